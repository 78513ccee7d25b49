"""Plots of the experiments on forgetting, readable in black and white: markers, line styles, hatches and numbers.

Every function returns a matplotlib figure, which [`save_figure`][dynalora.drawing.runs.save_figure] writes
as PNG and SVG.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dynalora.common.statistics import Interval
from dynalora.drawing.style import HATCHES, LINES, PALETTE, figure, style
from dynalora.forgetting.landscape import LandscapeRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Landscapes = Mapping[str, Sequence[Sequence[LandscapeRow]]]
"""Name of a stage → one landscape per seed."""


def plot_stages(stages: Landscapes, value: str, *, label: str, title: str) -> Figure:
    """One number of every matrix over the layers, a panel per kind of module and a line per stage (DiRA Figures 1, 2).

    Lines are means over the seeds; a band spans the least and the largest of several.

    Args:
        stages: The landscapes; all of the same adapter.
        value: Which number: a field of [`LandscapeRow`][dynalora.forgetting.landscape.LandscapeRow].
        label: What it is, with its unit, for the axis.
        title: Heading.
    """
    from matplotlib.ticker import MaxNLocator

    rows = [row for landscapes in stages.values() for landscape in landscapes for row in landscape]
    kinds = list(dict.fromkeys(row.kind for row in rows))
    columns = min(4, len(kinds))
    lines = -(-len(kinds) // columns)
    made, axes = figure(3.1 * columns, 2.5 * lines + 0.5, columns=columns, rows=lines)
    for axis in axes[len(kinds) :]:
        axis.set_visible(False)
    for place, (axis, kind) in enumerate(zip(axes, kinds, strict=False)):
        for index, (name, landscapes) in enumerate(stages.items()):
            chosen = [[row for row in landscape if row.kind == kind] for landscape in landscapes]
            at = [row.layer if row.layer is not None else i for i, row in enumerate(chosen[0])]
            values = np.array([[float(getattr(row, value)) for row in seed] for seed in chosen])
            axis.plot(
                at, values.mean(0), label=name, **style(index),
            )  # fmt: skip
            if len(values) > 1:
                axis.fill_between(
                    at, values.min(0), values.max(0), color=style(index)["color"], alpha=0.15, linewidth=0
                )
        axis.set_title(kind, fontsize=9)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("layer", fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.tick_params(labelsize=8)
        if place % columns == 0:
            axis.set_ylabel(label, fontsize=8)
    axes[0].legend(fontsize=7, frameon=False)
    made.suptitle(title, fontsize=10)
    return made


def plot_bars(
    bars: Mapping[str, Mapping[str, Interval | None]],
    *,
    label: str,
    title: str,
    lines: Mapping[str, Mapping[str, float | None]] | None = None,
    decimals: int = 1,
) -> Figure:
    """Bars with intervals, a panel per task and a bar per run (DiRA Figure 3).

    Args:
        bars: Task → name of the run → its number with interval; None: not measured, no bar.
        label: What the height means, with its unit.
        title: Heading.
        lines: Task → name → height of a horizontal line to compare with.
        decimals: Digits of the printed numbers after the point.
    """
    tasks = list(bars)
    widest = max(len(runs) for runs in bars.values())
    made, axes = figure(max(3.0, 1.0 * widest + 0.9) * len(tasks), 3.9, columns=len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        for index, number in enumerate(bars[task].values()):
            _bar(axis, index, number, index, f"{{:.{decimals}f}}")
        for index, (name, height) in enumerate((lines or {}).get(task, {}).items()):
            if height is not None:
                axis.axhline(
                    height,
                    color="black",
                    linewidth=1,
                    linestyle=LINES[1 + index % (len(LINES) - 1)],
                    label=name,
                )
        axis.set_xticks(range(len(bars[task])), list(bars[task]))
        axis.set_ylabel(label)
        axis.set_title(task, fontsize=9)
        axis.grid(False, axis="x")
        axis.margins(y=0.18)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, frameon=True, framealpha=0.85)
    made.suptitle(title, fontsize=10)
    return made


def _bar(axis: Axes, place: float, number: Interval | None, style: int, shape: str) -> None:
    if number is None:
        axis.annotate("not measured", (place, 0), ha="center", va="bottom", fontsize=7, rotation=90)
        return
    axis.bar(
        place, number.value, width=0.66, facecolor=PALETTE[style % len(PALETTE)], edgecolor="black", linewidth=0.8,
        alpha=0.75, hatch=HATCHES[style % len(HATCHES)],
    )  # fmt: skip
    if number.high > number.low:
        ends = [[number.value - number.low], [number.high - number.value]]
        axis.errorbar(place, number.value, yerr=ends, color="black", capsize=4, linewidth=1.1)
    axis.annotate(
        shape.format(number.value), (place, max(number.value, number.high)), xytext=(0, 3),
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
    known = np.concatenate([grid[~np.isnan(grid)] for grid in grids.values()] or [np.zeros(0)])
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    high = high if high > low else low + 1
    width = 0.72 * len(measured_on) + 2.0
    made, axes = figure(width * len(grids) + 0.8, 0.5 * len(trained_on) + 2.2, columns=len(grids))
    shade: Callable[[float], float] = lambda number: (number - low) / (high - low)  # noqa: E731
    image = None
    for axis, (name, grid) in zip(axes, grids.items(), strict=True):
        # Grey from light to dark, so that a printed copy says the same.
        image = axis.imshow(
            grid, aspect="auto", cmap="Greys" if larger_is_better else "Greys_r", vmin=low, vmax=high
        )
        axis.grid(False)
        axis.spines[["top", "right"]].set_visible(True)
        for (row, column), number in np.ndenumerate(grid):
            dark = not np.isnan(number) and (shade(number) > 0.55) == larger_is_better
            axis.text(
                column, row, "–" if np.isnan(number) else f"{number:.{decimals}f}", ha="center", va="center",
                fontsize=8, color="white" if dark else "black",
            )  # fmt: skip
        axis.set_xticks(range(len(measured_on)), list(measured_on), rotation=35, ha="right", fontsize=8)
        axis.set_yticks(range(len(trained_on)), list(trained_on), fontsize=8)
        axis.set_xlabel("measured on")
        axis.set_ylabel("trained on")
        axis.set_title(name, fontsize=9)
    if image is not None:
        made.colorbar(image, ax=axes, label=label, fraction=0.04)
    made.suptitle(title, fontsize=10)
    return made
