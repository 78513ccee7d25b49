"""What the plots of this package share: runs told apart without colour, and files as PNG and SVG."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, "Color Universal Design" (2008), ordered so that the first few differ in lightness too.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")


def style(index: int) -> dict[str, Any]:
    """How the run of this number is drawn: colour, marker and line all differ, so that grey print will do."""
    return {
        "color": PALETTE[index % len(PALETTE)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)],
        "markersize": 3.5,
        "linewidth": 1.2,
    }


def panels(
    count: int, *, width: float = 3.2, height: float = 2.4, columns: int = 4, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with this many plots, row after row, on a canvas of its own.

    Args:
        count: number of plots.
        width: of a plot, in inches.
        height: of a plot, in inches.
        columns: plots in a row at most.
        share_y: whether all have the same vertical axis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(1, min(columns, count))
    rows = max(1, -(-count // columns))
    made = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(made)
    axes: list[Axes] = []
    for index in range(count):
        axes.append(made.add_subplot(rows, columns, index + 1, sharey=axes[0] if axes and share_y else None))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
    return made, axes


def rendered(made: Figure, kind: str, *, dpi: int = 150) -> bytes:
    """A figure as the bytes of a file of this kind, `png` or `svg`."""
    buffer = io.BytesIO()
    made.savefig(buffer, format=kind, dpi=dpi)
    return buffer.getvalue()


def save(made: Figure, path: str | os.PathLike[str] | None, *, dpi: int = 150) -> None:
    """Write a figure as PNG and SVG side by side, each of them whole or not at all.

    Args:
        made: the figure.
        path: file to write; both files have its name, with their own endings. None writes nothing.
        dpi: of the PNG.
    """
    if path is None:
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    for ending in ("png", "svg"):
        beside = target.with_name(f".{target.stem}.{os.getpid()}.{ending}.tmp")
        try:
            beside.write_bytes(rendered(made, ending, dpi=dpi))
            os.replace(beside, target.with_suffix(f".{ending}"))
        finally:
            beside.unlink(missing_ok=True)
