"""Questions out of benchmarks, files and generators, and which task they make."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dynalora.common.names import did_you_mean
from dynalora.errors import ConfigError, DataError
from dynalora.evaluation.benchmarks import BENCHMARKS, GROUPS, UNION_NAME, benchmark
from dynalora.evaluation.files import FILE_KINDS, file_rows, split_files
from dynalora.evaluation.kinds.base import Benchmark, Example, LearnedKind
from dynalora.evaluation.kinds.choice import CHOICE
from dynalora.evaluation.numbers import MARK
from dynalora.evaluation.run import check_scoring
from dynalora.evaluation.sources import Row
from dynalora.evaluation.tasks import Task, load_task, task_names
from dynalora.lab.data.conversations import to_conversations
from dynalora.lab.data.fields import find_fields
from dynalora.lab.settings import named_values
from dynalora.lab.tasks.task import BenchmarkTask, Chat

HELD_OUT_SPLITS = ("dev", "test")
"""Splits of files whose questions are held out, the first that there is."""


@dataclass(frozen=True)
class Request:
    """How many questions of a task, from where, and how they are put.

    Attributes:
        data: A folder with benchmarks' files; None: the Hub.
        held_out: Number of held-out questions of each task that is measured.
        train_limit: Number of training questions; None: all.
        seed: Of generated questions and of the order of mixtures.
        by_generation: Whether answers to multiple choice are generated.
        run_code: Whether generated code may be executed.
    """

    data: str | os.PathLike[str] | None
    held_out: int
    train_limit: int | None
    seed: int
    by_generation: bool
    run_code: bool


def is_place(source: str) -> bool:
    """Whether a source names files, and not a benchmark or a generator."""
    path = Path(source).expanduser()
    return path.exists() or "/" in source or "\\" in source or "train" in split_files(path)


def group_members(source: str) -> tuple[str, ...] | None:
    """The benchmarks of a group; None if there is no such group."""
    name = source.strip().lower()
    return GROUPS["commonsense"] if name == UNION_NAME else GROUPS.get(name)


def generator_name(source: str) -> str:
    """The name of a generated task, with the options of its generator behind a colon."""
    return source.removeprefix("reasoning_gym:")


def generated(source: str, request: Request, train_size: int) -> Task:
    """The questions of a task of reasoning-gym.

    Args:
        source: Its name, with options of its generator behind a colon.
        request: Seed and number of held-out questions.
        train_size: Number of training questions.
    """
    name, _, listed = generator_name(source).partition(":")
    known = task_names()
    if name not in known:
        if Path(source.removesuffix(".gz")).suffix.lower() in FILE_KINDS:
            raise ConfigError(f"There is no file '{source}'; give a file that is there, or the name of a task.")
        raise ConfigError(f"There is no task '{name}'; {did_you_mean(name, [*BENCHMARKS, *known], brief=True)}.")
    options = named_values(pair for pair in listed.split(",") if pair.strip())
    return load_task(name, train_size=train_size, held_out_size=request.held_out, seed=request.seed, options=options)


def file_split(path: Path, *names: str) -> tuple[Path, list[Row]]:
    """The first file of these splits that there is, and its rows; a single file is all splits at once.

    Raises:
        DataError: There is none, it cannot be read, or it holds no row.
    """
    files = split_files(path)
    file = path if path.is_file() else next((files[name] for name in names if name in files), None)
    if file is None:
        place = f"'{path}/{{}}.jsonl'" if path.is_dir() else f"'{path}.{{}}.jsonl'"
        raise DataError(
            f"The task '{path}' has no file {place.format(' or '.join(names))} (or of another kind, or with .gz); "
            "give a file, a folder, or the beginning of the names of its files."
        )
    rows: list[Row] = [(f"'{file}', {where}", row) for where, row in file_rows(file)]
    if not rows:
        raise DataError(f"'{file}' holds no row; give a file with at least one.")
    return file, rows


def parted(rows: Sequence[Row], request: Request) -> tuple[list[Row], list[Row]]:
    """The rows of a single file as rows to train on and held-out ones: at most a fifth, drawn by the request's seed."""
    count = min(request.held_out, max(1, len(rows) // 5))
    aside = set(random.Random(request.seed).sample(range(len(rows)), count))
    held_out = [rows[index] for index in sorted(aside)]
    return [row for index, row in enumerate(rows) if index not in aside], held_out


def similar_benchmark(row: Mapping[str, Any]) -> Benchmark | None:
    """The benchmark whose rows are written like this one; None: those of none are."""
    if "instruction" in row and "answer" in row:
        return benchmark("arc_easy")  # whose rows list their options, as those of all others do
    if "question" in row and MARK in str(row.get("answer")):
        return benchmark("gsm8k")
    return None


def file_name(path: Path) -> str:
    """The name of a task out of files: the folder's, or the beginning of the file's."""
    path = path.resolve()
    return path.name.partition(".")[0] if path.is_file() else path.name


def chats(file: Path, rows: Sequence[Row]) -> list[Chat]:
    """The rows of a file that is no benchmark's as conversations: prompts with responses, chats or plain text.

    Raises:
        DataError: They are none of these either, or no row has a response.
    """
    fields = ", ".join(f"'{key}'" for key in rows[0][1])
    try:
        find_fields(rows[0][1])
    except DataError:
        raise DataError(
            f"'{file}' has rows with the fields {fields}; give prompts and responses (such as prompt and response, or "
            "messages), multiple choice (instruction, answer) or word problems (question, and an answer that ends in "
            f"'{MARK} 72'), or name a benchmark."
        ) from None
    source = f"'{file}'"
    placed = [(where.removeprefix(f"{source}, "), row) for where, row in rows]
    return [Chat.of(messages) for messages in to_conversations(placed, source=source)]


def chat_key(chat: Chat) -> str:
    """What tells a conversation from others: all that is asked in it, or the text itself where nothing is asked."""
    asked = [turn["content"] for turn in chat.messages if turn["role"] == "user"]
    return plain(" ".join(asked) if asked else chat.answer)


def origin(task: Benchmark, request: Request) -> str:
    """Where a benchmark's rows are, quoted."""
    return f"'{task.source.hub}'" if request.data is None else f"'{os.fspath(request.data)}'"


def check_measured(task: Benchmark, request: Request) -> None:
    """Make sure that a benchmark's answers can be learned and scored, before any row is read.

    Raises:
        ConfigError: They cannot, or generated code is not to be executed.
        UnsupportedError: A package is missing, or generated code cannot be contained.
    """
    if not isinstance(task.kind, LearnedKind):
        raise ConfigError(f"{task.name} has no questions with answers; choose another task, such as arc_easy or gsm8k.")
    check_scoring(task, task.metrics, run_code=request.run_code)


def examples_of(task: Benchmark, rows: Sequence[Row]) -> list[Example]:
    """The items of rows."""
    return [example for where, row in rows for example in task.items(row, where)]


def benchmark_task(
    about: str, task: Benchmark, train: Sequence[Example], held_out: Sequence[Example], request: Request
) -> BenchmarkTask:
    """A task out of a benchmark's items, whose options are compared by their likelihood where they can and may be."""
    options = all(example.choice is not None for example in (*train, *held_out))
    if options and not request.by_generation:
        task = replace(task, kind=CHOICE)
    return BenchmarkTask(task.name, about, task, tuple(train), tuple(held_out))


def plain(question: str) -> str:
    """A question without differences of case and white space."""
    return " ".join(question.split()).casefold()


def question_key(example: Example) -> str:
    """What tells an example's question from others: with its options if it has any."""
    choice = example.choice
    return plain(f"{example.prompt} {example.second}" if choice is None else choice.question)


def question_keys(example: Example) -> frozenset[str]:
    """All that may stand for an example's question elsewhere: with its options, and without."""
    whole = plain(f"{example.prompt} {example.second}")
    return frozenset({whole, question_key(example)})
