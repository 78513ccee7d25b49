"""Plots of a run as PNG, in colours that readers with any colour vision can tell apart.

Every function that draws returns the PNG's bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dynalora.drawing.style import MARKERS, PALETTE, figure, rendered, style
from dynalora.lab.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dynalora.adapter.method import Panel


def save_figure(run: RunFolder, name: str, made: Figure) -> bytes:
    """Write a figure into a run's `plots/` as PNG and SVG; returns the PNG, for the report."""
    picture = rendered(made)
    run.write(f"plots/{name}.png", picture)
    run.write(f"plots/{name}.svg", rendered(made, "svg"))
    return picture


def loss_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Training loss (thin, with a running mean) and held-out loss (markers) against the optimizer step.

    Args:
        runs: Name of each run → its metric records, which may hold `step`, `loss` and `held_out_loss` (nats per
            token).

    Returns:
        A PNG.
    """
    made, (axis,) = figure()
    for index, (name, records) in enumerate(runs.items()):
        colour = PALETTE[index % len(PALETTE)]
        steps, losses = _series(records, "loss")
        if len(steps):
            axis.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
            axis.plot(steps, running_mean(losses), color=colour, linewidth=1.6, label=f"{name}, training")
        steps, losses = _series(records, "held_out_loss")
        if len(steps):
            marker = MARKERS[index % len(MARKERS)]
            axis.plot(
                steps, losses, color=colour, marker=marker, markersize=5, linewidth=1.2, linestyle="--",
                label=f"{name}, held out",
            )  # fmt: skip
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("loss (nats per token)")
    axis.set_ylim(bottom=0)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8)
    return rendered(made)


def metric_panels(records: Sequence[Mapping[str, Any]], panels: Sequence[Panel]) -> bytes | None:
    """A method's own metrics against the optimizer step, one plot for each panel.

    Args:
        records: Metric records of a run, with `step` and the metrics.
        panels: What to draw; panels without any number are left out.

    Returns:
        A PNG; None if there is nothing to draw.
    """
    found = []
    for panel in panels:
        curves = {name: _series(records, name) for name in panel.metrics}
        curves = {name: curve for name, curve in curves.items() if len(curve[0])}
        if curves:
            found.append((panel, curves))
    if not found:
        return None
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    made, axes = figure(width=3.4 * columns, height=2.7 * rows, columns=columns, rows=rows)
    for axis, (panel, curves) in zip(axes, found, strict=False):
        for index, (name, (steps, values)) in enumerate(curves.items()):
            axis.plot(
                steps, values, label=name, **style(index, marker=False),
            )  # fmt: skip
        if panel.log and any((values > 0).any() for _, values in curves.values()):
            axis.set_yscale("log", nonpositive="mask")
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel("optimizer step")
        if len(curves) > 1:
            axis.legend(frameon=False, fontsize=8)
    for axis in axes[len(found) :]:
        axis.set_visible(False)
    return rendered(made)


def _series(
    records: Sequence[Mapping[str, Any]], key: str
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    pairs = [
        (record["step"], record[key])
        for record in records
        if record.get(key) is not None and "step" in record
    ]
    return np.array([step for step, _ in pairs], dtype=float), np.array(
        [value for _, value in pairs], dtype=float
    )


def running_mean(values: Sequence[float] | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Mean over a centred window of about a fifteenth of the run, narrower at both ends."""
    half = max(1, len(values) // 30)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return np.asarray((sums[high] - sums[low]) / (high - low))


def bars(
    values: Mapping[str, float | tuple[float, float, float]],
    *,
    ylabel: str,
    title: str = "",
    decimals: int = 3,
) -> bytes:
    """One bar per name, with its number above it and, where given, its interval.

    Args:
        values: Name → value, or → (value, low, high).
        ylabel: What the height means, with its unit.
        title: Heading of the plot.
        decimals: Digits after the point of the printed numbers.

    Returns:
        A PNG.
    """
    made, (axis,) = figure(width=max(3.2, 1.1 * len(values) + 1.6))
    for index, (name, given) in enumerate(values.items()):
        value, low, high = given if isinstance(given, tuple) else (given, given, given)
        # The base model is grey, so that a method has the same colour in every plot of a report.
        trained = [other for other in values if other != "base"]
        colour = PALETTE[trained.index(name) % len(PALETTE)] if name in trained else "0.6"
        axis.bar(index, value, width=0.62, color=colour)
        if high > low:
            axis.errorbar(
                index, value, yerr=[[value - low], [high - value]], color="black", capsize=4, linewidth=1
            )
        axis.annotate(
            f"{value:.{decimals}f}", (index, max(value, high)), xytext=(0, 3), textcoords="offset points",
            ha="center", va="bottom", fontsize=9,
        )  # fmt: skip
    axis.set_xticks(range(len(values)), list(values))
    axis.grid(False, axis="x")
    axis.set_ylabel(ylabel)
    axis.margins(y=0.15)
    if title:
        axis.set_title(title, fontsize=10)
    return rendered(made)


def retention_bars(kl: Mapping[str, float], shift: Mapping[str, float]) -> bytes:
    """How far each adapted model has moved from the base model, side by side: smaller is better.

    Args:
        kl: Name → KL(base ‖ tuned), nats per token.
        shift: Name → loss on the base model's own text minus the base model's loss on it, nats per token.

    Returns:
        A PNG.
    """
    made, axes = figure(width=7.2, height=3.4, columns=2)
    for axis, values, label in zip(axes, (kl, shift), ("KL(base ‖ tuned)", "loss shift"), strict=True):
        for index, value in enumerate(values.values()):
            axis.bar(index, value, width=0.62, color=PALETTE[index % len(PALETTE)])
            axis.annotate(
                f"{value:.4f}", (index, max(value, 0)), xytext=(0, 3), textcoords="offset points", ha="center",
                fontsize=9,
            )  # fmt: skip
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(values)), list(values))
        axis.grid(False, axis="x")
        axis.set_ylabel(f"{label} (nats per token)")
        axis.margins(y=0.15)
    return rendered(made)


def rank_heatmap(rows: Sequence[Any], *, title: str = "") -> bytes:
    """Effective rank of every adapted matrix: one row per kind of module, one column per layer.

    Args:
        rows: Rows of [`dynalora.rank_landscape`][dynalora.rank_landscape], as objects or mappings with `layer`,
            `kind` and `effective_rank`.
        title: Heading of the plot.

    Returns:
        A PNG.
    """
    kinds, grid = rank_grid(rows)
    layers = _layers(rows)
    made, (axis,) = figure(width=max(4.5, 0.24 * len(layers) + 2.2), height=max(2.2, 0.34 * len(kinds) + 1.4))
    image = axis.imshow(grid, aspect="auto", cmap="cividis", vmin=0)
    axis.grid(False)
    axis.set_yticks(range(len(kinds)), kinds)
    every = max(1, -(-len(layers) // 16))
    axis.set_xticks(
        range(0, len(layers), every),
        ["–" if layers[i] < 0 else str(layers[i]) for i in range(0, len(layers), every)],
    )
    axis.set_xlabel("layer")
    made.colorbar(image, ax=axis, label="effective rank")
    if title:
        axis.set_title(title, fontsize=10)
    return rendered(made)


def rank_grid(rows: Sequence[Any]) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Effective ranks (kinds, layers) with the kinds' names; NaN where a layer has no such matrix.

    Args:
        rows: As in [`rank_heatmap`][dynalora.drawing.runs.rank_heatmap].
    """
    kinds = list(dict.fromkeys(str(_get(row, "kind")) for row in rows))
    layers = _layers(rows)
    grid = np.full((len(kinds), len(layers)), np.nan)
    for row in rows:
        layer = _get(row, "layer")
        place = layers.index(-1 if layer is None else int(layer))
        grid[kinds.index(str(_get(row, "kind"))), place] = float(_get(row, "effective_rank"))
    return kinds, grid


def _layers(rows: Sequence[Any]) -> list[int]:
    """Layer numbers in order; −1 stands for what belongs to none."""
    return sorted({-1 if (layer := _get(row, "layer")) is None else int(layer) for row in rows})


def _get(row: Any, name: str) -> Any:
    return row[name] if isinstance(row, Mapping) else getattr(row, name)
