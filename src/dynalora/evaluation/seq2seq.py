"""Encoder-decoders (BART, T5): what differs from causal language models when they learn and answer.

The encoder reads the question, padded on the right since many know absolute positions; the decoder writes the answer
from its own start token on. Both texts carry the tokenizer's own special tokens and no chat format. Rows of token ids
look as they do everywhere else, with labels on the answer only; where the labels begin, the question ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from dynalora.common.devices import device_of
from dynalora.common.names import IGNORED_LABEL
from dynalora.evaluation.padding import padded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def is_encoder_decoder(model: torch.nn.Module) -> bool:
    """Whether a model, with or without adapter, has an encoder and a decoder."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))


def question_room(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Number of tokens that the encoder reads, as its tokenizer says; None: it sets no limit."""
    length = int(tokenizer.model_max_length)
    return length if length < 10**9 else None


def shortened(ids: Sequence[int], room: int | None) -> list[int]:
    """A question that fits: a longer one loses the end of its text, and keeps its last token, which closes it."""
    if room is None or len(ids) <= room:
        return list(ids)
    return [*ids[: room - 1], ids[-1]]


def taught_logits(
    model: torch.nn.Module, rows: Sequence[Mapping[str, Any]], padding: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the decoder says at every token of the right answers, given the tokens before it.

    Args:
        model: An encoder-decoder, with or without adapter.
        rows: `input_ids` and `labels` of each item; labels are −100 on the question.
        padding: Token to pad with.

    Returns:
        Logits (B, K, V), and the right tokens (B, K), −100 where an answer is over.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    device = device_of(model)
    batch = {name: tensor.to(device) for name, tensor in _padded(rows, padding).items()}
    targets = batch.pop("labels")
    begun = base.prepare_decoder_input_ids_from_labels(targets)
    return model(**batch, decoder_input_ids=begun, use_cache=False).logits, targets


class Seq2SeqCollator:
    """Makes batches to train an encoder-decoder on.

    Args:
        padding: Token to pad questions with.

    Returns (when called with a list of B rows):
        `input_ids` and `attention_mask` (B, T) of the questions, and `labels` (B, K) of the answers, −100 behind them;
        all int64. The model itself shifts the labels into its decoder's input.
    """

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        return _padded(rows, self.padding)


def _padded(rows: Sequence[Mapping[str, Any]], padding: int) -> dict[str, torch.Tensor]:
    parts = [_parted(row) for row in rows]
    ids, mask = padded([question for question, _ in parts], padding, "right")
    labels, _ = padded([answer for _, answer in parts], IGNORED_LABEL, "right")
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _parted(row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Question and answer of a row."""
    labels = list(row["labels"])
    start = next((place for place, label in enumerate(labels) if label != IGNORED_LABEL), len(labels))
    return list(row["input_ids"][:start]), labels[start:]
