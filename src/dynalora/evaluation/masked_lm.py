"""Masked-LM perplexity: what an encoder has kept of its pre-training (DISeL §4, App. II).

With M the masked positions of a text x, and x' the text with the mask token in all of them,

    perplexity = exp( (1/|M|) Σ_{t in M} −log p(x_t | x') )

over all masked positions of all texts. An adapter that was trained with a classifier on the encoder is measured on the
encoder with its original masked-LM head: the model that `AutoModelForMaskedLM.from_pretrained(base)` gives, with the
adapter put on it by `PeftModel.from_pretrained`, or while it is still in memory with the classifier's encoder put into
it by `under_head`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft import PeftModel

from dynalora.common.devices import device_of
from dynalora.common.progress import Progress, silent
from dynalora.common.statistics import Estimate, Interval, ratio
from dynalora.errors import ConfigError, DataError, check_least
from dynalora.evaluation.generation import batches_by_length, evaluating, padding_id
from dynalora.evaluation.padding import padded
from dynalora.evaluation.perplexity import exponential

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class MaskedText:
    """Texts with some tokens masked.

    Attributes:
        rows: Token ids of each text, special tokens included, unmasked.
        masked: For each text the masked positions, ascending.
        mask_id: The token that stands in the masked positions.
    """

    rows: tuple[tuple[int, ...], ...]
    masked: tuple[tuple[int, ...], ...]
    mask_id: int

    @property
    def tokens(self) -> int:
        """Number of masked tokens."""
        return sum(map(len, self.masked))


@dataclass(frozen=True)
class MaskedPerplexity:
    """Masked-LM perplexity of a model on a text.

    Attributes:
        perplexity: Exp of the loss.
        loss: Mean negative log-likelihood of the masked tokens, nats per token.
        error: Standard error of the loss over the texts; 0 for a single text.
        tokens: Number of masked tokens.
    """

    perplexity: float
    loss: float
    error: float
    tokens: int

    @property
    def interval(self) -> Interval:
        """The perplexity with its 95 % interval over the texts."""
        return exponential(Estimate(self.loss, self.error))


def under_head(classifier: torch.nn.Module, original: PreTrainedModel) -> PreTrainedModel:
    """The encoder of a classifier, with whatever was trained in it, under the original masked-LM head.

    Args:
        classifier: With or without adapter; it keeps its encoder, which both then share.
        original: The masked language model that it was made from; its own encoder is replaced.

    Returns:
        `original`.

    Raises:
        ConfigError: The two are not of one family.
    """
    base: Any = classifier.get_base_model() if isinstance(classifier, PeftModel) else classifier
    name = original.base_model_prefix
    encoder, replaced = getattr(base, name, None), getattr(original, name, None)
    if encoder is None or replaced is None or type(encoder) is not type(replaced):
        raise ConfigError(
            f"The encoder of a {type(base).__name__} does not fit under the head of a {type(original).__name__}; give "
            "the masked language model that the classifier was made from."
        )
    setattr(original, name, encoder)
    return original


def mask_text(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    share: float = 0.15,
    seed: int = 0,
    max_length: int = 128,
) -> MaskedText:
    """Mask tokens of texts, the same ones for every model with this tokenizer.

    Every masked position holds the mask token: the 80/10/10 rule of BERT's training has no place in a measurement.
    Which positions are masked depends on the seed, the text and its place in the list, and on nothing else.

    Args:
        texts: The texts, such as the lines of WikiText-2 that are no headings. Texts without two ordinary tokens are
            left out.
        tokenizer: The model's; it must have a mask token.
        share: Part of a text's ordinary tokens to mask, rounded; at least one, special tokens never.
        seed: Of the choice. The global random state is neither used nor changed.
        max_length: Tokens at which a text is cut, special tokens included.

    Raises:
        ConfigError: The tokenizer has no mask token, `share` is not in (0, 1), `max_length` is below 4, one string
            instead of a list.
        DataError: No text is left.
    """
    if isinstance(texts, str):
        raise ConfigError("texts must be a list of texts, got one string; put it into a list.")
    _check_share(share)
    if max_length < 4:
        raise ConfigError(f"max_length is {max_length}; give at least 4 tokens.")
    _mask_token(tokenizer)
    rows = [list(tokenizer(text, truncation=True, max_length=max_length)["input_ids"]) for text in texts]
    return _masked(rows, "texts", tokenizer, share, seed)


def mask_windows(
    windows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, *, share: float = 0.15, seed: int = 0
) -> MaskedText:
    """Mask tokens of windows of running text by the rule of `mask_text`.

    Args:
        windows: Token ids of each window without special tokens, as
            [`windows`][dynalora.evaluation.perplexity.windows] gives them; the tokenizer's first and last token are put
            around each. Windows without two ordinary tokens are left out.
        tokenizer: The model's; it must have a mask token.
        share: Part of a window's ordinary tokens to mask, rounded; at least one.
        seed: Of the choice.

    Raises:
        ConfigError: The tokenizer has no mask token, or `share` is not in (0, 1).
        DataError: No window is left.
    """
    _check_share(share)
    _mask_token(tokenizer)
    first, last = ([] if token is None else [int(token)] for token in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    return _masked([[*first, *window, *last] for window in windows], "windows", tokenizer, share, seed)


def _masked(
    texts: Sequence[list[int]], what: str, tokenizer: PreTrainedTokenizerBase, share: float, seed: int
) -> MaskedText:
    """Texts with a share of their tokens masked; those without two ordinary tokens are left out."""
    rows, masked = [], []
    for index, ids in enumerate(texts):
        places = _chosen(ids, tokenizer, share, seed, index)
        if places:
            rows.append(tuple(ids))
            masked.append(places)
    if not rows:
        raise DataError(f"None of the {len(texts)} {what} has two ordinary tokens; give text to measure on.")
    return MaskedText(tuple(rows), tuple(masked), _mask_token(tokenizer))


def _check_share(share: float) -> None:
    if not 0 < share < 1:
        raise ConfigError(f"share is {share}; give a part of the tokens between 0 and 1, such as 0.15.")


def _mask_token(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.mask_token_id is None:
        raise ConfigError(
            f"The tokenizer ({type(tokenizer).__name__}) has no mask token; give that of a masked language model."
        )
    return int(tokenizer.mask_token_id)


def _chosen(
    ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, share: float, seed: int, index: int
) -> tuple[int, ...]:
    """The places to mask, ascending; none where there are fewer than two ordinary tokens."""
    special = set(tokenizer.all_special_ids)
    ordinary = [place for place, token in enumerate(ids) if token not in special]
    if len(ordinary) < 2:
        return ()
    # Its own generator for every row: no row's mask depends on those before it.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    chosen = torch.randperm(len(ordinary), generator=generator)[: max(1, round(share * len(ordinary)))]
    return tuple(sorted(ordinary[place] for place in chosen.tolist()))


def masked_lm_perplexity(
    model: torch.nn.Module,
    text: MaskedText,
    *,
    batch_size: int = 32,
    name: str = "the model",
    progress: Progress = silent,
) -> MaskedPerplexity:
    """Perplexity of a masked language model on masked tokens, as defined at the top of this module.

    Args:
        model: A masked language model, with or without adapters; it is left in the mode it was in.
        text: From `mask_text`, with the model's tokenizer.
        batch_size: Texts per batch; it changes the result by rounding only.
        name: Of the model, for `progress`.
        progress: Called with the number of texts done.

    Raises:
        ConfigError: Batch_size below 1.
    """
    check_least(1, batch_size=batch_size)
    what = f"Masked-LM perplexity: {name}"
    device = device_of(model)
    padding = padding_id(model, None)
    sums = [0.0] * len(text.rows)
    with evaluating(model), torch.inference_mode():
        for batch in batches_by_length([len(row) for row in text.rows], batch_size, what, progress):
            # Padded on the right: encoders count their positions from the left, some from the first token that is no
            # padding, which is the same here.
            ids, mask = padded([text.rows[index] for index in batch], padding, "right")
            labels = torch.full_like(ids, -1)
            for row, index in enumerate(batch):
                places = torch.tensor(text.masked[index])
                labels[row, places] = ids[row, places]
                ids[row, places] = text.mask_id
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
            scored = labels >= 0
            losses = F.cross_entropy(logits[scored.to(device)].float(), labels[scored].to(device), reduction="none")
            parts = losses.double().cpu().split([len(text.masked[index]) for index in batch])
            for index, part in zip(batch, parts, strict=True):
                sums[index] = float(part.sum())
    loss = ratio(sums, [len(places) for places in text.masked])
    return MaskedPerplexity(math.exp(loss.value), loss.value, loss.error, text.tokens)
