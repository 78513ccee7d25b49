"""The plots of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dynalora.common.statistics import Interval
from dynalora.drawing import runs as plots
from dynalora.drawing.stages import plot_bars
from dynalora.drawing.style import figure, panels, style
from dynalora.jobs.compare.grid import Comparison
from dynalora.jobs.compare.summaries import MEAN, Summary, curve, kept_numbers, training_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawn


def plot_frontier(comparison: Comparison, task: str, text: str) -> Drawn | None:
    """Loss on the task against distance from the base model, a line over learning rates per method.

    Below and to the left is better: more learned, less forgotten. Where the base model has been measured, the axes show
    the runs that learned at least three quarters of what the best did; others would stretch them over decades.
    """
    grid = comparison.grid
    curves = {own.label: curve(comparison, task, own, text) for own in grid.contestants}
    points = [(kl, loss) for line in curves.values() for _, kl, loss in line]
    if not points:
        return None
    made, (axis,) = figure(6.6, 4.6)
    base = grid.result(grid.base(task))
    shown, against = points, ""
    if base is not None:
        best = min(loss for _, loss in points)
        worst = best + (base["test"]["loss"] - best) / 4
        shown = [point for point in points if point[1] <= worst]
        against = f"; base model: {base['test']['loss']:.3f}"
    for index, (label, line) in enumerate(curves.items()):
        if not line:
            continue
        looks = style(index) | {"markersize": 5}
        axis.plot([kl for _, kl, _ in line], [loss for *_, loss in line], label=label, **looks)
        seen = [point for point in line if point[1:] in shown]
        for rate, kl, loss in seen[:1] + seen[1:][-1:]:
            axis.annotate(f"{rate:g}", (kl, loss), xytext=(3, 3), textcoords="offset points", fontsize=6)
    axis.set_xscale("log")
    if len(shown) > 1 and len(shown) < len(points):
        kls, losses = zip(*shown, strict=True)
        room = 0.08 * (max(losses) - min(losses))
        axis.set_xlim(min(kls) / 1.3, max(kls) * 1.3)
        axis.set_ylim(min(losses) - room, max(losses) + room)
    axis.set_xlabel(f"KL(base ‖ tuned) on {text}, nats per token (log scale)")
    axis.set_ylabel(f"loss of the right answers{against}")
    axis.set_title(f"{grid.places[task]}: learned against forgotten, by learning rate", fontsize=10)
    axis.legend(fontsize=7, frameon=False)
    return made


def plot_kept(comparison: Comparison, task: str) -> Drawn | None:
    """Accuracy against the retention tasks (their mean, or the first), a line over learning rates per method."""
    grid = comparison.grid
    results = [(cell, result) for cell, result in grid.results() if cell.task == task]
    first = next((result["kept"] for _, result in results if result.get("kept")), None)
    if first is None or any(result["test"]["accuracy"] is None for _, result in results):
        return None
    name = MEAN if MEAN in kept_numbers({"kept": first}) else next(iter(first))
    scale = 100 if name == MEAN or first[name]["share"] else 1
    told = (
        "retention tasks, unweighted mean"
        if name == MEAN
        else f"{first[name]['title']}, {first[name]['metric']}"
    )
    made, (axis,) = figure(6.6, 4.6)
    for index, own in enumerate(grid.contestants):
        line = []
        for rate in own.learning_rates:
            there = [one for cell, one in results if cell.label == own.label and cell.learning_rate == rate]
            if there:
                kept = statistics.fmean(kept_numbers(one)[name] for one in there)
                right = statistics.fmean(one["test"]["accuracy"] for one in there)
                line.append((rate, scale * kept, 100 * right))
        if line:
            looks = style(index) | {"markersize": 5}
            axis.plot([kept for _, kept, _ in line], [right for *_, right in line], label=own.label, **looks)
            for rate, kept, right in line[:1] + line[1:][-1:]:
                axis.annotate(
                    f"{rate:g}", (kept, right), xytext=(3, 3), textcoords="offset points", fontsize=6
                )
    base = grid.result(grid.base(task))
    if base is not None:
        axis.axvline(
            scale * kept_numbers(base)[name], color="0.5", linewidth=1, linestyle=":", label="base model"
        )
    axis.set_xlabel(told + (", %" if scale == 100 else ""))
    axis.set_ylabel("accuracy, %")
    axis.set_title(f"{grid.places[task]}: learned against kept, by learning rate", fontsize=10)
    axis.legend(fontsize=7, frameon=False)
    return made


def plot_parameters(comparison: Comparison, place: str, found: Sequence[Summary]) -> Drawn | None:
    """Accuracy (or loss) against the number of trained parameters."""
    counts = {own.label: own.parameters for own in comparison.grid.contestants}
    shares = all(one.accuracy is not None for one in found)
    made, (axis,) = figure(6.0, 4.0)
    index = 0
    for one in found:
        number = one.accuracy if shares else one.loss
        count = counts.get(one.label)
        if number is None or not count:
            continue
        scale = 100 if shares else 1
        error = [[scale * (number.value - number.low)], [scale * (number.high - number.value)]]
        looks = style(index) | {"linestyle": "none", "markersize": 6}
        axis.errorbar([count], [scale * number.value], yerr=error, capsize=3, label=one.label, **looks)
        index += 1
    if not index:
        return None
    axis.set_xscale("log")
    axis.set_xlabel("trained parameters (log scale)")
    axis.set_ylabel("accuracy, %" if shares else "loss of the right answers")
    axis.set_title(f"{place}: quality against size", fontsize=10)
    axis.legend(fontsize=7, frameon=False)
    return made


def plot_learning(comparison: Comparison, place: str, found: Sequence[Summary]) -> Drawn | None:
    """Training loss by step, running means over the seeds."""
    made, (axis,) = figure(6.6, 4.0)
    index = 0
    for one in found:
        runs = [result["training"]["losses"] for result in one.results.values() if result.get("training")]
        length = min((len(run) for run in runs), default=0)
        if not length:
            continue
        steps = [step for step, _ in runs[0][:length]]
        means = [statistics.fmean(run[place][1] for run in runs) for place in range(length)]
        axis.plot(steps, plots.running_mean(means), label=one.label, **style(index, marker=False))
        index += 1
    if not index:
        return None
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("training loss (running mean)")
    axis.set_title(f"{place}: learning curves at the chosen learning rates", fontsize=10)
    axis.legend(fontsize=7, frameon=False)
    return made


def plot_cost(comparison: Comparison, found: Mapping[str, Sequence[Summary]]) -> Drawn | None:
    """Time of a step and peak of memory, a bar per method."""
    bars: dict[str, dict[str, Interval | None]] = {"step, s": {}, "peak of training, GiB": {}}
    for own in comparison.grid.contestants:
        for title, name, scale in (
            ("step, s", "step_seconds", 1.0), ("peak of training, GiB", "peak_bytes", 2.0**-30)
        ):  # fmt: skip
            values = [scale * value for value in training_numbers(found, own.label, name)]
            if values:
                middle = statistics.median(values)
                bars[title][own.label] = Interval(middle, min(values), max(values))
    if not all(bars.values()):
        return None
    return plot_bars(
        bars, label="", title="Cost: median over cells, with the smallest and the largest", decimals=2
    )


def plot_ranks(found: Sequence[Summary], place: str) -> Drawn | None:
    """Effective ranks by layer and kind of module, a panel per method, of the first seed."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    maps: dict[str, tuple[list[str], Any]] = {}
    for one in found:
        rows = next(iter(one.results.values())).get("landscape")
        if rows:
            maps[one.label] = plots.rank_grid(rows)
    if not maps:
        return None
    most = max(float(np.nanmax(grid)) for _, grid in maps.values())
    made, axes = panels(len(maps), width=3.4, height=2.2, columns=3)
    image = None
    for axis, (label, (kinds, grid)) in zip(axes, maps.items(), strict=True):
        image = axis.imshow(grid, aspect="auto", cmap="cividis", vmin=0, vmax=max(most, 1))
        axis.grid(False)
        axis.set_yticks(range(len(kinds)), kinds, fontsize=6)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("layer", fontsize=7)
        axis.set_title(label, fontsize=9)
    if image is not None:
        made.colorbar(image, ax=axes, label="effective rank", fraction=0.04)
    made.suptitle(f"{place}: effective ranks", fontsize=10)
    return made
