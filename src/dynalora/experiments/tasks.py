"""Tasks to train on and to measure: generated ones, multiple choice, and word problems with a number as the answer.

A task is named in one of three ways:

- a benchmark of [`benchmarks`][dynalora.evaluation.benchmarks], such as `arc_easy` or `gsm8k`, whose answers are right
  or wrong; its rows come from the Hub, or from a folder of benchmarks' files;
- a task of reasoning-gym, such as `family_relationships`, with options of its generator behind a colon:
  `chain_sum:min_terms=2,max_terms=3`;
- files: `data/ARC-Easy` for `data/ARC-Easy.train.jsonl.gz` and `data/ARC-Easy.dev.jsonl.gz`, or a folder with
  `train.jsonl` and `test.jsonl`. Held out is the first there is of `dev` (or `validation`, `valid`) and `test`. Rows
  with `instruction` and `answer` are multiple choice as in LLM-Adapters; rows with `question` and an `answer` that ends
  in `#### 72` are word problems as in GSM8K.

| kind | trained on | accuracy | loss |
|---|---|---|---|
| generated | the answer | the whole answer is the model's most likely one | of the answer, end of turn included |
| multiple choice | the right option's text | the likeliest option, per token, is the right one | of the right option |
| classification | the class | the likeliest class is the right one | of the right class, per text |
| others | the solution's text | the generated solution is right by the benchmark's metric | of the solution |

Losses are negative log-likelihoods of the right answers in nats per token. They tell models apart long before their
accuracies do. Classification (GLUE) is for encoders with a classification head, all others for causal language models.
"""

from __future__ import annotations

import abc
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dynalora.errors import ConfigError, DataError
from dynalora.evaluation.benchmarks import Benchmark, Example, benchmark, find_benchmark
from dynalora.evaluation.files import file_rows, split_files
from dynalora.evaluation.generation import batches_by_length, evaluating, generate
from dynalora.evaluation.metrics import Metric
from dynalora.evaluation.multiple_choice import Choice, option_scores
from dynalora.evaluation.numbers import MARK
from dynalora.evaluation.run import model_window
from dynalora.evaluation.scoring import answer_loss
from dynalora.evaluation.sources import Row
from dynalora.evaluation.statistics import Estimate, Interval, ratio, wilson
from dynalora.evaluation.tasks import Item, load_task
from dynalora.experiments.data import IGNORED, Collator, TokenizedSet, Tokens, tokenize
from dynalora.experiments.settings import named_values
from dynalora.progress import Progress, silent

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

GENERATED = 1000
"""Training questions of a generated task, unless another number is asked for."""

_HELD_OUT = ("dev", "test")


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
        losses: negative log-likelihood of each right answer, in nats, summed over its tokens.
        counts: number of tokens of each right answer.
        metrics: the benchmark's own numbers where they are others than accuracy, by name (Matthews' correlation, …).
    """

    correct: tuple[bool, ...]
    loss: Estimate
    questions: int
    losses: tuple[float, ...] = field(default=(), repr=False)
    counts: tuple[int, ...] = field(default=(), repr=False)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        correct: Sequence[bool],
        losses: Sequence[float],
        counts: Sequence[int],
        metrics: Mapping[str, float] | None = None,
    ) -> TaskScore:
        """The score out of what single questions gave."""
        loss = ratio(losses, counts)
        return cls(tuple(correct), loss, len(losses), tuple(losses), tuple(counts), dict(metrics or {}))

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
            "losses": list(self.losses),
            "counts": list(self.counts),
            "metrics": dict(self.metrics),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> TaskScore:
        """The score out of what `record` gave."""
        correct = tuple(bool(own) for own in record["correct"])
        return cls(
            correct,
            Estimate(record["loss"], record["loss_error"]),
            int(record["questions"]),
            tuple(record.get("losses", ())),
            tuple(record.get("counts", ())),
            dict(record.get("metrics", {})),
        )


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
    def head(self) -> str:
        """What the model must have on top: `lm`, or `classes` for a classification head."""
        return "lm"

    @property
    def labels(self) -> int:
        """Number of classes of a classification head; 1: a value."""
        return 1

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Makes batches of what `training` returns."""
        return Collator(tokenizer.pad_token_id or 0)

    @property
    @abc.abstractmethod
    def items(self) -> Sequence[Item]:
        """The training questions with their answers."""

    def validation(self, count: int, *, seed: int = 0) -> tuple[ExperimentTask, ExperimentTask]:
        """Set training questions aside to choose settings on, so that the held-out ones only judge.

        Args:
            count: number of questions to set aside.
            seed: fixes which.

        Returns:
            The task without them, and the task with them as its held-out questions.

        Raises:
            ConfigError: there are not that many.
        """
        own: Any = self
        if not 0 < count < len(own.train):
            raise ConfigError(
                f"{count} questions to choose settings on cannot be set aside of the {len(own.train):,} training "
                f"questions of {self.name}; set aside fewer."
            )
        aside = set(random.Random(seed).sample(range(len(own.train)), count))
        parts: tuple[list[Any], list[Any]] = ([], [])
        for index, item in enumerate(own.train):
            parts[index in aside].append(item)
        return replace(own, train=tuple(parts[0])), replace(own, held_out=tuple(parts[1]))

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
    ) -> TokenizedSet:
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
        return TokenizedSet(kept, 0, len(rows) - len(kept))


def _tokens(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, system: str) -> TokenizedSet:
    conversations = [item.conversation(system) for item in items]
    return tokenize(conversations, tokenizer, max_length=1 << 30)


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
        return TaskScore.of(found.greedy, found.sums, found.counts)


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
        return TaskScore.of(found.correct(), found.right_losses, found.right_counts)


@dataclass(frozen=True)
class GenerationTask(ExperimentTask):
    """Questions whose generated answers are right or wrong by a benchmark's metric."""

    benchmark: Benchmark = field(repr=False)
    train: tuple[Example, ...] = field(repr=False)
    held_out: tuple[Example, ...] = field(repr=False)

    @property
    def items(self) -> Sequence[Item]:
        return [_item(example) for example in self.train]

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
        rows = _tokens([_item(example) for example in self.held_out], tokenizer, how.system).rows
        what = f"Measuring {name} on {self.name}"
        found = answer_loss(model, rows, batch_size=how.batch_size, what=what, progress=progress)
        asked = self.held_out[: how.generated]
        if not asked:
            return TaskScore.of((), found.sums, found.counts)
        said = generate(
            model, tokenizer, [_prompt(row) for row in rows[: how.generated]],
            max_new_tokens=how.generated_tokens, batch_size=how.batch_size, stop=self.benchmark.stop,
            what=f"Solving {self.name}: {name}", progress=progress,
        )  # fmt: skip
        metric = _right_or_wrong(self.benchmark)
        assert metric is not None  # a task is made of no other benchmarks
        right = metric.score(said, [example.reference for example in asked])[1][metric.names[0]]
        return TaskScore.of([bool(value) for value in right], found.sums, found.counts)


@dataclass(frozen=True)
class ClassTask(ExperimentTask):
    """Texts, alone or in pairs, to be put into classes (or valued) by a model with a classification head.

    A value's loss is its squared error, and no answer is simply right.
    """

    benchmark: Benchmark = field(repr=False)
    train: tuple[Example, ...] = field(repr=False)
    held_out: tuple[Example, ...] = field(repr=False)

    @property
    def head(self) -> str:
        return "classes"

    @property
    def labels(self) -> int:
        return self.benchmark.labels

    @property
    def items(self) -> Sequence[Item]:
        return [Item(example.prompt, str(example.reference)) for example in self.train]

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer)

    def training(
        self, tokenizer: PreTrainedTokenizerBase, *, system: str = "", max_length: int = 512
    ) -> TokenizedSet:
        """The training texts as token ids with their class; longer ones lose their end."""
        rows, cut = self._rows(self.train, tokenizer, max_length)
        return TokenizedSet(cast("list[Tokens]", rows), cut, 0)

    def _rows(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> tuple[list[dict[str, Any]], int]:
        rows, cut = [], 0
        for example in examples:
            made = tokenizer(example.prompt, example.second or None, truncation=True, max_length=max_length)
            cut += len(made["input_ids"]) >= max_length
            value = float(example.reference) if self.labels == 1 else int(example.reference)
            rows.append({**made, "labels": value})
        return rows, cut

    def measure(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        how: Measuring | None = None,
        *,
        name: str = "the model",
        progress: Progress = silent,
    ) -> TaskScore:
        import torch
        import torch.nn.functional as F

        how = how or Measuring()
        room = min(512, model_window(model, tokenizer))
        rows, _ = self._rows(self.held_out, tokenizer, room)
        device, collate = next(model.parameters()).device, self.collator(tokenizer)
        losses, predicted = [0.0] * len(rows), [0.0] * len(rows)
        what, done = f"Measuring {name} on {self.name}", 0
        progress(what, 0, len(rows))
        with evaluating(model), torch.inference_mode():
            for batch in batches_by_length([len(row["input_ids"]) for row in rows], how.batch_size):
                made = {key: value.to(device) for key, value in collate([rows[i] for i in batch]).items()}
                truth = made.pop("labels")
                logits = model(**made).logits.float()
                if self.labels == 1:
                    values, apart = logits[:, 0], (logits[:, 0] - truth) ** 2
                else:
                    values, apart = logits.argmax(-1), F.cross_entropy(logits, truth, reduction="none")
                for index, value, loss in zip(batch, values.tolist(), apart.tolist(), strict=True):
                    predicted[index], losses[index] = value, loss
                done += len(batch)
                progress(what, done, len(rows))
        references = [example.reference for example in self.held_out]
        answers: list[Any] = predicted if self.labels == 1 else [int(value) for value in predicted]
        found: dict[str, float] = {}
        for metric in self.benchmark.metrics:
            intervals, _ = metric.score(answers, references)
            found |= {own: interval.value for own, interval in intervals.items()}
        found.pop("accuracy", None)
        right = (
            []
            if self.labels == 1
            else [own == int(truth) for own, truth in zip(answers, references, strict=True)]
        )
        return TaskScore.of(right, losses, [1] * len(losses), found)


def _item(example: Example) -> Item:
    """The question with what is learned: the solution, or where there is none the bare answer."""
    return Item(example.prompt, example.response or str(example.reference))


def _right_or_wrong(task: Benchmark) -> Metric | None:
    """A benchmark's first metric, if it says of every answer whether it is right."""
    if task.how != "generate" or not task.metrics:
        return None
    first = task.metrics[0]
    return first if first.items is not None and first.names[0] in ("accuracy", "strict") else None


def _prompt(row: Tokens) -> list[int]:
    start = next(place for place, label in enumerate(row["labels"]) if label != IGNORED)
    return row["input_ids"][:start]


# --- finding a task -------------------------------------------------------------------------------------------


def load_experiment_task(
    source: str,
    *,
    data: str | os.PathLike[str] | None = None,
    held_out: int = 200,
    train_limit: int | None = None,
    seed: int = 0,
) -> ExperimentTask:
    """The task of that name.

    Args:
        source: a benchmark, a task of reasoning-gym, or the place of its files; see the top of this module.
        data: a folder with benchmarks' files, laid out as [`sources`][dynalora.evaluation.sources] says; None: the Hub.
        held_out: number of held-out questions; files that have fewer give all of theirs.
        train_limit: number of training questions; None: all of a file,
            [`GENERATED`][dynalora.experiments.tasks.GENERATED] of a generated task.
        seed: of generated questions.

    Raises:
        ConfigError: the name is empty or unknown, a number is out of range, the generator rejects the options, or the
            benchmark's answers are not right or wrong.
        DataError: a file or split is missing, or its rows are neither multiple choice nor word problems.
        UnsupportedError: reasoning-gym is not installed.
    """
    if held_out < 1:
        raise ConfigError(f"held_out is {held_out}; give a whole number of at least 1.")
    if train_limit is not None and train_limit < 1:
        raise ConfigError(f"train_limit is {train_limit}; give a whole number of at least 1.")
    if not source.strip():
        raise ConfigError(
            "A task has no name; give a benchmark, a task of reasoning-gym, or the place of its files."
        )
    path = Path(source).expanduser()
    if path.is_dir() or "/" in source or "\\" in source or "train" in split_files(path):
        return _from_files(path, held_out, train_limit)
    known = find_benchmark(source)
    if known is not None:
        return _from_benchmark(known, data, held_out, train_limit)
    source = source.removeprefix("reasoning_gym:")
    name, _, told = source.partition(":")
    options = named_values(pair for pair in told.split(",") if pair.strip())
    made = load_task(
        name, train_size=train_limit or GENERATED, held_out_size=held_out, seed=seed, options=options
    )
    about = f"{source} of reasoning-gym, seed {seed}: {len(made.train):,} training and {len(made.held_out):,} held out"
    return AnswerTask(source, about, made.train, made.held_out)


def _from_files(path: Path, held_out: int, train_limit: int | None) -> ExperimentTask:
    files = split_files(path)
    train_file, held_file = files.get("train"), next((files[own] for own in _HELD_OUT if own in files), None)
    if train_file is None or held_file is None:
        lacking = "train" if train_file is None else " or ".join(_HELD_OUT)
        place = f"'{path}/{{}}.jsonl'" if path.is_dir() else f"'{path}.{{}}.jsonl'"
        raise DataError(
            f"The task '{path}' has no file {place.format(lacking)} (or of another kind, or with .gz); "
            "give a folder or the beginning of the names of its files."
        )
    train, held = (
        [(f"'{file}', {where}", row) for where, row in file_rows(file)] for file in (train_file, held_file)
    )
    for file, rows in ((train_file, train), (held_file, held)):
        if not rows:
            raise DataError(f"'{file}' holds no row; give a file with at least one.")
    first = train[0][1]
    if "instruction" in first:
        written_as = "arc_easy"  # whose rows list their options, as those of all others do
    elif "question" in first and MARK in str(first.get("answer")):
        written_as = "gsm8k"
    else:
        has = ", ".join(f"'{key}'" for key in first)
        raise DataError(
            f"'{train_file}' has rows with the fields {has}; give multiple choice (instruction, answer) or word "
            f"problems (question, and an answer that ends in '{MARK} 72'), or name a benchmark."
        )
    name = path.resolve().name
    places = f"'{train_file.name}'", f"'{held_file.name}'"
    return _task(name, places, benchmark(written_as), train, held, held_out, train_limit)


def _from_benchmark(
    known: Benchmark, data: str | os.PathLike[str] | None, held_out: int, train_limit: int | None
) -> ExperimentTask:
    if _right_or_wrong(known) is None and known.how != "classify":
        raise ConfigError(
            f"The answers to {known.name} are not simply right or wrong; choose another task, "
            "such as arc_easy or gsm8k."
        )
    train = known.source.rows("train", folder=data)[1]
    split, held = known.source.rows(folder=data, limit=held_out)
    place = f"'{known.source.hub}'" if data is None else f"'{os.fspath(data)}'"
    return _task(known.name, (place, f"its {split} split"), known, train, held, held_out, train_limit)


def _task(
    name: str,
    places: tuple[str, str],
    known: Benchmark,
    train: Sequence[Row],
    held: Sequence[Row],
    held_out: int,
    train_limit: int | None,
) -> ExperimentTask:
    """A task out of rows that are read as a benchmark's; no question is on both sides."""
    every = [example for where, row in train for example in known.read(row, where)]
    aside = [example for where, row in held[:held_out] for example in known.read(row, where)][:held_out]
    seen = {_key(example) for example in aside}
    kept = [example for example in every if _key(example) not in seen][:train_limit]
    if not kept:
        raise DataError(f"Every training question of {name} is also held out; give other files.")
    about = f"{name}: {len(kept):,} training questions of {places[0]}, {len(aside):,} held out of {places[1]}"
    if known.how == "classify":
        return ClassTask(name, about, known, tuple(kept), tuple(aside))
    choices, later = ([own.choice for own in part if own.choice is not None] for part in (kept, aside))
    if len(choices) == len(kept) and len(later) == len(aside):
        return ChoiceTask(name, about, tuple(choices), tuple(later))
    return GenerationTask(name, about, known, tuple(kept), tuple(aside))


def _key(example: Example) -> str:
    question = f"{example.prompt} {example.second}" if example.choice is None else example.choice.question
    return " ".join(question.split()).casefold()
