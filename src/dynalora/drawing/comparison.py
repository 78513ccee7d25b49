"""Methods against each other: learned against forgotten, quality against size, learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dynalora.common.statistics import Interval
from dynalora.drawing.landscape import rank_grid
from dynalora.drawing.style import describe, figure, heat_map, legend, looks, panels
from dynalora.drawing.training import running_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Mapping[str, Sequence[tuple[float, float, float]]]
"""Label → (learning rate, x, y), in the order of the rates; labels without points only reserve their look."""


def plot_learning_rates(
    curves: Points,
    *,
    title: str,
    x: str,
    y: str,
    highest: float | None = None,
    base: float | None = None,
    log: bool = False,
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
    """
    drawn, (axis,) = figure(6.6, 4.6)
    shown = []
    total = 0
    chosen = looks(curves)
    for label, points in curves.items():
        if not points:
            continue
        line = chosen[label].line() | {"markersize": 5}
        axis.plot([at for _, at, _ in points], [height for *_, height in points], label=label, **line)
        visible = [point for point in points if highest is None or point[2] <= highest]
        for rate, at, height in [*visible[:1], *visible[1:][-1:]]:
            axis.annotate(f"{rate:g}", (at, height), xytext=(3, 3), textcoords="offset points", fontsize=6)
        shown += visible
        total += len(points)
    if log:
        axis.set_xscale("log")
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


def plot_sizes(points: Mapping[str, tuple[int, Interval] | None], *, title: str, y: str) -> Figure:
    """Quality against the number of trained parameters, with intervals.

    Args:
        points: Label → trained parameters and quality; None: not measured.
        title: Heading.
        y: What the quality is, with its unit.
    """
    drawn, (axis,) = figure(6.0, 4.0)
    chosen = looks(points)
    for label, point in points.items():
        if point is not None:
            count, number = point
            ends = [[number.value - number.low], [number.high - number.value]]
            line = chosen[label].line() | {"linestyle": "none", "markersize": 6}
            axis.errorbar([count], [number.value], yerr=ends, capsize=3, label=label, **line)
    axis.set_xscale("log")
    describe(axis, title=title, x="trained parameters (log scale)", y=y)
    legend(axis)
    return drawn


def plot_learning_curves(curves: Mapping[str, Sequence[tuple[int, float]]], *, title: str) -> Figure:
    """Running means of the training loss by step.

    Args:
        curves: Label → (optimizer step, loss), in order; labels without points only reserve their look.
        title: Heading.
    """
    drawn, (axis,) = figure(6.6, 4.0)
    chosen = looks(curves)
    for label, points in curves.items():
        if points:
            steps, losses = zip(*points, strict=True)
            axis.plot(steps, running_mean(losses), label=label, **chosen[label].line(marker=False))
    describe(axis, title=title, x="optimizer step", y="training loss (running mean)")
    legend(axis)
    return drawn


def plot_rank_maps(landscapes: Mapping[str, Sequence[Any]], *, title: str) -> Figure:
    """Effective ranks by layer and kind of module, a panel per method.

    Args:
        landscapes: Label → rows, as for [`rank_grid`][dynalora.drawing.landscape.rank_grid].
        title: Heading.
    """
    maps = {label: rank_grid(rows) for label, rows in landscapes.items()}
    largest = max(1.0, *(float(np.nanmax(grid)) for *_, grid in maps.values()))
    drawn, axes = panels(len(maps), width=3.4, columns=3, title=title)
    for axis, (label, (kinds, layers, grid)) in zip(axes, maps.items(), strict=True):
        image = heat_map(axis, grid, rows=kinds, columns=layers, cmap="cividis", vmin=0, vmax=largest)
        axis.tick_params(labelsize=6)
        describe(axis, title=label, x="layer")
    drawn.colorbar(image, ax=axes, label="effective rank", fraction=0.04)
    return drawn
