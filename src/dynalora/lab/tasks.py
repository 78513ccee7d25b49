"""Tasks to train on and to measure: generated ones, multiple choice, word problems, classification, and others.

A task is named in one of four ways:

- a benchmark of [`benchmarks`][dynalora.evaluation.benchmarks], such as `arc_easy` or `gsm8k`; its rows come from the
  Hub, or from a folder of benchmarks' files;
- a task of reasoning-gym, such as `family_relationships`, with options of its generator behind a colon:
  `chain_sum:min_terms=2,max_terms=3`;
- files: `data/ARC-Easy` for `data/ARC-Easy.train.jsonl.gz` and `data/ARC-Easy.dev.jsonl.gz`, or a folder with
  `train.jsonl` and `test.jsonl`. Held out is the first there is of `dev` (or `validation`, `valid`) and `test`. Rows
  with `instruction` and `answer` are multiple choice as in LLM-Adapters; rows with `question` and an `answer` that ends
  in `#### 72` are word problems as in GSM8K;
- trained on one thing and measured on others, as papers do: `TRAIN -> MEASURED + MEASURED`, with a name for tables and
  files in front if wanted: `commonsense = commonsense_union -> boolq + piqa`. TRAIN is any of the above, of which the
  training rows are taken; a group of benchmarks or `commonsense_union`; or whatever `dynalora finetune --data` reads (a
  data set of the Hub, a file or a folder with prompts and responses); several are joined by `+`. MEASURED is any of the
  above, of which the held-out questions are taken, or a group. Accuracy is the unweighted mean of the measured tasks'
  accuracies, which are each among the metrics. A question that is measured is not trained on; questions count as the
  same if they differ only in case and white space.

| kind | trained on | accuracy | loss |
|---|---|---|---|
| generated | the answer | the whole answer is the model's most likely one | of the answer, end of turn included |
| multiple choice | the right option's text | the likeliest option, per token, is the right one | of the right option |
| multiple choice, by generation | the row's response | the first keyword that is said is the right one | of it |
| code | the solution | the generated program passes the tests | of the solution |
| classification | the class | the likeliest class is the right one | of the right class, per text |
| marking | the answer's place in the passage | none; exact match and F1 instead | of start and end, per question |
| others | the solution's text | the solution is right by the benchmark's metric, if that says so | of the solution |

Losses are negative log-likelihoods of the right answers in nats per token. They tell models apart long before their
accuracies do. Classification (GLUE) is for encoders with a classification head, marking (`squad_v2_spans`) for those
with a question-answering head, all others for causal language models, and what is neither compared by likelihood nor
code for encoder-decoders as well.
"""

from __future__ import annotations

import abc
import copy
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dynalora.common.progress import Progress, silent
from dynalora.common.statistics import Estimate, Interval, ratio, unweighted_mean, wilson
from dynalora.errors import ConfigError, DataError
from dynalora.evaluation.benchmarks import (
    GROUPS,
    UNION_NAME,
    Benchmark,
    Example,
    benchmark,
    commonsense_rows,
    find_benchmark,
)
from dynalora.evaluation.files import file_rows, split_files
from dynalora.evaluation.multiple_choice import Choice, option_lengths, option_scores
from dynalora.evaluation.numbers import MARK
from dynalora.evaluation.run import (
    Prepared,
    check_scoring,
    class_logits,
    classes,
    fitting,
    measure,
    model_window,
    span_window,
)
from dynalora.evaluation.scoring import AnswerLoss, answer_loss
from dynalora.evaluation.seq2seq import is_encoder_decoder
from dynalora.evaluation.sources import MissingSplitError, Row
from dynalora.evaluation.spans import mark_answers, read_windows
from dynalora.evaluation.tasks import Item, load_task
from dynalora.evaluation.tokens import Conversation, TokenizedSet, Tokens, tokenize
from dynalora.lab.data.collator import Collator
from dynalora.lab.data.conversations import load_conversations
from dynalora.lab.settings import named_values

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
        batch_size: Questions per forward pass.
        generated: Answers that must be generated, which is slow: the first so many questions of a task; 0: none, and
            then its accuracy is not known.
        generated_tokens: Longest generated answer.
        system: A system message before every question; empty: the chat template's own, if it has one.
    """

    batch_size: int = 8
    generated: int = 64
    generated_tokens: int = 256
    system: str = ""


@dataclass(frozen=True)
class TaskScore:
    """What a model achieved on a task's held-out questions.

    Attributes:
        correct: For each question that was answered whether it was right; empty where none was (see
            [`Measuring`][dynalora.lab.tasks.Measuring]).
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
        counts: Sequence[int],
        metrics: Mapping[str, float] | None = None,
        *,
        too_long: int = 0,
    ) -> TaskScore:
        """The score out of what single questions gave."""
        loss = ratio(losses, counts)
        return cls(
            tuple(correct),
            loss,
            len(losses),
            tuple(losses),
            tuple(counts),
            dict(metrics or {}),
            too_long=too_long,
        )

    @classmethod
    def together(cls, scores: Mapping[str, TaskScore]) -> TaskScore:
        """One score out of several tasks', by their names.

        Accuracy is the unweighted mean of theirs. Questions are put one behind the other, so the loss, and a comparison
        of two models question by question, weigh a task by its questions.
        """
        accuracies = {name: own.accuracy for name, own in scores.items()}
        known = {name: own for name, own in accuracies.items() if own is not None}
        metrics = {name: own.value for name, own in known.items()}
        for name, score in scores.items():
            metrics |= {f"{name} {metric}": value for metric, value in score.metrics.items()}
        whole = cls.of(
            [right for own in scores.values() for right in own.correct],
            [loss for own in scores.values() for loss in own.losses],
            [count for own in scores.values() for count in own.counts],
            metrics,
            too_long=sum(own.too_long for own in scores.values()),
        )
        if len(known) < len(scores):
            # The mean of some of the tasks would pass for the mean of all of them.
            return replace(whole, correct=())
        return replace(whole, mean=unweighted_mean(list(known.values())))

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
            "correct": [int(own) for own in self.correct],
            "losses": list(self.losses),
            "counts": list(self.counts),
            "metrics": dict(self.metrics),
            **({"unweighted": True} if self.mean is not None else {}),
            **({"too_long": self.too_long} if self.too_long else {}),
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
            Interval(record["accuracy"], record["accuracy_low"], record["accuracy_high"])
            if record.get("unweighted")
            else None,
            int(record.get("too_long", 0)),
        )


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
    def head(self) -> str:
        """The kind of model.

        `text`: a causal language model or an encoder-decoder; `classes`: a classifier; `spans`: one that marks answers.
        """
        return "text"

    @property
    def causal(self) -> bool:
        """Whether it takes a causal language model, and no encoder-decoder."""
        return False

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
            count: Number of questions to set aside.
            seed: Fixes which.

        Returns:
            The task without them, and the task with them as its held-out questions.

        Raises:
            ConfigError: There are not that many.
        """
        own: Any = self
        kept, aside = self._parted(count, seed)
        return replace(own, train=kept), replace(own, held_out=aside)

    def _parted(self, count: int, seed: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
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
        return tuple(parts[0]), tuple(parts[1])

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
            model: Of the kind that `head` says, with or without adapter. It is left in the mode it was in.
            tokenizer: The model's.
            how: Batch sizes and the like; None: the defaults.
            name: Of the model, for `progress`.
            progress: Called as questions are done.
        """

    def training(
        self, tokenizer: PreTrainedTokenizerBase, *, system: str = "", max_length: int = 512
    ) -> TokenizedSet:
        """The training questions as token ids, loss on the answers only.

        Args:
            tokenizer: With a chat template, or an encoder-decoder's.
            system: A system message before every question.
            max_length: Longer questions, in tokens with their answer, are left out: half an answer teaches to stop in
                the middle.

        Raises:
            DataError: All of them are longer.
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

    def _losses(
        self,
        items: Sequence[Item],
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        how: Measuring,
        name: str,
        progress: Progress,
    ) -> tuple[AnswerLoss, int]:
        """Loss of the right answers to held-out questions, and how many do not fit into the model's window."""
        rows = _tokens(items, tokenizer, how.system).rows
        cut = 0
        if not is_encoder_decoder(model):  # which reads the beginning of a long question
            lengths = [len(row["input_ids"]) for row in rows]
            fits = fitting(lengths, model_window(model, tokenizer), self.name, then=_UNMEASURED)
            cut = len(rows) - len(fits)
            rows = [rows[index] for index in fits]
        what = f"Measuring {name} on {self.name}"
        return answer_loss(model, rows, batch_size=how.batch_size, what=what, progress=progress), cut


_UNMEASURED = "are left out"
KINDS = {"classes": "classification", "spans": "the marking of answers"}
"""In words what a task is whose head (`ExperimentTask.head`) is not `text`."""


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
        found, cut = self._losses(self.held_out, model, tokenizer, how, name, progress)
        return TaskScore.of(found.greedy, found.sums, found.counts, too_long=cut)


@dataclass(frozen=True)
class ChoiceTask(ExperimentTask):
    """Multiple choice, by the options' likelihood."""

    train: tuple[Choice, ...] = field(repr=False)
    held_out: tuple[Choice, ...] = field(repr=False)

    @property
    def causal(self) -> bool:
        return True

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
        lengths = option_lengths(tokenizer, self.held_out, system=how.system)
        fits = fitting(lengths, model_window(model, tokenizer), self.name, then=_UNMEASURED)
        found = option_scores(
            model, tokenizer, [self.held_out[index] for index in fits], system=how.system,
            batch_size=how.batch_size, name=f"{name} on {self.name}", progress=progress,
        )  # fmt: skip
        cut = len(lengths) - len(fits)
        return TaskScore.of(found.correct(), found.right_losses, found.right_counts, too_long=cut)


@dataclass(frozen=True)
class GenerationTask(ExperimentTask):
    """Questions whose answers are generated and scored by a benchmark's metrics."""

    benchmark: Benchmark = field(repr=False)
    train: tuple[Example, ...] = field(repr=False)
    held_out: tuple[Example, ...] = field(repr=False)

    @property
    def causal(self) -> bool:
        return self.benchmark.how == "code"

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
        items = [_item(example) for example in self.held_out]
        found, cut = self._losses(items, model, tokenizer, how, name, progress)
        asked = self.held_out[: how.generated]
        if not asked:
            return TaskScore.of((), found.sums, found.counts, too_long=cut)
        result = measure(
            model, tokenizer, Prepared(self.benchmark, "", asked, self.benchmark.metrics),
            batch_size=how.batch_size, max_new_tokens=how.generated_tokens, system=how.system, name=name,
            progress=progress,
        )  # fmt: skip
        main = result.main if self.benchmark.right_or_wrong else None
        right = [bool(value) for value in result.values[main]] if main else []
        others = {own: interval.value for own, interval in result.scores.items() if own != main}
        return TaskScore.of(right, found.sums, found.counts, others, too_long=cut)


@dataclass(frozen=True)
class EncoderTask(ExperimentTask):
    """A benchmark for models with a head of their own, which is trained with the adapter."""

    benchmark: Benchmark = field(repr=False)
    train: tuple[Example, ...] = field(repr=False)
    held_out: tuple[Example, ...] = field(repr=False)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer)

    def _numbers(self, answers: Sequence[Any]) -> dict[str, float]:
        """The benchmark's own numbers for answers to the held-out questions."""
        references = [example.reference for example in self.held_out]
        scores = [metric.score(answers, references)[0] for metric in self.benchmark.metrics]
        return {name: interval.value for found in scores for name, interval in found.items()}


@dataclass(frozen=True)
class ClassTask(EncoderTask):
    """Texts, alone or in pairs, to be put into classes (or valued) by a model with a classification head.

    A value's loss is its squared error, and no answer is simply right.
    """

    @property
    def head(self) -> str:
        return "classes"

    @property
    def labels(self) -> int:
        return self.benchmark.labels

    @property
    def items(self) -> Sequence[Item]:
        return [Item(example.prompt, str(example.reference)) for example in self.train]

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
        what = f"Measuring {name} on {self.name}"
        logits, _ = class_logits(
            model, tokenizer, self.held_out, batch_size=how.batch_size, what=what, progress=progress
        )
        references = [example.reference for example in self.held_out]
        answers: list[Any] = classes(logits)
        if self.labels == 1:
            truth = torch.tensor([float(one) for one in references])
            losses = (logits[:, 0] - truth) ** 2
        else:
            losses = F.cross_entropy(logits, torch.tensor([int(one) for one in references]), reduction="none")
        found = self._numbers(answers)
        found.pop("accuracy", None)
        right = (
            []
            if self.labels == 1
            else [own == int(truth) for own, truth in zip(answers, references, strict=True)]
        )
        return TaskScore.of(right, losses.tolist(), [1] * len(losses), found)


@dataclass(frozen=True)
class SpanTask(EncoderTask):
    """Questions about passages, whose answers a model with a question-answering head marks there.

    A passage that is longer than the model's window is several training rows, one per window.
    """

    @property
    def head(self) -> str:
        return "spans"

    @property
    def items(self) -> Sequence[Item]:
        return [Item(example.prompt, example.response or "unanswerable") for example in self.train]

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        right = copy.copy(tokenizer)
        right.padding_side = "right"  # places are counted from the left
        return super().collator(right)

    def training(
        self, tokenizer: PreTrainedTokenizerBase, *, system: str = "", max_length: int = 512
    ) -> TokenizedSet:
        """The training questions with their passages, in windows of up to `max_length` tokens."""
        rows: list[Tokens] = []
        cut: set[int] = set()
        for window in read_windows(tokenizer, self.train, max_length):
            rows.append(cast("Tokens", window.training_row()))
            if window.cut:
                cut.add(window.item)
        return TokenizedSet(rows, len(cut), 0)

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
        marked = mark_answers(
            model, tokenizer, self.held_out, max_length=span_window(model, tokenizer), batch_size=how.batch_size,
            what=f"Measuring {name} on {self.name}", progress=progress,
        )  # fmt: skip
        return TaskScore.of([], marked.losses, [1] * len(marked.losses), self._numbers(marked.answers))


def _item(example: Example) -> Item:
    """The question with what is learned: the solution, or where there is none the bare answer."""
    return Item(example.prompt, example.response or str(example.reference))


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
        """Out of what [`load_conversations`][dynalora.lab.data.conversations.load_conversations] returns."""
        asked = [turn["content"] for turn in messages if turn["role"] == "user"]
        return cls(asked[-1] if asked else "", messages[-1]["content"], tuple(messages))


@dataclass(frozen=True)
class MixedTask(ExperimentTask):
    """Trained on one thing, measured on others: see the top of this module.

    Attributes:
        train: What is learned.
        measured: The tasks that are measured; their own training questions are not looked at.
    """

    train: tuple[Item, ...] = field(repr=False)
    measured: tuple[ExperimentTask, ...] = field(repr=False)

    @property
    def causal(self) -> bool:
        return any(own.causal for own in self.measured)

    @property
    def items(self) -> Sequence[Item]:
        return self.train

    def validation(self, count: int, *, seed: int = 0) -> tuple[ExperimentTask, ExperimentTask]:
        """As for every task; what is set aside is measured by its answers' loss, whatever kind of question it is."""
        kept, aside = self._parted(count, seed)
        return replace(self, train=kept), AnswerTask(self.name, self.about, (), aside)

    def measure(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        how: Measuring | None = None,
        *,
        name: str = "the model",
        progress: Progress = silent,
    ) -> TaskScore:
        return TaskScore.together(
            {
                own.name: own.measure(model, tokenizer, how, name=name, progress=progress)
                for own in self.measured
            }
        )


# --- finding a task -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wanted:
    """How many questions of a task, from where, and how they are put."""

    data: str | os.PathLike[str] | None
    held_out: int
    train_limit: int | None
    seed: int
    by_generation: bool
    run_code: bool


def load_experiment_task(
    source: str,
    *,
    data: str | os.PathLike[str] | None = None,
    held_out: int = 200,
    train_limit: int | None = None,
    seed: int = 0,
    by_generation: bool = False,
    run_code: bool = False,
) -> ExperimentTask:
    """The task of that name.

    Args:
        source: A benchmark, a task of reasoning-gym, the place of its files, or `TRAIN -> MEASURED + MEASURED`; see the
            top of this module.
        data: A folder with benchmarks' files, laid out as [`sources`][dynalora.evaluation.sources] says; None: the Hub.
        held_out: Number of held-out questions, of each task that is measured; files that have fewer give all of theirs.
        train_limit: Number of training questions; None: all of a file,
            [`GENERATED`][dynalora.lab.tasks.GENERATED] of a generated task.
        seed: Of generated questions, and of the order in which the benchmarks of a group are mixed.
        by_generation: Put multiple choice as LLM-Adapters does: the model learns and generates a response to a prompt
            that lists the options, and the response's first keyword is its answer. False: options are compared by their
            likelihood.
        run_code: Execute generated code, in a sandbox; tasks that need it are refused without.

    Raises:
        ConfigError: The name is empty or unknown, a number is out of range, the generator rejects the options, there is
            nothing to learn or nothing to score, or generated code is not to be executed.
        DataError: A file or split is missing, or its rows are neither multiple choice nor word problems.
        UnsupportedError: Reasoning-gym or what a metric needs is not installed, or code cannot be contained.
    """
    if held_out < 1:
        raise ConfigError(f"held_out is {held_out}; give a whole number of at least 1.")
    if train_limit is not None and train_limit < 1:
        raise ConfigError(f"train_limit is {train_limit}; give a whole number of at least 1.")
    wanted = _Wanted(data, held_out, train_limit, seed, by_generation, run_code)
    if "->" in source:
        return _mixed(source, wanted)
    _check_named(source)
    path = Path(source).expanduser()
    if _is_place(source):
        return _from_files(path, wanted)
    known = find_benchmark(source)
    if known is not None:
        return _from_benchmark(known, wanted)
    if (group := _group(source)) is not None:
        raise ConfigError(
            f"'{source}' is a group of tasks; name one of them, or say what is trained on and what is measured: "
            f"{source} -> {' + '.join(group[:2])}."
        )
    own = source.removeprefix("reasoning_gym:")
    made = _generated(own, wanted, train_limit or GENERATED)
    about = f"{own} of reasoning-gym, seed {seed}: {len(made.train):,} training and {len(made.held_out):,} held out"
    return AnswerTask(own, about, made.train, made.held_out)


def _check_named(source: str) -> None:
    if not source.strip():
        raise ConfigError(
            "A task has no name; give a benchmark, a task of reasoning-gym, or the place of its files."
        )


def _is_place(source: str) -> bool:
    """Whether a source names files, and not a benchmark or a generator."""
    path = Path(source).expanduser()
    return path.is_dir() or "/" in source or "\\" in source or "train" in split_files(path)


def _group(source: str) -> tuple[str, ...] | None:
    """The benchmarks of a group; None if there is no such group."""
    own = source.strip().lower()
    return GROUPS["commonsense"] if own == UNION_NAME else GROUPS.get(own)


def _generated(source: str, wanted: _Wanted, train_size: int) -> Any:
    name, _, told = source.partition(":")
    options = named_values(pair for pair in told.split(",") if pair.strip())
    return load_task(
        name, train_size=train_size, held_out_size=wanted.held_out, seed=wanted.seed, options=options
    )


def _file_split(path: Path, *names: str) -> tuple[Path, list[Row]]:
    """The first file of these splits that there is, and its rows."""
    files = split_files(path)
    file = next((files[name] for name in names if name in files), None)
    if file is None:
        place = f"'{path}/{{}}.jsonl'" if path.is_dir() else f"'{path}.{{}}.jsonl'"
        raise DataError(
            f"The task '{path}' has no file {place.format(' or '.join(names))} (or of another kind, or with .gz); "
            "give a folder or the beginning of the names of its files."
        )
    rows: list[Row] = [(f"'{file}', {where}", row) for where, row in file_rows(file)]
    if not rows:
        raise DataError(f"'{file}' holds no row; give a file with at least one.")
    return file, rows


def _written_as(row: Mapping[str, Any]) -> Benchmark | None:
    """The benchmark whose rows are written like this one; None: that of none."""
    if "instruction" in row and "answer" in row:
        return benchmark("arc_easy")  # whose rows list their options, as those of all others do
    if "question" in row and MARK in str(row.get("answer")):
        return benchmark("gsm8k")
    return None


def _read_as(file: Path, rows: Sequence[Row]) -> Benchmark:
    first = rows[0][1]
    found = _written_as(first)
    if found is None:
        has = ", ".join(f"'{key}'" for key in first)
        raise DataError(
            f"'{file}' has rows with the fields {has}; give multiple choice (instruction, answer) or word "
            f"problems (question, and an answer that ends in '{MARK} 72'), or name a benchmark."
        )
    return found


def _from_files(path: Path, wanted: _Wanted) -> ExperimentTask:
    train_file, train = _file_split(path, "train")
    held_file, held = _file_split(path, *_HELD_OUT)
    places = f"'{train_file.name}'", f"'{held_file.name}'"
    return _task(path.resolve().name, places, _read_as(train_file, train), train, held, wanted)


def _from_benchmark(known: Benchmark, wanted: _Wanted) -> ExperimentTask:
    _check_measured(known, wanted)
    train = known.source.rows("train", folder=wanted.data)[1]
    split, held = known.source.rows(folder=wanted.data, limit=wanted.held_out)
    return _task(known.name, (_origin(known, wanted), f"its {split} split"), known, train, held, wanted)


def _origin(known: Benchmark, wanted: _Wanted) -> str:
    return f"'{known.source.hub}'" if wanted.data is None else f"'{os.fspath(wanted.data)}'"


def _check_measured(known: Benchmark, wanted: _Wanted) -> None:
    """Make sure that a benchmark's answers can be learned and scored, before any row is read."""
    if known.how not in ("generate", "code", "classify", "extract"):
        raise ConfigError(
            f"{known.name} has no questions with answers; choose another task, such as arc_easy or gsm8k."
        )
    check_scoring(known, known.metrics, run_code=wanted.run_code)


def _task(
    name: str,
    places: tuple[str, str],
    known: Benchmark,
    train: Sequence[Row],
    held: Sequence[Row],
    wanted: _Wanted,
) -> ExperimentTask:
    """A task out of rows that are read as a benchmark's; no question is on both sides."""
    aside = _examples(known, held[: wanted.held_out])[: wanted.held_out]
    seen = {_key(example) for example in aside}
    kept = [own for own in _examples(known, train) if _key(own) not in seen][: wanted.train_limit]
    if not kept:
        raise DataError(f"Every training question of {name} is also held out; give other files.")
    about = f"{name}: {len(kept):,} training questions of {places[0]}, {len(aside):,} held out of {places[1]}"
    return _of_kind(name, about, known, kept, aside, wanted)


def _examples(known: Benchmark, rows: Sequence[Row]) -> list[Example]:
    return [example for where, row in rows for example in known.read(row, where)]


def _of_kind(
    name: str,
    about: str,
    known: Benchmark,
    train: Sequence[Example],
    held: Sequence[Example],
    wanted: _Wanted,
) -> ExperimentTask:
    if known.how == "classify":
        return ClassTask(name, about, known, tuple(train), tuple(held))
    if known.how == "extract":
        return SpanTask(name, about, known, tuple(train), tuple(held))
    choices, later = ([own.choice for own in part if own.choice is not None] for part in (train, held))
    if not wanted.by_generation and len(choices) == len(train) and len(later) == len(held):
        return ChoiceTask(name, about, tuple(choices), tuple(later))
    return GenerationTask(name, about, known, tuple(train), tuple(held))


def _key(example: Example) -> str:
    question = f"{example.prompt} {example.second}" if example.choice is None else example.choice.question
    return _plain(question)


def _plain(question: str) -> str:
    return " ".join(question.split()).casefold()


# --- trained on one thing, measured on others -----------------------------------------------------------------

_FORM = "write it as TRAIN -> MEASURED + MEASURED, such as commonsense_union -> boolq + piqa"


@dataclass(frozen=True)
class _Lesson:
    """A training row, and its questions as they are compared with those that are measured."""

    item: Item
    keys: frozenset[str]


def _mixed(source: str, wanted: _Wanted) -> ExperimentTask:
    """A task out of `NAME = TRAIN -> MEASURED + MEASURED`."""
    name, trained, measured = _arrow(source)
    tasks: list[ExperimentTask] = []
    seen: set[str] = set()
    for own in dict.fromkeys(member for part in measured for member in _group(part) or (part,)):
        task, keys = _measured(own, wanted)
        if task.head != "text":
            raise ConfigError(
                f"{task.name} is {KINDS[task.head]}, which is trained and measured on one task; name {task.name} "
                "alone."
            )
        if any(task.name == other.name for other in tasks):
            raise ConfigError(f"The task '{source}' measures {task.name} twice; name it once.")
        tasks.append(task)
        seen |= keys
    lessons: list[_Lesson] = []
    for part in trained:
        lessons += _lessons(part, wanted)
    if len(trained) > 1 or _group(trained[0]) is not None:
        # One behind the other, a limit would leave out the later ones.
        random.Random(wanted.seed).shuffle(lessons)
    kept = [own.item for own in lessons if not own.keys & seen]
    if not kept:
        raise DataError(f"Every training question of '{source}' is also measured; train on something else.")
    left_out = len(lessons) - len(kept)
    kept = kept[: wanted.train_limit]
    about = f"{name}: {len(kept):,} training rows of {' + '.join(trained)}" + (
        f" ({left_out:,} whose question is measured are left out)" if left_out else ""
    )
    about += "; measured: " + "; ".join(task.about for task in tasks)
    return MixedTask(name, about, tuple(kept), tuple(tasks))


def _arrow(source: str) -> tuple[str, list[str], list[str]]:
    """Name, what is trained on, and what is measured.

    Raises:
        ConfigError: It is not of that form.
    """
    given = re.match(r"\s*([\w.\-]+)\s*=(.*)", source, re.DOTALL)
    whole = given[2] if given else source
    # A plus between two names; the one behind a name (HumanEval+) is its own.
    sides = [[part.strip() for part in re.split(r"\s\+|\+(?=\s*[^\s+])", side)] for side in whole.split("->")]
    if len(sides) != 2:
        raise ConfigError(f"The task '{source}' has {len(sides) - 1} arrows; {_FORM}.")
    for side, what in zip(sides, ("trained on", "measured"), strict=True):
        if not all(side):
            raise ConfigError(f"The task '{source}' does not say what is {what}; {_FORM}.")
    trained, measured = sides
    return given[1] if given else " -> ".join(" + ".join(side) for side in sides), trained, measured


def _measured(source: str, wanted: _Wanted) -> tuple[ExperimentTask, set[str]]:
    """A task without training questions, and what it asks."""
    known = find_benchmark(source)
    if known is not None and not _is_place(source):
        _check_measured(known, wanted)
        split, rows = known.source.rows(folder=wanted.data, limit=wanted.held_out)
        place, name = f"the {split} split of {_origin(known, wanted)}", known.name
    elif _is_place(source):
        path = Path(source).expanduser()
        file, rows = _file_split(path, *_HELD_OUT)
        known, place, name = _read_as(file, rows), f"'{file.name}'", path.resolve().name
    else:
        own = source.removeprefix("reasoning_gym:")
        made = _generated(own, wanted, 1)
        about = f"{own} of reasoning-gym, seed {wanted.seed}: {len(made.held_out):,}"
        return AnswerTask(own, about, (), made.held_out), {_plain(item.question) for item in made.held_out}
    aside = _examples(known, rows[: wanted.held_out])[: wanted.held_out]
    task = _of_kind(name, f"{name}: {len(aside):,} of {place}", known, (), aside, wanted)
    return task, {key for example in aside for key in _keys(example)}


def _keys(example: Example) -> frozenset[str]:
    """All that may stand for an example's question elsewhere: with its options, and without."""
    choice = [] if example.choice is None else [example.choice.question]
    return frozenset(_plain(text) for text in [f"{example.prompt} {example.second}", *choice])


def _lessons(source: str, wanted: _Wanted) -> list[_Lesson]:
    """The training rows of a source, all of them."""
    known = find_benchmark(source)
    if not _is_place(source) and not Path(source).expanduser().is_file():
        if known is not None:
            return [_lesson(own, wanted) for own in _examples(known, _training_rows(known, wanted))]
        if source.strip().lower() == UNION_NAME:
            return [_lesson(own, wanted) for own in commonsense_rows(wanted.data)]
        if (group := _group(source)) is not None:
            return list(_group_lessons(source, group, wanted))
        made = _generated(source.removeprefix("reasoning_gym:"), wanted, wanted.train_limit or GENERATED)
        return [_Lesson(item, frozenset([_plain(item.question)])) for item in made.train]
    path = Path(source).expanduser()
    if "train" in split_files(path):
        file, rows = _file_split(path, "train")
        known = _written_as(rows[0][1])
        if known is not None:
            return [_lesson(own, wanted) for own in _examples(known, rows)]
        source = source if path.is_dir() else str(file)
    return [
        _Lesson(
            Chat.of(messages),
            frozenset(_plain(turn["content"]) for turn in messages if turn["role"] == "user"),
        )
        for messages in load_conversations(source)
    ]


def _training_rows(known: Benchmark, wanted: _Wanted) -> list[Row]:
    if known.how not in ("generate", "code"):
        encoders = {"classify": KINDS["classes"], "extract": KINDS["spans"]}
        why = f"is {encoders[known.how]}" if known.how in encoders else "has no questions with answers"
        raise ConfigError(
            f"{known.name} {why}, which a model that is measured on other tasks cannot learn; choose another."
        )
    return known.source.rows("train", folder=wanted.data)[1]


def _group_lessons(name: str, group: Sequence[str], wanted: _Wanted) -> Iterator[_Lesson]:
    """The training rows of those of a group that have any."""
    none, first = True, None
    for known in map(benchmark, group):
        try:
            rows = _training_rows(known, wanted)
        except MissingSplitError as error:
            first = first or error
            continue
        none = False
        yield from (_lesson(own, wanted) for own in _examples(known, rows))
    if none:
        raise DataError(f"No task of the group {name} has training rows: {first}")


def _lesson(example: Example, wanted: _Wanted) -> _Lesson:
    in_words = wanted.by_generation or example.choice is None
    return _Lesson(_item(example) if in_words else cast("Choice", example.choice).item, _keys(example))
