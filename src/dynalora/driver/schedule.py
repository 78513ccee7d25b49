"""What follows from how many optimizer steps are done: weights that change over a run, and when something is due."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

Schedule = Literal["linear", "cosine", "constant"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)


def scheduled(initial: float, schedule: Schedule, step: int, total_steps: int | None) -> float:
    """Value of a decaying weight at one optimizer step.

    Args:
        initial: Value at the first step.
        schedule: `"constant"`; `"linear"`: `initial · (1 - t)`; `"cosine"`: `initial · (1 + cos πt) / 2`,
            both with `t = step / total_steps`, 0 from `total_steps` on.
        step: Optimizer steps already done: 0 at the first step.
        total_steps: Optimizer steps of the whole run; may be None for `"constant"` only.

    Raises:
        ValueError: `total_steps` is missing or not positive for a decaying schedule.
    """
    if schedule == "constant":
        return initial
    if not total_steps or total_steps < 0:
        raise ValueError(f"a {schedule} schedule needs a positive total_steps, got {total_steps}")
    t = min(step / total_steps, 1.0)
    if schedule == "linear":
        return initial * (1.0 - t)
    return initial * 0.5 * (1.0 + math.cos(math.pi * t))


def in_steps(value: float, total_steps: int | None, rounded: Callable[[float], int] = math.ceil) -> int:
    """A number of optimizer steps that may be given as a fraction of the run.

    Args:
        value: Steps, or a fraction below 1.
        total_steps: Optimizer steps of the whole run; may be None for steps.
        rounded: How a fraction of the run becomes a whole number.

    Raises:
        ValueError: A fraction is given, and the number of steps is unknown.
    """
    if value >= 1:
        return int(value)
    if not total_steps:
        raise ValueError("a fraction of a run needs its number of steps")
    return rounded(round(value * total_steps, 6))  # 0.1 · 30 is a little more than 3


@dataclass(frozen=True)
class Occasions:
    """When something takes place again and again, in optimizer steps counted from 1.

    Attributes:
        start: The first time.
        interval: Steps from one time to the next.
        end: The last step at which it may take place.
        horizon: Steps before it that it remembers.
    """

    start: int
    interval: int
    end: int
    horizon: int

    def due(self, step: int) -> bool:
        """Whether it takes place after this step."""
        return self.start <= step <= self.end and (step - self.start) % self.interval == 0

    def matters(self, step: int) -> bool:
        """Whether the next time remembers this step."""
        coming = self.start + max(0, -(-(step - self.start) // self.interval)) * self.interval
        return step >= 1 and coming <= self.end and coming - step < self.horizon

    @property
    def count(self) -> int:
        """How many times there are."""
        return max(0, (self.end - self.start) // self.interval + 1)


def memory_of(decay: float) -> int:
    """Steps that a moving average remembers: older ones weigh less than 1e-9.

    Args:
        decay: What it keeps of itself in a step, in [0, 1).
    """
    return math.ceil(math.log(1e-9) / math.log(decay)) if decay else 1
