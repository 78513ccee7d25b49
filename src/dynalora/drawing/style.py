"""What all figures share: one look for each label, empty canvases, and files as PNG and SVG."""

from __future__ import annotations

import io
import itertools
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dynalora.common.extras import require
from dynalora.common.files import why_not_written, write_file
from dynalora.errors import ConfigError
from dynalora.methods import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# Okabe and Ito, "Color Universal Design" (2008), ordered so that the first few differ in lightness too; a brown stands
# for their yellow, which can hardly be seen on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 2)))
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++")

BASE = "base"
"""Label of the untouched model, which is grey in every figure."""

FIRST = (
    "dira", "disel", "dislora", "pedyra",
    "lora", "full", "dora", "pissa", "adalora", "rslora", "lora+", "randlora", "miss", "p-tuning", "lora-null",
)  # fmt: skip
"""Methods in the order in which they get their looks; others of the registry come after them, so that a new method
changes no look that figures already have."""


@dataclass(frozen=True)
class Look:
    """How one label is drawn.

    Attributes:
        color: Of its line, points or bar.
        marker: Of its points.
        linestyle: Of its line.
        hatch: Of its bar.
    """

    color: str
    marker: str
    linestyle: Any
    hatch: str

    def line(self, *, marker: bool = True) -> dict[str, Any]:
        """Arguments of a curve, with marked points unless there are many."""
        arguments = {"color": self.color, "linestyle": self.linestyle, "linewidth": 1.2}
        return arguments | ({"marker": self.marker, "markersize": 3.5} if marker else {})


def look(number: int) -> Look:
    """The look with a number: colour, marker, line and hatch all differ, so that grey print will do."""
    # A colour that comes again comes with another marker.
    round_ = number // len(PALETTE)
    # And a marker that comes again with another line.
    places = ((PALETTE, number), (MARKERS, number + round_), (LINES, number + 3 * round_), (HATCHES, number))
    return Look(*(items[place % len(items)] for items, place in places))


def looks(labels: Iterable[str]) -> dict[str, Look]:
    """The look of every label in a figure.

    A method has the same look in every figure, whether it is called by its name or its title: first come those of
    [`FIRST`][dynalora.drawing.style.FIRST], then the others of the registry. The untouched model is grey. Other labels
    take the first looks that no method in the figure has, in order.

    Args:
        labels: The labels; figures that belong together and share other labels should be given the same ones.

    Returns:
        Label → look, in the order of the labels.
    """
    names = list(dict.fromkeys(labels))
    order = {name: number for number, name in enumerate(dict.fromkeys((*FIRST, *METHODS)))}
    order |= {method.title.casefold(): order[name] for name, method in METHODS.items()}
    fixed = {name: order.get(name.casefold().removesuffix(" fine-tuning")) for name in names}
    free = (number for number in itertools.count() if number not in fixed.values())
    base = Look("0.6", "x", ":", "")
    return {
        name: base if name == BASE else look(next(free) if number is None else number) for name, number in fixed.items()
    }


def figure(
    width: float = 6.4, height: float = 3.8, *, columns: int = 1, rows: int = 1, share_y: bool = False, title: str = ""
) -> tuple[Figure, list[Axes]]:
    """An empty figure with plots side by side, row after row, on a canvas of its own (pyplot is not touched).

    Width and height are in inches and those of the whole figure.
    """
    require("matplotlib", "Drawing")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawn)
    drawn.suptitle(title, fontsize=10)
    axes: list[Axes] = []
    for index in range(rows * columns):
        axes.append(drawn.add_subplot(rows, columns, index + 1, sharey=axes[0] if axes and share_y else None))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8, which="both")
    return drawn, axes


def panels(
    count: int, *, width: float | None = None, height: float = 2.5, columns: int = 4, **more: Any
) -> tuple[Figure, list[Axes]]:
    """A figure with this many plots of a size in inches, row after row, and at most so many in a row.

    Without a width plots are 3.2 wide, and a single one, which carries the figure's heading alone, 4.2. `more` are
    arguments of [`figure`][dynalora.drawing.style.figure].
    """
    if width is None:
        width = 3.2 if count > 1 else 4.2
    columns = max(1, min(columns, count))
    rows = max(1, -(-count // columns))
    drawn, axes = figure(width * columns, height * rows + 0.4, columns=columns, rows=rows, **more)
    for axis in axes[count:]:
        drawn.delaxes(axis)
    return drawn, axes[:count]


def over_layers(kinds: Sequence[str], label: str, **more: Any) -> tuple[Figure, list[Axes]]:
    """A figure with a plot for each kind of module, with the layers on its horizontal axis."""
    drawn, axes = panels(len(kinds), **more)
    from matplotlib.ticker import MaxNLocator  # after it has been made sure that matplotlib is there

    for axis, kind in zip(axes, kinds, strict=True):
        describe(axis, title=kind, x="layer", y=label)
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))  # there are no half layers
    return drawn, axes


STEPS = "optimizer step"
"""What an axis is called that counts optimizer steps, of which there are no halves."""


def describe(axis: Axes, *, title: str = "", x: str = "", y: str = "") -> None:
    """Write a plot's heading and what its axes mean; what is empty is left out."""
    if x == STEPS:
        from matplotlib.ticker import MaxNLocator

        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if title:
        axis.set_title(title, fontsize=9)
    if x:
        axis.set_xlabel(x, fontsize=8)
    if y:
        axis.set_ylabel(y, fontsize=8)


def log_scale(axis: Axes, which: Literal["x", "y"] = "x", **options: Any) -> None:
    """Make an axis logarithmic, with plain numbers beside as many of its marks as have room.

    Args:
        axis: The axes.
        which: The horizontal or the vertical one.
        options: Passed on to matplotlib.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator

    (axis.set_xscale if which == "x" else axis.set_yscale)("log", **options)
    scale = axis.xaxis if which == "x" else axis.yaxis

    def between(value: float, _: int) -> str:
        """What stands at a mark between powers of ten: where these are few, 2 and 5; where there is none, each."""
        low, high = sorted(scale.get_view_interval())
        few = high < 100 * low
        leading = round(value / 10 ** math.floor(math.log10(value)))
        return f"{value:g}" if few and (leading in (2, 5) or high < 5 * low) else ""

    scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    scale.set_minor_locator(LogLocator(subs=range(2, 10)))
    scale.set_minor_formatter(FuncFormatter(between))


def legend(axis: Axes) -> None:
    """Explain a plot's labels in the plot, if it has any."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, frameon=True, framealpha=0.85, edgecolor="none")


def heat_map(
    axis: Axes,
    grid: np.ndarray[Any, Any],
    *,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    turned: float = 0,
    **options: Any,
) -> AxesImage:
    """Numbers (rows, columns) as shades; what is not a number stays empty.

    Of the names of rows and of columns, which are turned by so many degrees, as many are written as there is room for,
    and at most 16; None numbers them. `options` are those of matplotlib's `imshow`, such as `cmap`, `vmin` and `vmax`.
    """
    image = axis.imshow(grid, aspect="auto", interpolation="nearest", **options)
    axis.grid(False)
    for axle, names in ((axis.yaxis, rows), (axis.xaxis, columns)):
        if names is None:
            axle.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # a MaxNLocator
        else:
            size = axis.get_window_extent()
            # In pixels of the figure; names at a right angle to their axis take the height of a line.
            line = 0.16 * axis.figure.dpi
            flat = axle is axis.xaxis and not turned
            room = size.width if axle is axis.xaxis else size.height
            each = line * (0.3 + 0.5 * max(map(len, names), default=1)) if flat else line
            every = max(1, -(-len(names) // max(2, min(16, int(room / each)))))
            axle.set_ticks(range(0, len(names), every), list(names[::every]))
    if turned:
        for text in axis.get_xticklabels():
            text.set(rotation=turned, ha="right")
    return image


def rendered(drawn: Figure, kind: str = "png", *, dpi: int = 150) -> bytes:
    """A figure as the bytes of a file of this kind, `png` or `svg`; equal figures give equal files."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "dynalora", "svg.fonttype": "none"}):
        drawn.savefig(buffer, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


OVER_PICTURES = {"white": "#fefefe", "black": "#010101"}
"""White and black for what is written over shades, which stay as they are where the page is dark."""
_GREY = re.compile(r"#([0-9a-f]{2})\1\1\b")
_DARK = ((0xE7, 0xEA, 0xEE), (0x15, 0x18, 0x1C))
"""What black and white become on a dark page."""


def for_pages(svg: bytes) -> bytes:
    """An SVG picture that is light on a light page and dark on a dark one, as the reader's system says.

    Black, white and the greys between them change places; colours stay, so that a method has one colour on both.
    """
    text = svg.decode()
    greys = ({"00"} | {match[1] for match in _GREY.finditer(text)}) - {shade[1:3] for shade in OVER_PICTURES.values()}

    def dark(grey: str) -> str:
        part = int(grey, 16) / 255
        return "#" + "".join(f"{round(ink + part * (paper - ink)):02x}" for ink, paper in zip(*_DARK, strict=True))

    light_rules = "".join(f"--g{grey}:#{grey * 3};" for grey in sorted(greys))
    dark_rules = "".join(f"--g{grey}:{dark(grey)};" for grey in sorted(greys))
    # Matplotlib leaves out the fill of what is black.
    style = f":root{{{light_rules}fill:var(--g00)}}@media (prefers-color-scheme:dark){{:root{{{dark_rules}}}}}"
    text = _GREY.sub(lambda match: f"var(--g{match[1]})" if match[1] in greys else match[0], text)
    head = text.index(">", text.index("<svg")) + 1
    return f"{text[:head]}<style>{style}</style>{text[head:]}".encode()


def save(drawn: Figure, path: str | os.PathLike[str] | None, *, overwrite: bool = False, dpi: int = 150) -> list[Path]:
    """Write a figure as PNG and SVG side by side, each whole or not at all; nothing without a path.

    Args:
        drawn: The figure.
        path: The PNG file's name; the SVG has the same with another ending.
        overwrite: Whether files that are there are replaced.
        dpi: Pixels per inch of the PNG.

    Raises:
        ConfigError: There is such a file and `overwrite` is false, or the place cannot be written.
    """
    if path is None:
        return []
    places = {kind: Path(path).with_suffix(f".{kind}") for kind in ("png", "svg")}
    for place in places.values():  # all of them before the first is written
        reason = why_not_written(place)
        if reason is not None and not (overwrite and place.is_file()):
            remedy = "choose another path, or replace it with overwrite=True" if place.is_file() else "choose another"
            raise ConfigError(f"The picture '{place}' {reason}; {remedy}.")
    return [write_file(place, rendered(drawn, kind, dpi=dpi), replace=overwrite) for kind, place in places.items()]
