"""Gates, drawn: where they open, on what, and how well they tell domains apart (DISeL §5, App. V).

Lines differ in dash and marker as well as in colour, so that the plots can be read in black and white. Every function
returns a matplotlib figure, and also writes it if a path is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from dynalora.drawing.style import figure, save, style
from dynalora.forgetting.gates import (
    BINS,
    DEPTHS,
    GateMean,
    GateRecord,
    GateStatistics,
    Separation,
    depth_group,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_gates(
    statistics: Mapping[str, Sequence[GateStatistics]], path: str | None = None, title: str = ""
) -> Figure:
    """Normalised gate histograms by depth group, domains overlaid (DISeL Figure 4).

    Args:
        statistics: Results of `dynalora.record_gates` by the name of their text's domain.
        path: File to write, as PNG and SVG side by side; None only returns the figure.
        title: Heading; empty names what is drawn.
    """
    chosen = {
        domain: {group: list(rows) for group, rows in _by_depth(rows).items()}
        for domain, rows in statistics.items()
    }
    return _histograms(chosen, title or "Gates by depth and domain", path)


def plot_gates_by_kind(
    statistics: Sequence[GateStatistics], path: str | None = None, title: str = ""
) -> Figure:
    """Normalised gate histograms by depth group, kinds of module overlaid, for one domain (DISeL Figure 5).

    Args:
        statistics: Result of `dynalora.record_gates`.
        path: File to write, as PNG and SVG side by side; None only returns the figure.
        title: Heading; empty names what is drawn.
    """
    chosen: dict[str, dict[str, list[GateStatistics]]] = {kind: {} for kind in _kinds(statistics)}
    for group, rows in _by_depth(statistics).items():
        for row in rows:
            chosen[row.kind].setdefault(group, []).append(row)
    return _histograms(chosen, title or "Gates by depth and kind of module", path)


def _by_depth(rows: Sequence[GateStatistics]) -> dict[str, list[GateStatistics]]:
    layers = max((row.layer for row in rows if row.layer is not None), default=-1) + 1
    groups: dict[str, list[GateStatistics]] = {}
    for row in rows:
        groups.setdefault(depth_group(row.layer, layers), []).append(row)
    return groups


def _histograms(
    chosen: Mapping[str, Mapping[str, Sequence[GateStatistics]]], title: str, path: str | None
) -> Figure:
    """One panel per depth group, one line per name; each histogram adds up to 1."""
    found = {group for groups in chosen.values() for group in groups}
    groups = [group for group in DEPTHS if group in found] or ["none"]
    made, axes = _figure(len(groups), 1)
    edges = torch.linspace(0, 1, BINS + 1)
    for axis, group in zip(axes, groups, strict=True):
        for index, (name, by_group) in enumerate(chosen.items()):
            rows = by_group.get(group, ())
            if not rows:
                continue
            histogram = torch.stack([row.histogram for row in rows]).sum(0).double()
            share = histogram / histogram.sum().clamp_min(1)
            axis.stairs(
                share.numpy(), edges.numpy(), label=name, **style(index, marker=False),
            )  # fmt: skip
        # Most gates are nearly closed: on a linear axis the open ones could not be seen.
        axis.set_yscale("log")
        axis.set_xlim(0, 1)
        axis.set_title(f"{group} layers" if group != "none" else "all layers", fontsize=9)
        axis.set_xlabel("gate", fontsize=8)
    axes[0].set_ylabel("share of gates", fontsize=8)
    axes[-1].legend(fontsize=7, frameon=False)
    return _done(made, title, path)


def plot_gate_means(records: Mapping[str, GateRecord], path: str | None = None, title: str = "") -> Figure:
    """Mean gate over depth, one panel per kind of module, domains overlaid, with 95 % intervals over documents.

    Args:
        records: Results of `dynalora.record_gates` by domain, all of the same adapter.
        path: File to write, as PNG and SVG side by side; None only returns the figure.
        title: Heading; empty names what is drawn.
    """

    def point(record: GateRecord, row: GateStatistics) -> GateMean:
        mean = record.mean(lambda other: other is row)
        assert mean is not None  # the row is one of the record's
        return mean

    lines = {
        domain: [(row.kind, row.layer, point(record, row)) for row in record]
        for domain, record in records.items()
    }
    values = {
        domain: [(kind, layer, mean.value, mean.low, mean.high) for kind, layer, mean in points]
        for domain, points in lines.items()
    }
    return _over_depth(values, "mean gate", title or "Mean gate by layer and domain", path)


def plot_separation(
    separations: Mapping[str, Sequence[Separation]], path: str | None = None, title: str = ""
) -> Figure:
    """Area under the ROC curve over depth, one panel per kind of module, with 95 % intervals over documents.

    Args:
        separations: Results of `dynalora.forgetting.gates.gate_separation` by the name of their pair of domains.
        path: File to write, as PNG and SVG side by side; None only returns the figure.
        title: Heading; empty names what is drawn.
    """
    values = {
        pair: [(item.kind, item.layer, item.auc, item.low, item.high) for item in items]
        for pair, items in separations.items()
    }
    return _over_depth(
        values,
        "area under ROC",
        title or "How well the gates tell tokens of two domains apart",
        path,
        line=0.5,
    )


def _over_depth(
    values: Mapping[str, Sequence[tuple[str, int | None, float, float | None, float | None]]],
    label: str,
    title: str,
    path: str | None,
    line: float | None = None,
) -> Figure:
    kinds = list(dict.fromkeys(kind for points in values.values() for kind, *_ in points))
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    made, axes = _figure(columns, rows)
    for axis in axes[len(kinds) :]:
        axis.set_visible(False)
    for axis, kind in zip(axes, kinds, strict=False):
        for index, (name, points) in enumerate(values.items()):
            chosen = [point for point in points if point[0] == kind]
            # Names are drawn next to each other rather than on top of each other.
            shift = 0.12 * (index - (len(values) - 1) / 2)
            x = [(place if layer is None else layer) + shift for place, (_, layer, *_) in enumerate(chosen)]
            y = [value for _, _, value, _, _ in chosen]
            low = [value - (value if bottom is None else bottom) for _, _, value, bottom, _ in chosen]
            high = [(value if top is None else top) - value for _, _, value, _, top in chosen]
            axis.errorbar(
                x, y, yerr=[low, high], label=name, elinewidth=0.8, capsize=1.5, **style(index),
            )  # fmt: skip
        if line is not None:
            axis.axhline(line, color="0.5", linewidth=0.8)
        axis.set_title(kind, fontsize=9)
        axis.set_xlabel("layer", fontsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # a MaxNLocator
    for index in range(0, len(kinds), columns):
        axes[index].set_ylabel(label, fontsize=8)
    axes[0].legend(fontsize=7, frameon=False)
    return _done(made, title, path)


def plot_gate_heatmap(
    statistics: Sequence[GateStatistics], path: str | None = None, title: str = ""
) -> Figure:
    """Mean gate of every rank component: one panel per kind of module, layers across, components down.

    Args:
        statistics: Result of `dynalora.record_gates`.
        path: File to write, as PNG and SVG side by side; None only returns the figure.
        title: Heading; empty names what is drawn.
    """
    kinds = _kinds(statistics)
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    made, axes = _figure(columns, rows)
    top = max(float(row.mean.max()) for row in statistics)
    for axis in axes[len(kinds) :]:
        axis.set_visible(False)
    image = None
    for axis, kind in zip(axes, kinds, strict=False):
        chosen = [row for row in statistics if row.kind == kind]
        r = max(len(row.mean) for row in chosen)
        grid = torch.full((r, len(chosen)), float("nan"), dtype=torch.float64)  # layers may differ in rank
        for column, row in enumerate(chosen):
            grid[: len(row.mean), column] = row.mean
        image = axis.imshow(
            grid.numpy(), aspect="auto", cmap="gray_r", vmin=0, vmax=top, interpolation="nearest"
        )
        axis.grid(False)
        every = max(1, -(-len(chosen) // 8))
        axis.set_xticks(
            range(0, len(chosen), every),
            ["–" if row.layer is None else str(row.layer) for row in chosen[::every]],
        )
        axis.yaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # a MaxNLocator
        axis.set_title(kind, fontsize=9)
        axis.set_xlabel("layer", fontsize=8)
    for index in range(0, len(kinds), columns):
        axes[index].set_ylabel("rank component", fontsize=8)
    assert image is not None  # there is at least one kind
    made.colorbar(image, ax=axes[: len(kinds)], label="mean gate")
    return _done(made, title or "Mean gate per rank component", path)


def _kinds(statistics: Sequence[GateStatistics]) -> list[str]:
    return list(dict.fromkeys(row.kind for row in statistics))


def _figure(columns: int, rows: int) -> tuple[Figure, list[Axes]]:
    return figure(
        max(3.2 * columns, 4.2), 2.5 * rows + 0.4, columns=columns, rows=rows, share_y=True, labels=8
    )


def _done(made: Figure, title: str, path: str | None) -> Figure:
    made.suptitle(title, fontsize=10)
    save(made, path)
    return made
