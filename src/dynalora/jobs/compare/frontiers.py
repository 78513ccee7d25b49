"""Learned against forgotten along a run's curve over factors: at equal loss, at equal KL, and on the whole.

A frontier is what remains of a curve when every point is left out to which another is not inferior in both loss and KL.
Between its points √KL is linear in the loss: KL grows with the square of a small update, and the loss falls with the
update itself. The base model, with KL 0, is the end of every frontier.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynalora.common.statistics import Interval, mean_interval
from dynalora.forgetting.trim import smallest_near_best

Point = tuple[float, float]
"""Loss and KL."""

_STEPS = 200  # losses at which two frontiers are compared


def points_of(result: Mapping[str, Any], text: str) -> list[tuple[float, float, float]]:
    """A run's curve as (factor, loss, KL on a text), factors descending; a run without a curve has one point."""
    curve = result.get("curve") or [{"factor": 1.0, "test": result["test"], "kl": result.get("retention") or {}}]
    return [
        (float(point["factor"]), float(point["test"]["loss"]), float(point["kl"][text]["kl"]))
        for point in curve
        if text in point["kl"]
    ]


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points to which no other is superior, KL rising and loss falling."""
    best: list[Point] = []
    # Rounding may take a KL of nothing below 0.
    for kl, loss in sorted((max(0.0, kl), loss) for loss, kl in points):
        if math.isfinite(loss) and math.isfinite(kl) and (not best or loss < best[-1][0]):
            best.append((loss, kl))
    return best


def kl_at(front: Sequence[Point], loss: float) -> float | None:
    """The least KL at which a frontier has a loss; None if it never has one so low."""
    if not front or loss < front[-1][0]:
        return None
    for (high, less), (low, more) in itertools.pairwise(front):
        if low <= loss <= high:
            part = (high - loss) / (high - low)
            return ((1 - part) * math.sqrt(less) + part * math.sqrt(more)) ** 2
    return front[0][1] if loss >= front[0][0] else front[-1][1]


def loss_at(front: Sequence[Point], kl: float) -> float | None:
    """The lowest loss that a frontier has at no more than a KL; None if it always has more."""
    if not front or kl < front[0][1]:
        return None
    for (high, less), (low, more) in itertools.pairwise(front):
        if less <= kl <= more:
            first, at, last = (math.sqrt(value) for value in (less, kl, more))
            return high + (low - high) * (at - first) / (last - first) if last > first else low
    return front[-1][0]


def log_ratio(front: Sequence[Point], other: Sequence[Point], highest: float) -> float | None:
    """Mean of ln(KL / the other's KL) over the losses that both frontiers have: the area between them.

    Args:
        front: A frontier.
        other: The frontier to compare it with.
        highest: Losses from here on, near the base model's, do not count.

    Returns:
        The mean; None if the frontiers have no loss in common.
    """
    if not front or not other:
        return None
    low, high = max(front[-1][0], other[-1][0]), min(front[0][0], other[0][0], highest)
    if high < low:
        return None
    logs = []
    for step in range(_STEPS):
        loss = low + (high - low) * (step + 0.5) / _STEPS
        first, second = kl_at(front, loss), kl_at(other, loss)
        if first and second:
            logs.append(math.log(first / second))
    return math.fsum(logs) / len(logs) if logs else None


@dataclass(frozen=True)
class Scaled:
    """How one method's curves over factors compare with the reference's on one text, over the seeds that both have.

    Attributes:
        factor: The smallest factor whose validation loss is within 1 % of the lowest, mean over the seeds.
        loss: Loss at that factor.
        kl: KL at that factor.
        at_loss: KL where the frontier has the loss of the reference as trained; None where a seed's never has it.
        at_loss_ratio: That divided by KL of the reference as trained, geometric mean.
        own_ratio: That divided by KL where the reference's own frontier has that loss, geometric mean.
        at_kl: Loss where the frontier has KL of the reference as trained, minus the reference's loss.
        area: KL divided by the reference's at equal loss, geometric mean over the losses that both frontiers have.
        seeds: Number of seeds.
        reached: Number of seeds whose frontier has the reference's loss.
    """

    factor: float | None
    loss: Interval | None
    kl: Interval | None
    at_loss: Interval | None
    at_loss_ratio: Interval | None
    own_ratio: Interval | None
    at_kl: Interval | None
    area: Interval | None
    seeds: int
    reached: int


def compare_scaled(
    runs: Mapping[int, Mapping[str, Any]],
    reference: Mapping[int, Mapping[str, Any]],
    text: str,
    base_loss: float | None,
) -> Scaled | None:
    """One method's runs beside the reference's.

    Args:
        runs: Results by seed.
        reference: The reference's results by seed.
        text: The text that KL is measured on.
        base_loss: Loss of the base model, which ends the frontiers at KL 0; None: they end at the smallest factor.

    Returns:
        The comparison; None where no seed has been measured on the text for both.
    """
    seeds = [
        seed for seed in runs if seed in reference and points_of(runs[seed], text) and points_of(reference[seed], text)
    ]
    if not seeds:
        return None
    taken = [taken_point(runs[seed], text) for seed in seeds]
    pairs = [_pair(runs[seed], reference[seed], text, base_loss) for seed in seeds]
    at_loss = [pair["at_loss"] for pair in pairs]
    return Scaled(
        factor=math.fsum(point[0] for point in taken) / len(taken),
        loss=mean_interval([point[1] for point in taken]),
        kl=mean_interval([point[2] for point in taken]),
        at_loss=_mean(at_loss),
        at_loss_ratio=_ratio([pair["ratio"] for pair in pairs]),
        own_ratio=_ratio([pair["own"] for pair in pairs]),
        at_kl=_mean([pair["at_kl"] for pair in pairs]),
        area=_ratio([pair["area"] for pair in pairs]),
        seeds=len(seeds),
        reached=sum(kl is not None for kl in at_loss),
    )


def taken_point(result: Mapping[str, Any], text: str) -> tuple[float, float, float]:
    """(factor, loss, KL) of a run at the smallest factor whose loss on the questions set aside is near the best.

    Without questions set aside it is the run as trained.
    """
    points = points_of(result, text)
    losses = {
        float(point["factor"]): float(point["validation"]["loss"])
        for point in result.get("curve") or []
        if point.get("validation")
    }
    if not losses:
        return points[0]
    factor = smallest_near_best(losses)
    return next(point for point in points if point[0] == factor)


def _pair(
    run: Mapping[str, Any], reference: Mapping[str, Any], text: str, base_loss: float | None
) -> dict[str, float | None]:
    """One seed of a method beside the same seed of the reference; logarithms of ratios."""
    front, other = (_frontier_of(result, text, base_loss) for result in (run, reference))
    _, loss, kl = points_of(reference, text)[0]
    at_loss, own, at_kl = kl_at(front, loss), kl_at(other, loss), loss_at(front, kl)
    smallest = min(max(entry[1] for entry in points_of(result, text)) for result in (run, reference))
    return {
        "at_loss": at_loss,
        "ratio": math.log(at_loss / kl) if at_loss and kl > 0 else None,
        "own": math.log(at_loss / own) if at_loss and own else None,
        "at_kl": None if at_kl is None else at_kl - loss,
        "area": log_ratio(front, other, smallest),
    }


def _frontier_of(result: Mapping[str, Any], text: str, base_loss: float | None) -> list[Point]:
    points = points_of(result, text)
    ends = [(base_loss, 0.0)] if base_loss is not None and len(points) > 1 else []
    return frontier([*((loss, kl) for _, loss, kl in points), *ends])


def _mean(values: Sequence[float | None]) -> Interval | None:
    """The mean over the seeds; None where a seed has no value, since the others would be the lucky ones."""
    complete = [value for value in values if value is not None]
    return mean_interval(complete) if complete and len(complete) == len(values) else None


def _ratio(logs: Sequence[float | None]) -> Interval | None:
    """A geometric mean out of logarithms."""
    mean = _mean(logs)
    return None if mean is None else Interval(*(math.exp(min(700.0, end)) for end in (mean.value, mean.low, mean.high)))
