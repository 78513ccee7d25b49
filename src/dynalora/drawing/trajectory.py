"""How the ranks of a PE-DyRA adapter moved during training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dynalora.drawing.style import describe, figure, heat_map, legend, look, save
from dynalora.forgetting.landscape import layer_index
from dynalora.forgetting.trajectory import RankTrajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_rank_trajectory(trajectory: RankTrajectory, path: str | None = None) -> Figure:
    """Draw a run's ranks: over time, by importance, and as they are at the end.

    Six panels: rank of every module over the steps; importance ranking over the steps; final ranks as a heat map of
    block × module kind; mean rank against mean importance rank; effective rank and utilisation at the end; the
    variance of log(G^{2/3} / r) over the steps.

    Args:
        trajectory: Result of `rank_trajectory`.
        path: File to write, as PNG and SVG side by side; None only returns the figure.
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
    describe(pareto, title="variance of log(G^(2/3) / r)", x="optimizer step", y="variance")
    save(drawn, path)
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
    describe(ranks, title="rank", x="optimizer step", y="rank")
    describe(ranking, title="importance ranking (1: highest score)", x="optimizer step", y="place")


def _final_ranks(drawn: Figure, axis: Axes, trajectory: RankTrajectory, kinds: list[str]) -> None:
    blocks = sorted({layer_index(name) or 0 for name in trajectory.modules})
    grid = np.full((len(blocks), len(kinds)), np.nan)
    for name, rank in zip(trajectory.modules, trajectory.ranks[-1], strict=True):
        grid[blocks.index(layer_index(name) or 0), kinds.index(name.rpartition(".")[2])] = rank
    names = [str(block) for block in blocks]
    image = heat_map(axis, grid, rows=names, columns=kinds, turned=45, origin="lower", cmap="cividis")
    drawn.colorbar(image, ax=axis)
    describe(axis, title="final rank", y="block")
