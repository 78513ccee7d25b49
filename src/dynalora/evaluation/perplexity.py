"""Perplexity of running text: of causal language models, and of encoders that fill masks.

Causal: the text's tokens are cut into windows of equal length, and every token but a window's first is predicted from
those before it in its window,

    exp( −(1/N) Σ log p(x_t | x_<t) )

Masked: in every window a fixed share of the tokens, drawn from a seed, is replaced by the mask token, and exactly
these are predicted from the rest. The two are not comparable with each other, nor over different tokenizers.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from dynalora.errors import ConfigError, DataError
from dynalora.evaluation.generation import batches_by_length, evaluating
from dynalora.evaluation.multiple_choice import Estimate, ratio
from dynalora.evaluation.scoring import Interval, answer_loss
from dynalora.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_IGNORED = -100
_Z = 1.959963984540054


def windows(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, limit: int | None = None
) -> list[list[int]]:
    """A text's tokens in pieces of `length`; the last, shorter one is left out unless it is the only one.

    Args:
        tokenizer: the model's; no special tokens are added.
        text: the text.
        length: tokens per window, at least 2.
        limit: the first windows only; None: all.

    Raises:
        ConfigError: `length` is below 2.
        DataError: the text has fewer than two tokens.
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
        model: left in the mode it was in.
        rows: token ids of each window, as `windows` gives them.
        batch_size: windows per batch.
        what: description given to `progress`.
        progress: called with the number of windows done.
    """
    labelled = [{"input_ids": row, "labels": [_IGNORED, *row[1:]]} for row in rows]
    found = answer_loss(model, labelled, batch_size=batch_size, what=what, progress=progress)
    return _exponential(ratio(found.sums, found.counts))


def masked_perplexity(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    *,
    share: float = 0.15,
    seed: int = 0,
    batch_size: int = 8,
    what: str = "Measuring perplexity",
    progress: Progress = silent,
) -> Interval:
    """Perplexity of a masked language model on windows of text, with its interval over the windows.

    Args:
        model: left in the mode it was in.
        tokenizer: the model's; it gives the mask token and the special tokens around each window.
        rows: token ids of each window, as `windows` gives them.
        share: of a window's tokens to mask, at least one.
        seed: which tokens.
        batch_size: windows per batch.
        what: description given to `progress`.
        progress: called with the number of windows done.

    Raises:
        ConfigError: the tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise ConfigError("The tokenizer has no mask token; give a masked language model, such as BERT.")
    chance = random.Random(seed)
    ids, labels = [], []
    for row in rows:
        hidden = set(chance.sample(range(len(row)), max(1, round(share * len(row)))))
        masked = [tokenizer.mask_token_id if at in hidden else token for at, token in enumerate(row)]
        wanted = [token if at in hidden else _IGNORED for at, token in enumerate(row)]
        first = [] if tokenizer.cls_token_id is None else [tokenizer.cls_token_id]
        last = [] if tokenizer.sep_token_id is None else [tokenizer.sep_token_id]
        ids.append([*first, *masked, *last])
        labels.append([*[_IGNORED] * len(first), *wanted, *[_IGNORED] * len(last)])
    device = next(model.parameters()).device
    padding = tokenizer.pad_token_id or 0
    sums, counts = [0.0] * len(rows), [0] * len(rows)
    done = 0
    progress(what, 0, len(rows))
    with evaluating(model), torch.inference_mode():
        for batch in batches_by_length([len(row) for row in ids], batch_size):
            longest = max(len(ids[index]) for index in batch)
            tokens = torch.tensor([ids[i] + [padding] * (longest - len(ids[i])) for i in batch])
            mask = torch.tensor([[1] * len(ids[i]) + [0] * (longest - len(ids[i])) for i in batch])
            aims = torch.tensor([labels[i] + [_IGNORED] * (longest - len(labels[i])) for i in batch])
            logits = model(input_ids=tokens.to(device), attention_mask=mask.to(device)).logits
            scored = (aims != _IGNORED).to(device)
            losses = torch.zeros(aims.shape, device=device)
            losses[scored] = F.cross_entropy(
                logits[scored].float(), aims.to(device)[scored], reduction="none"
            )
            for index, total, count in zip(
                batch, losses.sum(1).tolist(), scored.sum(1).tolist(), strict=True
            ):
                sums[index], counts[index] = total, count
            done += len(batch)
            progress(what, done, len(rows))
    return _exponential(ratio(sums, counts))


def _exponential(loss: Estimate) -> Interval:
    return Interval(
        math.exp(loss.value),
        math.exp(loss.value - _Z * loss.error),
        math.exp(loss.value + _Z * loss.error),
    )
