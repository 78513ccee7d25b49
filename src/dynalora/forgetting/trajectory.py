"""How ranks moved during training (PE-DyRA), from the record that is kept with the adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from dynalora.drawing import style as drawing
from dynalora.errors import DynaloraError
from dynalora.forgetting.landscape import PAPER_TAU, LandscapeRow, layer_index, rank_landscape
from dynalora.methods.pedyra import adjustments

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RankTrajectory:
    """The ranks of all adapted matrices over a run.

    Attributes:
        modules: Module names, in model order.
        steps: Optimizer steps done at each adjustment.
        ranks: Ranks by adjustment and module, (n + 1) × modules: at the start, and after each adjustment.
        scores: Layer scores (eq. 7) at each adjustment, n × modules.
        importance: Importance ranking at each adjustment, n × modules: 1 for the highest score.
        pareto_variance: At each adjustment, the variance over modules of log(G^{2/3} / r), with G the layer's score and
            r its rank; 0 where ranks are in proportion to G^{2/3} (Theorem 3.1). Modules of score 0 are left out;
            NaN if fewer than two remain.
        spearman: Correlation of the modules' mean rank with their mean importance rank: -1 if what matters more has
            higher rank throughout; NaN without variation.
        landscape: The spectra at the end: a row per module, with its effective rank.
    """

    modules: list[str]
    steps: list[int]
    ranks: list[list[int]]
    scores: list[list[float]]
    importance: list[list[int]]
    pareto_variance: list[float]
    spearman: float
    landscape: list[LandscapeRow]

    @property
    def utilisation(self) -> dict[str, float]:
        """Effective rank as a share of the rank, by module, at the end."""
        return {row.module: row.effective_rank / row.rank for row in self.landscape}


def rank_trajectory(model: nn.Module, adapter: str = "default", tau: float = PAPER_TAU) -> RankTrajectory:
    """What became of the ranks of a PE-DyRA adapter.

    Args:
        model: Model with the adapter, trained or loaded.
        adapter: The adapter's name.
        tau: Threshold on singular values for the effective rank.

    Raises:
        DynaloraError: There has been no adjustment.
    """
    record = adjustments(model, adapter)
    if not record:
        raise DynaloraError(
            f"adapter {adapter!r} has no adjustment of ranks on record; only PE-DyRA adapters have one, from their "
            "first adjustment on."
        )
    modules = list(record[0].ranks)
    start = {name: len(scores) for name, scores in record[0].scores.items()}
    ranks = [[start[name] for name in modules], *([one.ranks[name] for name in modules] for one in record)]
    scores = [[one.layer_scores[name] for name in modules] for one in record]
    importance = []
    for row in scores:
        order = sorted(range(len(row)), key=lambda i: (-row[i], i))
        importance.append([order.index(i) + 1 for i in range(len(row))])
    return RankTrajectory(
        modules=modules,
        steps=[one.step for one in record],
        ranks=ranks,
        scores=scores,
        importance=importance,
        pareto_variance=[_pareto_variance(row, before) for row, before in zip(scores, ranks, strict=False)],
        spearman=spearman(np.mean(ranks, axis=0).tolist(), np.mean(importance, axis=0).tolist()),
        landscape=rank_landscape(model, tau, adapter),
    )


def _pareto_variance(scores: Sequence[float], ranks: Sequence[int]) -> float:
    logs = [2 / 3 * math.log(g) - math.log(r) for g, r in zip(scores, ranks, strict=True) if g > 0]
    return float(np.var(logs)) if len(logs) > 1 else math.nan


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's ρ, with mean ranks for ties; NaN if one of them is constant."""

    def ordered(values: Sequence[float]) -> list[float]:
        return [
            sum(v < value for v in values) + (1 + sum(v == value for v in values)) / 2 for value in values
        ]

    a, b = (np.array(ordered(values)) for values in (one, other))
    spread = float(a.std() * b.std())
    return float(((a - a.mean()) * (b - b.mean())).mean()) / spread if spread else math.nan


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
