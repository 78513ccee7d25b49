"""Numbers with intervals as bars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dynalora.common.statistics import Interval
from dynalora.drawing.style import LINES, Look, describe, figure, legend, looks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    axis.bar(
        place,
        number.value,
        width=0.66,
        facecolor=look.color,
        edgecolor="black",
        linewidth=0.8,
        hatch=look.hatch,
    )
    if number.high > number.low:
        ends = [[number.value - number.low], [number.high - number.value]]
        axis.errorbar(place, number.value, yerr=ends, color="black", capsize=4, linewidth=1.1)
    axis.annotate(
        f"{number.value:.{decimals}f}", (place, max(number.value, number.high, 0)), xytext=(0, 3),
        textcoords="offset points", ha="center", va="bottom", fontsize=8,
    )  # fmt: skip
