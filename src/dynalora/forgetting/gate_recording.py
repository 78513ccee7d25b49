"""Recording what gates do on a text, in one pass with bounded memory.

Hooks on the adapted layers see each layer's inputs, compute its gates once more, and add them to running sums and
histograms. Nothing of the text is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dynalora.adapter.gates import GatedLayer
from dynalora.common.devices import device_of
from dynalora.common.names import plain_name
from dynalora.errors import ConfigError, DynaloraError
from dynalora.evaluation.generation import evaluating
from dynalora.forgetting.gates import (
    ALL,
    BINS,
    DEPTHS,
    DOCUMENT_GROUPS,
    TOKEN_BINS,
    TOKEN_LOGIT,
    GateRecord,
    GateStatistics,
    depth_group,
)
from dynalora.forgetting.landscape import layer_index, module_kind
from dynalora.forgetting.passes import counted_tokens, forward_options, placed_inputs, token_batches

logger = logging.getLogger(__name__)


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
    recorder = _Recorder(layers)
    options = forward_options(model, [layer for layer, _ in layers.values()])
    device, seen = device_of(model), 0
    with evaluating(model):
        for batch, count, total in token_batches(texts, tokenizer, batch_size, max_length):
            batch = {k: v.to(device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
            with recorder.listening(counted_tokens(batch)):
                model(**{k: v for k, v in batch.items() if k != "labels"}, **options)
            seen += count
            if progress is not None:
                progress(seen, total)
    if not recorder.documents:
        raise ConfigError("no tokens to record gates on: the texts are empty, or all tokens are masked.")
    return recorder.result()


class _Recorder:
    """Running sums and histograms of all layers."""

    def __init__(self, layers: dict[str, tuple[GatedLayer, str]]) -> None:
        self.layers = layers
        self.documents = 0
        self.collectors = {name: _Collector(layer.rank(adapter)) for name, (layer, adapter) in layers.items()}
        blocks = max((index for name in layers if (index := layer_index(name)) is not None), default=-1) + 1
        self.depths = {name: depth_group(layer_index(name), blocks) for name in layers}
        self.depth_histograms = {group: _token_histogram() for group in (*DEPTHS, ALL) if group == ALL or blocks}
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
                placed = placed_inputs(layer, inputs[0], counted, row_of, with_tokens)
                if placed is None:
                    self.unplaced.add(name)
                    return
                x, row, by_token = placed
                score = self.collectors[name].add(layer.gates(x, adapter), number[row].to(x.device) % DOCUMENT_GROUPS)
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
            _count_tokens(self.depth_histograms[group], total / layers, number[row_of[counted]] % DOCUMENT_GROUPS)
        self.moments += torch.stack([sums @ sums.mT, sums @ counts.mT, counts @ counts.mT])
        self.documents += int(with_tokens.sum())

    def result(self) -> GateRecord:
        if self.unplaced:
            first = min(self.unplaced)
            logger.warning(
                "%d layers see other rows than the batch's tokens and are left out of the record (the first: %s).",
                len(self.unplaced), plain_name(first),
            )  # fmt: skip
        placed_layers = [index for index, name in enumerate(self.layers) if name not in self.unplaced]
        names = list(self.layers)
        rows = tuple(self.collectors[names[index]].result(plain_name(names[index])) for index in placed_layers)
        if not rows:
            raise DynaloraError("no layer with gates sees the batch's tokens; there is nothing to record.")
        pick = torch.tensor(placed_layers)
        return GateRecord(
            rows,
            self.documents,
            {group: histogram.cpu() for group, histogram in self.depth_histograms.items()},
            self.moments[:, pick][:, :, pick],
        )


def _token_histogram() -> torch.Tensor:
    return torch.zeros(DOCUMENT_GROUPS, TOKEN_BINS, dtype=torch.int32)


def token_bins(score: torch.Tensor) -> torch.Tensor:
    """The bin of each mean gate, int64: score (n) in [0, 1] → (n) in 0 … `TOKEN_BINS` − 1."""
    logit = torch.logit(score.double()).clamp(-TOKEN_LOGIT, TOKEN_LOGIT)
    return ((logit / TOKEN_LOGIT + 1) / 2 * TOKEN_BINS).long().clamp_(0, TOKEN_BINS - 1)


def _count_tokens(histogram: torch.Tensor, score: torch.Tensor, group: torch.Tensor) -> None:
    counts = torch.bincount(group * TOKEN_BINS + token_bins(score), minlength=histogram.numel())
    histogram += counts.view_as(histogram).to(histogram)


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
            name, layer_index(name), module_kind(name), self.tokens, self.sum / n, self.sum_square / n,
            self.rank_histogram, self.token_histogram,
        )  # fmt: skip
