"""The rank landscape over the layers (DiRA Figures 1, 2, 4–10), and how a PE-DyRA adapter's ranks moved."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dynalora.drawing.style import STEPS, describe, figure, heat_map, legend, look, looks, over_layers, save
from dynalora.errors import ConfigError
from dynalora.forgetting.defaults import QUANTITIES, Quantity
from dynalora.forgetting.landscape import LandscapeRow, deciding_rank, layer_index
from dynalora.forgetting.trajectory import RankTrajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_LARGEST_CEILING = 512  # ranks of whole weights would press the curves onto the axis

RANK_LABELS: dict[Quantity, str] = {
    "effective_rank": "effective rank",
    "nuclear_norm": "nuclear norm",
    "energy": "energy above τ",
    "entropy_rank": "effective rank by entropy",
    "stable_rank": "stable rank",
    "energy_rank": "rank of 99 % of the energy",
    "effect_rank": "rank of 99 % of the effect on inputs",
}
_RANKS: tuple[Quantity, ...] = ("effective_rank", "entropy_rank", "stable_rank", "energy_rank", "effect_rank")


def plot_rank_landscape(
    landscape: Sequence[LandscapeRow] | Mapping[str, Sequence[LandscapeRow]],
    path: str | os.PathLike[str] | None = None,
    quantity: Quantity | None = None,
    title: str = "",
    *,
    overwrite: bool = False,
) -> Figure:
    """Draw the landscape over the layers, one panel per module kind, runs overlaid (DiRA Figures 1, 2, 4–10).

    Args:
        landscape: Result of `rank_landscape`, or several by name.
        path: PNG file to write, and beside it the SVG; None only returns the figure.
        quantity: What to draw, a field or property of [`LandscapeRow`][dynalora.forgetting.landscape.LandscapeRow]:
            `effective_rank`, `nuclear_norm`, `energy`, `entropy_rank`, `stable_rank`, `energy_rank`, or `effect_rank`
            where it was measured. None draws the one that decides: `effect_rank` where every matrix has it, and
            `energy_rank` otherwise. A dotted line in plots of ranks is the rank that the adapters have.
        title: Of the figure; by default it says what is drawn.
        overwrite: Whether files that are there are replaced.

    Raises:
        ConfigError: The quantity is unknown or was not measured, there is nothing to draw, there is such a file and
            `overwrite` is false, or the place cannot be written.
    """
    if quantity is not None and quantity not in QUANTITIES:
        raise ConfigError(f"quantity is {quantity!r}; choose one of {', '.join(QUANTITIES)}, or leave it out.")
    runs = landscape if isinstance(landscape, Mapping) else {"": landscape}
    rows = [row for run in runs.values() for row in run]
    quantity = deciding_rank(rows) if quantity is None else quantity
    if not rows:
        raise ConfigError("There are no matrices to draw; take a landscape first.")
    if any(getattr(row, quantity) is None for row in rows):
        raise ConfigError(f"{quantity} was not measured of every matrix; take the landscape with effects.")
    ranked = quantity in _RANKS
    drawn, axes = _curves(
        {name: [run] for name, run in runs.items()},
        quantity,
        label=RANK_LABELS[quantity],
        title=title or f"{RANK_LABELS[quantity].capitalize()} of the weight updates, by layer",
        share_y=quantity != "nuclear_norm",
    )
    for kind, axis in axes.items():
        ceiling = max(row.rank for row in rows if row.kind == kind)
        if ranked and ceiling <= _LARGEST_CEILING:
            axis.axhline(ceiling, color="0.6", linestyle=":", linewidth=1)
        axis.set_ylim(bottom=-0.5 if ranked else 0)
    save(drawn, path, overwrite=overwrite)
    return drawn


def plot_stages(
    stages: Mapping[str, Sequence[Sequence[LandscapeRow]]], value: str, *, label: str, title: str
) -> Figure:
    """One number of every matrix over the layers, a panel per kind of module and a line per stage (DiRA Figures 1, 2).

    Lines are means over the seeds; a band spans the least and the largest of several.

    Args:
        stages: Name of a stage → one landscape per seed; all of the same adapter.
        value: Which number: a field of [`LandscapeRow`][dynalora.forgetting.landscape.LandscapeRow].
        label: What it is, with its unit, for the axis.
        title: Heading.
    """
    drawn, axes = _curves(stages, value, label=label, title=title)
    for axis in axes.values():
        axis.set_ylim(bottom=0)
    return drawn


def _curves(
    runs: Mapping[str, Sequence[Sequence[LandscapeRow]]], value: str, *, label: str, title: str, share_y: bool = False
) -> tuple[Figure, dict[str, Axes]]:
    """A figure and its plots by kind of module: of each run the mean over its landscapes, with a band if several."""
    kinds = list(dict.fromkeys(row.kind for run in runs.values() for rows in run for row in rows))
    drawn, axes = over_layers(kinds, label, share_y=share_y, title=title)
    chosen = looks(runs)
    for axis, kind in zip(axes, kinds, strict=True):
        for name, run in runs.items():
            matrices = [[row for row in rows if row.kind == kind] for rows in run]
            layers = [index if row.layer is None else row.layer for index, row in enumerate(matrices[0])]
            values = np.array([[float(getattr(row, value)) for row in rows] for rows in matrices])
            axis.plot(layers, values.mean(0), label=name, **chosen[name].line())
            if len(values) > 1:
                low, high, color = values.min(0), values.max(0), chosen[name].color
                axis.fill_between(layers, low, high, color=color, alpha=0.15, linewidth=0)
    if any(runs):
        legend(axes[0])
    return drawn, dict(zip(kinds, axes, strict=True))


def plot_rank_heatmap(rows: Sequence[Any], quantity: Quantity) -> Figure:
    """A rank of every adapted matrix: one row per kind of module, one column per layer.

    Rows are those of [`rank_landscape`][dynalora.rank_landscape], as objects or as mappings, which must have the
    quantity.
    """
    kinds, layers, grid = rank_grid(rows, quantity)
    drawn, (axis,) = figure(max(4.5, 0.24 * len(layers) + 2.2), max(2.2, 0.34 * len(kinds) + 1.4))
    image = heat_map(axis, grid, rows=kinds, columns=layers, cmap="cividis", vmin=0)
    describe(axis, x="layer")
    drawn.colorbar(image, ax=axis, label=RANK_LABELS[quantity])
    return drawn


def rank_grid(
    rows: Sequence[Any], quantity: Quantity = "effective_rank"
) -> tuple[list[str], list[str], np.ndarray[Any, Any]]:
    """Ranks as a grid.

    Gives kinds of modules, names of the layers (a dash for matrices outside of blocks), and the ranks, (kinds,
    layers), float64; NaN where a layer has no such matrix.
    """

    def value(row: Any, name: str) -> Any:
        return row[name] if isinstance(row, Mapping) else getattr(row, name)

    places = [-1 if value(row, "layer") is None else int(value(row, "layer")) for row in rows]
    kinds, layers = list(dict.fromkeys(str(value(row, "kind")) for row in rows)), sorted(set(places))
    grid = np.full((len(kinds), len(layers)), np.nan)
    for row, place in zip(rows, places, strict=True):
        grid[kinds.index(str(value(row, "kind"))), layers.index(place)] = float(value(row, quantity))
    return kinds, ["–" if layer < 0 else str(layer) for layer in layers], grid


def plot_rank_trajectory(
    trajectory: RankTrajectory, path: str | os.PathLike[str] | None = None, *, overwrite: bool = False
) -> Figure:
    """Draw a run's ranks: over time, by importance, and as they are at the end.

    Six panels: rank of every module over the steps; importance ranking over the steps; final ranks as a heat map of
    block × module kind; mean rank against mean importance rank; effective rank and utilisation at the end; the
    logarithm of the variance of G^{2/3} / r over the steps.

    Args:
        trajectory: Result of `rank_trajectory`.
        path: File to write, as PNG and SVG side by side; None only returns the figure.
        overwrite: Whether files that are there are replaced.

    Raises:
        ConfigError: There is such a file and `overwrite` is false, or the place cannot be written.
    """
    drawn, (over_time, ranking, final, against, used, pareto) = figure(13, 7.5, columns=3, rows=2)
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in trajectory.modules))
    _over_time(over_time, ranking, trajectory, kinds)
    _final_ranks(drawn, final, trajectory, kinds)
    against.scatter(np.mean(trajectory.importance, axis=0), np.mean(trajectory.ranks, axis=0), s=14)
    rho = f"Spearman's ρ = {trajectory.spearman:.2f}"
    describe(against, title=rho, x="mean importance rank", y="mean rank")
    shown = [row.effective_rank for row in trajectory.landscape]
    used.bar(range(len(shown)), [row.rank for row in trajectory.landscape], color="0.85", label="rank")
    used.bar(range(len(shown)), shown, color=look(0).color, label="effective rank")
    legend(used)
    mean = float(np.mean(list(trajectory.utilisation.values())))
    describe(used, title=f"effective rank, utilisation {mean:.0%}", x="module", y="rank")
    pareto.plot(trajectory.steps, trajectory.pareto_variance, marker="o", markersize=3)
    describe(pareto, title="log of the variance of G^(2/3) / r", x=STEPS, y="log variance")
    save(drawn, path, overwrite=overwrite)
    return drawn


def _over_time(ranks: Axes, ranking: Axes, trajectory: RankTrajectory, kinds: list[str]) -> None:
    """Ranks and importance ranking of every module over the steps, a colour and line for each kind of module."""
    steps = [0, *trajectory.steps]
    labelled = set()
    for number, name in enumerate(trajectory.modules):
        kind = name.rpartition(".")[2]
        line = look(kinds.index(kind)).line(marker=False) | {"alpha": 0.7}
        label = "_" if kind in labelled else kind  # one entry of the legend per kind
        labelled.add(kind)
        ranks.step(steps, [row[number] for row in trajectory.ranks], where="post", label=label, **line)
        places = [row[number] for row in trajectory.importance]
        ranking.plot(trajectory.steps, places, marker=".", markersize=3, **line)
    legend(ranks)
    ranking.invert_yaxis()
    describe(ranks, title="rank", x=STEPS, y="rank")
    describe(ranking, title="importance ranking (1: highest score)", x=STEPS, y="place")


def _final_ranks(drawn: Figure, axis: Axes, trajectory: RankTrajectory, kinds: list[str]) -> None:
    blocks = sorted({layer_index(name) or 0 for name in trajectory.modules})
    grid = np.full((len(blocks), len(kinds)), np.nan)
    for name, rank in zip(trajectory.modules, trajectory.ranks[-1], strict=True):
        grid[blocks.index(layer_index(name) or 0), kinds.index(name.rpartition(".")[2])] = rank
    names = [str(block) for block in blocks]
    image = heat_map(axis, grid, rows=names, columns=kinds, turned=45, origin="lower", cmap="cividis")
    drawn.colorbar(image, ax=axis)
    describe(axis, title="final rank", y="block")
