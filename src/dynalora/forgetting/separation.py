"""How well gates tell the tokens of two domains apart.

Two records of the same adapter are compared by the area under the ROC curve: the probability that a token of the one
domain opens a layer's gates further than a token of the other, ties counting half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dynalora.common.statistics import t_quantile
from dynalora.errors import ConfigError
from dynalora.forgetting.gates import GateRecord


@dataclass(frozen=True)
class Separation:
    """How well a layer's mean gate tells the tokens of two domains apart.

    Attributes:
        name: Full module name, or the name of a depth group.
        layer: Index of its transformer block, None outside of blocks and for depth groups.
        kind: Last part of the name.
        auc: Area under the ROC curve: the probability that a token of the first domain has a larger mean gate than
            one of the second, ties counting half. 0.5: no difference; 1: always larger.
        bin_error: The exact area is within this of `auc`, which counts tokens of the same bin as ties.
        low: Lower end of the 95 % interval over documents; None with fewer than two documents in a domain.
        high: Upper end.
    """

    name: str
    layer: int | None
    kind: str
    auc: float
    bin_error: float
    low: float | None
    high: float | None


def gate_separation(first: GateRecord, second: GateRecord) -> list[Separation]:
    """The separation of two domains in every layer.

    Args:
        first: Record on the domain whose gates are expected to be further open, the fine-tuning domain.
        second: Record on the other domain, of the same adapter.

    Returns:
        One entry per layer, in model order.

    Raises:
        ConfigError: The records are of different layers.
    """
    names = [[row.module for row in record] for record in (first, second)]
    if names[0] != names[1]:
        raise ConfigError("the two records are of different layers; record both with the same adapter.")
    return [
        _separation(a.module, a.layer, a.kind, a.token_histogram, b.token_histogram)
        for a, b in zip(first, second, strict=True)
    ]


def depth_separation(first: GateRecord, second: GateRecord) -> dict[str, Separation]:
    """The separation by each token's mean gate over a depth group, and over all layers (`"all"`)."""
    return {
        group: _separation(group, None, group, first.depth_histograms[group], second.depth_histograms[group])
        for group in first.depth_histograms
        if min(int(record.depth_histograms[group].sum()) for record in (first, second)) > 0
    }


def _separation(
    name: str, layer: int | None, kind: str, first: torch.Tensor, second: torch.Tensor
) -> Separation:
    first, second = first.double(), second.double()
    auc, error = binned_auc(first.sum(0), second.sum(0))
    variance, freedom = 0.0, len(first)
    for counts, other, flip in ((first, second, False), (second, first, True)):
        filled = counts[counts.sum(1) > 0]
        groups = len(filled)
        if groups < 2:
            return Separation(name, layer, kind, auc, error, None, None)
        whole, rest = counts.sum(0), other.sum(0)
        left_out = torch.tensor(
            [
                binned_auc(rest, whole - part)[0] if flip else binned_auc(whole - part, rest)[0]
                for part in filled
            ],
            dtype=torch.float64,
        )
        variance += (groups - 1) / groups * float((left_out - left_out.mean()).square().sum())
        freedom = min(freedom, groups - 1)
    half = t_quantile(0.975, freedom) * math.sqrt(variance)
    return Separation(name, layer, kind, auc, error, max(0.0, auc - half), min(1.0, auc + half))


def binned_auc(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    """Area under the ROC curve from two histograms over the same ascending bins.

    Args:
        first: Counts of the domain that should score higher, (bins).
        second: Counts of the other, (bins).

    Returns:
        P(first > second) + ½ P(same bin), and ½ P(same bin), which bounds what the bins may hide.

    Raises:
        ConfigError: A histogram is empty.
    """
    if not float(first.sum()) or not float(second.sum()):
        raise ConfigError("a histogram without counts has no ROC curve; give both domains tokens.")
    p, q = first.double() / first.sum(), second.double() / second.sum()
    below = q.cumsum(0) - q
    tied = float((p * q).sum()) / 2
    return float((p * below).sum()) + tied, tied
