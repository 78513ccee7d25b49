"""What the demo does."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from dynalora.errors import ConfigError
from dynalora.lab.training.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class DemoSpec(TrainSettings):
    """What the demo does. Every setting has a default, and the defaults take a few minutes on two cores.

    Attributes:
        output: The run folder, new or empty; None: `runs/demo`, or the first of `runs/demo-2`, … that is free.
        model: Hub id or folder of another causal language model; None: SmolLM2-135M-Instruct.
        methods: What to compare, in this order; `lora` is PEFT's LoRA. Each at most once.
        r: Rank of every adapter.
        alpha: Scales every update by alpha / r; None: each method's default.
        target_modules: Names, a regular expression, or `all-linear`.
        gate_bias_init: Start of DISeL's gate biases.
        task: A task of reasoning-gym; None: the demo's own.
        task_options: Options of the task's generator; given only together with `task`.
        system: System message of every question; None: a short one for the demo's own model, none for others.
        held_out: Number of held-out questions.
        retention_texts: Number of texts the base model writes for measuring retention.
        retention_tokens: Longest of them, in tokens.
    """

    output: str | None = None
    model: str | None = None
    methods: list[str] = field(default_factory=lambda: ["disel", "lora"])
    r: int = 16
    alpha: float | None = None
    target_modules: list[str] | str = "all-linear"
    gate_bias_init: float = -3.0
    task: str | None = None
    task_options: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    held_out: int = 200
    retention_texts: int = 32
    retention_tokens: int = 48

    steps: int | None = 40
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup: float = 0.1
    batch_size: int = 8
    log_every: int | None = 1
    eval_every: int | None = 0
    save_every: int | None = 0

    def _check(self) -> None:
        super()._check()
        for name in ("held_out", "retention_texts", "retention_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give a whole number of at least 1.")
        if self.steps is None:
            raise ConfigError("steps is missing; give the number of optimizer steps.")
        if not self.methods:
            raise ConfigError("methods is empty; name at least one.")
        twice = {name for name in self.methods if self.methods.count(name) > 1}
        if twice:
            raise ConfigError(
                f"methods lists {', '.join(sorted(twice))} more than once; name each at most once."
            )
        if self.task is None and self.task_options:
            raise ConfigError("task_options are given without a task; name the task they belong to.")

    def settings(self) -> dict[str, Any]:
        """The settings as written to the run folder."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "output"}
