"""Distance from the base model, during training and after it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dynalora.drawing.style import describe, legend, looks, panels, save
from dynalora.errors import ConfigError
from dynalora.forgetting.curves import RetentionPoint

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
    if isinstance(runs, Mapping):
        named = {name: list(points) for name, points in runs.items() if points}
    else:
        for point in runs:
            named.setdefault(point.run, []).append(point)
    texts = list(dict.fromkeys(point.text for points in named.values() for point in points))
    if not texts:
        raise ConfigError("There are no measurements to draw; train with a RetentionMonitor first.")
    drawn, axes = panels(2 * len(texts), width=4.2, height=2.9, columns=2)
    chosen = looks(named)
    for text, kl, shift in zip(texts, axes[::2], axes[1::2], strict=True):
        for name, points in named.items():
            curve = sorted((point for point in points if point.text == text), key=lambda point: point.step)
            steps = [point.step for point in curve]
            errors = [point.retention.kl_error for point in curve]
            line = chosen[name].line() | {"label": name}
            kl.errorbar(
                steps, [point.retention.kl for point in curve], yerr=errors, capsize=2, elinewidth=0.7, **line
            )
            shift.plot(steps, [point.retention.loss_shift for point in curve], **line)
        if max_forgetting is not None:
            kl.axhline(max_forgetting, color="black", linestyle=":", linewidth=1, label="budget")
        shift.axhline(0, color="0.5", linewidth=0.8)
        kl.set_ylim(bottom=0)
        describe(kl, title=text, x="optimizer step", y="KL(base ‖ tuned) (nats per token)")
        describe(shift, title=text, x="optimizer step", y="loss shift (nats per token)")
    legend(axes[0])
    drawn.suptitle(title, fontsize=10)
    save(drawn, path)
    return drawn
