"""Whether a run learned anything to speak of, and what to change if it did not."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from dynalora.evaluation.scoring import answer_loss
from dynalora.jobs.finetune.prepare import Prepared
from dynalora.lab.baselines import edits_base
from dynalora.lab.training.rates import rate_for
from dynalora.lab.training.train import TrainResult, answered

LITTLE = 0.05
"""A loss that fell by less than this share of it has hardly fallen."""
_HALF = 0.5
"""Training data whose loss has fallen to less than this part of it have been learned."""
_HELD_OUT = "held-out loss"
_DOUBTFUL = 0.2
"""A fall by less than this share is compared with its standard error."""


def learned_little(ready: Prepared, result: TrainResult) -> str:
    """What to change where a run has learned next to nothing, in two sentences; empty where it has learned.

    It has not if the held-out loss (without held-out data, the loss in training) fell by less than 5 %, or by less than
    twice the standard error of its fall, which is over conversations, each before and after.
    """
    name, before, after = _losses(result)
    fell = before - after
    if not fell < _DOUBTFUL * before:
        return ""
    error = standard_error(ready, result) if fell > 0 else math.nan
    if fell >= LITTLE * before and not fell < 2 * error:
        return ""
    if fell <= 0:
        found = (
            f"The run has learned nothing that shows: the {name} did not fall ({before:.4f} before, {after:.4f} after)."
        )
    elif fell < 2 * error:
        found = f"The run has learned nothing for sure: the {name} fell by {fell:.4f} ± {error:.4f} (standard error)."
    else:
        share = 100 * fell / before
        found = f"The run has learned little, or there was little to learn: the {name} fell by {share:.1f} %."
    by_heart = _by_heart(result) if name == _HELD_OUT else ""
    return f"{found} {by_heart or _remedy(ready, result, rose=fell < -LITTLE * before)}"


def _losses(result: TrainResult) -> tuple[str, float, float]:
    """What is compared, and its values before and after; not-a-number where nothing was measured."""
    if result.held_out_before is not None and result.held_out_after is not None:
        return _HELD_OUT, result.held_out_before, result.held_out_after
    return "loss in training", *_ends(result, 10)


def _ends(result: TrainResult, parts: int) -> tuple[float, float]:
    """The mean loss in training over the first and over the last of so many parts of a run."""
    losses = [float(record["loss"]) for record in result.records if "loss" in record]
    ends = max(1, len(losses) // parts)
    return _mean(losses[:ends]), _mean(losses[-ends:])


def _by_heart(result: TrainResult) -> str:
    """What to change where the training data were learned and the held-out ones were not; empty where they were not."""
    first, last = _ends(result, 4)
    if not last < _HALF * first:
        return ""
    measured = [(record["held_out_loss"], record["step"]) for record in result.records if "held_out_loss" in record]
    lowest, step = min(measured, default=(math.nan, 0))
    before = result.held_out_before
    was = ""
    if before is not None and lowest < (1 - LITTLE) * before:
        was = f", which was {lowest:.4f} at step {step:,}"
    return (
        f"The loss in training fell from {first:.2f} to {last:.2f}, so the training data were learned by heart: give "
        "more of them, train for fewer steps (--steps, --epochs), or keep the weights of the lowest held-out "
        f"loss{was} (--keep-best)."
    )


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def standard_error(ready: Prepared, result: TrainResult) -> float:
    """Of the fall of the held-out loss, over conversations; not-a-number where it cannot be had.

    Costs two measurements of the held-out data, one without the adapter.
    """
    rows = answered(ready.held_out)
    if len(rows) < 2 or edits_base(ready.spec.method, ready.config):
        return math.nan
    tuned = answer_loss(result.model, rows, batch_size=ready.spec.batch_size)
    with result.model.disable_adapter():
        base = answer_loss(result.model, rows, batch_size=ready.spec.batch_size)
    # A mean over tokens is a ratio of sums over conversations: its error is that of the sums around it.
    fall = (math.fsum(base.sums) - math.fsum(tuned.sums)) / tuned.tokens
    residuals = [b - t - fall * count for b, t, count in zip(base.sums, tuned.sums, tuned.counts, strict=True)]
    return math.sqrt(math.fsum(r * r for r in residuals) * len(rows) / (len(rows) - 1)) / tuned.tokens


def _remedy(ready: Prepared, result: TrainResult, *, rose: bool) -> str:
    rate = ready.spec.learning_rate
    assert rate is not None  # a prepared run has one
    tested = rate_for(ready.method, result.steps)
    if rate < tested.rate / 1.5 and not rose:
        return f"Its learning rate was {rate:g}; take {tested.rate:g}, {tested.why} (--learning-rate)."
    if rate > (1.5 if rose else 3) * tested.rate:
        return f"Its learning rate was {rate:g}; take {tested.rate:g}, {tested.why} (--learning-rate)."
    if rose:
        return (
            f"Train for fewer steps (--steps, --epochs), or with a lower learning rate than {rate:g} (--learning-rate)."
        )
    return f"Train for more steps (--steps, --epochs), or with a higher learning rate than {rate:g} (--learning-rate)."
