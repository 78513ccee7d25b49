"""A task to train on and to measure: its training questions, and its held-out ones."""

from __future__ import annotations

import abc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dynalora.common.progress import Progress, silent
from dynalora.errors import ConfigError
from dynalora.evaluation.heads import LANGUAGE_MODELS, Head, common_heads
from dynalora.evaluation.kinds.base import Benchmark, Example, LearnedKind, Measuring, Prepared, Subject
from dynalora.evaluation.kinds.text import TextKind, right_answers, training_rows
from dynalora.evaluation.results import TaskScore
from dynalora.evaluation.tasks import Item
from dynalora.evaluation.tokens import Conversation, TokenizedSet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ExperimentTask(abc.ABC):
    """A task with its training and its held-out questions.

    Attributes:
        name: For tables and plots.
        about: What it is and where from, in words.
    """

    name: str
    about: str

    @property
    def heads(self) -> tuple[Head, ...]:
        """The kinds of models that can do it."""
        return LANGUAGE_MODELS

    @property
    def noun(self) -> str:
        """What such a task is called in messages."""
        return TextKind.noun

    @property
    def labels(self) -> int:
        """Number of classes of a classification head; 1: a value."""
        return 1

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[Any], Any] | None:
        """What makes batches of what `training` returns; None: what language models are trained with."""
        return None

    @property
    @abc.abstractmethod
    def items(self) -> Sequence[Item]:
        """The training questions with their answers."""

    def validation(self, count: int, *, seed: int = 0) -> tuple[ExperimentTask, ExperimentTask]:
        """Set training questions aside to choose settings on, so that the held-out ones only judge.

        Args:
            count: Number of questions to set aside.
            seed: Fixes which.

        Returns:
            The task without them, and the task with them as its held-out questions.

        Raises:
            ConfigError: There are not that many.
        """
        task: Any = self
        rest, aside = self._parted(count, seed)
        return replace(task, train=rest), replace(task, held_out=aside)

    def _parted(self, count: int, seed: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        task: Any = self
        if not 0 < count < len(task.train):
            raise ConfigError(
                f"{count} questions to choose settings on cannot be set aside of the {len(task.train):,} training "
                f"questions of {self.name}; set aside fewer."
            )
        aside = set(random.Random(seed).sample(range(len(task.train)), count))
        parts: tuple[list[Any], list[Any]] = ([], [])
        for index, item in enumerate(task.train):
            parts[index in aside].append(item)
        return tuple(parts[0]), tuple(parts[1])

    def measure(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        how: Measuring | None = None,
        *,
        name: str = "the model",
        progress: Progress = silent,
    ) -> TaskScore:
        """Measure a model on the held-out questions.

        Args:
            model: Of a kind in `heads`, with or without adapter. It is left in the mode it was in.
            tokenizer: The model's.
            how: Batch sizes and the like; None: the defaults.
            name: Of the model, for `progress`.
            progress: Called as questions are done.
        """
        return self._score(Subject(model, tokenizer, name, progress), how or Measuring())

    @abc.abstractmethod
    def _score(self, subject: Subject, how: Measuring) -> TaskScore: ...

    def training(self, tokenizer: PreTrainedTokenizerBase, *, system: str = "", max_length: int = 512) -> TokenizedSet:
        """The training questions as token ids, loss on the answers only.

        Args:
            tokenizer: With a chat template, or an encoder-decoder's or encoder's.
            system: A system message before every question.
            max_length: Tokens of the longest row.

        Raises:
            DataError: All of them are longer.
        """
        return training_rows(self.items, tokenizer, self.name, system=system, max_length=max_length)


@dataclass(frozen=True)
class AnswerTask(ExperimentTask):
    """Questions with one right answer each, short enough to be said word by word."""

    train: tuple[Item, ...] = field(repr=False)
    held_out: tuple[Item, ...] = field(repr=False)

    @property
    def items(self) -> Sequence[Item]:
        return self.train

    def _score(self, subject: Subject, how: Measuring) -> TaskScore:
        losses, too_long = right_answers(self.held_out, subject, self.name, how)
        return TaskScore.of(losses.greedy, losses.sums, losses.counts, too_long=too_long)


@dataclass(frozen=True)
class BenchmarkTask(ExperimentTask):
    """A benchmark, which is learned and measured as its kind says."""

    benchmark: Benchmark = field(repr=False)
    train: tuple[Example, ...] = field(repr=False)
    held_out: tuple[Example, ...] = field(repr=False)

    @property
    def kind(self) -> LearnedKind:
        """What the model does."""
        kind = self.benchmark.kind
        assert isinstance(kind, LearnedKind)  # others are refused when a task is loaded
        return kind

    @property
    def heads(self) -> tuple[Head, ...]:
        return self.kind.heads

    @property
    def noun(self) -> str:
        return self.kind.noun

    @property
    def labels(self) -> int:
        return self.benchmark.labels

    @property
    def items(self) -> Sequence[Item]:
        return [self.kind.item(example) for example in self.train]

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[Any], Any] | None:
        return self.kind.collator(tokenizer)

    def training(self, tokenizer: PreTrainedTokenizerBase, *, system: str = "", max_length: int = 512) -> TokenizedSet:
        return self.kind.training(self.benchmark, self.train, tokenizer, system=system, max_length=max_length)

    def _score(self, subject: Subject, how: Measuring) -> TaskScore:
        prepared = Prepared(self.benchmark, "", self.held_out, self.benchmark.metrics)
        return self.kind.score(subject, prepared, how)


@dataclass(frozen=True)
class Chat(Item):
    """A conversation as it stands in a data set, which may have several turns.

    Attributes:
        messages: All of it; `question` is the last thing asked and `answer` what is said to it.
    """

    messages: tuple[Any, ...] = field(default=(), repr=False)

    def conversation(self, system: str = "") -> list[Any]:
        """The messages, behind a system message if one is given and they have none."""
        has = self.messages[0]["role"] == "system"
        first = [{"role": "system", "content": system}] if system and not has else []
        return [*first, *self.messages]

    @classmethod
    def of(cls, messages: Conversation) -> Chat:
        """A chat with these messages."""
        asked = [turn["content"] for turn in messages if turn["role"] == "user"]
        return cls(asked[-1] if asked else "", messages[-1]["content"], tuple(messages))


@dataclass(frozen=True)
class MixedTask(ExperimentTask):
    """Trained on one thing, measured on others: see [`tasks`][dynalora.lab.tasks].

    Attributes:
        train: What is learned.
        measured: The tasks that are measured; their own training questions are not looked at.
    """

    train: tuple[Item, ...] = field(repr=False)
    measured: tuple[ExperimentTask, ...] = field(repr=False)

    @property
    def heads(self) -> tuple[Head, ...]:
        return common_heads([task.heads for task in self.measured])

    @property
    def items(self) -> Sequence[Item]:
        return self.train

    def validation(self, count: int, *, seed: int = 0) -> tuple[ExperimentTask, ExperimentTask]:
        """As for every task; what is set aside is measured by its answers' loss, whatever kind of question it is."""
        rest, aside = self._parted(count, seed)
        return replace(self, train=rest), AnswerTask(self.name, self.about, (), aside)

    def _score(self, subject: Subject, how: Measuring) -> TaskScore:
        return TaskScore.together({task.name: task._score(subject, how) for task in self.measured})
