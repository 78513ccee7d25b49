"""What was measured during training, against the optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dynalora.adapter.method import Panel
from dynalora.drawing.style import STEPS, describe, figure, legend, log_scale, look, looks, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_losses(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Training loss (thin, with a running mean) and held-out loss (markers) against the optimizer step.

    Args:
        runs: Name of each run → its metric records, which may hold `step`, `loss` and `held_out_loss` (nats per
            token).
    """
    drawn, (axis,) = figure()
    chosen = looks(runs)
    for name, records in runs.items():
        color, marker = chosen[name].color, chosen[name].marker
        steps, losses = _series(records, "loss")
        if len(steps):
            axis.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
            axis.plot(steps, running_mean(losses), color=color, linewidth=1.6, label=f"{name}, training")
        steps, losses = _series(records, "held_out_loss")
        if len(steps):
            axis.plot(
                steps, losses, color=color, marker=marker, markersize=5, linewidth=1.2, linestyle="--",
                label=f"{name}, held out",
            )  # fmt: skip
    describe(axis, x=STEPS, y="loss (nats per token)")
    axis.set_ylim(bottom=0)
    legend(axis)
    return drawn


def plot_metrics(records: Sequence[Mapping[str, Any]], shown: Sequence[Panel]) -> Figure | None:
    """A method's own metrics against the optimizer step, a plot for each panel in which any changes; None if none does.

    What never changes is not drawn. `records` are those of a run, with `step` and the metrics.
    """
    filled = []
    for panel in shown:
        curves = {name: _series(records, name) for name in panel.metrics}
        curves = {name: (steps, values) for name, (steps, values) in curves.items() if len(np.unique(values)) > 1}
        if curves:
            filled.append((panel, curves))
    if not filled:
        return None
    drawn, axes = panels(len(filled), width=3.4, height=2.7, columns=3)
    for axis, (panel, curves) in zip(axes, filled, strict=True):
        for index, (name, (steps, values)) in enumerate(curves.items()):
            axis.plot(steps, values, label=name, **look(index).line(marker=False))
        if panel.log and any((values > 0).any() for _, values in curves.values()):
            log_scale(axis, "y", nonpositive="mask")
        describe(axis, title=panel.title, x=STEPS)
        if len(curves) > 1:
            legend(axis)
    return drawn


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    pairs = [(record["step"], record[key]) for record in records if record.get(key) is not None and "step" in record]
    steps, values = np.array(pairs, dtype=float).reshape(-1, 2).T
    return steps, values


def running_mean(values: Sequence[float] | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Mean over a centred window of about a fifteenth of the run, narrower at both ends: (n) → (n)."""
    half = max(1, len(values) // 30)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return np.asarray((sums[high] - sums[low]) / (high - low))
