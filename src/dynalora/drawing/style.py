"""What the plots of this package share: runs told apart without colour, and files as PNG and SVG."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynalora.common.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, "Color Universal Design" (2008), ordered so that the first few differ in lightness too.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 2)))
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++")


def style(index: int, *, marker: bool = True) -> dict[str, Any]:
    """How the run of this number is drawn: colour, marker and line all differ, so that grey print will do.

    Args:
        index: Number of the run, from 0.
        marker: Whether points are marked; False for curves with many.
    """
    drawn: dict[str, Any] = {
        "color": PALETTE[index % len(PALETTE)],
        "linestyle": LINES[index % len(LINES)],
        "linewidth": 1.2,
    }
    if marker:
        # A colour that comes again comes with another marker.
        drawn |= {"marker": MARKERS[(index + index // len(PALETTE)) % len(MARKERS)], "markersize": 3.5}
    return drawn


def figure(
    width: float = 6.4,
    height: float = 3.8,
    *,
    columns: int = 1,
    rows: int = 1,
    share_y: bool = False,
    labels: float | None = None,
) -> tuple[Figure, list[Axes]]:
    """An empty figure with plots side by side, row after row, on a canvas of its own (pyplot is not touched).

    Args:
        width: In inches, of the whole figure.
        height: In inches.
        columns: Number of plots in a row.
        rows: Number of rows.
        share_y: Whether all have the same vertical axis.
        labels: Size of the ticks' labels in points; None: matplotlib's.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    axes: list[Axes] = []
    for index in range(rows * columns):
        axes.append(made.add_subplot(rows, columns, index + 1, sharey=axes[0] if axes and share_y else None))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
        if labels is not None:
            axis.tick_params(labelsize=labels)
    return made, axes


def panels(
    count: int, *, width: float = 3.2, height: float = 2.4, columns: int = 4, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with this many plots, row after row.

    Args:
        count: Number of plots.
        width: Of a plot, in inches.
        height: Of a plot, in inches.
        columns: Plots in a row at most.
        share_y: Whether all have the same vertical axis.
    """
    columns = max(1, min(columns, count))
    rows = max(1, -(-count // columns))
    made, axes = figure(width * columns, height * rows, columns=columns, rows=rows, share_y=share_y, labels=8)
    for axis in axes[count:]:
        made.delaxes(axis)
    return made, axes[:count]


def rendered(made: Figure, kind: str = "png", *, dpi: int = 150) -> bytes:
    """A figure as the bytes of a file of this kind, `png` or `svg`; equal figures give equal files."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "dynalora", "svg.fonttype": "none"}):
        made.savefig(buffer, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def save(made: Figure, path: str | os.PathLike[str] | None, *, dpi: int = 150) -> None:
    """Write a figure as PNG and SVG side by side, each of them whole or not at all.

    Args:
        made: The figure.
        path: File to write; both files have its name, with their own endings. None writes nothing.
        dpi: Of the PNG.
    """
    if path is None:
        return
    target = Path(path)
    for ending in ("png", "svg"):
        write_file(target.with_suffix(f".{ending}"), rendered(made, ending, dpi=dpi))
