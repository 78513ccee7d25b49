"""Questions about passages, whose answers a model with a question-answering head marks there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from dynalora.evaluation.heads import MARKER
from dynalora.evaluation.kinds.base import Benchmark, Example, Measuring, Prepared, Subject
from dynalora.evaluation.kinds.encoder import EncoderKind, Outcome
from dynalora.evaluation.spans import mark_answers, read_windows
from dynalora.evaluation.tasks import Item
from dynalora.evaluation.tokens import TokenizedSet, Tokens
from dynalora.evaluation.windows import within_window

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WINDOW = 384
"""Tokens of a window over a passage, as in BERT's own script."""


class MarkKind(EncoderKind):
    """The marking of answers; a passage longer than the model's window is several training rows, one per window."""

    heads = (MARKER,)
    noun = "the marking of answers"

    def item(self, example: Example) -> Item:
        return Item(example.prompt, example.response or "unanswerable")

    def training(
        self, task: Benchmark, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, system: str = "",
        max_length: int = 512,
    ) -> TokenizedSet:  # fmt: skip
        """The questions with their passages, in windows of up to `max_length` tokens."""
        rows: list[Tokens] = []
        cut: set[int] = set()
        for window in read_windows(tokenizer, examples, max_length):
            rows.append(cast("Tokens", window.training_row()))
            if window.cut:
                cut.add(window.item)
        return TokenizedSet(rows, len(cut), 0)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[Any], Any] | None:
        right = copy.copy(tokenizer)
        right.padding_side = "right"  # places are counted from the left
        return super().collator(right)

    def outcome(self, subject: Subject, prepared: Prepared, how: Measuring, what: str) -> Outcome:
        model, tokenizer = subject.model, subject.tokenizer
        marked = mark_answers(
            model, tokenizer, prepared.items, max_length=within_window(_WINDOW, model, tokenizer),
            batch_size=how.batch_size, what=what, progress=subject.progress,
        )  # fmt: skip
        return Outcome(marked.answers, marked.losses, answers=marked.answers, too_long=marked.cut)


MARK = MarkKind()
