"""Questions that language models answer in words: what is learned of them, and what the right answers cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dynalora.errors import DataError
from dynalora.evaluation.kinds.base import Benchmark, Example, LearnedKind, Measuring, Subject
from dynalora.evaluation.scoring import AnswerLoss, answer_loss
from dynalora.evaluation.seq2seq import is_encoder_decoder
from dynalora.evaluation.tasks import Item
from dynalora.evaluation.tokens import TokenizedSet, tokenize
from dynalora.evaluation.windows import fitting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEFT_OUT = "are left out"


class TextKind(LearnedKind):
    """Questions that are answered in words."""

    noun = "answering in words"

    def item(self, example: Example) -> Item:
        """The question with what is learned: the solution, or where there is none the bare answer."""
        return Item(example.prompt, example.response or str(example.reference))

    def training(
        self, task: Benchmark, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, system: str = "",
        max_length: int = 512,
    ) -> TokenizedSet:  # fmt: skip
        items = [self.item(example) for example in examples]
        return training_rows(items, tokenizer, task.name, system=system, max_length=max_length)


def conversation_rows(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, system: str = "") -> TokenizedSet:
    """Questions with their answers as token ids, none cut, loss on the answers only."""
    return tokenize([item.conversation(system) for item in items], tokenizer, max_length=1 << 30)


def training_rows(
    items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, name: str, *, system: str = "", max_length: int = 512
) -> TokenizedSet:
    """Questions with their answers to train on, loss on the answers only.

    Args:
        items: The questions.
        tokenizer: With a chat template, or an encoder-decoder's.
        name: The task's, for errors.
        system: A system message before every question.
        max_length: Longer questions, in tokens with their answer, are left out: half an answer teaches to stop in the
            middle.

    Raises:
        DataError: All of them are longer.
    """
    rows = conversation_rows(items, tokenizer, system)
    fits = [row for row in rows.rows if len(row["input_ids"]) <= max_length]
    if not fits:
        shortest = min(len(row["input_ids"]) for row in rows.rows)
        raise DataError(
            f"Every training question of {name} is longer than max_length {max_length}; the shortest has {shortest} "
            "tokens."
        )
    return TokenizedSet(fits, 0, len(rows) - len(fits))


def right_answers(items: Sequence[Item], subject: Subject, name: str, how: Measuring) -> tuple[AnswerLoss, int]:
    """The loss of the right answers.

    Args:
        items: Questions with their right answers.
        subject: A causal language model or an encoder-decoder.
        name: The task's, for progress and warnings.
        how: Batch size and system message.

    Returns:
        The losses, and the number of questions that do not fit into the model's window and are left out.

    Raises:
        DataError: None fits.
    """
    rows = conversation_rows(items, subject.tokenizer, how.system).rows
    too_long = 0
    if not is_encoder_decoder(subject.model):  # which reads the beginning of a long question
        lengths = [len(row["input_ids"]) for row in rows]
        fits = fitting(lengths, subject.room(), name, then=LEFT_OUT)
        too_long = len(rows) - len(fits)
        rows = [rows[index] for index in fits]
    what = f"Measuring {subject.name} on {name}"
    losses = answer_loss(subject.model, rows, batch_size=how.batch_size, what=what, progress=subject.progress)
    return losses, too_long
