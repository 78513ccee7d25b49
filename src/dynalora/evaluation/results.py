"""What measuring a model on a task gives: a benchmark's numbers, and the scores that trainings are compared by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dynalora.common.statistics import Estimate, Interval, ratio, unweighted_mean, wilson


@dataclass(frozen=True)
class TaskResult:
    """What a model achieved on a benchmark.

    Attributes:
        task: The benchmark's name.
        title: As its paper writes it.
        split: That was measured on.
        items: Number of items.
        main: The name of the number that stands for the task.
        scores: By name, each with its 95 % interval; shares are between 0 and 1.
        percent: Names that are shares.
        values: By name, one value per item, for comparisons on the same items; None where an item does not count.
        answers: What the model said, one per item; empty for tasks in which it says nothing.
        too_long: Items that do not fit into the model's window; they count as wrong (classification,
            encoder-decoders and questions about passages: lose their end).
        seconds: Wall-clock time.
    """

    task: str
    title: str
    split: str
    items: int
    main: str
    scores: dict[str, Interval]
    percent: tuple[str, ...]
    values: dict[str, tuple[float | None, ...]] = field(default_factory=dict, repr=False)
    answers: tuple[str, ...] = field(default=(), repr=False)
    too_long: int = 0
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class TaskScore:
    """What a model achieved on a task's held-out questions, as trainings are compared by it.

    Attributes:
        correct: For each question that was answered whether it was right; empty where none was (see
            [`Measuring`][dynalora.evaluation.kinds.base.Measuring]).
        loss: Negative log-likelihood of the right answers, nats per token, with its standard error over the questions.
        questions: Number of questions that the loss is over.
        losses: Negative log-likelihood of each right answer, in nats, summed over its tokens.
        counts: Number of tokens of each right answer.
        metrics: The benchmark's own numbers where they are others than accuracy, by name (Matthews' correlation, …); of
            several tasks together, each one's accuracy by its name.
        mean: Of several tasks together, the unweighted mean of their accuracies; None: all questions count alike.
        too_long: Number of questions that do not fit into the model's window with their answer, and are not measured.
    """

    correct: tuple[bool, ...]
    loss: Estimate
    questions: int
    losses: tuple[float, ...] = field(default=(), repr=False)
    counts: tuple[int, ...] = field(default=(), repr=False)
    metrics: Mapping[str, float] = field(default_factory=dict)
    mean: Interval | None = None
    too_long: int = 0

    @classmethod
    def of(
        cls,
        correct: Sequence[bool],
        losses: Sequence[float],
        counts: Sequence[int] | None = None,
        metrics: Mapping[str, float] | None = None,
        *,
        too_long: int = 0,
    ) -> TaskScore:
        """The score of single questions.

        Args:
            correct: For each question that was answered whether it was right.
            losses: Negative log-likelihood of each right answer.
            counts: Number of tokens of each right answer; None: an answer is one choice and not a text.
            metrics: The benchmark's other numbers.
            too_long: Number of questions that were not measured.
        """
        counts = [1] * len(losses) if counts is None else counts
        return cls(
            tuple(correct), ratio(losses, counts), len(losses), tuple(losses), tuple(counts), dict(metrics or {}),
            too_long=too_long,
        )  # fmt: skip

    @classmethod
    def together(cls, scores: Mapping[str, TaskScore]) -> TaskScore:
        """One score for several tasks, given by their names.

        Accuracy is the unweighted mean of theirs. Questions are put one behind the other, so the loss, and a comparison
        of two models question by question, weigh a task by its questions.
        """
        accuracies = {name: accuracy for name, score in scores.items() if (accuracy := score.accuracy) is not None}
        metrics = {name: accuracy.value for name, accuracy in accuracies.items()}
        for name, score in scores.items():
            metrics |= {f"{name} {metric}": value for metric, value in score.metrics.items()}
        whole = cls.of(
            [right for score in scores.values() for right in score.correct],
            [loss for score in scores.values() for loss in score.losses],
            [count for score in scores.values() for count in score.counts],
            metrics,
            too_long=sum(score.too_long for score in scores.values()),
        )
        if len(accuracies) < len(scores):
            # The mean of some of the tasks would pass for the mean of all of them.
            return replace(whole, correct=())
        return replace(whole, mean=unweighted_mean(list(accuracies.values())))

    @property
    def accuracy(self) -> Interval | None:
        """Share of right answers with Wilson's 95 % interval, or the mean over tasks; None if nothing was answered."""
        if self.mean is not None:
            return self.mean
        return wilson(sum(self.correct), len(self.correct)) if self.correct else None

    def record(self) -> dict[str, Any]:
        """The score as JSON holds it."""
        accuracy = self.accuracy
        return {
            "accuracy": None if accuracy is None else accuracy.value,
            "accuracy_low": None if accuracy is None else accuracy.low,
            "accuracy_high": None if accuracy is None else accuracy.high,
            "loss": self.loss.value,
            "loss_error": self.loss.error,
            "questions": self.questions,
            "correct": [int(right) for right in self.correct],
            "losses": list(self.losses),
            "counts": list(self.counts),
            "metrics": dict(self.metrics),
            **({"unweighted": True} if self.mean is not None else {}),
            **({"too_long": self.too_long} if self.too_long else {}),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> TaskScore:
        """The score that gave a record."""
        mean = None
        if record.get("unweighted"):
            mean = Interval(record["accuracy"], record["accuracy_low"], record["accuracy_high"])
        return cls(
            tuple(bool(right) for right in record["correct"]),
            Estimate(record["loss"], record["loss_error"]),
            int(record["questions"]),
            tuple(record.get("losses", ())),
            tuple(record.get("counts", ())),
            dict(record.get("metrics", {})),
            mean,
            int(record.get("too_long", 0)),
        )
