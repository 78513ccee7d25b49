"""Where gates open, on what text, and how well they tell domains apart (DISeL §5, App. V)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from dynalora.drawing.style import describe, heat_map, legend, log_scale, look, over_layers, panels, save
from dynalora.forgetting.gates import BINS, DEPTHS, PARTS, GateRecord, GateStatistics, Separation, depth_group, part_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Point = tuple[str, int | None, float, float | None, float | None]
"""Kind of module, layer, value, and the two ends of its interval if it has one."""


def plot_gates(
    statistics: Mapping[str, Sequence[GateStatistics]],
    path: str | os.PathLike[str] | None = None,
    title: str = "Gates by depth and domain",
    *,
    overwrite: bool = False,
) -> Figure:
    """Normalised gate histograms by depth group, domains overlaid (DISeL Figure 4).

    Args:
        statistics: Results of `dynalora.record_gates` by the name of their text's domain.
        path: File to write, as PNG and SVG side by side; None only returns the figure.
        title: Heading.
        overwrite: Whether files that are there are replaced.

    Raises:
        ConfigError: There is such a file and `overwrite` is false, or the place cannot be written.
    """
    drawn = _histograms({domain: _by_depth(rows) for domain, rows in statistics.items()}, title)
    save(drawn, path, overwrite=overwrite)
    return drawn


def plot_gates_by_kind(
    statistics: Sequence[GateStatistics], title: str = "Gates by depth and kind of module"
) -> Figure:
    """Normalised gate histograms by depth group, kinds of module overlaid, for one domain (DISeL Figure 5)."""
    by_kind: dict[str, dict[str, list[GateStatistics]]] = {kind: {} for kind in _kinds(statistics)}
    for group, rows in _by_depth(statistics).items():
        for row in rows:
            by_kind[row.kind].setdefault(group, []).append(row)
    return _histograms(by_kind, title)


def plot_gates_by_part(
    statistics: Sequence[GateStatistics], title: str = "Gates by depth, attention and MLP"
) -> Figure:
    """Normalised gate histograms by depth group, of attention and of the MLP as wholes (DISeL Figures 10 and 13)."""
    by_part: dict[str, dict[str, list[GateStatistics]]] = {part: {} for part in PARTS}
    for group, rows in _by_depth(statistics).items():
        for row in rows:
            by_part[part_of(row.module)].setdefault(group, []).append(row)
    return _histograms({part: groups for part, groups in by_part.items() if groups}, title)


def _by_depth(rows: Sequence[GateStatistics]) -> dict[str, list[GateStatistics]]:
    layers = max((row.layer for row in rows if row.layer is not None), default=-1) + 1
    groups: dict[str, list[GateStatistics]] = {}
    for row in rows:
        groups.setdefault(depth_group(row.layer, layers), []).append(row)
    return groups


def _histograms(named: Mapping[str, Mapping[str, Sequence[GateStatistics]]], title: str) -> Figure:
    """One panel per depth group, one line per name; each histogram adds up to 1."""
    present = {group for groups in named.values() for group in groups}
    groups = [group for group in DEPTHS if group in present] or ["none"]
    drawn, axes = panels(len(groups), share_y=True, title=title)
    edges = torch.linspace(0, 1, BINS + 1).numpy()
    for axis, group in zip(axes, groups, strict=True):
        for index, (name, by_group) in enumerate(named.items()):
            if rows := by_group.get(group):
                histogram = torch.stack([row.histogram for row in rows]).sum(0).double()
                share = histogram / histogram.sum().clamp_min(1)
                axis.stairs(share.numpy(), edges, label=name, **look(index).line(marker=False))
        # Most gates are nearly closed: on a linear axis the open ones could not be seen.
        log_scale(axis, "y")
        axis.set_xlim(0, 1)
        describe(axis, title=f"{group} layers" if group != "none" else "all layers", x="gate")
    describe(axes[0], y="share of gates")
    legend(axes[-1])
    return drawn


def plot_gate_means(records: Mapping[str, GateRecord]) -> Figure:
    """Mean gate over depth, one panel per kind of module, domains overlaid, with 95 % intervals over documents.

    All records are of the same adapter.
    """
    curves: dict[str, list[_Point]] = {domain: [] for domain in records}
    for domain, record in records.items():
        for row in record:
            mean = record.layer_mean(row)
            curves[domain].append((row.kind, row.layer, mean.value, mean.low, mean.high))
    return _over_depth(curves, "mean gate", "Mean gate by layer and domain")


def plot_separation(separations: Mapping[str, Sequence[Separation]]) -> Figure:
    """Area under the ROC curve over depth, one panel per kind of module, with 95 % intervals over documents."""
    curves: dict[str, list[_Point]] = {
        pair: [(item.kind, item.layer, item.auc, item.low, item.high) for item in items]
        for pair, items in separations.items()
    }
    title = "How well the gates tell tokens of two domains apart"
    return _over_depth(curves, "area under ROC", title, level=0.5)


def _over_depth(curves: Mapping[str, Sequence[_Point]], label: str, title: str, level: float | None = None) -> Figure:
    kinds = list(dict.fromkeys(kind for points in curves.values() for kind, *_ in points))
    drawn, axes = over_layers(kinds, label, share_y=True, title=title)
    for axis, kind in zip(axes, kinds, strict=True):
        for index, (name, points) in enumerate(curves.items()):
            chosen = [point for point in points if point[0] == kind]
            # Names are drawn next to each other rather than on top of each other.
            shift = 0.12 * (index - (len(curves) - 1) / 2)
            x = [(place if layer is None else layer) + shift for place, (_, layer, *_) in enumerate(chosen)]
            y = [value for _, _, value, _, _ in chosen]
            low = [value - (value if bottom is None else bottom) for _, _, value, bottom, _ in chosen]
            high = [(value if top is None else top) - value for _, _, value, _, top in chosen]
            line = look(index).line() | {"label": name}
            axis.errorbar(x, y, yerr=[low, high], elinewidth=0.8, capsize=1.5, **line)
        if level is not None:
            axis.axhline(level, color="0.5", linewidth=0.8)
    legend(axes[0])
    return drawn


def plot_gate_heatmap(statistics: Sequence[GateStatistics], title: str = "Mean gate per rank component") -> Figure:
    """Mean gate of every rank component: one panel per kind of module, layers across, components down."""
    kinds = _kinds(statistics)
    drawn, axes = panels(len(kinds), share_y=True, title=title)
    largest = max(float(row.mean.max()) for row in statistics)
    for axis, kind in zip(axes, kinds, strict=True):
        chosen = [row for row in statistics if row.kind == kind]
        r = max(len(row.mean) for row in chosen)
        grid = torch.full((r, len(chosen)), float("nan"), dtype=torch.float64)  # layers may differ in rank
        for column, row in enumerate(chosen):
            grid[: len(row.mean), column] = row.mean
        layers = ["–" if row.layer is None else str(row.layer) for row in chosen]
        image = heat_map(axis, grid.numpy(), columns=layers, cmap="cividis", vmin=0, vmax=largest)
        describe(axis, title=kind, x="layer", y="rank component")
    drawn.colorbar(image, ax=axes, label="mean gate")
    return drawn


def _kinds(statistics: Sequence[GateStatistics]) -> list[str]:
    return list(dict.fromkeys(row.kind for row in statistics))
