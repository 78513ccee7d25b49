"""The linear model of a fixed against a gated update (DISeL Figure 1)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dynalora.drawing.style import LINES, STEPS, describe, figure, legend, log_scale, look, looks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_population_losses(losses: Mapping[str, tuple[float, float]], closed_forms: Collection[str] = ()) -> Figure:
    """Loss of every correction on both populations, side by side (DISeL Figure 1).

    Args:
        losses: Name of a correction → its loss on the fine-tuning and on the pre-training population.
        closed_forms: Names of those that were not trained; their bars are hatched.
    """
    drawn, (axis,) = figure(width=6.8)
    for side, population in enumerate(("fine-tuning", "pre-training")):
        bars = axis.bar(
            [place + (side - 0.5) * 0.38 for place in range(len(losses))], [pair[side] for pair in losses.values()],
            width=0.36, label=f"{population} population", color=("0.35", "0.8")[side], edgecolor="black", linewidth=0.6,
        )  # fmt: skip
        for bar, name in zip(bars, losses, strict=True):
            if name in closed_forms:
                bar.set_hatch("///")
        axis.bar_label(bars, fmt="%.3g", fontsize=8, padding=2)
    axis.set_xticks(range(len(losses)), list(losses), fontsize=9)
    axis.grid(False, axis="x")
    axis.margins(y=0.12)
    describe(axis, title="A fixed update leaves an error on both populations", y="expected squared error")
    legend(axis)
    return drawn


def plot_mixture_losses(curves: Mapping[str, Sequence[tuple[int, float]]], closed_forms: Mapping[str, float]) -> Figure:
    """Loss on the mixture of both populations during training.

    Args:
        curves: Name of a method → (optimizer step, loss), in order.
        closed_forms: Name → loss of a correction that is known in closed form, drawn as a level line.
    """
    drawn, (axis,) = figure()
    chosen = looks(curves)
    for name, curve in curves.items():
        axis.plot(*zip(*curve, strict=True), label=name, **chosen[name].line())
    for index, (name, loss) in enumerate(closed_forms.items(), start=1):
        axis.axhline(loss, color="black", linestyle=LINES[index % len(LINES)], linewidth=1, label=name)
    log_scale(axis, "y")
    describe(
        axis,
        title="Only the gated update gets below the best fixed correction",
        x=STEPS,
        y="expected squared error, mixture",
    )
    legend(axis)
    return drawn


def plot_gate_curve(
    logit: Sequence[float], gate: Sequence[float], low: Sequence[float], high: Sequence[float]
) -> Figure:
    """Gates against the logit of the posterior, with the posterior itself."""
    drawn, (axis,) = figure(width=5.2)
    x = np.linspace(min(logit), max(logit), 200)
    axis.plot(x, 1 / (1 + np.exp(-x)), color="black", linestyle="--", linewidth=1.2, label="Bayes posterior p(x)")
    axis.fill_between(logit, low, high, color="0.8", label="gates, 10 % to 90 %", linewidth=0)
    axis.plot(logit, gate, color=look(0).color, marker="o", markersize=4, linewidth=1, label="mean gate")
    axis.set_ylim(-0.02, 1.02)
    describe(
        axis,
        title="What the gates have learned",
        x="log-odds that the input belongs to the fine-tuning population",
        y="gate",
    )
    legend(axis)
    return drawn
