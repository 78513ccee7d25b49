"""Scores of runs: means over seeds with their intervals, and how tables show them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dynalora.common.statistics import Difference, Estimate, Interval, mean_interval

SCORE_COLUMNS = ("accuracy", "accuracy_low", "accuracy_high", "loss", "loss_error", "questions")
"""The numbers of a score's record that tables of runs hold."""


def mean_accuracy(records: Sequence[Mapping[str, Any]]) -> Interval | None:
    """Mean accuracy over runs with its 95 % interval: Student's t over the runs; of a single one over its questions."""
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


def shown_interval(
    interval: Interval | Difference | None, decimals: int, *, scale: float = 1.0, sign: str = "", half: bool = False
) -> str | None:
    """A number with its 95 % interval for a table: `41.2 (38.0 to 44.4)`; alone where the interval has no width.

    Args:
        interval: None stays None.
        decimals: Number of digits after the point.
        scale: Factor, such as 100 for percent.
        sign: `+` to show the sign of positive numbers too.
        half: Show half of the interval's width, as in `41.2 ± 3.2`, for tables with many columns.
    """
    if interval is None:
        return None
    value, low, high = (
        f"{scale * number:{sign}.{decimals}f}" for number in (interval.value, interval.low, interval.high)
    )
    if interval.low == interval.high:
        return value
    if half:
        return f"{value} ± {scale * (interval.high - interval.low) / 2:.{decimals}f}"
    return f"{value} ({low} to {high})"


def decimals_for(intervals: Iterable[Interval | Difference | None], least: int = 3, most: int = 4) -> int:
    """How many decimals a table's column needs: two significant digits of each interval or three of its number.

    Args:
        intervals: The column; None where there is nothing, and intervals without a width, tell nothing.
        least: At least so many.
        most: At most so many; also where no interval has a width.
    """

    def needed(interval: Interval | Difference) -> int:
        half = (interval.high - interval.low) / 2
        if not (math.isfinite(half) and half > 0):
            return -1
        of_number = 2 - math.floor(math.log10(abs(interval.value))) if interval.value else most
        return max(0, min(1 - math.floor(math.log10(half)), of_number))

    told = [places for interval in intervals if interval is not None and (places := needed(interval)) >= 0]
    return min(max(*told, least), most) if told else most


def shown_scores(records: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """Accuracy in percent and loss over runs, as two cells of a table; two empty ones without records."""
    if not records:
        return [None, None]
    return [shown_interval(mean_accuracy(records), 1, scale=100), shown_interval(mean_loss(records), 3)]


def score_line(task: str, record: Mapping[str, Any]) -> str:
    """One score in words."""
    accuracy = "–" if record["accuracy"] is None else f"{100 * record['accuracy']:.1f} %"
    return f"{task} {accuracy}, loss {record['loss']:.3f}"


def mean_line(records: Sequence[Mapping[str, Any]]) -> str:
    """Mean scores over runs in words."""
    accuracy = mean_accuracy(records)
    share = "" if accuracy is None else f"{100 * accuracy.value:.1f} % right, "
    return f"{share}loss {mean_loss(records).value:.3f}"
