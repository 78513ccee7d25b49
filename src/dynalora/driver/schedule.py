"""Weights that change over a run, as functions of how many optimizer steps are done."""

from __future__ import annotations

import math
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
