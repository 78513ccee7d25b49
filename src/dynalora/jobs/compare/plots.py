"""The plots of a comparison: what each of them shows is read from the summaries here, and drawn in the drawing room."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dynalora.common.statistics import Interval
from dynalora.drawing.comparison import (
    differing,
    plot_bars,
    plot_factors,
    plot_learning_curves,
    plot_learning_rates,
    plot_over_steps,
    plot_rank_maps,
    plot_sizes,
)
from dynalora.jobs.compare.contestants import Contestant
from dynalora.jobs.compare.frontiers import points_of
from dynalora.jobs.compare.grid import Comparison, Grid
from dynalora.jobs.compare.summaries import MEAN, Summary, curve, kept_numbers, training_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TOLD_APART = 1.1  # times as many parameters


def plot_frontier(comparison: Comparison, task: str, text: str) -> Figure | None:
    """Loss on the task against distance from the base model, a line over learning rates per method.

    Below and to the left is better: more learned, less forgotten. Where the base model has been measured, the axes show
    the runs that learned at least three quarters of what the best did; others would stretch them over decades.
    """
    grid = comparison.grid
    curves = {contestant.label: curve(comparison, task, contestant, text) for contestant in grid.contestants}
    losses = [loss for points in curves.values() for *_, loss in points]
    if not losses:
        return None
    highest, against = loss_shown(grid, task, losses)
    return plot_learning_rates(
        curves,
        title=f"{grid.places[task]}: learned against forgotten, by learning rate",
        x=f"KL(base ‖ tuned) on {text}, nats per token (log scale)",
        y=f"loss of the right answers{against}",
        highest=highest,
        log=True,
        chosen=_chosen(grid, task),
    )


def plot_scaled(comparison: Comparison, task: str, text: str) -> Figure | None:
    """Loss against distance from the base model, a line over factors of the update for each learning rate.

    Points are means over the seeds that ran at a rate. None where no curve was measured.
    """
    grid = comparison.grid
    curves: dict[str, list[tuple[float, list[tuple[float, float]]]]] = {}
    several = False
    for contestant in grid.contestants:
        curves[contestant.label] = []
        for rate in contestant.learning_rates:
            results = [grid.result(grid.cell(task, contestant, rate, seed)) for seed in grid.spec.run_seeds]
            runs = [points_of(result, text) for result in results if result is not None]
            means = [
                (statistics.fmean(kl for *_, kl in points), statistics.fmean(loss for _, loss, _ in points))
                for points in zip(*filter(None, runs), strict=False)
            ]
            several |= len(means) > 1
            if means:
                curves[contestant.label].append((rate, means))
    losses = [loss for runs in curves.values() for _, points in runs for _, loss in points]
    if not several:
        return None
    highest, against = loss_shown(grid, task, losses)
    return plot_factors(
        curves,
        title=f"{grid.places[task]}: learned against forgotten, updates scaled down",
        x=f"KL(base ‖ tuned) on {text}, nats per token (log scale)",
        y=f"loss of the right answers{against}",
        highest=highest,
        chosen=_chosen(grid, task),
    )


def _chosen(grid: Grid, task: str) -> dict[str, float]:
    """The learning rate that each method was given, where there was a choice."""
    if not grid.chooses:
        return {}
    rates = {each.label: grid.chosen_rate(task, each) for each in grid.contestants if len(each.learning_rates) > 1}
    return {label: rate for label, rate in rates.items() if rate is not None}


def loss_shown(grid: Grid, task: str, losses: Sequence[float]) -> tuple[float | None, str]:
    """The loss up to which runs are shown, and the base model's in words; none where that was not measured."""
    base = grid.result(grid.base(task))
    if base is None or not losses:
        return None, ""
    loss = base["test"]["loss"]
    return min(losses) + (loss - min(losses)) / 4, f"; base model: {loss:.3f}"


def plot_kept(comparison: Comparison, task: str) -> Figure | None:
    """Accuracy against the retention tasks (their mean, or the first), a line over learning rates per method."""
    grid = comparison.grid
    results = [(cell, result) for cell, result in grid.results() if cell.task == task]
    first = next((result["kept"] for _, result in results if result.get("kept")), None)
    if first is None or any(result["test"]["accuracy"] is None for _, result in results):
        return None
    if MEAN in kept_numbers({"kept": first}):
        scale = 100 if all(number["share"] for number in first.values() if not number.get("further")) else 1
        name, title = MEAN, "retention tasks, unweighted mean"
    else:
        name = next(iter(first))
        scale, title = ((100 if first[name]["share"] else 1), f"{first[name]['title']}, {first[name]['metric']}")
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for contestant in grid.contestants:
        curves[contestant.label] = []
        for rate in contestant.learning_rates:
            runs = [result for cell, result in results if cell.label == contestant.label and cell.learning_rate == rate]
            if runs:
                retained = statistics.fmean(kept_numbers(result)[name] for result in runs)
                right = statistics.fmean(result["test"]["accuracy"] for result in runs)
                curves[contestant.label].append((rate, scale * retained, 100 * right))
    base = grid.result(grid.base(task))
    return plot_learning_rates(
        curves,
        title=f"{grid.places[task]}: learned against kept, by learning rate",
        x=title + (", %" if scale == 100 else ""),
        y="accuracy, %",
        base=None if base is None else scale * kept_numbers(base)[name],
        chosen=_chosen(grid, task),
    )


def differ_in_size(contestants: Sequence[Contestant]) -> bool:
    """Whether methods train numbers of parameters that a plot could tell apart.

    Matched ones stand on one line, and a line beside one other point is no plot: at least half of them must differ.
    """
    counts = sorted(contestant.parameters for contestant in contestants if contestant.parameters)
    places = 1 + sum(after > _TOLD_APART * before for before, after in itertools.pairwise(counts))
    return places > 1 and 2 * places >= len(counts)


def plot_parameters(comparison: Comparison, place: str, summaries: Sequence[Summary]) -> Figure | None:
    """Accuracy (or loss) against the number of trained parameters."""
    accuracies = [summary.accuracy for summary in summaries]
    shares = all(accuracies) and differing(accuracies)
    scale = 100 if shares else 1
    by_label = {summary.label: summary.accuracy if shares else summary.loss for summary in summaries}
    points: dict[str, tuple[int, Interval] | None] = {}
    for contestant in comparison.grid.contestants:
        number, count = by_label.get(contestant.label), contestant.parameters
        points[contestant.label] = None
        if number is not None and count:
            scaled = Interval(scale * number.value, scale * number.low, scale * number.high)
            points[contestant.label] = (count, scaled)
    if not any(points.values()):
        return None
    return plot_sizes(
        points, title=f"{place}: quality against size", y="accuracy, %" if shares else "loss of the right answers"
    )


def plot_learning(comparison: Comparison, place: str, summaries: Sequence[Summary]) -> Figure | None:
    """Training loss by step, running means over the seeds."""
    curves: dict[str, list[tuple[int, float]]] = {contestant.label: [] for contestant in comparison.grid.contestants}
    for summary in summaries:
        runs = [result["training"]["losses"] for result in summary.results.values() if result.get("training")]
        if runs:
            curves[summary.label] = [
                (points[0][0], statistics.fmean(loss for _, loss in points)) for points in zip(*runs, strict=False)
            ]
    if not any(curves.values()):
        return None
    return plot_learning_curves(curves, title=f"{place}: learning curves at the chosen learning rates")


def plot_over_time(comparison: Comparison, task: str, summaries: Sequence[Summary]) -> Figure | None:
    """Accuracy (or loss) and what was kept over the steps, means over the seeds; None where that was not measured."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for summary in summaries:
        runs = [(result.get("over_time") or {}).get("points") or [] for result in summary.results.values()]
        for points in zip(*runs, strict=False):
            numbers = [_numbers_over_time(point) for point in points]
            for name in numbers[0]:
                mean = statistics.fmean(number[name] for number in numbers)
                curves.setdefault(name, {}).setdefault(summary.label, []).append((points[0]["step"], mean))
    curves = {
        name: lines
        for name, lines in curves.items()
        if differing(value for points in lines.values() for _, value in points)
    }
    if not curves:
        return None
    base = comparison.grid.result(comparison.grid.base(task))
    untouched = {} if base is None else _numbers_over_time({**base["test"], "kept": base.get("kept")})
    return plot_over_steps(curves, title=f"{comparison.grid.places[task]}: during training", base=untouched)


def _numbers_over_time(point: Mapping[str, Any]) -> dict[str, float]:
    """What is drawn of a measurement, by its name with its unit: of retention tasks of one kind their mean."""
    numbers: dict[str, float] = {}
    if point.get("accuracy") is not None:
        numbers["accuracy, %"] = 100 * point["accuracy"]
    elif point.get("loss") is not None:
        numbers["loss of the right answers"] = point["loss"]
    tasks = point.get("kept") or {}
    values = kept_numbers(point)
    for task in tasks.values():
        if MEAN not in values or task.get("further"):
            scale = 100 if task["share"] else 1
            numbers[f"{task['title']}, {task['metric']}{', %' if scale == 100 else ''}"] = scale * task["value"]
    if MEAN in values:
        shares = all(task["share"] for task in tasks.values() if not task.get("further"))
        numbers["retention tasks, mean" + (", %" if shares else "")] = (100 if shares else 1) * values[MEAN]
    return numbers


def plot_cost(comparison: Comparison, by_place: Mapping[str, Sequence[Summary]]) -> Figure | None:
    """Time of a step and peak of memory, a bar per method."""
    bars: dict[str, dict[str, Interval | None]] = {"step, s": {}, "peak of training, GiB": {}}
    numbers = (("step, s", "step_seconds", 1.0), ("peak of training, GiB", "peak_bytes", 2.0**-30))
    for contestant in comparison.grid.contestants:
        for title, name, scale in numbers:
            values = [scale * value for value in training_numbers(by_place, contestant.label, name)]
            if values:
                middle = statistics.median(values)
                bars[title][contestant.label] = Interval(middle, min(values), max(values))
    if not all(bars.values()):
        return None
    return plot_bars(bars, label="", title="Cost: median over cells, with the smallest and the largest", decimals=2)


def plot_ranks(summaries: Sequence[Summary], place: str) -> Figure | None:
    """Effective ranks by layer and kind of module, a panel per method, of the first seed.

    None where every method has one rank throughout, as a LoRA has.
    """
    landscapes = {
        summary.label: rows for summary in summaries if (rows := next(iter(summary.results.values())).get("landscape"))
    }
    if not any(differing([row["effective_rank"] for row in rows]) for rows in landscapes.values()):
        return None
    return plot_rank_maps(landscapes, title=f"{place}: effective ranks")
