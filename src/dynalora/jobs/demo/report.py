"""The demo's results as tables, figures and sentences."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from dynalora.common.statistics import Estimate, Interval, mcnemar, paired_difference
from dynalora.drawing.comparison import differing, plot_bars
from dynalora.drawing.training import plot_losses
from dynalora.evaluation.scoring import Score
from dynalora.evaluation.tasks import Task
from dynalora.jobs.demo.settings import DemoSpec
from dynalora.lab.report import Cell, Table
from dynalora.lab.scores import shown_interval

SHOWN = 8


@dataclass(frozen=True)
class DemoRow:
    """One method's result, before (the base model) and after training.

    Attributes:
        method: Its name.
        accuracy_before: Share of held-out questions answered right, with its 95 % interval.
        accuracy_after: The same after training.
        answer_loss_before: Loss of the right answers, nats per token.
        answer_loss_after: The same after training.
        kl: KL(base ‖ tuned) on text that the base model wrote, nats per token.
        kl_error: Its standard error.
        loss_shift: Loss on that text minus the base model's, nats per token.
        trainable_parameters: Number of trained parameters.
        step_seconds: Median time of an optimizer step; None for runs of very few steps.
        train_seconds: Time of the whole training.
        retain: Weight with which it keeps what the base model says; None: it does not.
    """

    method: str
    accuracy_before: Interval
    accuracy_after: Interval
    answer_loss_before: float
    answer_loss_after: float
    kl: float
    kl_error: float
    loss_shift: float
    trainable_parameters: int
    step_seconds: float | None
    train_seconds: float
    retain: float | None = None

    @property
    def title(self) -> str:
        """The method with what it was told to keep."""
        return self.method if self.retain is None else f"{self.method}, retain = {self.retain:g}"


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo found.

    Attributes:
        rows: One per method, in the order they were trained.
        scores: Base model and methods by name → their held-out scores.
        task: What they were trained on.
        origin: Where the base model came from.
        seconds: Time of the whole demo.
        shots: Number of solved questions that the base model was shown in its second measurement; 0: there is none.
        peak_memory: Most memory the process has held, in bytes; None where the system does not say.
    """

    rows: list[DemoRow]
    scores: dict[str, Score]
    task: Task
    origin: str
    seconds: float = 0.0
    shots: int = 0
    peak_memory: int | None = None

    @property
    def shown(self) -> Score | None:
        """The base model's score after solved questions; None where it was not measured."""
        return self.scores.get(f"base, {self.shots} examples")


def summary_table(result: DemoResult) -> Table:
    """The demo's one table: the base model's rows first, then each method's."""
    names = {"base model": result.scores["base"]}
    if result.shown is not None:
        names[f"base model, shown {_solved(result)}"] = result.shown
    cells: list[list[Cell]] = [
        [name, _share(score.accuracy), "0", f"{score.answer_loss:.3f}", "0", None, None]
        for name, score in names.items()
    ]
    for row in result.rows:
        cells.append(
            [
                row.title, _share(row.accuracy_after), f"{row.kl:.4f} ± {row.kl_error:.4f}",
                f"{row.answer_loss_after:.3f}", f"{row.loss_shift:+.4f}", row.trainable_parameters,
                None if row.step_seconds is None else f"{row.step_seconds:.2f}",
            ]
        )  # fmt: skip
    return Table(
        ["", "accuracy", "KL from base", "answer loss", "loss shift", "trainable parameters", "step (s)"],
        cells,
        note=(
            "Accuracy: held-out questions answered exactly right by greedy decoding, with Wilson's 95 % interval; "
            "solved questions are of the training set, and stand before each held-out one. "
            "Answer loss: nats per token of the right answers. KL(base ‖ tuned), with its standard error, and loss "
            "shift: nats per token of text that the base model itself wrote; 0 is an unchanged model. Step: median "
            "time of an optimizer step; `dynalora bench` compares step times precisely."
        ),
    )


def comparison_table(result: DemoResult) -> Table:
    """Differences in accuracy on the same questions: each method against the base model and against the others."""
    names = list(result.scores)
    rows: list[list[Cell]] = []
    for first, second in itertools.combinations(names, 2):
        a, b = result.scores[first].correct, result.scores[second].correct
        interval, p = shown_interval(paired_difference(a, b), 1, scale=100, sign="+"), mcnemar(a, b)
        rows.append([f"{second} − {first}", interval, "< 0.0001" if p < 1e-4 else f"{p:.4f}"])
    return Table(
        ["accuracy on the same questions", "difference in points (95 % interval)", "McNemar's p"],
        rows,
        note="Interval: adjusted Wald for paired proportions. p: exact, two-sided. One training run per method.",
    )


def _share(accuracy: Interval) -> str:
    return f"{100 * accuracy.value:.1f} % ({100 * accuracy.low:.1f}–{100 * accuracy.high:.1f})"


def summary(result: DemoResult) -> str:
    """The trade in its first sentence: what the first method forgets and learns beside the second, with intervals."""
    first = result.rows[0]
    sentences = [_traded(result, first, result.rows[1])] if len(result.rows) > 1 else []
    sentences += [_alone(row, result) for row in (result.rows[2:] if sentences else result.rows)]
    base = f"The base model answers {_share(result.scores['base'].accuracy)} right as it is asked"
    if result.shown is not None:
        base += f", and {_share(result.shown.accuracy)} after {_solved(result)} of the training set"
    sentences.append(f"{base}; its KL is 0.")
    memory = f" and {result.peak_memory / 1e9:.1f} GB of memory" if result.peak_memory else ""
    sentences.append(f"All of it took {result.seconds / 60:.1f} minutes{memory}, with one training run per method.")
    return " ".join(sentences)


def _traded(result: DemoResult, first: DemoRow, second: DemoRow) -> str:
    """One method's forgetting and learning beside another's."""
    less, more = sorted((first.kl, second.kl))
    times = f"{more / less:.0f} times" if less > 0 and more / less >= 10 else f"{more / max(less, 1e-12):.1f} times"
    forgets = f"forgets {times} {'less' if first.kl <= second.kl else 'more'} than {second.title}"
    scores = [result.scores[row.method].correct for row in (first, second)]
    apart = paired_difference(scores[1], scores[0])
    chance = "may be chance" if apart.low <= 0 <= apart.high else "is beyond chance"
    return (
        f"{first.title} {forgets} (KL from the base model {_distance(first)} instead of {_distance(second)} nats per "
        f"token), and answers {_share(first.accuracy_after)} instead of {_share(second.accuracy_after)} of "
        f"{len(result.task.held_out):,} held-out questions right; the difference of "
        f"{shown_interval(apart, 1, scale=100, sign='+')} points {chance}."
    )


def _alone(row: DemoRow, result: DemoResult) -> str:
    return (
        f"{row.title} answers {_share(row.accuracy_after)} of {len(result.task.held_out):,} held-out questions right, "
        f"at a KL from the base model of {_distance(row)} nats per token."
    )


def _solved(result: DemoResult) -> str:
    return f"{result.shots} solved question{'' if result.shots == 1 else 's'}"


def _distance(row: DemoRow) -> str:
    """KL with its 95 % interval."""
    interval = Estimate(row.kl, row.kl_error).interval
    return f"{row.kl:.3f} ({max(0.0, interval.low):.3f}–{interval.high:.3f})"


def description(spec: DemoSpec, result: DemoResult, system: str, *, retention_tokens: int) -> str:
    """What was trained and measured, as a paragraph."""
    task = result.task
    options = ", ".join(f"{name} = {value}" for name, value in task.options.items())
    batch = spec.batch_size * spec.gradient_accumulation
    message = f" System message: “{system}”" if system else ""
    return (
        f"Base model: {result.origin}. Task: {task.name} of reasoning-gym{f' ({options})' if options else ''}."
        f"{message} There are {len(task.train):,} training and {len(task.held_out):,} held-out questions from seed "
        f"{task.seed}, none twice. Always giving the most frequent answer would be right on "
        f"{100 * task.majority:.1f} % of them. Training: AdamW, {spec.steps} steps of {batch} questions, learning rate "
        f"{spec.learning_rate:g} ({spec.schedule}), rank {spec.r}; every method sees the same batches in the same "
        f"order. Besides as it is asked, the base model is measured with {_solved(result)} of the training "
        f"set before each held-out one, which show it the form of an answer. "
        f"Retention is measured on {retention_tokens:,} tokens that the base model wrote."
    )


READING = (
    "Higher accuracy and lower answer loss mean that more of the task was learned; part of that is to answer in the "
    "form asked for, as the samples below show. KL and loss shift nearer to 0 mean that more of the base model was "
    "kept. The two have to be read together: an adapter that learns nothing forgets nothing either."
)


def samples_table(result: DemoResult) -> Table:
    """What the base model and each method answer to the first held-out questions."""
    names = list(result.scores)
    rows: list[list[Cell]] = []
    for index, item in enumerate(result.task.held_out[:SHOWN]):
        answers = [(score.samples[index : index + 1] or ("",))[0][:200] for score in result.scores.values()]
        rows.append([item.question, item.answer, *answers])
    return Table(
        ["question", "right answer", *names], rows, title="The first held-out questions",
        note="Greedy decoding, cut at the length of the longest right answer.",
    )  # fmt: skip


def figures(result: DemoResult, records: dict[str, list[dict[str, Any]]]) -> dict[str, tuple[Figure | None, str]]:
    """The plots by name, each with its caption."""
    distances: dict[str, dict[str, Interval | None]] = {
        "KL(base ‖ tuned)": {row.method: Interval(*[row.kl] * 3) for row in result.rows},
        "loss shift": {row.method: Interval(*[row.loss_shift] * 3) for row in result.rows},
    }
    accuracy = {name: score.accuracy for name, score in result.scores.items()}
    return {
        "accuracy": (
            plot_bars({"": accuracy}, label="held-out accuracy", decimals=3) if differing(accuracy.values()) else None,
            "Held-out accuracy, 95 % intervals.",
        ),
        "loss": (plot_losses(records), "Training loss of each method, on the same batches."),
        "retention": (
            plot_bars(distances, label="nats per token", decimals=4),
            "Distance from the base model on the base model's own text; smaller is better.",
        ),
    }
