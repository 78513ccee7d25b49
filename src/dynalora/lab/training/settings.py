"""How to train."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dynalora.errors import ConfigError

SCHEDULES = ("cosine", "linear", "constant_with_warmup")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train. The optimizer is AdamW (0.9, 0.999, 1e-8).

    Attributes:
        steps: Optimizer steps; None: as many as `epochs` needs.
        epochs: Passes over the training data, where `steps` is None.
        learning_rate: The peak.
        schedule: Shape of the learning rate after warm-up: `cosine`, `linear` (both to 0) or
            `constant_with_warmup`.
        warmup: Part of the steps over which the learning rate rises from 0, in [0, 1).
        weight_decay: Never applied to biases, norms and gates.
        batch_size: Sequences per device and forward pass.
        gradient_accumulation: Forward passes per optimizer step.
        max_grad_norm: Gradients are scaled down to this norm; 0: never.
        seed: Fixes the adapter's start, the order of the data and dropout.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        log_every: Optimizer steps between log lines; None: a hundredth of the run.
        eval_every: Optimizer steps between measurements of the held-out loss; None: a fifth of the run; 0: only
            before and after.
        save_every: Optimizer steps between checkpoints, from which a killed run is resumed; None: a tenth of
            the run; 0: never.
    """

    steps: int | None = None
    epochs: float = 1.0
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    batch_size: int = 8
    gradient_accumulation: int = 1
    max_grad_norm: float = 1.0
    seed: int = 42
    gradient_checkpointing: bool = False
    log_every: int | None = None
    eval_every: int | None = None
    save_every: int | None = None

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; give a whole number of at least 1.")
        for name in ("eval_every", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} is {value}; give a number of steps, or 0 for never.")
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value}; give a number above 0.")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} is {value}; give a number of at least 0.")
        if not 0 <= self.warmup < 1:
            raise ConfigError(
                f"warmup is {self.warmup}; give a part of the steps, from 0 up to, but without, 1."
            )
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule is '{self.schedule}'; choose one of {', '.join(SCHEDULES)}.")
