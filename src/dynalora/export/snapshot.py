"""Static snapshots of gated adapters: every gate held at its mean over some text.

The update is then one fixed matrix, up·diag(ḡ)·down, which can be exported and merged. What that costs on text that
matters is measured against the gated adapter itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from dynalora.adapter.gates import GatedLayer
from dynalora.adapter.layer import adapter_layers
from dynalora.common.names import IGNORED_LABEL
from dynalora.errors import ConfigError, DataError, UnsupportedError
from dynalora.evaluation.generation import evaluating
from dynalora.forgetting.base_model import adapters_off


class GateMeans(Protocol):
    """What is needed of a record of gates (`dynalora.record_gates`)."""

    @property
    def module(self) -> str:
        """Module name."""

    @property
    def mean(self) -> torch.Tensor:
        """Mean gate per component, (r)."""


@contextmanager
def held_gates(model: nn.Module, record: Iterable[GateMeans], adapter_name: str = "default") -> Iterator[None]:
    """Hold an adapter's gates at their recorded means inside; afterwards they move again.

    Args:
        model: Model with a gated adapter.
        record: Result of `dynalora.record_gates` on the text that the snapshot is for.
        adapter_name: Which adapter.

    Raises:
        UnsupportedError: The adapter has no gates.
        ConfigError: The record is not of this adapter as it is now.
    """
    means = {row.module: row.mean for row in record}
    layers = [
        layer
        for layer in adapter_layers(model, adapter_name).values()
        if isinstance(layer, GatedLayer) and layer.gated(adapter_name)
    ]
    if not layers:
        raise UnsupportedError(
            f"adapter {adapter_name!r} has no gates to hold, so it needs no snapshot; export it as it is."
        )
    for layer in layers:
        mean = means.get(layer.name)
        if mean is None or len(mean) != layer.rank(adapter_name):
            held = "no gates" if mean is None else f"{len(mean)} gates"
            raise ConfigError(
                f"the record has {held} for {layer.name!r}, whose adapter {adapter_name!r} has "
                f"{layer.rank(adapter_name)}; record them anew with record_gates()."
            )
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.holding(adapter_name, means[layer.name]))
        yield


@dataclass(frozen=True)
class SnapshotPrice:
    """What a snapshot costs on some text, in nats per token.

    Attributes:
        tokens: Number of tokens the means are over.
        kl: KL(gated ‖ snapshot).
        base_loss: Task loss of the base model.
        gated_loss: Task loss with the gates.
        snapshot_loss: Task loss of the snapshot.
    """

    tokens: int
    kl: float
    base_loss: float
    gated_loss: float
    snapshot_loss: float


def snapshot_price(
    model: nn.Module, record: Iterable[GateMeans], batches: Iterable[dict[str, Any]], adapter_name: str = "default"
) -> SnapshotPrice:
    """Compare the snapshot of a causal language model's adapter with the adapter, on text with labels.

    Args:
        model: A PEFT model, the adapter active.
        record: Result of `dynalora.record_gates`; for an honest price, on other text than `batches`.
        batches: Batches for `model(**batch)` with `labels`, −100 where a token does not count.
        adapter_name: Which adapter.

    Raises:
        DataError: No token counts.
        UnsupportedError: The adapter has no gates.
        ConfigError: The record is not of this adapter.
    """
    record = list(record)
    device = next(model.parameters()).device
    sums, tokens = torch.zeros(4, dtype=torch.float64), 0
    with evaluating(model), torch.inference_mode():
        for batch in batches:
            inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
            labels = batch["labels"].to(device)[:, 1:]
            counted = labels != IGNORED_LABEL
            targets = labels[counted]

            def predict(inputs: dict[str, Any] = inputs, counted: torch.Tensor = counted) -> torch.Tensor:
                return F.log_softmax(model(**inputs).logits[:, :-1][counted].float(), dim=-1)

            gated = predict()
            with held_gates(model, record, adapter_name):
                snapshot = predict()
            with adapters_off(model):
                base = predict()
            kl = F.kl_div(snapshot, gated, log_target=True, reduction="sum")
            losses = [F.nll_loss(p, targets, reduction="sum") for p in (base, gated, snapshot)]
            sums += torch.stack([kl, *losses]).double().cpu()
            tokens += len(targets)
    if not tokens:
        raise DataError("no token counts in the text to measure the snapshot on: all labels are −100.")
    return SnapshotPrice(tokens, *(sums / tokens).tolist())
