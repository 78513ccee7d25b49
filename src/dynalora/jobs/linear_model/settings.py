"""Settings of `dynalora linear-model`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from dynalora.errors import ConfigError

if TYPE_CHECKING:
    from dynalora.jobs.linear_model.populations import LinearModel


@dataclass(frozen=True, kw_only=True)
class LinearModelSpec:
    """What `dynalora linear-model` does. The defaults take a few minutes on one core.

    Attributes:
        output: The run folder, new or empty; None: `runs/linear-model`.
        in_features: Length of the inputs.
        out_features: Length of the targets.
        task_rank: Rank of ΔW*.
        r: Rank of LoRA and DISeL.
        separation: ‖μ‖ in standard deviations of the populations.
        steps: Optimizer steps, each on new samples.
        batch_size: Samples per step, from both populations.
        learning_rate: Peak; the schedule is a cosine with 2 % warm-up, the optimizer AdamW without weight decay.
        gate_bias_init: DISeL's, as in [`DiselConfig`][dynalora.DiselConfig].
        samples: On which the final losses are measured.
        seed: Of the maps, the start and the samples.
    """

    output: str | None = None
    in_features: int = 16
    out_features: int = 16
    task_rank: int = 4
    r: int = 4
    separation: float = 1.5
    steps: int = 4000
    batch_size: int = 256
    learning_rate: float = 0.02
    gate_bias_init: float = -3.0
    samples: int = 200_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("r", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give 1 or more.")
        if self.samples < 1000:
            raise ConfigError(f"samples is {self.samples}; give 1000 or more.")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate is {self.learning_rate}; give a positive number.")
        self.problem()

    def problem(self) -> LinearModel:
        """The populations and maps that these settings name."""
        from dynalora.jobs.linear_model.populations import (
            random_linear_model,  # torch, which --help need not wait for
        )

        return random_linear_model(
            self.in_features, self.out_features, self.task_rank, self.separation, self.seed
        )

    def settings(self) -> dict[str, Any]:
        """The settings as written to the run folder."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "output"}
