"""What tasks for encoders have in common: their model's last layer is new, and is trained with the adapter."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dynalora.evaluation.kinds.base import LearnedKind, Measuring, Prepared, Subject
from dynalora.evaluation.results import TaskResult, TaskScore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Outcome:
    """What a model says to the items of a task.

    Attributes:
        judged: What the metrics compare with the references, one per item.
        losses: Loss of each right answer.
        correct: Whether each answer is right; empty where no answer is simply right or wrong.
        answers: What the model said in words, one per item; empty where it says nothing.
        too_long: Number of items that lost their end.
    """

    judged: Sequence[Any]
    losses: Sequence[float]
    correct: Sequence[bool] = ()
    answers: Sequence[str] = ()
    too_long: int = 0


class EncoderKind(LearnedKind):
    """Tasks for encoders, all of whose numbers come from one pass over the items."""

    @abc.abstractmethod
    def outcome(self, subject: Subject, prepared: Prepared, how: Measuring, what: str) -> Outcome:
        """What the model says to all items.

        Args:
            subject: A model that a head in `heads` fits.
            prepared: The task with its items.
            how: Batch size.
            what: Description given to its `progress`.
        """

    def measure(self, subject: Subject, prepared: Prepared, how: Measuring) -> TaskResult:
        outcome = self.outcome(subject, prepared, how, f"{prepared.task.title}: {subject.name}")
        return prepared.scored(outcome.judged, answers=outcome.answers, too_long=outcome.too_long)

    def score(self, subject: Subject, prepared: Prepared, how: Measuring) -> TaskScore:
        what = f"Measuring {subject.name} on {prepared.task.name}"
        outcome = self.outcome(subject, prepared, how, what)
        references = [item.reference for item in prepared.items]
        scores = [metric.score(outcome.judged, references)[0] for metric in prepared.metrics]
        numbers = {name: interval.value for score in scores for name, interval in score.items()}
        numbers.pop("accuracy", None)  # said by `correct`
        return TaskScore.of(outcome.correct, outcome.losses, metrics=numbers)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[Any], Any] | None:
        from transformers import DataCollatorWithPadding  # takes a moment to import

        return DataCollatorWithPadding(tokenizer)
