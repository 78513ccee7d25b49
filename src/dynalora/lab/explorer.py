"""A plot in a report that can be read off and zoomed, with axes to choose; plotly draws it in the browser."""

from __future__ import annotations

import base64
import gzip
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from dynalora.drawing.style import looks

_SYMBOLS = {
    "o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "P": "cross", "X": "x",
    "*": "star",
}  # fmt: skip
"""Matplotlib's markers in plotly's words."""


@dataclass(frozen=True)
class Point:
    """A point of an explorer.

    Attributes:
        values: What was measured, by the keys of the explorer's quantities; what is missing is not drawn.
        note: What is shown beside it when it is pointed at.
        marked: Whether it stands out.
    """

    values: Mapping[str, float]
    note: str
    marked: bool = False


@dataclass(frozen=True)
class Line:
    """Points that are joined in their order.

    Attributes:
        label: Whose they are; lines of one label share a colour, a marker and an entry of the legend.
        points: The points.
    """

    label: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Explorer:
    """A plot of anything that was measured against anything else.

    Attributes:
        lines: What is drawn.
        quantities: What can be on an axis: key → title with its unit.
        x: Key of what is on the horizontal axis at first.
        y: Key of what is on the vertical axis at first.
        log: Keys of what has a logarithmic axis.
        caption: What it shows and how to use it.
        highest: Largest values that are shown at first, by key; what is above appears when the plot is zoomed out.
        labels: All labels of the report in order, so that a label without a look of its own has the same one as in the
            report's pictures.
    """

    lines: Sequence[Line]
    quantities: Mapping[str, str]
    x: str
    y: str
    log: Sequence[str] = ()
    caption: str = ""
    highest: Mapping[str, float] = field(default_factory=dict)
    labels: Sequence[str] = field(default=())

    @property
    def json(self) -> Markup:
        """Everything that the script of the page needs, as JSON that may stand in HTML."""
        chosen = looks([*self.labels, *(line.label for line in self.lines)])
        lines: list[dict[str, Any]] = [
            {
                "label": line.label, "color": _hex(chosen[line.label].color),
                "symbol": _SYMBOLS.get(chosen[line.label].marker, "circle"),
                "points": [
                    {"values": dict(point.values), "note": str(Markup.escape(point.note)), "marked": point.marked}
                    for point in line.points
                ],
            }
            for line in self.lines
        ]  # fmt: skip
        text = json.dumps(
            {
                "lines": lines, "quantities": dict(self.quantities), "log": list(self.log),
                "highest": dict(self.highest),
            }
        )  # fmt: skip
        return Markup(text.replace("<", "\\u003c").replace("&", "\\u0026"))


def _hex(color: str) -> str:
    """A colour for a browser: matplotlib writes greys as numbers between 0 and 1."""
    return color if color.startswith("#") else "#" + f"{round(255 * float(color)):02x}" * 3


def plot_library() -> str | None:
    """The source of plotly's library for browsers; None where plotly is not installed."""
    try:
        offline = importlib.import_module("plotly.offline")
    except ImportError:
        return None
    return str(offline.get_plotlyjs())


def packed(source: str) -> str:
    """A script as text that a page can carry and unpack: gzip in base64. The same script always gives the same text."""
    return base64.b64encode(gzip.compress(source.encode(), 9, mtime=0)).decode("ascii")
