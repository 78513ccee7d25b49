"""What an adapter of one task does to another task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dynalora.drawing.style import describe, figure, heat_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    drawn, axes = figure(
        width * len(grids) + 0.8, 0.5 * len(trained_on) + 2.2, columns=len(grids), title=title
    )
    for axis, (name, grid) in zip(axes, grids.items(), strict=True):
        image = heat_map(axis, grid, rows=trained_on, columns=measured_on, turned=35, **shades)
        axis.spines[["top", "right"]].set_visible(True)
        for (row, column), number in np.ndenumerate(grid):
            dark = not np.isnan(number) and ((number - low) / (high - low) > 0.55) == larger_is_better
            axis.text(
                column, row, "–" if np.isnan(number) else f"{number:.{decimals}f}", ha="center", va="center",
                fontsize=8, color="white" if dark else "black",
            )  # fmt: skip
        describe(axis, title=name, x="measured on", y="trained on")
    drawn.colorbar(image, ax=axes, label=label, fraction=0.04)
    return drawn
