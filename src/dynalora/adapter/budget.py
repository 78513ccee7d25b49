"""A budget of forgetting: KL(base ‖ tuned) ≤ `max_forgetting` when a run ends, with `retain` as the largest weight.

The penalty P of [`adapter.retain`][dynalora.adapter.retain] is known at every step, the KL of the whole model only
where it is measured, on a part of the text. P leaves out how the changes of several layers add up, so a measurement
sets the ratio of the two, and in between the KL is taken to be ratio · P.

What is above the budget after the last step is scaled down to it
([`hold_budget`][dynalora.forgetting.budget.hold_budget]). That costs little learning, while a weight that is too large
costs much: under Adam, which divides by the size of past gradients, a step whose gradient is the penalty's by orders of
magnitude makes the model stand still for hundreds of steps, and gates that are pushed shut do not open again. So the
weight begins at `retain` and is never larger. It falls where less is forgotten than the budget allows, and rises again
where more is. With T steps in all it is

    w = retain · exp(u),      u ← clip(u + 15/T · e, −log 1000, 0) at every step but for the first 15 %,

    e = clip(log(ratio · P / (1.3 · budget)), −1, 0) + clip(log(ratio · P / (2.5 · budget)), 0, 1)

At first, while rates rise and the KL is yet to come, the weight is `retain`. Where T is unknown, u moves as
if T were 30, from the fifth step on.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch

_LOW, _HIGH = 1.3, 2.5
"""Between these multiples of the budget the weight stays as it is."""
_GAIN = 15.0  # of u, over all steps of a run
_UNKNOWN = 30  # steps of a run of unknown length, for the gain
_BEGIN = 0.15  # share of the steps after which the weight may move
_BEGIN_UNKNOWN = 5  # steps, where the length is unknown
_RANGE = math.log(1000.0)  # how far the weight may fall
_FIRST = (1, 2, 4, 8)  # steps after which there is a measurement in any case
_MEASUREMENTS = 20  # in a run of known length
_EVERY = 50  # steps between measurements, where the length is unknown
_SMALL = 1e-6  # nats per token; below is rounding

# Entries of the state that is saved with the adapter.
_LOG, _RATIO, _KL, _STEP = range(4)


class Meter(Protocol):
    """What measures the model that an adapter belongs to, on the text that it is to keep."""

    def kl(self) -> float:
        """KL(base ‖ tuned), nats per token, on a part of the text."""

    def replay(
        self, step: int, parameters: list[torch.nn.Parameter]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
        """KL(base ‖ tuned), nats per token, on the few texts whose turn it is, and its gradient."""


def new_state() -> torch.Tensor:
    """What is remembered before the first step: u, the ratio, the last measured KL (−1: none) and when; (4)."""
    return torch.tensor([0.0, 1.0, -1.0, -1.0])


def due(step: int, total_steps: int | None) -> bool:
    """Whether the KL is to be measured when `step` steps are done."""
    every = max(5, total_steps // _MEASUREMENTS) if total_steps else _EVERY
    return step in _FIRST or (step > 0 and step % every == 0)


def measured(state: torch.Tensor) -> tuple[float, int] | None:
    """The KL that was measured last, and after how many steps, of a state (4); None before the first time."""
    kl, step = state[[_KL, _STEP]].tolist()
    return (kl, int(step)) if step >= 0 else None


def controlled_weight(
    state: torch.Tensor,
    value: torch.Tensor,
    weight: float,
    budget: float,
    kl: float | None,
    step: int,
    total_steps: int | None,
) -> torch.Tensor:
    """The weight for the coming step; `state` is brought up to date in place, without waiting for the device.

    Args:
        state: From [`new_state`][dynalora.adapter.budget.new_state], (4).
        value: P at the present weights, a scalar.
        weight: `retain`, the largest that the weight can be.
        budget: `max_forgetting`.
        kl: The KL, if it has just been measured at the present weights.
        step: Steps that are done.
        total_steps: Steps of the whole run, if they are known.
    """
    value = value.to(state.device, state.dtype)
    if kl is not None:
        state[_KL], state[_STEP] = kl, step
        if kl > _SMALL:
            state[_RATIO] = torch.where(value > 0, kl / value, state[_RATIO])
    if step >= (_BEGIN * total_steps if total_steps else _BEGIN_UNKNOWN):
        share = state[_RATIO] * value / budget
        error = (share / _LOW).log().clamp(-1.0, 0.0) + (share / _HIGH).log().clamp(0.0, 1.0)
        # Nothing is to be learned from what is no number, nor while nothing has been seen to change.
        error = torch.where((state[_KL] > _SMALL) & error.isfinite(), error, torch.zeros_like(error))
        state[_LOG] = (state[_LOG] + _GAIN / (total_steps or _UNKNOWN) * error).clamp(-_RANGE, 0.0)
    return weight * state[_LOG].exp()
