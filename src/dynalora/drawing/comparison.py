"""Methods against each other: bars, learned against forgotten, quality against size, learning curves, transfer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dynalora.common.statistics import Interval
from dynalora.drawing.landscape import rank_grid
from dynalora.drawing.style import (
    LINES,
    OVER_PICTURES,
    STEPS,
    Look,
    describe,
    figure,
    heat_map,
    legend,
    log_scale,
    looks,
    panels,
)
from dynalora.drawing.training import running_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Points = Mapping[str, Sequence[tuple[float, float, float]]]
"""Label → (learning rate, x, y), in the order of the rates; labels without points only reserve their look."""


def differing(values: Iterable[Interval | float | None]) -> bool:
    """Whether a picture of these numbers says anything: not where they are all alike, such as all zero."""
    return len({value.value if isinstance(value, Interval) else value for value in values if value is not None}) > 1


def plot_learning_rates(
    curves: Points,
    *,
    title: str,
    x: str,
    y: str,
    highest: float | None = None,
    base: float | None = None,
    log: bool = False,
    chosen: Mapping[str, float] | None = None,
) -> Figure:
    """A line over learning rates for each method, with the smallest and the largest rate written beside it.

    Args:
        curves: The points.
        title: Heading.
        x: What the horizontal axis means, with its unit.
        y: What the vertical axis means, with its unit.
        highest: Show only the range of the points up to this height; others would stretch the axes. None: of all.
        base: Where the untouched model is on the horizontal axis; None leaves it out.
        log: Whether the horizontal axis is logarithmic.
        chosen: Label → the rate whose point gets a ring.
    """
    drawn, (axis,) = figure(6.6, 4.6)
    shown = []
    total = 0
    styles = looks(curves)
    for label, points in curves.items():
        if not points:
            continue
        line = styles[label].line() | {"markersize": 5}
        axis.plot([at for _, at, _ in points], [height for *_, height in points], label=label, **line)
        _ring(axis, [(at, height) for rate, at, height in points if rate == (chosen or {}).get(label)])
        visible = [point for point in points if highest is None or point[2] <= highest]
        for rate, at, height in [*visible[:1], *visible[1:][-1:]]:
            axis.annotate(f"{rate:g}", (at, height), xytext=(3, 3), textcoords="offset points", fontsize=6)
        shown += visible
        total += len(points)
    if log:
        log_scale(axis)
    if 1 < len(shown) < total:
        _, places, heights = zip(*shown, strict=True)
        room = 0.08 * (max(heights) - min(heights))
        axis.set_xlim(min(places) / 1.3, max(places) * 1.3)
        axis.set_ylim(min(heights) - room, max(heights) + room)
    if base is not None:
        axis.axvline(base, color="0.5", linewidth=1, linestyle=":", label="base model")
    describe(axis, title=title, x=x, y=y)
    legend(axis)
    return drawn


def plot_factors(
    curves: Mapping[str, Sequence[tuple[float, Sequence[tuple[float, float]]]]],
    *,
    title: str,
    x: str,
    y: str,
    highest: float | None = None,
    chosen: Mapping[str, float] | None = None,
) -> Figure:
    """A line over factors of the update for each run, from as trained (a large marker) down to the smallest factor.

    Args:
        curves: Label → runs as (learning rate, points), the points as (x, y) with falling factors.
        title: Heading.
        x: What the horizontal axis means, with its unit; it is logarithmic.
        y: What the vertical axis means, with its unit.
        highest: Show only the range of the points up to this height; None: of all.
        chosen: Label → the rate whose run as trained gets a ring.
    """
    drawn, (axis,) = figure(6.6, 4.6)
    styles = looks(curves)
    shown = []
    for label, runs in curves.items():
        for number, (rate, points) in enumerate(runs):
            line = styles[label].line() | ({"label": label} if number == 0 else {})
            axis.plot([at for at, _ in points], [height for _, height in points], **line)
            first = points[0]
            axis.plot(*first, color=styles[label].color, marker=styles[label].marker, markersize=7)
            _ring(axis, [first] if rate == (chosen or {}).get(label) else [])
            visible = [point for point in points if highest is None or point[1] <= highest]
            if first in visible:
                axis.annotate(f"{rate:g}", first, xytext=(4, 4), textcoords="offset points", fontsize=6)
            shown += visible
    log_scale(axis)
    shown = [point for point in shown if point[0] > 0]
    if len(shown) > 1:
        places, heights = zip(*shown, strict=True)
        room = 0.08 * (max(heights) - min(heights)) or 0.1
        axis.set_xlim(min(places) / 1.3, max(places) * 1.3)
        axis.set_ylim(min(heights) - room, max(heights) + room)
    describe(axis, title=title, x=x, y=y)
    legend(axis)
    return drawn


def _ring(axis: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Mark points that were chosen."""
    for at, height in points:
        axis.scatter([at], [height], s=150, facecolors="none", edgecolors="black", linewidths=1.1, zorder=3)


def plot_sizes(points: Mapping[str, tuple[int, Interval] | None], *, title: str, y: str) -> Figure:
    """Quality against the number of trained parameters, with intervals."""
    drawn, (axis,) = figure(6.0, 4.0)
    chosen = looks(points)
    for label, point in points.items():
        if point is not None:
            count, number = point
            ends = [[number.value - number.low], [number.high - number.value]]
            line = chosen[label].line() | {"linestyle": "none", "markersize": 6}
            axis.errorbar([count], [number.value], yerr=ends, capsize=3, label=label, **line)
    log_scale(axis)
    describe(axis, title=title, x="trained parameters (log scale)", y=y)
    legend(axis)
    return drawn


def plot_learning_curves(curves: Mapping[str, Sequence[tuple[int, float]]], *, title: str) -> Figure:
    """Running means of the training loss by step."""
    drawn, (axis,) = figure(6.6, 4.0)
    chosen = looks(curves)
    for label, points in curves.items():
        if points:
            steps, losses = zip(*points, strict=True)
            axis.plot(steps, running_mean(losses), label=label, **chosen[label].line(marker=False))
    describe(axis, title=title, x=STEPS, y="training loss (running mean)")
    legend(axis)
    return drawn


def plot_over_steps(
    curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], *, title: str, base: Mapping[str, float]
) -> Figure:
    """What was measured during training, a plot for each number and a line for each method (DISeL, Figures 6 to 9).

    Args:
        curves: What a number is, with its unit → label → points as (step, number).
        title: Heading.
        base: The same numbers of the untouched model, where they are known, drawn as dotted lines.
    """
    drawn, axes = panels(len(curves), width=4.2, height=3.0, columns=2, title=title)
    chosen = looks(next(iter(curves.values())))
    for axis, (number, lines) in zip(axes, curves.items(), strict=False):
        for label, points in lines.items():
            if points:
                steps, values = zip(*points, strict=True)
                axis.plot(steps, values, **(chosen[label].line() | {"label": label}))
        if number in base:
            axis.axhline(base[number], color="black", linestyle=":", linewidth=1, label="base model")
        describe(axis, x=STEPS, y=number)
    legend(axes[0])
    return drawn


def plot_by_layer(rows: Mapping[str, Sequence[Mapping[str, Any]]], *, title: str) -> Figure:
    """A number by layer, a line for each method, and its number without a layer (`layer` None) as a dotted line.

    Args:
        rows: Label → `layer`, `loss` and `accuracy`; accuracies are drawn where all have them, and losses else.
        title: Heading.
    """
    shares = all(row["accuracy"] is not None for of_label in rows.values() for row in of_label)
    name, scale = ("accuracy", 100.0) if shares else ("loss", 1.0)
    drawn, (axis,) = figure(6.6, 4.0)
    chosen = looks(rows)
    for label, of_label in rows.items():
        points = [(row["layer"], scale * row[name]) for row in of_label if row["layer"] is not None]
        layers, values = zip(*points, strict=True)
        axis.plot(layers, values, **(chosen[label].line() | {"label": label}))
        for row in of_label:
            if row["layer"] is None:
                axis.axhline(scale * row[name], color=chosen[label].color, linestyle=":", linewidth=1)
    describe(axis, title=title, x="layer", y="accuracy, %" if shares else "loss of the right answers")
    legend(axis)
    return drawn


def plot_rank_maps(landscapes: Mapping[str, Sequence[Any]], *, title: str) -> Figure:
    """Effective ranks by layer and kind of module, a panel per method."""
    maps = {label: rank_grid(rows) for label, rows in landscapes.items()}
    largest = max(1.0, *(float(np.nanmax(grid)) for *_, grid in maps.values()))
    drawn, axes = panels(len(maps), width=3.4, columns=3, title=title)
    for axis, (label, (kinds, layers, grid)) in zip(axes, maps.items(), strict=True):
        image = heat_map(axis, grid, rows=kinds, columns=layers, cmap="cividis", vmin=0, vmax=largest)
        axis.tick_params(labelsize=6)
        describe(axis, title=label, x="layer")
    drawn.colorbar(image, ax=axes, label="effective rank", fraction=0.04)
    return drawn


def plot_bars(
    bars: Mapping[str, Mapping[str, Interval | None]],
    *,
    label: str,
    title: str = "",
    lines: Mapping[str, Mapping[str, float | None]] | None = None,
    decimals: int = 1,
) -> Figure:
    """Bars with their numbers above them and their intervals, a plot per task and a bar per run (DiRA Figure 3).

    Args:
        bars: Task → name of the run → its number with interval; None: not measured, no bar.
        label: What the height means, with its unit.
        title: Heading.
        lines: Task → name → height of a horizontal line to compare with.
        decimals: Digits of the printed numbers after the point.
    """
    runs = list(dict.fromkeys(run for task in bars.values() for run in task))
    chosen = looks(runs)
    widest = max(len(task) for task in bars.values())
    drawn, axes = figure(max(3.0, 1.0 * widest + 0.9) * len(bars), 3.9, columns=len(bars), title=title)
    for axis, (task, values) in zip(axes, bars.items(), strict=True):
        for index, (run, number) in enumerate(values.items()):
            _bar(axis, index, number, chosen[run], decimals)
        for index, (name, height) in enumerate((lines or {}).get(task, {}).items()):
            if height is not None:
                dashes = LINES[1 + index % (len(LINES) - 1)]
                axis.axhline(height, color="black", linewidth=1, linestyle=dashes, label=name)
        if any(number is not None and number.value < 0 for number in values.values()):
            axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(values)), list(values))
        axis.grid(False, axis="x")
        axis.margins(y=0.18)
        describe(axis, title=task, y=label)
        legend(axis)
    return drawn


def _bar(axis: Axes, place: float, number: Interval | None, look: Look, decimals: int) -> None:
    if number is None:
        axis.annotate("not measured", (place, 0), ha="center", va="bottom", fontsize=7, rotation=90)
        return
    axis.bar(place, number.value, width=0.66, facecolor=look.color, edgecolor="black", linewidth=0.8, hatch=look.hatch)
    if number.high > number.low:
        ends = [[number.value - number.low], [number.high - number.value]]
        axis.errorbar(place, number.value, yerr=ends, color="black", capsize=4, linewidth=1.1)
    axis.annotate(
        f"{number.value:.{decimals}f}", (place, max(number.value, number.high, 0)), xytext=(0, 3),
        textcoords="offset points", ha="center", va="bottom", fontsize=8,
    )  # fmt: skip


def plot_transfer(
    matrices: Mapping[str, Sequence[Sequence[float | None]]],
    trained_on: Sequence[str],
    measured_on: Sequence[str],
    *,
    label: str,
    title: str,
    decimals: int = 1,
    larger_is_better: bool = True,
) -> Figure:
    """Heat maps side by side: trained on a row's task, measured on a column's (DiRA Figure 6).

    Args:
        matrices: Name of a method → numbers by row and column; None: not measured.
        trained_on: Names of the rows.
        measured_on: Names of the columns.
        label: What the numbers are, with their unit.
        title: Heading.
        decimals: Digits of the printed numbers after the point.
        larger_is_better: Darker is better in either case.
    """
    grids = {
        name: np.array([[np.nan if cell is None else cell for cell in row] for row in rows], dtype=float)
        for name, rows in matrices.items()
    }
    measured = np.concatenate([grid[~np.isnan(grid)] for grid in grids.values()] or [np.zeros(0)])
    low, high = (float(measured.min()), float(measured.max())) if measured.size else (0.0, 1.0)
    high = high if high > low else low + 1
    # Grey from light to dark, so that a printed copy says the same.
    shades = {"cmap": "Greys" if larger_is_better else "Greys_r", "vmin": low, "vmax": high}
    width = 0.72 * len(measured_on) + 2.0
    drawn, axes = figure(width * len(grids) + 0.8, 0.5 * len(trained_on) + 2.2, columns=len(grids), title=title)
    for axis, (name, grid) in zip(axes, grids.items(), strict=True):
        image = heat_map(axis, grid, rows=trained_on, columns=measured_on, turned=35, **shades)
        axis.spines[["top", "right"]].set_visible(True)
        for (row, column), number in np.ndenumerate(grid):
            if np.isnan(number):
                axis.text(column, row, "–", ha="center", va="center", fontsize=8)
                continue
            dark = ((number - low) / (high - low) > 0.55) == larger_is_better
            ink = OVER_PICTURES["white" if dark else "black"]
            axis.text(column, row, f"{number:.{decimals}f}", ha="center", va="center", fontsize=8, color=ink)
        describe(axis, title=name, x="measured on", y="trained on")
    drawn.colorbar(image, ax=axes, label=label, fraction=0.04)
    return drawn
