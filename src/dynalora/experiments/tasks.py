"""Tasks to train on and to measure: generated ones, multiple choice, and word problems with a number as the answer.

A task is named in one of two ways:

- a task of reasoning-gym, such as `family_relationships`, with options of its generator behind a colon:
  `chain_sum:min_terms=2,max_terms=3`;
- files: `data/ARC-Easy` for `data/ARC-Easy.train.jsonl.gz` and `data/ARC-Easy.dev.jsonl.gz`, or a folder with
  `train.jsonl` and `test.jsonl`. Held out is the first there is of `dev`, `validation`, `valid` and `test`. Rows with
  `instruction` and `answer` are multiple choice as in LLM-Adapters; rows with `question` and an `answer` that ends in
  `#### 72` are word problems as in GSM8K.

| kind | trained on | accuracy | loss |
|---|---|---|---|
| generated | the answer | the whole answer is the model's most likely one | of the answer, end of turn included |
| multiple choice | the right option's text | the likeliest option, per token, is the right one | of the right option |
| word problem | the solution's text | the generated solution ends in the right number | of the solution |

Losses are negative log-likelihoods of the right answers in nats per token. They tell models apart long before their
accuracies do.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynalora.errors import ConfigError, DataError
from dynalora.evaluation.commonsense import choice_from
from dynalora.evaluation.files import file_rows
from dynalora.evaluation.generation import generate
from dynalora.evaluation.multiple_choice import Choice, option_scores
from dynalora.evaluation.numbers import MARK, final_number, same_number, solution_from
from dynalora.evaluation.scoring import answer_loss
from dynalora.evaluation.statistics import Estimate, Interval, ratio, wilson
from dynalora.evaluation.tasks import Item, load_task
from dynalora.experiments import data
from dynalora.experiments.settings import named_values
from dynalora.progress import Progress, silent

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

GENERATED = 1000
"""Training questions of a generated task, unless another number is asked for."""

_HELD_OUT = ("dev", "validation", "valid", "test")
_KINDS = (".jsonl", ".json")


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """How to measure.

    Attributes:
        batch_size: questions per forward pass.
        generated: word problems are solved by generation, which is slow: the first so many; 0: none, and then their
            accuracy is not known.
        generated_tokens: longest generated solution.
        system: a system message before every question; empty: the chat template's own, if it has one.
    """

    batch_size: int = 8
    generated: int = 64
    generated_tokens: int = 256
    system: str = ""


@dataclass(frozen=True)
class TaskScore:
    """What a model achieved on a task's held-out questions.

    Attributes:
        correct: for each question that was answered whether it was right; empty where none was (see
            [`Measuring`][dynalora.experiments.tasks.Measuring]).
        loss: negative log-likelihood of the right answers, nats per token, with its standard error over the questions.
        questions: number of questions that the loss is over.
    """

    correct: tuple[bool, ...]
    loss: Estimate
    questions: int

    @property
    def accuracy(self) -> Interval | None:
        """Share of right answers with Wilson's 95 % interval; None if nothing was answered."""
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
            "correct": [int(own) for own in self.correct],
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> TaskScore:
        """The score out of what `record` gave."""
        correct = tuple(bool(own) for own in record["correct"])
        return cls(correct, Estimate(record["loss"], record["loss_error"]), int(record["questions"]))


@dataclass(frozen=True)
class ExperimentTask(abc.ABC):
    """A task with its training and its held-out questions.

    Attributes:
        name: for tables and plots.
        about: what it is and where from, in words.
    """

    name: str
    about: str

    @property
    @abc.abstractmethod
    def items(self) -> Sequence[Item]:
        """The training questions with their answers."""

    @abc.abstractmethod
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
            model: a causal language model, with or without adapter. It is left in the mode it was in.
            tokenizer: the model's.
            how: batch sizes and the like; None: the defaults.
            name: of the model, for `progress`.
            progress: called as questions are done.
        """

    def training(
        self, tokenizer: PreTrainedTokenizerBase, *, system: str = "", max_length: int = 512
    ) -> data.TokenizedSet:
        """The training questions as token ids, loss on the answers only.

        Args:
            tokenizer: with a chat template.
            system: a system message before every question.
            max_length: longer questions, in tokens with their answer, are left out: half an answer teaches to stop in
                the middle.

        Raises:
            DataError: all of them are longer.
        """
        rows = _tokens(self.items, tokenizer, system)
        kept = [row for row in rows.rows if len(row["input_ids"]) <= max_length]
        if not kept:
            shortest = min(len(row["input_ids"]) for row in rows.rows)
            raise DataError(
                f"Every training question of {self.name} is longer than max_length {max_length}; "
                f"the shortest has {shortest} tokens."
            )
        return data.TokenizedSet(kept, 0, len(rows) - len(kept))


def _tokens(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, system: str) -> data.TokenizedSet:
    conversations = [item.conversation(system) for item in items]
    return data.tokenize(conversations, tokenizer, max_length=1 << 30)


@dataclass(frozen=True)
class AnswerTask(ExperimentTask):
    """Questions with one right answer each, short enough to be said word by word."""

    train: tuple[Item, ...] = field(repr=False)
    held_out: tuple[Item, ...] = field(repr=False)

    @property
    def items(self) -> Sequence[Item]:
        return self.train

    def measure(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        how: Measuring | None = None,
        *,
        name: str = "the model",
        progress: Progress = silent,
    ) -> TaskScore:
        how = how or Measuring()
        rows = _tokens(self.held_out, tokenizer, how.system).rows
        what = f"Measuring {name} on {self.name}"
        found = answer_loss(model, rows, batch_size=how.batch_size, what=what, progress=progress)
        return TaskScore(found.greedy, ratio(found.sums, found.counts), len(rows))


@dataclass(frozen=True)
class ChoiceTask(ExperimentTask):
    """Multiple choice, by the options' likelihood."""

    train: tuple[Choice, ...] = field(repr=False)
    held_out: tuple[Choice, ...] = field(repr=False)

    @property
    def items(self) -> Sequence[Item]:
        return [choice.item for choice in self.train]

    def measure(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        how: Measuring | None = None,
        *,
        name: str = "the model",
        progress: Progress = silent,
    ) -> TaskScore:
        how = how or Measuring()
        found = option_scores(
            model, tokenizer, self.held_out, system=how.system, batch_size=how.batch_size,
            name=f"{name} on {self.name}", progress=progress,
        )  # fmt: skip
        return TaskScore(found.correct(), found.right_loss_per_token, len(self.held_out))


@dataclass(frozen=True)
class NumberTask(ExperimentTask):
    """Word problems whose solutions end in a number."""

    train: tuple[Item, ...] = field(repr=False)
    held_out: tuple[Item, ...] = field(repr=False)

    @property
    def items(self) -> Sequence[Item]:
        return self.train

    def measure(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        how: Measuring | None = None,
        *,
        name: str = "the model",
        progress: Progress = silent,
    ) -> TaskScore:
        how = how or Measuring()
        rows = _tokens(self.held_out, tokenizer, how.system).rows
        what = f"Measuring {name} on {self.name}"
        found = answer_loss(model, rows, batch_size=how.batch_size, what=what, progress=progress)
        asked = self.held_out[: how.generated]
        said = generate(
            model, tokenizer, [_prompt(row) for row in rows[: how.generated]],
            max_new_tokens=how.generated_tokens, batch_size=how.batch_size,
            what=f"Solving {self.name}: {name}", progress=progress,
        ) if asked else []  # fmt: skip
        right = tuple(
            same_number(final_number(own), final_number(item.answer))
            for own, item in zip(said, asked, strict=True)
        )
        return TaskScore(right, ratio(found.sums, found.counts), len(rows))


def _prompt(row: data.Tokens) -> list[int]:
    start = next(place for place, label in enumerate(row["labels"]) if label != data.IGNORED)
    return row["input_ids"][:start]


# --- finding a task -------------------------------------------------------------------------------------------


def load_experiment_task(
    source: str, *, held_out: int = 200, train_limit: int | None = None, seed: int = 0
) -> ExperimentTask:
    """The task of that name.

    Args:
        source: a task of reasoning-gym or the place of its files; see the top of this module.
        held_out: number of held-out questions; files that have fewer give all of theirs.
        train_limit: number of training questions; None: all of a file,
            [`GENERATED`][dynalora.experiments.tasks.GENERATED] of a generated task.
        seed: of generated questions.

    Raises:
        ConfigError: the name is empty or unknown, a number is out of range, or the generator rejects the options.
        DataError: a file is missing or its rows are neither multiple choice nor word problems.
        UnsupportedError: reasoning-gym is not installed.
    """
    if held_out < 1:
        raise ConfigError(f"held_out is {held_out}; give a whole number of at least 1.")
    if train_limit is not None and train_limit < 1:
        raise ConfigError(f"train_limit is {train_limit}; give a whole number of at least 1.")
    if not source.strip():
        raise ConfigError("A task has no name; give a task of reasoning-gym or the place of its files.")
    path = Path(source).expanduser()
    if path.is_dir() or "/" in source or "\\" in source or _split_file(path, "train") is not None:
        return _from_files(path, held_out, train_limit)
    name, _, told = source.partition(":")
    options = named_values(pair for pair in told.split(",") if pair.strip())
    made = load_task(
        name, train_size=train_limit or GENERATED, held_out_size=held_out, seed=seed, options=options
    )
    about = f"{source} of reasoning-gym, seed {seed}: {len(made.train):,} training and {len(made.held_out):,} held out"
    return AnswerTask(source, about, made.train, made.held_out)


def _split_file(path: Path, split: str) -> Path | None:
    """The file of a split: inside a folder, or with the split's name behind the given one."""
    begin = path / split if path.is_dir() else path.with_name(f"{path.name}.{split}")
    names = [begin.with_name(f"{begin.name}{kind}{packed}") for kind in _KINDS for packed in ("", ".gz")]
    return next((name for name in names if name.is_file()), None)


def _from_files(path: Path, held_out: int, train_limit: int | None) -> ExperimentTask:
    train_file = _split_file(path, "train")
    held_file = next((file for split in _HELD_OUT if (file := _split_file(path, split)) is not None), None)
    if train_file is None or held_file is None:
        lacking = "train" if train_file is None else " or ".join(_HELD_OUT)
        place = f"'{path}/{{}}.jsonl'" if path.is_dir() else f"'{path}.{{}}.jsonl'"
        raise DataError(
            f"The task '{path}' has no file {place.format(lacking)} (or .json, or with .gz); "
            "give a folder or the beginning of the names of its files."
        )
    name = path.resolve().name
    train_rows, held_rows = list(file_rows(train_file)), list(file_rows(held_file))
    for file, rows in ((train_file, train_rows), (held_file, held_rows)):
        if not rows:
            raise DataError(f"'{file}' holds no row; give a file with at least one.")
    first = train_rows[0][1]
    about = f"{name}: {{:,}} training questions of '{train_file.name}', {{:,}} held out of '{held_file.name}'"
    if "instruction" in first:
        choices = [choice_from(row, f"'{train_file}', {where}") for where, row in train_rows]
        aside = tuple(choice_from(row, f"'{held_file}', {where}") for where, row in held_rows[:held_out])
        seen = {_key(choice.question) for choice in aside}
        kept = tuple(choice for choice in choices if _key(choice.question) not in seen)[:train_limit]
        _require_training(kept, name)
        return ChoiceTask(name, about.format(len(kept), len(aside)), kept, aside)
    if "question" in first and MARK in str(first.get("answer")):
        problems = [solution_from(row, f"'{train_file}', {where}") for where, row in train_rows]
        later = tuple(solution_from(row, f"'{held_file}', {where}") for where, row in held_rows[:held_out])
        seen = {_key(item.question) for item in later}
        solved = tuple(item for item in problems if _key(item.question) not in seen)[:train_limit]
        _require_training(solved, name)
        return NumberTask(name, about.format(len(solved), len(later)), solved, later)
    has = ", ".join(f"'{key}'" for key in first)
    raise DataError(
        f"'{train_file}' has rows with the fields {has}; give multiple choice (instruction, answer) or word problems "
        f"(question, and an answer that ends in '{MARK} 72')."
    )


def _require_training(rows: Sequence[Any], name: str) -> None:
    if not rows:
        raise DataError(f"Every training question of {name} is also held out; give other files.")


def _key(question: str) -> str:
    return " ".join(question.split()).casefold()
