"""What DISeL's gates do on given text (DISeL §5, App. V).

One pass over the text, and memory that does not grow with it: sums per rank component, histograms in fixed bins, and
sums over documents from which intervals follow. Two such records are compared by the area under the ROC curve: the
probability that a token of the one domain opens a layer's gates further than a token of the other, ties counting half.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from peft import PeftModel
from torch import nn

from dynalora.adapter.gates import GatedLayer
from dynalora.common.names import IGNORED_LABEL, plain_name
from dynalora.common.statistics import normal_quantile, t_quantile
from dynalora.errors import ConfigError, DynaloraError
from dynalora.evaluation.generation import evaluating
from dynalora.forgetting.landscape import layer_index

logger = logging.getLogger(__name__)

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
        return _layers(self.rows)

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
        if not indices:
            return None
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


def _layers(rows: Iterable[GateStatistics]) -> int:
    return max((row.layer for row in rows if row.layer is not None), default=-1) + 1


@torch.no_grad()
def record_gates(
    model: nn.Module,
    texts: Iterable[str] | Iterable[dict[str, Any]],
    tokenizer: Any = None,
    batch_size: int = 8,
    max_length: int = 512,
    adapter_name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GateRecord:
    """Record the gates of a DISeL adapter on any text, in one streaming pass with bounded memory.

    Args:
        model: Model with a DISeL adapter.
        texts: Texts, with a tokenizer; or batches ready for `model(**batch)`. Either may be a generator: nothing is
            kept. Of batches, `attention_mask` says which tokens count, and `labels` of the same shape, if there,
            narrow them to the response (labels other than −100). Of texts, all tokens count but the special ones that
            the tokenizer adds. Each text, or row of a batch, is a document.
        tokenizer: A transformers tokenizer, needed for texts.
        batch_size: Texts per pass.
        max_length: Tokens at which a text is cut.
        adapter_name: Which adapter; None takes the active one.
        progress: Called with (texts done, texts in all; 0 where that is unknown).

    Returns:
        A sequence with one entry per adapted layer, in model order. The model's mode (train/eval) is left as it was.
        Layers whose inputs cannot be matched to the tokens (experts that see some of them) are left out, with a
        warning.

    Raises:
        ConfigError: Texts without a tokenizer, or no text at all.
        DynaloraError: The model has no gated adapter.
    """
    layers = {
        name: (module, adapter)
        for name, module in model.named_modules()
        if isinstance(module, GatedLayer)
        for adapter in ([adapter_name] if adapter_name else module.active_adapters)
        if module.has_adapter(adapter) and module.gated(adapter)
    }
    if not layers:
        raise DynaloraError("the model has no adapter with gates (a DISeL adapter) to record.")
    if isinstance(texts, str):
        raise ConfigError("texts must be a list of texts, got one string; put it into a list.")
    recorder = _Recorder(layers)
    given = _forward_options(model, layers)
    seen = 0
    with evaluating(model):
        for batch, count, total in _batches(texts, tokenizer, batch_size, max_length):
            batch = {k: v.to(_device(model)) for k, v in batch.items() if isinstance(v, torch.Tensor)}
            with recorder.listening(_counted(batch)):
                model(**{k: v for k, v in batch.items() if k != "labels"}, **given)
            seen += count
            if progress is not None:
                progress(seen, total)
    if not recorder.documents:
        raise ConfigError("no tokens to record gates on: the texts are empty, or all tokens are masked.")
    return recorder.result()


def _counted(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which tokens count, (B, T), bool; (B) for models whose inputs are no tokens."""
    ids = batch.get("input_ids", batch.get("attention_mask"))
    if ids is None:
        first = next(iter(batch.values()))
        return torch.ones(len(first), dtype=torch.bool, device=first.device)
    counted = torch.ones_like(ids, dtype=torch.bool)
    if "attention_mask" in batch and batch["attention_mask"].shape == ids.shape:
        counted &= batch["attention_mask"].bool()
    if "labels" in batch and batch["labels"].shape == ids.shape:
        counted &= batch["labels"] != IGNORED_LABEL
    return counted


def _forward_options(model: nn.Module, layers: dict[str, tuple[GatedLayer, str]]) -> dict[str, Any]:
    """Spare what nobody looks at: the key-value cache, and (B, T, V) logits unless the head's own gates are wanted."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    accepted = inspect.signature(base.forward).parameters
    options: dict[str, Any] = {}
    if "use_cache" in accepted:
        options["use_cache"] = False
    heads = [base.get_output_embeddings()] if hasattr(base, "get_output_embeddings") else []
    if "logits_to_keep" in accepted and not any(layer in heads for layer, _ in layers.values()):
        options["logits_to_keep"] = 1
    return options


class _Recorder:
    """Running sums and histograms of all layers."""

    def __init__(self, layers: dict[str, tuple[GatedLayer, str]]) -> None:
        self.layers = layers
        self.documents = 0
        self.collectors = {name: _Collector(layer.rank(adapter)) for name, (layer, adapter) in layers.items()}
        blocks = max((index for name in layers if (index := layer_index(name)) is not None), default=-1) + 1
        self.depths = {name: depth_group(layer_index(name), blocks) for name in layers}
        self.depth_histograms = {
            group: _token_histogram() for group in (*DEPTHS, ALL) if group == ALL or blocks
        }
        self.moments = torch.zeros(3, len(layers), len(layers), dtype=torch.float64)
        self.unplaced: set[str] = set()

    @contextmanager
    def listening(self, counted: torch.Tensor) -> Iterator[None]:
        """Record one forward pass; `counted` (B, T) or (B) says which positions count."""
        rows = torch.arange(len(counted), device=counted.device)
        row_of = rows.reshape(-1, *[1] * (counted.dim() - 1)).expand(counted.shape)
        with_tokens = counted.reshape(len(counted), -1).any(1)
        number = self.documents - 1 + with_tokens.cumsum(0)  # of each row's document, where it has tokens
        sums = torch.zeros(len(self.layers), len(counted), dtype=torch.float64)
        counts = torch.zeros_like(sums)
        by_depth: dict[str, tuple[torch.Tensor, int]] = {}

        def hook(index: int, name: str, adapter: str) -> Callable[..., None]:
            def listen(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
                placed = _place(inputs[0], counted, row_of, with_tokens)
                if placed is None:
                    self.unplaced.add(name)
                    return
                x, row, by_token = placed
                score = self.collectors[name].add(
                    layer.gates(x, adapter), number[row].to(x.device) % DOCUMENT_GROUPS
                )
                sums[index].index_add_(0, row.cpu(), score.double().cpu())
                counts[index] += torch.bincount(row, minlength=len(counted)).double().cpu()
                if by_token:
                    for group in (self.depths[name], ALL):
                        if group in self.depth_histograms:
                            total, layers = by_depth.get(group, (torch.zeros(()), 0))
                            by_depth[group] = (total + score.double().to(counted.device), layers + 1)

            return listen

        handles = [
            layer.register_forward_pre_hook(hook(index, name, adapter))
            for index, (name, (layer, adapter)) in enumerate(self.layers.items())
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for group, (total, layers) in by_depth.items():
            _count_tokens(
                self.depth_histograms[group], total / layers, number[row_of[counted]] % DOCUMENT_GROUPS
            )
        self.moments += torch.stack([sums @ sums.mT, sums @ counts.mT, counts @ counts.mT])
        self.documents += int(with_tokens.sum())

    def result(self) -> GateRecord:
        if self.unplaced:
            first = min(self.unplaced)
            logger.warning(
                "%d layers see other rows than the batch's tokens and are left out of the record (the first: %s).",
                len(self.unplaced), plain_name(first),
            )  # fmt: skip
        kept = [index for index, name in enumerate(self.layers) if name not in self.unplaced]
        names = list(self.layers)
        rows = tuple(self.collectors[names[index]].result(plain_name(names[index])) for index in kept)
        if not rows:
            raise DynaloraError("no layer with gates sees the batch's tokens; there is nothing to record.")
        pick = torch.tensor(kept)
        return GateRecord(
            rows,
            self.documents,
            {group: histogram.cpu() for group, histogram in self.depth_histograms.items()},
            self.moments[:, pick][:, :, pick],
        )


def _place(
    x: torch.Tensor, counted: torch.Tensor, row_of: torch.Tensor, with_tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, bool] | None:
    """The counted inputs of a layer (n, in), the batch row of each (n), and whether they are the batch's tokens."""
    shape = x.shape[:-1]
    if shape == counted.shape:
        return x[counted], row_of[counted], True
    if x.dim() == 2 and counted.dim() == 2 and shape[0] == counted.numel() != len(counted):
        return x[counted.flatten()], row_of[counted], True  # tokens in one long row, as some blocks see them
    if shape[:1] == counted.shape[:1]:  # one vector, or some, per text: a pooled one, say
        chosen = x[with_tokens]
        row = torch.arange(len(counted), device=counted.device)[with_tokens]
        each = chosen[0, ..., 0].numel() if len(chosen) else 1
        return chosen.reshape(-1, x.shape[-1]), row.repeat_interleave(each), False
    return None


def _token_histogram() -> torch.Tensor:
    return torch.zeros(DOCUMENT_GROUPS, TOKEN_BINS, dtype=torch.int32)


def token_bins(score: torch.Tensor) -> torch.Tensor:
    """The bin of each mean gate, int64: score (n) in [0, 1] → (n) in 0 … `TOKEN_BINS` − 1."""
    logit = torch.logit(score.double()).clamp(-TOKEN_LOGIT, TOKEN_LOGIT)
    return ((logit / TOKEN_LOGIT + 1) / 2 * TOKEN_BINS).long().clamp_(0, TOKEN_BINS - 1)


def _count_tokens(histogram: torch.Tensor, score: torch.Tensor, group: torch.Tensor) -> None:
    found = torch.bincount(group * TOKEN_BINS + token_bins(score), minlength=histogram.numel())
    histogram += found.view_as(histogram).to(histogram)


class _Collector:
    """One layer's sums."""

    def __init__(self, r: int) -> None:
        self.tokens = 0
        self.sum = torch.zeros(r, dtype=torch.float64)
        self.sum_square = torch.zeros(r, dtype=torch.float64)
        self.rank_histogram = torch.zeros(r, BINS, dtype=torch.int64)
        self.token_histogram = _token_histogram()

    def add(self, gates: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """Count gates (tokens, r) of documents in the groups `group` (tokens); gives the mean gates (tokens)."""
        gates = gates.float()
        r = gates.shape[1]
        self.tokens += gates.shape[0]
        self.sum += gates.sum(0, dtype=torch.float64).cpu()
        self.sum_square += gates.double().square().sum(0).cpu()
        bins = (gates * BINS).long().clamp_(0, BINS - 1) + torch.arange(r, device=gates.device) * BINS
        self.rank_histogram += torch.bincount(bins.flatten(), minlength=r * BINS).view(r, BINS).cpu()
        score = gates.mean(1, dtype=torch.float64)
        _count_tokens(self.token_histogram, score, group)
        return score

    def result(self, name: str) -> GateStatistics:
        n = max(self.tokens, 1)
        return GateStatistics(
            name,
            layer_index(name),
            name.rpartition(".")[2],
            self.tokens,
            self.sum / n,
            self.sum_square / n,
            self.rank_histogram,
            self.token_histogram,
        )


def _batches(
    texts: Iterable[str] | Iterable[dict[str, Any]], tokenizer: Any, batch_size: int, max_length: int
) -> Iterator[tuple[dict[str, Any], int, int]]:
    total = len(texts) if isinstance(texts, Sized) else 0
    items = iter(texts)
    first = next(items, None)
    if first is None:
        return
    whole: Iterator[Any] = itertools.chain([first], items)
    if not isinstance(first, str):
        for batch in whole:
            yield dict(batch), 1, total
        return
    if tokenizer is None:
        raise ConfigError("texts need a tokenizer; pass tokenizer=, or batches that are already tokenised.")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; give 1 or more.")
    while some := list(itertools.islice(whole, batch_size)):
        encoded = dict(
            tokenizer(
                some, return_tensors="pt", padding=True, truncation=True, max_length=max_length,
                return_special_tokens_mask=True, return_attention_mask=True,
            )
        )  # fmt: skip
        special = encoded.pop("special_tokens_mask")
        encoded["labels"] = encoded["input_ids"].masked_fill(special.bool(), IGNORED_LABEL)
        if encoded["input_ids"].shape[1]:
            yield encoded, len(some), total


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def depth_group(layer: int | None, layers: int) -> str:
    """`"early"`, `"middle"` or `"late"`: the third of the blocks that a layer lies in."""
    if layer is None:
        return "none"
    return DEPTHS[min(3 * layer // max(layers, 1), 2)]


# --- separation -------------------------------------------------------------------------------------------


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
    """The separation by each token's mean gate over a depth group, and over all layers (`"all"`).

    Args:
        first: Record on the domain whose gates are expected to be further open.
        second: Record on the other domain.
    """
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
    for own, other, flip in ((first, second, False), (second, first, True)):
        filled = own[own.sum(1) > 0]
        groups = len(filled)
        if groups < 2:
            return Separation(name, layer, kind, auc, error, None, None)
        whole, rest = own.sum(0), other.sum(0)
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
