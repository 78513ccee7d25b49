"""How the ranks of a PE-DyRA adapter moved during training, drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dynalora.drawing import style as drawing
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

    Returns:
        The matplotlib figure.
    """
    made, (over_time, ranking, heat, against, used, pareto) = drawing.figure(
        13, 7.5, columns=3, rows=2, labels=8
    )
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in trajectory.modules))
    for number, name in enumerate(trajectory.modules):
        line = drawing.style(kinds.index(name.rpartition(".")[2]), marker=False)
        label = name.rpartition(".")[2]
        label = label if label not in over_time.get_legend_handles_labels()[1] else "_"
        over_time.step(
            [0, *trajectory.steps],
            [row[number] for row in trajectory.ranks],
            where="post",
            alpha=0.7,
            label=label,
            **line,
        )
        places = [row[number] for row in trajectory.importance]
        ranking.plot(trajectory.steps, places, alpha=0.7, marker=".", markersize=3, **line)
    over_time.legend(fontsize=7)
    _titled(over_time, "rank", "optimizer step", "rank")
    ranking.invert_yaxis()
    _titled(ranking, "importance ranking (1: highest score)", "optimizer step", "place")
    _heat_map(made, heat, trajectory, kinds)
    against.scatter(np.mean(trajectory.importance, axis=0), np.mean(trajectory.ranks, axis=0), s=14)
    _titled(against, f"Spearman's ρ = {trajectory.spearman:.2f}", "mean importance rank", "mean rank")
    shown = [row.effective_rank for row in trajectory.landscape]
    used.bar(range(len(shown)), [row.rank for row in trajectory.landscape], color="0.85", label="rank")
    used.bar(range(len(shown)), shown, color=drawing.PALETTE[0], label="effective rank")
    used.legend(fontsize=7)
    mean = float(np.mean(list(trajectory.utilisation.values())))
    _titled(used, f"effective rank, utilisation {mean:.0%}", "module", "rank")
    pareto.plot(trajectory.steps, trajectory.pareto_variance, marker="o", markersize=3)
    _titled(pareto, "variance of log(G^(2/3) / r)", "optimizer step", "variance")
    drawing.save(made, path)
    return made


def _titled(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.tick_params(labelsize=8)


def _heat_map(figure: Figure, axis: Axes, trajectory: RankTrajectory, kinds: list[str]) -> None:
    blocks = sorted({layer_index(name) or 0 for name in trajectory.modules})
    grid = np.full((len(blocks), len(kinds)), np.nan)
    for name, rank in zip(trajectory.modules, trajectory.ranks[-1], strict=True):
        grid[blocks.index(layer_index(name) or 0), kinds.index(name.rpartition(".")[2])] = rank
    image = axis.imshow(grid, aspect="auto", origin="lower", cmap="cividis")
    axis.grid(False)
    axis.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right")
    axis.set_yticks(range(len(blocks)), [str(block) for block in blocks])
    figure.colorbar(image, ax=axis)
    _titled(axis, "final rank", "", "block")
