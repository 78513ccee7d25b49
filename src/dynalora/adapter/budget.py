"""A budget of forgetting: the weight of `retain` as a dual variable of KL(base ‖ tuned) ≤ `max_forgetting`.

The penalty P of [`adapter.retain`][dynalora.adapter.retain] is known at every step, the KL of the whole model only
where it is measured, on a part of the text. P leaves out how the changes of several layers add up, so a measurement
sets the ratio of the two, and in between the KL is taken to be ratio · P. Before the first measurement that finds
a change the weight is `retain`. Then, with e = log(ratio · P / aim) and T steps in all, it is

    w = retain · exp(u) · exp(3 · clip(e, −log 3, log 3)),      u ← u + 15/T · clip(e, −1.5, 1) at every step

The second factor opposes a change at once, the first removes what remains of e over the steps, within 1/1000 to 1000.
Both are bounded so that no step's gradient is the penalty's alone by orders of magnitude: Adam, which divides by the
size of past gradients, would stand still for hundreds of steps, and gates that are pushed shut do not open again.

The budget is about the end of the run, so the aim comes down to it: aim = 1.3 · budget · 30^(1 − step/T). Within a
small budget Adam's steps at a large rate leave nothing but their noise. What is above the budget after the last step is
scaled down to it ([`hold_budget`][dynalora.forgetting.budget.hold_budget]), which costs less learning than to fall
short. Where T is unknown the aim is 1.3 · budget throughout, and u moves as if T were 60.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch

AIM = 1.3
"""What the weight aims at when the run ends, as a multiple of the budget."""
_FROM = 30.0  # what it aims at when the run begins, as a multiple of that
_GAIN = 15.0  # of u, over all steps of a run
_UNKNOWN = 60  # steps of a run of unknown length, for the gain
_POWER = 3.0  # of the KL in the weight
_LEAST, _MOST = -1.5, 1.0  # e as u sees it
_RANGE = math.log(1000.0)  # of u, both ways
_SPAN = math.log(3.0)  # of e in the weight's second factor, both ways
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


def aim(budget: float, step: int, total_steps: int | None) -> float:
    """The KL that the weight aims at when `step` steps are done, nats per token."""
    return AIM * budget * (_FROM ** max(0.0, 1 - step / total_steps) if total_steps else 1.0)


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
        weight: `retain`.
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
    error = (state[_RATIO] * value / aim(budget, step, total_steps)).log().nan_to_num(nan=0.0)
    error = torch.where(state[_KL] > _SMALL, error, torch.zeros_like(error))  # nothing has been seen to change yet
    state[_LOG] = (state[_LOG] + _GAIN / (total_steps or _UNKNOWN) * error.clamp(_LEAST, _MOST)).clamp(-_RANGE, _RANGE)
    return weight * (state[_LOG] + _POWER * error.clamp(-_SPAN, _SPAN)).exp()
