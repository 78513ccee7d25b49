"""Scores of runs: means over seeds with their intervals, and how tables show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynalora.common.statistics import Estimate, Interval, mean_interval


def mean_accuracy(records: Sequence[Mapping[str, Any]]) -> Interval | None:
    """Mean accuracy over runs with its 95 % interval: Student's t over the runs; of a single one over its questions.

    Args:
        records: What [`TaskScore.record`][dynalora.lab.tasks.TaskScore] gave, one per run.
    """
    values = [record["accuracy"] for record in records]
    if not values or any(value is None for value in values):
        return None
    if len(records) == 1:
        return Interval(values[0], records[0]["accuracy_low"], records[0]["accuracy_high"])
    mean = mean_interval(values)
    return Interval(mean.value, max(0.0, mean.low), min(1.0, mean.high))


def mean_loss(records: Sequence[Mapping[str, Any]]) -> Interval:
    """Mean loss over runs with its 95 % interval: Student's t; of a single run normal, over its questions."""
    if len(records) == 1:
        return Estimate(records[0]["loss"], records[0]["loss_error"]).interval
    return mean_interval([record["loss"] for record in records])


def percent(interval: Interval | None) -> Interval | None:
    """A share as percent; None stays None."""
    if interval is None:
        return None
    return Interval(100 * interval.value, 100 * interval.low, 100 * interval.high)


def shown_accuracy(interval: Interval | None) -> str | None:
    """An accuracy for a table, in percent."""
    if interval is None:
        return None
    return f"{100 * interval.value:.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def shown_loss(interval: Interval) -> str:
    """A loss for a table."""
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"
