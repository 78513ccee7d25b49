"""What DISeL's gates do on given text (DISeL §5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dynalora.adapter.gates import GatedLayer
from dynalora.errors import ConfigError, DynaloraError
from dynalora.forgetting.landscape import layer_index

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 50


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
        histogram: Counts over all components in equal bins of [0, 1], int64.
    """

    module: str
    layer: int | None
    kind: str
    tokens: int
    mean: torch.Tensor
    mean_square: torch.Tensor
    histogram: torch.Tensor = field(repr=False)

    @property
    def openness(self) -> float:
        """Mean gate over tokens and components."""
        return float(self.mean.mean())


@torch.no_grad()
def record_gates(
    model: nn.Module,
    texts: Sequence[str] | Iterable[dict[str, Any]],
    tokenizer: Any = None,
    batch_size: int = 8,
    max_length: int = 512,
    adapter_name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[GateStatistics]:
    """Record the gates of a DISeL adapter on any text, in one streaming pass with bounded memory.

    Args:
        model: Model with a DISeL adapter.
        texts: Texts, with a tokenizer; or batches ready for ``model(**batch)``. Of those, ``attention_mask`` says
            which tokens count, and ``labels``, if there, narrow them to the response (labels other than −100).
        tokenizer: A transformers tokenizer, needed for texts.
        batch_size: Texts per pass.
        max_length: Tokens at which a text is cut.
        adapter_name: Which adapter; None takes the active one.
        progress: Called with (texts done, texts in all).

    Returns:
        One entry per adapted layer, in model order. The model's mode (train/eval) is left as it was.

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
    collectors = {name: _Collector(module.rank(adapter)) for name, (module, adapter) in layers.items()}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    seen = 0
    try:
        for batch, count, total in _batches(texts, tokenizer, batch_size, max_length):
            batch = {k: v.to(_device(model)) for k, v in batch.items() if isinstance(v, torch.Tensor)}
            counted = batch.get("attention_mask", torch.ones_like(next(iter(batch.values())))).bool()
            if "labels" in batch:
                counted &= batch["labels"] != -100
            with _listening(layers, collectors, counted):
                model(**{k: v for k, v in batch.items() if k != "labels"})
            seen += count
            if progress is not None:
                progress(seen, total)
    finally:
        for module, training in modes.items():
            module.training = training
    if not any(collector.tokens for collector in collectors.values()):
        raise ConfigError("no tokens to record gates on: the texts are empty, or all tokens are masked.")
    return [collectors[name].result(name) for name in layers]


class _Collector:
    def __init__(self, r: int) -> None:
        self.tokens = 0
        self.sum = torch.zeros(r, dtype=torch.float64)
        self.sum_square = torch.zeros(r, dtype=torch.float64)
        self.histogram = torch.zeros(BINS, dtype=torch.int64)

    def add(self, gates: torch.Tensor) -> None:
        """Count gates (tokens, r)."""
        gates = gates.float()
        self.tokens += gates.shape[0]
        self.sum += gates.sum(0, dtype=torch.float64).cpu()
        self.sum_square += gates.square().sum(0, dtype=torch.float64).cpu()
        bins = (gates * BINS).long().clamp_(0, BINS - 1).flatten()
        self.histogram += torch.bincount(bins, minlength=BINS).cpu()

    def result(self, name: str) -> GateStatistics:
        name = name.removeprefix("base_model.model.")
        n = max(self.tokens, 1)
        return GateStatistics(
            name,
            layer_index(name),
            name.rpartition(".")[2],
            self.tokens,
            self.sum / n,
            self.sum_square / n,
            self.histogram,
        )


@contextmanager
def _listening(
    layers: dict[str, tuple[GatedLayer, str]], collectors: dict[str, _Collector], counted: torch.Tensor
) -> Iterator[None]:
    def listen(name: str, adapter: str) -> Callable[..., None]:
        def hook(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0]
            if x.shape[:-1] == counted.shape:
                collectors[name].add(layer.gates(x[counted], adapter))
            else:  # a layer that sees something other than the token sequence (a pooled vector, say)
                collectors[name].add(layer.gates(x.reshape(-1, x.shape[-1]), adapter))

        return hook

    handles = [
        layer.register_forward_pre_hook(listen(name, adapter)) for name, (layer, adapter) in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _batches(
    texts: Sequence[str] | Iterable[dict[str, Any]], tokenizer: Any, batch_size: int, max_length: int
) -> Iterator[tuple[dict[str, Any], int, int]]:
    items = list(texts) if isinstance(texts, Sequence) else texts
    if isinstance(items, list) and items and isinstance(items[0], str):
        if tokenizer is None:
            raise ConfigError(
                "texts need a tokenizer; pass tokenizer=, or batches that are already tokenised."
            )
        for start in range(0, len(items), batch_size):
            some = items[start : start + batch_size]
            encoded = tokenizer(
                some, return_tensors="pt", padding=True, truncation=True, max_length=max_length
            )
            yield dict(encoded), len(some), len(items)
        return
    total = len(items) if isinstance(items, list) else 0
    for batch in items:
        yield dict(batch), 1, total


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def depth_group(layer: int | None, layers: int) -> str:
    """``"early"``, ``"middle"`` or ``"late"``: the third of the blocks that a layer lies in."""
    if layer is None:
        return "none"
    return ("early", "middle", "late")[min(3 * layer // max(layers, 1), 2)]


def plot_gates(statistics: dict[str, Sequence[GateStatistics]], path: str | None = None) -> Figure:
    """Normalised gate histograms by depth group, domains overlaid (DISeL Figure 3).

    Args:
        statistics: Results of :func:`record_gates` by the name of their text's domain.
        path: File to write; None only returns the figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    indices = [row.layer for rows in statistics.values() for row in rows if row.layer is not None]
    layers = max(indices, default=-1) + 1
    groups = ["early", "middle", "late"] if layers else ["none"]
    figure = Figure(figsize=(3.4 * len(groups), 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    centres = (torch.arange(BINS) + 0.5) / BINS
    for axis, group in zip(axes, groups, strict=True):
        for domain, rows in statistics.items():
            counts = [row.histogram for row in rows if depth_group(row.layer, layers) == group]
            if counts:
                histogram = torch.stack(counts).sum(0).double()
                axis.plot(centres, histogram / histogram.sum().clamp_min(1), label=domain, linewidth=1.2)
        axis.set_title(group if layers else "all layers", fontsize=9)
        axis.set_xlabel("gate", fontsize=8)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("share", fontsize=8)
    axes[0].legend(fontsize=7)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
