"""How much text a model can take, and what happens to longer texts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from dynalora.errors import DataError
from dynalora.evaluation.seq2seq import is_encoder_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def model_window(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a model can take: the smaller of what its configuration and its tokenizer say."""
    config = getattr(model, "config", None)
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "seq_length")] + [
        getattr(tokenizer, "model_max_length", None)
    ]
    return min([int(value) for value in limits if isinstance(value, (int, float)) and 0 < value < 10**9] or [10**9])


def within_window(max_length: int, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """A length in tokens that the model can take: `max_length`, or its window if that is shorter."""
    # Of an encoder-decoder the window is the question's alone, which is cut to it.
    return max_length if is_encoder_decoder(model) else min(max_length, model_window(model, tokenizer))


def fitting(lengths: Sequence[int], room: int, what: str, *, then: str = "count as wrong") -> list[int]:
    """Indices of items that fit into the model's window; warns of those that do not.

    Args:
        lengths: Of the items, in tokens.
        room: Tokens that the model can take.
        what: The items' name.
        then: What happens with those that do not fit, for the warning.

    Raises:
        DataError: None does.
    """
    fits = [index for index, length in enumerate(lengths) if length <= room]
    if not fits:
        raise DataError(
            f"All {len(lengths)} prompts of {what} are longer than the model's window (the shortest has {min(lengths)} "
            f"tokens, {max(0, room)} fit); take shorter ones, fewer new tokens, or a model with a longer window."
        )
    if len(fits) < len(lengths):
        logger.warning(
            "%d of %d prompts of %s are longer than the %d tokens that the model's window has room for and %s.",
            len(lengths) - len(fits), len(lengths), what, max(0, room), then,
        )  # fmt: skip
    return fits
