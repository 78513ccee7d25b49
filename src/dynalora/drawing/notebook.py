"""How results look in a notebook: tables, and pictures where matplotlib is installed."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from functools import singledispatch
from typing import TYPE_CHECKING, Any

from dynalora.adapter.state import StateReport, StateReports
from dynalora.drawing.landscape import RANK_LABELS, plot_rank_heatmap
from dynalora.drawing.retention import plot_retention_curves, plot_scaled_update
from dynalora.drawing.style import rendered
from dynalora.errors import DynaloraError
from dynalora.forgetting.curves import RetentionCurves, RetentionPoint, RetentionPoints
from dynalora.forgetting.landscape import Landscape, deciding_rank
from dynalora.forgetting.retention import Retention
from dynalora.forgetting.trim import TrimCurve

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@singledispatch
def html_of(result: Any) -> str:
    """A result in HTML."""
    return f"<pre>{html.escape(repr(result))}</pre>"


@html_of.register
def _(result: StateReports) -> str:
    return "".join(_state(report) for report in result) or "<p>The model has no adapter of dynalora.</p>"


@html_of.register
def _(result: StateReport) -> str:
    return _state(result)


@html_of.register
def _(result: Landscape) -> str:
    if not result:
        return "<p>No matrix is adapted.</p>"
    kinds: dict[str, list[Any]] = {}
    for row in result:
        kinds.setdefault(row.kind, []).append(row)
    deciding = deciding_rank(result)
    rows = [
        [
            kind, len(of_kind), _mean([row.rank for row in of_kind]), _mean([row.effective_rank for row in of_kind]),
            _mean([row.entropy_rank for row in of_kind]), _mean([getattr(row, deciding) for row in of_kind]),
            _mean([row.nuclear_norm for row in of_kind], 3),
        ]
        for kind, of_kind in kinds.items()
    ]  # fmt: skip
    table = _table(
        ["module", "matrices", "rank", "effective rank", "by entropy", RANK_LABELS[deciding], "nuclear norm"], rows
    )
    return f"{table}<p>Means over the layers; effective rank: singular values above the threshold.</p>" + _picture(
        lambda: plot_rank_heatmap(result, deciding)
    )


@html_of.register
def _(result: Retention) -> str:
    return _retention([["", result]]) + _WORDS


@html_of.register
def _(result: RetentionPoints) -> str:
    return _curves({"": result}, lambda: plot_retention_curves(result))


@html_of.register
def _(result: RetentionCurves) -> str:
    return _curves(result, lambda: plot_retention_curves(result))


@html_of.register
def _(result: TrimCurve) -> str:
    columns = {
        "factor of the update": [f"{point.factor:g}" for point in result],
        "KL from the base model": [f"{point.kl:.4f} ± {point.kl_error:.4f}" for point in result],
    }
    if any(point.loss is not None for point in result):
        columns["held-out loss"] = ["–" if point.loss is None else f"{point.loss:.4f}" for point in result]
    table = _table(list(columns), list(zip(*columns.values(), strict=True)))
    return table + _picture(lambda: plot_scaled_update({"": list(result)}))


_WORDS = "<p>Nats per token; 0 is an unchanged model. ±: standard error over the texts.</p>"


def _state(report: StateReport) -> str:
    """One adapter's state as a table."""
    ranks = list(report.ranks.values())
    spread = f"{min(ranks)} to {max(ranks)}, mean {_mean(ranks)}" if ranks else "–"
    rows: list[list[Any]] = [
        ["method", report.method],
        ["step", f"{report.step:,}" + (f" of {report.total_steps:,}" if report.total_steps else "")],
        ["trained parameters", f"{report.trainable_parameters:,}"],
        [f"ranks of {len(ranks)} matrices", spread],
        *([name, _detail(value)] for name, value in report.details.items()),
    ]
    return _table([f"adapter {report.adapter}", ""], rows)


def _detail(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        shown = ", ".join(f"{name}: {_detail(entry)}" for name, entry in list(value.items())[:_ENTRIES])
        return shown + (f" and {len(value) - _ENTRIES:,} more" if len(value) > _ENTRIES else "")
    return str(value)


_ENTRIES = 6
"""Most entries of a mapping that are written."""


def _curves(curves: Mapping[str, Sequence[RetentionPoint]], draw: Callable[[], Figure]) -> str:
    """The last measurement of each run on each text, and all of them as a picture."""
    last = {(name or point.run, point.text): point for name, points in curves.items() for point in points}
    if not last:
        return "<p>Nothing has been measured yet.</p>"
    rows = [[f"{run}, {text}, step {point.step:,}", point.retention] for (run, text), point in last.items()]
    return _retention(rows) + _WORDS + _picture(draw)


def _retention(rows: Sequence[Sequence[Any]]) -> str:
    cells = [
        [name, f"{measured.kl:.4f} ± {measured.kl_error:.4f}", f"{measured.loss_shift:+.4f}", f"{measured.tokens:,}"]
        for name, measured in rows
    ]
    return _table(["", "KL from the base model", "loss shift", "tokens"], cells)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(tag: str, cells: Sequence[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', columns)}</thead><tbody>{body}</tbody></table>"


def _picture(draw: Callable[[], Figure]) -> str:
    """A figure as an image; nothing where it cannot be drawn."""
    try:
        data = base64.b64encode(rendered(draw(), "svg")).decode("ascii")
    except DynaloraError:  # matplotlib is not installed, or there is nothing to draw
        return ""
    source = f"data:image/svg+xml;base64,{data}"
    return f'<img src="{source}" alt="The same as a picture" style="max-width:100%;background:white">'


def _mean(values: Sequence[float], decimals: int = 1) -> str:
    return f"{sum(values) / len(values):.{decimals}f}"
