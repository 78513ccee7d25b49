"""What DISeL's gates did on a text, layer by layer and over several layers (DISeL §5, App. V).

[`record_gates`][dynalora.record_gates] makes such a record in one pass over the text. Its size does not grow with the
text: it holds sums per rank component, histograms in fixed bins, and sums over documents, from which the intervals
follow. Two records of the same adapter are compared by the area under the ROC curve: the probability that a token of
the one domain opens a layer's gates further than a token of the other, ties counting half.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import overload

import torch

from dynalora.common.statistics import normal_quantile, t_quantile
from dynalora.errors import ConfigError

BINS = 50
"""Bins of [0, 1] for histograms of gates."""

TOKEN_BINS = 4096
"""Bins for a layer's mean gate per token, equal in its logit, so that almost closed gates are told apart too."""

TOKEN_LOGIT = 16.0
"""The bins reach from minus this logit to this logit; what lies outside counts in the outermost bins."""

DOCUMENT_GROUPS = 10
"""Documents are dealt to this many groups in turn; leaving out one group at a time gives a separation's interval."""

DEPTHS = ("early", "middle", "late")
ALL = "all"


@dataclass
class GateStatistics:
    """Post-sigmoid gates of one adapted layer over all counted tokens.

    Attributes:
        module: Full module name.
        layer: Index of its transformer block, None outside of blocks.
        kind: Last part of the name.
        tokens: Tokens counted.
        mean: Mean gate per rank component, (r), float64.
        mean_square: Mean squared gate per rank component, (r), float64.
        rank_histogram: Counts per rank component in equal bins of [0, 1], (r, `BINS`), int64.
        token_histogram: Counts of tokens by their mean gate over the components, int32, (`DOCUMENT_GROUPS`,
            `TOKEN_BINS`); bins are equal in the logit.
    """

    module: str
    layer: int | None
    kind: str
    tokens: int
    mean: torch.Tensor
    mean_square: torch.Tensor
    rank_histogram: torch.Tensor = field(repr=False)
    token_histogram: torch.Tensor = field(repr=False)

    @property
    def openness(self) -> float:
        """Mean gate over tokens and components."""
        return float(self.mean.mean())

    @property
    def histogram(self) -> torch.Tensor:
        """Counts over all components in equal bins of [0, 1], (`BINS`), int64."""
        return self.rank_histogram.sum(0)

    @property
    def deviation(self) -> torch.Tensor:
        """Standard deviation over tokens per rank component, (r), float64."""
        return (self.mean_square - self.mean.square()).clamp_min(0).sqrt()


@dataclass(frozen=True)
class GateMean:
    """A mean gate with its 95 % interval over documents.

    Attributes:
        value: The mean over tokens and components, and then over layers.
        low: Lower end; None with fewer than two documents.
        high: Upper end.
    """

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, eq=False)
class GateRecord(Sequence[GateStatistics]):
    """What `record_gates` found: one entry per adapted layer, and what concerns several layers together.

    Attributes:
        rows: The layers, in model order; the record itself is a sequence of them.
        documents: Texts (rows of the batches) with at least one counted token.
        depth_histograms: As `token_histogram`, of each token's mean gate over the layers of a depth group
            (`"early"`, `"middle"`, `"late"`) and over all layers (`"all"`).
        moments: Sums over documents d of S Sᵀ, S Nᵀ and N Nᵀ, (3, layers, layers), float64, with S_l the sum over the
            document's tokens of layer l's mean gate, and N_l the number of those tokens.
    """

    rows: tuple[GateStatistics, ...]
    documents: int
    depth_histograms: dict[str, torch.Tensor] = field(repr=False)
    moments: torch.Tensor = field(repr=False)

    @overload
    def __getitem__(self, index: int) -> GateStatistics: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[GateStatistics]: ...
    def __getitem__(self, index: int | slice) -> GateStatistics | Sequence[GateStatistics]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def layers(self) -> int:
        """Number of transformer blocks, as far as adapted layers tell."""
        return max((row.layer for row in self.rows if row.layer is not None), default=-1) + 1

    @property
    def tokens(self) -> int:
        """Tokens counted in the layer that saw most."""
        return max(row.tokens for row in self.rows)

    def mean(self, chosen: Callable[[GateStatistics], bool] | None = None) -> GateMean | None:
        """The mean gate of some layers, every layer counting the same, with its 95 % interval.

        Tokens of one text are alike, so the text is the unit that was sampled: the variance is that of a ratio of sums
        over documents (linearised; W. G. Cochran, Sampling Techniques, ch. 6), the quantile the normal distribution's.

        Args:
            chosen: Says of each layer whether it belongs; None takes all.

        Returns:
            The mean; None if no layer is chosen.
        """
        indices = [index for index, row in enumerate(self.rows) if chosen is None or chosen(row)]
        return self._mean(indices) if indices else None

    def layer_mean(self, layer: GateStatistics) -> GateMean:
        """The mean gate of one of its layers, with its 95 % interval."""
        return self._mean([index for index, row in enumerate(self.rows) if row is layer])

    def _mean(self, indices: list[int]) -> GateMean:
        value = sum(self.rows[index].openness for index in indices) / len(indices)
        if self.documents < 2:
            return GateMean(value, None, None)
        pick = torch.tensor(indices)
        sums, mixed, counts = (moment[pick][:, pick] for moment in self.moments)
        means = torch.tensor([self.rows[index].openness for index in indices], dtype=torch.float64)
        tokens = torch.tensor([float(self.rows[index].tokens) for index in indices], dtype=torch.float64)
        cross = mixed * means
        residual = sums - cross - cross.mT + torch.outer(means, means) * counts
        covariance = residual / torch.outer(tokens, tokens) * self.documents / (self.documents - 1)
        half = normal_quantile() * float(covariance.mean().clamp_min(0).sqrt())
        return GateMean(value, max(0.0, value - half), min(1.0, value + half))

    def depth(self, row: GateStatistics) -> str:
        """The depth group of one of its layers."""
        return depth_group(row.layer, self.layers)


def depth_group(layer: int | None, layers: int) -> str:
    """`"early"`, `"middle"` or `"late"`: the third of the blocks that a layer lies in."""
    if layer is None:
        return "none"
    return DEPTHS[min(3 * layer // max(layers, 1), 2)]


PARTS = ("attention", "MLP")
"""The two parts of a transformer block, to which kinds of modules are added up."""


def part_of(module: str) -> str:
    """The part of its block that a module belongs to, by its name: one of `PARTS`."""
    return PARTS[0] if re.search("attn|attention", module, re.IGNORECASE) else PARTS[1]


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


def _separation(name: str, layer: int | None, kind: str, first: torch.Tensor, second: torch.Tensor) -> Separation:
    first, second = first.double(), second.double()
    auc, error = binned_auc(first.sum(0), second.sum(0))
    variance, freedom = 0.0, len(first)
    for counts, other, flip in ((first, second, False), (second, first, True)):
        filled = counts[counts.sum(1) > 0]
        groups = len(filled)
        if groups < 2:
            return Separation(name, layer, kind, auc, error, None, None)
        whole, rest = counts.sum(0), other.sum(0)
        pairs = [(rest, whole - part) if flip else (whole - part, rest) for part in filled]
        left_out = torch.tensor([binned_auc(*pair)[0] for pair in pairs], dtype=torch.float64)
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
