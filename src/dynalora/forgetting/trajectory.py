"""How ranks moved during training (PE-DyRA), from the record that is kept with the adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from dynalora.errors import DynaloraError
from dynalora.forgetting.landscape import PAPER_TAU, LandscapeRow, rank_landscape
from dynalora.methods.pedyra import adjustments


@dataclass(frozen=True)
class RankTrajectory:
    """The ranks of all adapted matrices over a run.

    Attributes:
        modules: Module names, in model order.
        steps: Optimizer steps done at each adjustment.
        ranks: Ranks by adjustment and module, (n + 1) × modules: at the start, and after each adjustment.
        scores: Layer scores (eq. 7) at each adjustment, n × modules.
        importance: Importance ranking at each adjustment, n × modules: 1 for the highest score.
        pareto_variance: At each adjustment, the logarithm of the variance over modules of G^{2/3} / r, with G the
            layer's score and r its rank before it (Theorem 3.1, Figure 5); -inf where ranks are in proportion to
            G^{2/3}.
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
    """What became of the ranks of a PE-DyRA adapter; singular values above `tau` make its effective ranks.

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
    ranks = [[start[name] for name in modules], *([entry.ranks[name] for name in modules] for entry in record)]
    scores = [[entry.layer_scores[name] for name in modules] for entry in record]
    importance = []
    for row in scores:
        order = sorted(range(len(row)), key=lambda i: (-row[i], i))
        importance.append([order.index(i) + 1 for i in range(len(row))])
    return RankTrajectory(
        modules=modules,
        steps=[entry.step for entry in record],
        ranks=ranks,
        scores=scores,
        importance=importance,
        pareto_variance=[pareto_variance(row, before) for row, before in zip(scores, ranks, strict=False)],
        spearman=spearman(np.mean(ranks, axis=0).tolist(), np.mean(importance, axis=0).tolist()),
        landscape=rank_landscape(model, tau, adapter),
    )


def pareto_variance(scores: Sequence[float], ranks: Sequence[int]) -> float:
    """The logarithm of the variance of G^{2/3} / r over layers; -inf where there is none."""
    variance = float(np.var([g ** (2 / 3) / r for g, r in zip(scores, ranks, strict=True)]))
    return math.log(variance) if variance > 0 else -math.inf


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's ρ, with mean ranks for ties; NaN if one of them is constant."""

    def ordered(values: Sequence[float]) -> list[float]:
        return [sum(v < value for v in values) + (1 + sum(v == value for v in values)) / 2 for value in values]

    a, b = (np.array(ordered(values)) for values in (one, other))
    spread = float(a.std() * b.std())
    return float(((a - a.mean()) * (b - b.mean())).mean()) / spread if spread else math.nan
