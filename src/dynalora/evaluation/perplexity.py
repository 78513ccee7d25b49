"""Perplexity of running text by causal language models.

The text's tokens are cut into windows of equal length, and every token but a window's first is predicted from those
before it in its window,

    exp( −(1/N) Σ log p(x_t | x_<t) )

Perplexities over different tokenizers cannot be compared, nor those of encoders that fill masks
([`masked_lm`][dynalora.evaluation.masked_lm]).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from dynalora.common.names import IGNORED_LABEL
from dynalora.common.progress import Progress, silent
from dynalora.common.statistics import Estimate, Interval, ratio
from dynalora.errors import ConfigError, DataError
from dynalora.evaluation.scoring import answer_loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def windows(tokenizer: PreTrainedTokenizerBase, text: str, length: int, limit: int | None = None) -> list[list[int]]:
    """A text's tokens in pieces of `length`; the last, shorter one is left out unless it is the only one.

    Args:
        tokenizer: The model's; no special tokens are added.
        text: The text.
        length: Tokens per window, at least 2.
        limit: The first windows only; None: all.

    Raises:
        ConfigError: `length` is below 2.
        DataError: The text has fewer than two tokens.
    """
    if length < 2:
        raise ConfigError(f"The window is {length} tokens; give at least 2.")
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(ids) < 2:
        raise DataError(f"The text has {len(ids)} tokens; give at least two.")
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
    if len(pieces) > 1 and len(pieces[-1]) < length:
        pieces.pop()
    return pieces[:limit]


def perplexity(
    model: torch.nn.Module,
    rows: list[list[int]],
    *,
    batch_size: int = 8,
    what: str = "Measuring perplexity",
    progress: Progress = silent,
) -> Interval:
    """Perplexity of a causal language model on windows of text, with its interval over the windows.

    Args:
        model: Left in the mode it was in.
        rows: Token ids of each window, as `windows` gives them.
        batch_size: Windows per batch.
        what: Description given to `progress`.
        progress: Called with the number of windows done.
    """
    labelled = [{"input_ids": row, "labels": [IGNORED_LABEL, *row[1:]]} for row in rows]
    losses = answer_loss(model, labelled, batch_size=batch_size, what=what, progress=progress)
    return exponential(ratio(losses.sums, losses.counts))


def exponential(loss: Estimate) -> Interval:
    """The perplexity of a loss in nats per token, with its 95 % interval."""
    inside = loss.interval
    return Interval(math.exp(inside.value), math.exp(inside.low), math.exp(inside.high))
