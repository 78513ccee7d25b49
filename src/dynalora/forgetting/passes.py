"""Passing text through a model while layers are watched: batches, which tokens count, what a layer saw of them."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from dynalora.adapter.experts import ExpertMatrix
from dynalora.adapter.layer import AdapterLayer
from dynalora.common.names import IGNORED_LABEL
from dynalora.errors import ConfigError, check_least
from dynalora.evaluation.generation import evaluating
from dynalora.forgetting.base_model import adapters_off


def token_batches(
    texts: Iterable[str] | Iterable[dict[str, Any]], tokenizer: Any, batch_size: int, max_length: int
) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Batches for `model(**batch)`, with the number of texts in each, and of all texts (0 where that is unknown).

    Of texts `labels` are −100 at special tokens. Batches come as they are and count as one each.

    Args:
        texts: Texts, or batches; a generator will do.
        tokenizer: A transformers tokenizer, needed for texts.
        batch_size: Texts per batch.
        max_length: Tokens at which a text is cut.

    Raises:
        ConfigError: One string instead of a list, or texts without a tokenizer.
    """
    if isinstance(texts, str):
        raise ConfigError("texts must be a list of texts, got one string; put it into a list.")
    total = len(texts) if isinstance(texts, Sized) else 0
    items = iter(texts)
    first = next(items, None)
    whole: Iterator[Any] = itertools.chain([] if first is None else [first], items)
    if not isinstance(first, str):
        for batch in whole:
            yield dict(batch), 1, total
        return
    if tokenizer is None:
        raise ConfigError("texts need a tokenizer; pass tokenizer=, or batches that are already tokenised.")
    check_least(1, batch_size=batch_size)
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


def pass_rows(model: nn.Module, rows: Iterable[Sequence[int]]) -> None:
    """Pass token ids through a language model, row by row, for whoever watches its layers; adapters are off.

    Args:
        model: The model, with or without adapters.
        rows: Token ids of each text.
    """
    device = next(model.parameters()).device
    with adapters_off(model), evaluating(model), torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row], device=device), use_cache=False)


def counted_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
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


def forward_options(model: nn.Module, layers: Iterable[nn.Module]) -> dict[str, Any]:
    """Spare what nobody looks at: the key-value cache, and (B, T, V) logits unless the head's own gates are wanted."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    accepted = inspect.signature(base.forward).parameters
    options: dict[str, Any] = {}
    if "use_cache" in accepted:
        options["use_cache"] = False
    heads = [base.get_output_embeddings()] if hasattr(base, "get_output_embeddings") else []
    if "logits_to_keep" in accepted and not any(layer in heads for layer in layers):
        options["logits_to_keep"] = 1
    return options


def placed_inputs(
    layer: nn.Module, x: torch.Tensor, counted: torch.Tensor, row_of: torch.Tensor, with_tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, bool] | None:
    """The counted inputs of a layer, the batch row of each (n), and whether they are the batch's tokens.

    Args:
        layer: The layer.
        x: Its input, (…, in); ids (…) where it is an embedding.
        counted: Which tokens count, (B, T) or (B).
        row_of: The batch row of each token, of the same shape.
        with_tokens: Which rows have tokens that count, (B).

    Returns:
        The inputs as (n, in), ids as (n); None where they cannot be told apart by tokens, as a convolution's
        or an expert's.
    """
    if isinstance(layer, AdapterLayer) and isinstance(layer.get_base_layer(), ExpertMatrix):
        return None  # it gets the tokens that were sent to it, as many as it may be
    if isinstance(layer, AdapterLayer) and layer.layer_kind is not None:
        if not layer.layer_kind.integers:
            return None
        ids = placed_inputs(nn.Identity(), x[..., None], counted, row_of, with_tokens)
        return None if ids is None else (ids[0][..., 0], *ids[1:])
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
