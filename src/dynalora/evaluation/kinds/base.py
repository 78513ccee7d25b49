"""What every kind of task says of itself, and the benchmarks and their items, which all kinds share."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from dynalora.common.progress import Progress, silent
from dynalora.common.statistics import Interval
from dynalora.errors import DataError, DynaloraError, first_line
from dynalora.evaluation.heads import Head
from dynalora.evaluation.metrics import Metric
from dynalora.evaluation.multiple_choice import Choice
from dynalora.evaluation.results import TaskResult, TaskScore
from dynalora.evaluation.sandbox import Limits, Program
from dynalora.evaluation.sources import Source
from dynalora.evaluation.tasks import Item
from dynalora.evaluation.tokens import TokenizedSet
from dynalora.evaluation.windows import model_window

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """One item of a task.

    Attributes:
        prompt: The question as it is put to the model.
        reference: What the answer is compared with; the metrics say of which type.
        response: The text to learn, for training; empty where the task has none.
        second: For classification, the second text of a pair; for marking, the passage that holds the answer.
        prefix: The beginning of the answer, given to the model; part of the generated code.
        choice: The same question with its options, for scoring by likelihood.
        program: For code, (answer) → the program to run, with its tests.
        span: Where the passage has the answer, in characters, (first, one behind the last); None: nowhere.
        where: Where its row lies, for errors.
    """

    prompt: str
    reference: Any
    response: str = ""
    second: str = ""
    prefix: str = ""
    choice: Choice | None = None
    program: Callable[[str], Program] | None = None
    span: tuple[int, int] | None = None
    where: str = ""


Reader = Callable[[Mapping[str, Any], str], Sequence[Example]]
"""(row, where it lies) → its items."""


@dataclass(frozen=True)
class Benchmark:
    """A task.

    Attributes:
        name: How it is asked for.
        title: As its paper writes it.
        source: Where its rows are.
        read: (row, where it lies) → its items; most rows are one, a dialogue is one per turn.
        metrics: How answers are scored; the first metric's first name stands for the task.
        kind: What the model does, one of [`kinds`][dynalora.evaluation.kinds].
        max_new_tokens: Longest answer.
        stop: Texts that end an answer.
        labels: For classification, number of classes; 1: a value.
        packages: For code, modules beyond Python's own library that its tests import.
        options: Whether questions have options that can be compared by their likelihood.
    """

    name: str
    title: str
    source: Source
    read: Reader
    metrics: tuple[Metric, ...]
    kind: Kind
    max_new_tokens: int = 32
    stop: tuple[str, ...] = ()
    labels: int = 2
    packages: tuple[str, ...] = ()
    options: bool = False

    def items(self, row: Mapping[str, Any], where: str) -> Sequence[Example]:
        """The items of a row.

        Raises:
            DataError: It is no row of this task.
        """
        try:
            return self.read(row, where)
        except DynaloraError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise DataError(
                f"{where} does not have the form of a row of {self.title} ({first_line(error)}); its fields are "
                f"{', '.join(map(repr, row)) or 'none'}."
            ) from error

    @property
    def main(self) -> str:
        """The number that stands for the task."""
        return self.metrics[0].names[0] if self.metrics else self.kind.number


@dataclass(frozen=True)
class Prepared:
    """A task that is ready to be measured.

    Attributes:
        task: The benchmark.
        split: The split that was read.
        items: Its items.
        metrics: Those to compute.
        weak_sandbox: Generated code is executed even where it cannot be contained.
        limits: Of generated code.
        limit: Largest number of items; of running text, of windows. None: all.
    """

    task: Benchmark
    split: str
    items: tuple[Example, ...] = field(repr=False)
    metrics: tuple[Metric, ...] = ()
    weak_sandbox: bool = False
    limits: Limits = field(default_factory=Limits)
    limit: int | None = None

    def result(
        self,
        scores: dict[str, Interval],
        values: dict[str, tuple[float | None, ...]] | None = None,
        *,
        percent: Sequence[str] = (),
        main: str = "",
        items: int | None = None,
        answers: Sequence[str] = (),
        too_long: int = 0,
    ) -> TaskResult:
        """The result of measuring this task.

        Args:
            scores: Numbers by name.
            values: Their values for single items.
            percent: Names of those that are shares.
            main: The one that stands for the task; empty: the benchmark's, or the first.
            items: Number of items; None: all of them.
            answers: What the model said.
            too_long: Number of items that do not fit into the model's window.
        """
        main = main or self.task.main
        return TaskResult(
            self.task.name, self.task.title, self.split, len(self.items) if items is None else items,
            main if main in scores else next(iter(scores)), scores, tuple(percent), values or {}, tuple(answers),
            too_long,
        )  # fmt: skip

    def scored(self, judged: Sequence[Any], *, answers: Sequence[str] = (), too_long: int = 0) -> TaskResult:
        """The result of scoring answers by the metrics.

        Args:
            judged: What the metrics compare with the references, one per item.
            answers: What the model said, one per item.
            too_long: Number of items that do not fit into the model's window.
        """
        scores: dict[str, Interval] = {}
        values: dict[str, tuple[float | None, ...]] = {}
        references = [item.reference for item in self.items]
        for metric in self.metrics:
            intervals, of_items = metric.score(judged, references)
            scores |= intervals
            values |= of_items
        percent = [name for metric in self.metrics if metric.percent for name in metric.names if name in scores]
        return self.result(scores, values, percent=percent, answers=answers, too_long=too_long)


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """How to measure.

    Attributes:
        batch_size: Questions per forward pass.
        generated: Answers that must be generated, which is slow: the first so many questions of a task; 0: none, and
            then its accuracy is not known.
        generated_tokens: Longest generated answer; None: the benchmark's.
        beams: Beams that answers are searched with; 1: the likeliest token each time.
        window: Tokens per window of running text.
        system: A system message before every question; empty: the chat template's own, if it has one.
        losses_only: The losses of the right answers will do: wrong options are not read, and accuracies are not known.
    """

    batch_size: int = 8
    generated: int = 64
    generated_tokens: int | None = 256
    beams: int = 1
    window: int = 512
    system: str = ""
    losses_only: bool = False


@dataclass(frozen=True)
class Subject:
    """A model that is measured.

    Attributes:
        model: With or without adapter; left in the mode it was in.
        tokenizer: The model's.
        name: For `progress`.
        progress: Called as questions are done.
    """

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    name: str = "the model"
    progress: Progress = silent

    def room(self) -> int:
        """How many tokens the model can take."""
        return model_window(self.model, self.tokenizer)


class Kind(abc.ABC):
    """What tasks of one kind ask of a model.

    Attributes:
        heads: The kinds of models that can do it.
        number: What the number is called that stands for a task without metrics.
    """

    heads: ClassVar[tuple[Head, ...]]
    number: ClassVar[str] = ""

    def check(  # noqa: B027 - most kinds need nothing
        self, task: Benchmark, *, run_code: bool = False, weak_sandbox: bool = False
    ) -> None:
        """Make sure that everything is there, and allowed, to measure a task, its metrics apart.

        Args:
            task: The benchmark.
            run_code: Whether generated code may be executed, in a sandbox.
            weak_sandbox: Whether it may be even where the system cannot contain it.

        Raises:
            ConfigError: The task needs what is not allowed.
            UnsupportedError: A package is missing, or generated code cannot be contained.
        """

    @abc.abstractmethod
    def measure(self, subject: Subject, prepared: Prepared, how: Measuring) -> TaskResult:
        """Measure a model by the benchmark's own numbers, on all items.

        Args:
            subject: A model that a head in `heads` fits.
            prepared: The task with its items.
            how: Batch sizes and the like.

        Raises:
            ConfigError: The tokenizer lacks what the task needs.
            DataError: Every item is longer than the model's window.
        """


class LearnedKind(Kind):
    """A kind whose tasks are questions with right answers, which can be trained on.

    Attributes:
        noun: What such a task is called in messages, such as "classification".
    """

    noun: ClassVar[str]

    @abc.abstractmethod
    def item(self, example: Example) -> Item:
        """An example's question with the answer that is learned, in words."""

    @abc.abstractmethod
    def training(
        self, task: Benchmark, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, system: str = "",
        max_length: int = 512,
    ) -> TokenizedSet:  # fmt: skip
        """Training rows, with the loss on the answers only.

        Args:
            task: The benchmark.
            examples: To train on.
            tokenizer: The model's.
            system: A system message before every question.
            max_length: Tokens of the longest row.

        Raises:
            DataError: All of them are longer.
        """

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[Any], Any] | None:
        """What makes batches of training rows; None: what language models are trained with."""
        return None

    @abc.abstractmethod
    def score(self, subject: Subject, prepared: Prepared, how: Measuring) -> TaskScore:
        """Measure a model with the loss of the right answers, as trainings are compared.

        Args:
            subject: As for `measure`, and so are the others.
            prepared: The task.
            how: Batch sizes and the like.
        """
