"""Scores on questions with one right answer each: accuracy, and the loss of the right answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from dynalora.common.devices import device_of
from dynalora.common.names import IGNORED_LABEL
from dynalora.common.progress import Progress, silent
from dynalora.common.statistics import Interval, wilson
from dynalora.errors import DataError, check_least
from dynalora.evaluation.causal import causal_pass
from dynalora.evaluation.generation import batches_by_length, evaluating, generate, padding_id
from dynalora.evaluation.padding import padded
from dynalora.evaluation.seq2seq import is_encoder_decoder, taught_logits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Score:
    """What a model achieved on a task's held-out items.

    Attributes:
        correct: For each item whether the model answers it right.
        answer_loss: Mean negative log-likelihood of the right answers, in nats per token, end-of-turn token included.
        answer_tokens: Number of tokens `answer_loss` is the mean over.
        samples: What the model says to the first few items, from `generate`.
    """

    correct: tuple[bool, ...]
    answer_loss: float
    answer_tokens: int
    samples: tuple[str, ...] = ()

    @property
    def accuracy(self) -> Interval:
        """Share of right answers with Wilson's 95 % interval."""
        return wilson(sum(self.correct), len(self.correct))


def evaluate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    *,
    samples: int = 8,
    batch_size: int = 16,
    name: str = "the model",
    progress: Progress = silent,
) -> Score:
    """Measure a model on questions with one right answer each.

    An item counts as right if greedy decoding gives exactly its answer, from the first token to the end-of-turn token.
    That is the case precisely if at every position of the right answer, given everything before it, the right token
    is the most likely one. So accuracy and loss come out of one forward pass, and nothing need be generated but the
    samples to look at.

    Args:
        model: A causal language model, with or without adapter.
        tokenizer: The model's.
        rows: For each item `input_ids` and `labels`, where labels are −100 on all but the answer's tokens. The ids
            before the first labelled one are the prompt. The answer's last token is the one that ends the turn.
        samples: For how many items, from the first on, to generate the answer as text.
        batch_size: Items per batch.
        name: Of the model, for `progress`.
        progress: Called as losses and samples are computed.

    Returns:
        The score.

    Raises:
        ConfigError: Samples below 0 or batch_size below 1.
        DataError: No item, or a row without answer tokens or prompt.
    """
    check_least(0, samples=samples)
    prompts = [_prompt(row, index) for index, row in enumerate(rows)]
    losses = answer_loss(model, rows, batch_size=batch_size, what=f"Measuring {name}", progress=progress)
    shown: list[str] = []
    if samples:
        longest = max(len(row["input_ids"]) - len(prompt) for row, prompt in zip(rows, prompts, strict=True))
        shown = generate(
            model, tokenizer, prompts[:samples], max_new_tokens=longest, batch_size=batch_size,
            what=f"Sample answers: {name}", progress=progress,
        )  # fmt: skip
    return Score(losses.greedy, losses.mean, losses.tokens, tuple(shown))


@dataclass(frozen=True)
class AnswerLoss:
    """Negative log-likelihood of the right answers.

    Attributes:
        sums: One per item, in nats, summed over the answer's tokens.
        counts: One per item, number of answer tokens.
        greedy: One per item, whether every answer token is the model's most likely one.
    """

    sums: tuple[float, ...]
    counts: tuple[int, ...]
    greedy: tuple[bool, ...]

    @property
    def tokens(self) -> int:
        """Number of answer tokens over all items."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Nats per answer token, every token counting the same."""
        return math.fsum(self.sums) / self.tokens


def answer_loss(
    model: torch.nn.Module,
    rows: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 16,
    what: str = "Loss of the answers",
    progress: Progress = silent,
) -> AnswerLoss:
    """Negative log-likelihood of the labelled tokens given everything before them.

    Args:
        model: A causal language model or an encoder-decoder, with or without adapter. It is left in the mode (train or
            eval) it was in.
        rows: `input_ids` and `labels` of each item, labels −100 where a token is not scored.
        batch_size: Items per batch.
        what: Description given to `progress`.
        progress: Called with the number of items done.

    Returns:
        Sums, counts and greedy agreement per item.

    Raises:
        ConfigError: Batch_size below 1.
        DataError: No rows, or a row has no labelled token after its first.
    """
    check_least(1, batch_size=batch_size)
    if not rows:
        raise DataError("There are no held-out items to measure on; give at least one.")
    for index, row in enumerate(rows):
        if len(row["input_ids"]) != len(row["labels"]):
            raise DataError(
                f"Row {index} has {len(row['input_ids'])} ids and {len(row['labels'])} labels; give as many of each."
            )
        if all(label == IGNORED_LABEL for label in row["labels"][1:]):
            raise DataError(f"Row {index} has no answer token; a label after the first must differ from −100.")
    padding = padding_id(model, None)
    right_logits = taught_logits if is_encoder_decoder(model) else _answer_logits
    sums, counts, greedy = [0.0] * len(rows), [0] * len(rows), [False] * len(rows)
    # Not inference_mode: this runs between training steps, and what sharding gathers here is trained with later.
    with evaluating(model), torch.no_grad():
        for batch in batches_by_length([len(row["input_ids"]) for row in rows], batch_size, what, progress):
            logits, targets = right_logits(model, [rows[index] for index in batch], padding)
            scored = targets != IGNORED_LABEL
            # Selected first, so that no float32 copy is made of logits that carry no label.
            chosen = logits[scored].float()
            losses = torch.zeros(targets.shape, device=targets.device)
            losses[scored] = F.cross_entropy(chosen, targets[scored], reduction="none")
            agrees = torch.ones_like(scored)
            agrees[scored] = chosen.argmax(dim=-1) == targets[scored]
            results = zip(batch, losses.sum(1).tolist(), scored.sum(1).tolist(), agrees.all(1).tolist(), strict=True)
            for index, total, count, agreed in results:
                sums[index], counts[index], greedy[index] = total, count, agreed
    return AnswerLoss(tuple(sums), tuple(counts), tuple(greedy))


def _answer_logits(
    model: torch.nn.Module, rows: Sequence[Mapping[str, Any]], padding: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, K, V) at the places of the labelled tokens, and those tokens (B, K), −100 where there is none."""
    device = device_of(model)
    tokens, mask = padded([row["input_ids"] for row in rows], padding, "left")
    labels, _ = padded([row["labels"] for row in rows], IGNORED_LABEL, "left")
    # Padded on the left all answers end together, so only the last few positions need logits.
    first = int((labels[:, 1:] != IGNORED_LABEL).any(dim=0).nonzero()[0])
    targets = labels[:, first + 1 :].to(device)
    logits = last_logits(model, tokens.to(device), mask.to(device), targets.shape[1] + 1)
    return logits[:, :-1], targets


def last_logits(model: torch.nn.Module, tokens: torch.Tensor, mask: torch.Tensor, keep: int) -> torch.Tensor:
    """Logits (B, keep, V) of the last `keep` positions of a left-padded batch (B, T)."""
    return causal_pass(model, tokens, mask, keep=keep)[0]


def _prompt(row: Mapping[str, Sequence[int]], index: int) -> list[int]:
    start = next((place for place, label in enumerate(row["labels"]) if label != IGNORED_LABEL), 0)
    if start == 0:
        raise DataError(f"Row {index} has no prompt before its answer, or no answer; the first label must be −100.")
    return list(row["input_ids"][:start])
