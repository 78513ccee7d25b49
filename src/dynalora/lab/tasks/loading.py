"""The task of a name: a benchmark, a generated task, files, or one thing to train on and others to measure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dynalora.errors import ConfigError, DataError
from dynalora.evaluation.benchmarks import find_benchmark
from dynalora.evaluation.kinds.base import Benchmark
from dynalora.evaluation.sources import Row
from dynalora.lab.tasks import reading
from dynalora.lab.tasks.mixed import GENERATED, mixed_task
from dynalora.lab.tasks.reading import Request
from dynalora.lab.tasks.task import AnswerTask, ExperimentTask


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
        source: A benchmark, a task of reasoning-gym, the place of its files, or `TRAIN -> MEASURED + MEASURED`; see
            [`tasks`][dynalora.lab.tasks].
        data: A folder with benchmarks' files, laid out as [`sources`][dynalora.evaluation.sources] says; None: the Hub.
        held_out: Number of held-out questions, of each task that is measured; files that have fewer give all of theirs.
        train_limit: Number of training questions; None: all of a file,
            [`GENERATED`][dynalora.lab.tasks.mixed.GENERATED] of a generated task.
        seed: Of generated questions, and of the order in which the benchmarks of a group are mixed.
        by_generation: Put multiple choice as LLM-Adapters does: the model learns and generates a response to a prompt
            that lists the options, and the response's first keyword is its answer. False: options are compared by their
            likelihood.
        run_code: Execute generated code, in a sandbox; tasks that need it are refused without.

    Raises:
        ConfigError: The name is empty or unknown, a number is out of range, the generator rejects the options, there is
            nothing to learn or nothing to score, or generated code is not to be executed.
        DataError: A file or split is missing, or its rows are neither prompts with responses, nor multiple choice, nor
            word problems.
        UnsupportedError: Reasoning-gym or what a metric needs is not installed, or code cannot be contained.
    """
    if held_out < 1:
        raise ConfigError(f"held_out is {held_out}; give a whole number of at least 1.")
    if train_limit is not None and train_limit < 1:
        raise ConfigError(f"train_limit is {train_limit}; give a whole number of at least 1.")
    request = Request(data, held_out, train_limit, seed, by_generation, run_code)
    if "->" in source:
        return mixed_task(source, request)
    if not source.strip():
        raise ConfigError("A task has no name; give a benchmark, a task of reasoning-gym, or the place of its files.")
    if reading.is_place(source):
        return _from_files(Path(source).expanduser(), request)
    entry = find_benchmark(source)
    if entry is not None:
        return _from_benchmark(entry, request)
    members = reading.group_members(source)
    if members is not None:
        raise ConfigError(
            f"'{source}' is a group of tasks; name one of them, or say what is trained on and what is measured: "
            f"{source} -> {' + '.join(members[:2])}."
        )
    questions = reading.generated(source, request, train_limit or GENERATED)
    name = reading.generator_name(source)
    about = (
        f"{name} of reasoning-gym, seed {seed}: {len(questions.train):,} training and {len(questions.held_out):,} "
        "held out"
    )
    return AnswerTask(name, about, questions.train, questions.held_out)


def _from_files(path: Path, request: Request) -> ExperimentTask:
    train_file, train = reading.file_split(path, "train")
    held_file, held_out = reading.file_split(path, *reading.HELD_OUT_SPLITS)
    if path.is_file():
        train, held_out = reading.parted(train, request)
    places, name = (f"'{train_file.name}'", f"'{held_file.name}'"), reading.file_name(path)
    similar = reading.similar_benchmark(held_out[0][1])
    if similar is not None:
        return _task(replace(similar, name=name, title=name), places, train, held_out, request)
    aside = reading.chats(held_file, held_out)[: request.held_out]
    keys = {reading.chat_key(chat) for chat in aside}
    kept = [chat for chat in (reading.chats(train_file, train) if train else ()) if reading.chat_key(chat) not in keys]
    kept = kept[: request.train_limit]
    return AnswerTask(name, _about(name, places, kept, aside), tuple(kept), tuple(aside))


def _from_benchmark(task: Benchmark, request: Request) -> ExperimentTask:
    reading.check_measured(task, request)
    train = task.source.rows("train", folder=request.data)[1]
    split, held_out = task.source.rows(folder=request.data, limit=request.held_out)
    return _task(task, (reading.origin(task, request), f"its {split} split"), train, held_out, request)


def _task(
    task: Benchmark, places: tuple[str, str], train: Sequence[Row], held_out: Sequence[Row], request: Request
) -> ExperimentTask:
    """A task out of rows that are read as a benchmark's; no question is on both sides."""
    aside = reading.examples_of(task, held_out[: request.held_out])[: request.held_out]
    keys = {reading.question_key(example) for example in aside}
    examples = [example for example in reading.examples_of(task, train) if reading.question_key(example) not in keys]
    examples = examples[: request.train_limit]
    return reading.benchmark_task(_about(task.name, places, examples, aside), task, examples, aside, request)


def _about(name: str, places: tuple[str, str], train: Sequence[object], aside: Sequence[object]) -> str:
    """What a task is and where from, in words.

    Raises:
        DataError: There is nothing to train on.
    """
    if not train:
        raise DataError(f"Every training question of {name} is also held out; give other files.")
    return f"{name}: {len(train):,} training questions of {places[0]}, {len(aside):,} held out of {places[1]}"
