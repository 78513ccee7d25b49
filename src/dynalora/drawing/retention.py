"""Distance from the base model, during training and after it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dynalora.drawing.style import STEPS, describe, legend, looks, panels, save
from dynalora.errors import ConfigError
from dynalora.forgetting.curves import RetentionPoint
from dynalora.forgetting.trim import TrimPoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_retention_curves(
    runs: Sequence[RetentionPoint] | Mapping[str, Sequence[RetentionPoint]],
    path: str | os.PathLike[str] | None = None,
    *,
    max_forgetting: float | None = None,
    title: str = "Distance from the base model during training",
    overwrite: bool = False,
) -> Figure:
    """Draw KL(base ‖ tuned) and loss shift against the optimizer step, runs overlaid, a row for each text.

    Args:
        runs: Points of one run, or of several by name.
        path: PNG file to write, and beside it the SVG; None only returns the figure.
        max_forgetting: The budget, drawn as a dotted line into the plots of KL.
        title: Of the figure.
        overwrite: Whether files that are there are replaced.

    Returns:
        The matplotlib figure. Bars on KL are its standard error over the texts.

    Raises:
        ConfigError: There is no point to draw, there is such a file and `overwrite` is false, or the place cannot be
            written.
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
    drawn, axes = panels(2 * len(texts), width=4.2, height=2.9, columns=2, title=title)
    chosen = looks(named)
    for text, kl, shift in zip(texts, axes[::2], axes[1::2], strict=True):
        for name, points in named.items():
            curve = sorted((point for point in points if point.text == text), key=lambda point: point.step)
            steps = [point.step for point in curve]
            errors = [point.retention.kl_error for point in curve]
            line = chosen[name].line() | {"label": name}
            kl.errorbar(steps, [point.retention.kl for point in curve], yerr=errors, capsize=2, elinewidth=0.7, **line)
            shift.plot(steps, [point.retention.loss_shift for point in curve], **line)
        if max_forgetting is not None:
            kl.axhline(max_forgetting, color="black", linestyle=":", linewidth=1, label="budget")
        shift.axhline(0, color="0.5", linewidth=0.8)
        kl.set_ylim(bottom=0)
        describe(kl, title=text, x=STEPS, y="KL(base ‖ tuned) (nats per token)")
        describe(shift, title=text, x=STEPS, y="loss shift (nats per token)")
    legend(axes[0])
    save(drawn, path, overwrite=overwrite)
    return drawn


def plot_scaled_update(
    curves: Mapping[str, Sequence[TrimPoint]], *, taken: float | None = None, max_kl: float | None = None
) -> Figure:
    """Draw what an update forgets and what it has learned against the factor that it is scaled with.

    Args:
        curves: Text → points; the held-out loss is drawn of the first text that has it.
        taken: The factor that was taken, drawn as a dotted line.
        max_kl: The bound on KL, drawn as a dotted line.

    Returns:
        The matplotlib figure. Bars on KL are its standard error over the texts.
    """
    losses = next((points for points in curves.values() if any(p.loss is not None for p in points)), [])
    drawn, axes = panels(2 if losses else 1, width=4.2, height=2.9, columns=2)
    chosen = looks(curves)
    for name, points in curves.items():
        axes[0].errorbar(
            [point.factor for point in points], [point.kl for point in points],
            yerr=[point.kl_error for point in points], capsize=2, elinewidth=0.7,
            **(chosen[name].line() | {"label": name}),
        )  # fmt: skip
    if max_kl is not None:
        axes[0].axhline(max_kl, color="black", linestyle=":", linewidth=1, label="bound")
    axes[0].set_ylim(bottom=0)
    describe(axes[0], title="forgotten", x="factor of the update", y="KL(base ‖ tuned) (nats per token)")
    if losses:
        places, heights = zip(*((p.factor, p.loss) for p in losses if p.loss is not None), strict=True)
        axes[1].plot(places, heights, color="black", marker="o", markersize=3.5, linewidth=1.2)
        describe(axes[1], title="learned", x="factor of the update", y="held-out loss (nats per token)")
    for axis in axes[: 1 + bool(losses)]:
        if taken is not None:
            axis.axvline(taken, color="0.5", linestyle=":", linewidth=1, label="taken")
    legend(axes[0])
    return drawn
