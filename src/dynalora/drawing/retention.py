"""Distance from the base model during training, drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dynalora.drawing.style import panels, save, style
from dynalora.errors import ConfigError
from dynalora.forgetting.monitor import RetentionPoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_retention_curves(
    runs: Sequence[RetentionPoint] | Mapping[str, Sequence[RetentionPoint]],
    path: str | os.PathLike[str] | None = None,
    *,
    max_forgetting: float | None = None,
    title: str = "Distance from the base model during training",
) -> Figure:
    """Draw KL(base ‖ tuned) and loss shift against the optimizer step, runs overlaid, a row for each text.

    Args:
        runs: Points of one run, or of several by name.
        path: PNG file to write, and beside it the SVG; None only returns the figure.
        max_forgetting: The budget, drawn as a dotted line into the plots of KL.
        title: Of the figure.

    Returns:
        The matplotlib figure. Bars on KL are its standard error over the texts.

    Raises:
        ConfigError: There is no point to draw.
    """
    named: dict[str, list[RetentionPoint]] = {}
    for name, point in (
        ((point.run, point) for point in runs)
        if not isinstance(runs, Mapping)
        else ((name, point) for name, points in runs.items() for point in points)
    ):
        named.setdefault(name, []).append(point)
    texts = list(dict.fromkeys(point.text for points in named.values() for point in points))
    if not texts:
        raise ConfigError("There are no measurements to draw; train with a RetentionMonitor first.")
    made, axes = panels(2 * len(texts), width=4.2, height=2.9, columns=2)
    for row, text in enumerate(texts):
        kl, shift = axes[2 * row], axes[2 * row + 1]
        for index, (name, points) in enumerate(named.items()):
            chosen = sorted((point for point in points if point.text == text), key=lambda point: point.step)
            steps = [point.step for point in chosen]
            kl.errorbar(
                steps,
                [point.retention.kl for point in chosen],
                yerr=[point.retention.kl_error for point in chosen],
                capsize=2,
                elinewidth=0.7,
                label=name,
                **style(index),
            )
            shift.plot(steps, [point.retention.loss_shift for point in chosen], label=name, **style(index))
        if max_forgetting is not None:
            kl.axhline(max_forgetting, color="black", linestyle=":", linewidth=1, label="budget")
        shift.axhline(0, color="0.5", linewidth=0.8)
        kl.set_ylim(bottom=0)
        kl.set_ylabel("KL(base ‖ tuned) (nats per token)", fontsize=8)
        shift.set_ylabel("loss shift (nats per token)", fontsize=8)
        for axis in (kl, shift):
            axis.set_title(text, fontsize=9)
            axis.set_xlabel("optimizer step", fontsize=8)
    axes[0].legend(fontsize=7, frameon=False)
    made.suptitle(title, fontsize=10)
    save(made, path)
    return made
