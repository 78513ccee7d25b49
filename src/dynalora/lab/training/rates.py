"""Learning rates that were tested, by method and length of the run: what `finetune` takes where none is given.

Short runs, of up to 100 steps: the rate that `experiments/compare` chose for SmolLM2-135M-Instruct in 30 steps on
ARC-Easy and OpenBookQA (the lower one where they differ); DISeL's with `match_step` is from the runs on
`docs/methods/disel.md`. Long runs, from 1000 steps: 2e-4, with which the papers train models of 7 billion parameters
for thousands of steps, and AdaLoRA's own paper's 1e-3. Between the two a rate lies on the line through both, over the
logarithms of steps and rates; this was not tested.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_SHORT, _LONG = 100, 1000
_USUAL = 2e-4
_TESTED = {
    "lora": (1.5e-3, _USUAL),
    "dora": (1.5e-3, _USUAL),
    "pissa": (5e-4, _USUAL),
    "adalora": (1.5e-2, 1e-3),
    "dira": (5e-3, _USUAL),
    "disel": (1e-3, _USUAL),
    "dislora": (1.5e-3, _USUAL),
    "pedyra": (1.5e-3, _USUAL),
}
"""Method → rates in short and in long runs."""


@dataclass(frozen=True)
class Rate:
    """A learning rate that nobody had to choose.

    Attributes:
        rate: Peak of the learning rate.
        why: Where it comes from, as the end of a sentence about it.
    """

    rate: float
    why: str


def rate_for(method: str, steps: int) -> Rate:
    """The learning rate for a method and a number of optimizer steps.

    Args:
        method: The method's name; methods without tested rates have the usual one, 2e-4.
        steps: Optimizer steps of the run.
    """
    if method not in _TESTED:
        return Rate(_USUAL, f"the usual one, since none was tested for {method}")
    short, long = _TESTED[method]
    if steps <= _SHORT:
        return Rate(short, f"which was tested for {method} in runs of 30 to {_SHORT} steps")
    if steps >= _LONG:
        return Rate(long, f"with which papers train for {_LONG} steps and more")
    share = math.log(steps / _SHORT) / math.log(_LONG / _SHORT)
    rate = math.exp((1 - share) * math.log(short) + share * math.log(long))
    return Rate(
        float(f"{rate:.1e}"),
        f"between {short:g}, tested for {method} in {_SHORT} steps, and {long:g} for {_LONG} steps",
    )
