"""Multiple choice by likelihood: the option that the model finds likeliest is its answer."""

from __future__ import annotations

from dynalora.errors import DataError
from dynalora.evaluation.heads import CAUSAL_LM
from dynalora.evaluation.kinds.base import Example, Measuring, Prepared, Subject
from dynalora.evaluation.kinds.text import LEFT_OUT, TextKind
from dynalora.evaluation.metrics import Metric
from dynalora.evaluation.multiple_choice import Choice, OptionScores, option_lengths, option_scores, right_option_losses
from dynalora.evaluation.results import TaskResult, TaskScore
from dynalora.evaluation.tasks import Item
from dynalora.evaluation.windows import fitting


class ChoiceKind(TextKind):
    """Multiple choice, whose options are compared by their likelihood."""

    heads = (CAUSAL_LM,)
    number = "accuracy"

    def item(self, example: Example) -> Item:
        return _choice(example).item

    def measure(self, subject: Subject, prepared: Prepared, how: Measuring) -> TaskResult:
        items, title = prepared.items, prepared.task.title
        choices = [_choice(item) for item in items]
        lengths = option_lengths(subject.tokenizer, choices)
        fits = fitting(lengths, subject.room(), title)
        scores = option_scores(
            subject.model, subject.tokenizer, [choices[index] for index in fits], batch_size=how.batch_size,
            name=f"{title}: {subject.name}", progress=subject.progress,
        )  # fmt: skip
        values = _values(scores, fits, len(items))
        metric = Metric(tuple(values), items=lambda answers, references: values)
        intervals, of_items = metric.score(items, items)
        return prepared.result(
            intervals, of_items, percent=("accuracy", "accuracy_raw"), main="accuracy", too_long=len(items) - len(fits)
        )  # fmt: skip

    def score(self, subject: Subject, prepared: Prepared, how: Measuring) -> TaskScore:
        choices, name = [_choice(item) for item in prepared.items], prepared.task.name
        lengths = option_lengths(subject.tokenizer, choices, system=how.system)
        fits = fitting(lengths, subject.room(), name, then=LEFT_OUT)
        choices, too_long = [choices[index] for index in fits], len(lengths) - len(fits)
        title = f"{subject.name} on {name}"
        if how.losses_only:
            losses = right_option_losses(
                subject.model, subject.tokenizer, choices, system=how.system, batch_size=how.batch_size, name=title,
                progress=subject.progress,
            )  # fmt: skip
            return TaskScore.of((), losses.sums, losses.counts, too_long=too_long)
        scores = option_scores(
            subject.model, subject.tokenizer, choices, system=how.system, batch_size=how.batch_size, name=title,
            progress=subject.progress,
        )  # fmt: skip
        return TaskScore.of(scores.correct(), scores.right_losses, scores.right_counts, too_long=too_long)


def _choice(example: Example) -> Choice:
    if example.choice is None:
        raise DataError(f"{example.where} has no options to compare; leave out `likelihood`.")
    return example.choice


def _values(scores: OptionScores, places: list[int], count: int) -> dict[str, list[float | None]]:
    """Values of all items: those that were not asked are wrong, and have no loss."""
    values: dict[str, list[float | None]] = {
        "accuracy": [0.0] * count, "accuracy_raw": [0.0] * count, "right_loss": [None] * count,
    }  # fmt: skip
    for name, measured in (
        ("accuracy", scores.correct()),
        ("accuracy_raw", scores.correct(normalised=False)),
        ("right_loss", scores.right_losses),
    ):
        for place, value in zip(places, measured, strict=True):
            values[name][place] = float(value)
    return values


CHOICE = ChoiceKind()
