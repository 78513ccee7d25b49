"""Tasks that are trained on one thing and measured on others: `NAME = TRAIN -> MEASURED + MEASURED`."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dynalora.errors import ConfigError, DataError
from dynalora.evaluation.benchmarks import UNION_NAME, benchmark, commonsense_rows, find_benchmark
from dynalora.evaluation.files import split_files
from dynalora.evaluation.heads import CAUSAL_LM
from dynalora.evaluation.kinds.base import Benchmark, Example, LearnedKind
from dynalora.evaluation.kinds.choice import CHOICE
from dynalora.evaluation.kinds.generate import GENERATE
from dynalora.evaluation.sources import MissingSplitError
from dynalora.evaluation.tasks import Item
from dynalora.lab.data.conversations import load_conversations
from dynalora.lab.tasks import reading
from dynalora.lab.tasks.reading import Request
from dynalora.lab.tasks.task import AnswerTask, Chat, ExperimentTask, MixedTask

GENERATED = 1000
"""Training questions of a generated task, unless another number is asked for."""

_FORM = "write it as TRAIN -> MEASURED + MEASURED, such as commonsense_union -> boolq + piqa"


@dataclass(frozen=True)
class _Lesson:
    """A training row, and its questions as they are compared with those that are measured."""

    item: Item
    keys: frozenset[str]


def mixed_task(source: str, request: Request) -> ExperimentTask:
    """The task of `NAME = TRAIN -> MEASURED + MEASURED`.

    Raises:
        ConfigError: The source is not of that form, or names what cannot be trained on or measured so.
        DataError: Rows are missing, or every training question is also measured.
        UnsupportedError: A package is missing, or generated code cannot be contained.
    """
    name, trained, measured = split_source(source)
    tasks: list[ExperimentTask] = []
    keys: set[str] = set()
    for member in dict.fromkeys(member for part in measured for member in reading.group_members(part) or (part,)):
        task, asked = _measured(member, request)
        if CAUSAL_LM not in task.heads:
            raise ConfigError(
                f"{task.name} is {task.noun}, which is trained and measured on one task; name {task.name} alone."
            )
        if any(task.name == other.name for other in tasks):
            raise ConfigError(f"The task '{source}' measures {task.name} twice; name it once.")
        tasks.append(task)
        keys |= asked
    lessons = [lesson for part in trained for lesson in _lessons(part, request)]
    if len(trained) > 1 or reading.group_members(trained[0]) is not None:
        # One behind the other, a limit would leave out the later ones.
        random.Random(request.seed).shuffle(lessons)
    items = [lesson.item for lesson in lessons if not lesson.keys & keys]
    if not items:
        raise DataError(f"Every training question of '{source}' is also measured; train on something else.")
    left_out = len(lessons) - len(items)
    items = items[: request.train_limit]
    about = f"{name}: {len(items):,} training rows of {' + '.join(trained)}"
    if left_out:
        about += f" ({left_out:,} whose question is measured are left out)"
    about += "; measured: " + "; ".join(task.about for task in tasks)
    return MixedTask(name, about, tuple(items), tuple(tasks))


def split_source(source: str) -> tuple[str, list[str], list[str]]:
    """Name, what is trained on, and what is measured.

    Raises:
        ConfigError: The source is not of that form.
    """
    named = re.match(r"\s*([\w.\-]+)\s*=(.*)", source, re.DOTALL)
    whole = named[2] if named else source
    # A plus between two names; the one behind a name (HumanEval+) belongs to it.
    sides = [[part.strip() for part in re.split(r"\s\+|\+(?=\s*[^\s+])", side)] for side in whole.split("->")]
    if len(sides) != 2:
        raise ConfigError(f"The task '{source}' has {len(sides) - 1} arrows; {_FORM}.")
    for side, what in zip(sides, ("trained on", "measured"), strict=True):
        if not all(side):
            raise ConfigError(f"The task '{source}' does not say what is {what}; {_FORM}.")
    trained, measured = sides
    return named[1] if named else " -> ".join(" + ".join(side) for side in sides), trained, measured


def _measured(source: str, request: Request) -> tuple[ExperimentTask, set[str]]:
    """A task without training questions, and what it asks."""
    entry = find_benchmark(source)
    if reading.is_place(source):
        path = Path(source).expanduser()
        file, rows = reading.file_split(path, *reading.HELD_OUT_SPLITS)
        name, place = reading.file_name(path), f"'{file.name}'"
        similar = reading.similar_benchmark(rows[0][1])
        if similar is None:
            asked = reading.chats(file, rows)[: request.held_out]
            about = f"{name}: {len(asked):,} of {place}"
            return AnswerTask(name, about, (), tuple(asked)), {reading.chat_key(chat) for chat in asked}
        task = replace(similar, name=name, title=name)
    elif entry is not None:
        reading.check_measured(entry, request)
        split, rows = entry.source.rows(folder=request.data, limit=request.held_out)
        task, place = entry, f"the {split} split of {reading.origin(entry, request)}"
    else:
        name = reading.generator_name(source)
        questions = reading.generated(source, request, 1).held_out
        about = f"{name} of reasoning-gym, seed {request.seed}: {len(questions):,}"
        return AnswerTask(name, about, (), questions), {reading.plain(item.question) for item in questions}
    aside = reading.examples_of(task, rows[: request.held_out])[: request.held_out]
    about = f"{task.name}: {len(aside):,} of {place}"
    keys = {key for example in aside for key in reading.question_keys(example)}
    return reading.benchmark_task(about, task, (), aside, request), keys


def _lessons(source: str, request: Request) -> list[_Lesson]:
    """The training rows of a source, all of them."""
    path = Path(source).expanduser()
    if not reading.is_place(source):
        return _named_lessons(source, request)
    if "train" in split_files(path):
        file, rows = reading.file_split(path, "train")
        similar = reading.similar_benchmark(rows[0][1])
        if similar is not None:
            return [_lesson(example, GENERATE, request) for example in reading.examples_of(similar, rows)]
        source = source if path.is_dir() else str(file)
    return [_chat_lesson(Chat.of(messages)) for messages in load_conversations(source)]


def _chat_lesson(chat: Chat) -> _Lesson:
    asked = (reading.plain(turn["content"]) for turn in chat.messages if turn["role"] == "user")
    return _Lesson(chat, frozenset([*asked, reading.chat_key(chat)]))


def _named_lessons(source: str, request: Request) -> list[_Lesson]:
    """The training rows of a benchmark, of a group, or of a generated task."""
    entry = find_benchmark(source)
    if entry is not None:
        return _benchmark_lessons(entry, request)
    if source.strip().lower() == UNION_NAME:
        return [_lesson(example, GENERATE, request) for example in commonsense_rows(request.data)]
    members = reading.group_members(source)
    if members is not None:
        return _group_lessons(source, members, request)
    questions = reading.generated(source, request, request.train_limit or GENERATED).train
    return [_Lesson(item, frozenset([reading.plain(item.question)])) for item in questions]


def _benchmark_lessons(task: Benchmark, request: Request) -> list[_Lesson]:
    """The training rows of a benchmark."""
    kind = task.kind
    if not isinstance(kind, LearnedKind) or CAUSAL_LM not in kind.heads:
        why = f"is {kind.noun}" if isinstance(kind, LearnedKind) else "has no questions with answers"
        raise ConfigError(
            f"{task.name} {why}, which a model that is measured on other tasks cannot learn; choose another."
        )
    rows = task.source.rows("train", folder=request.data)[1]
    return [_lesson(example, kind, request) for example in reading.examples_of(task, rows)]


def _group_lessons(name: str, members: Sequence[str], request: Request) -> list[_Lesson]:
    """The training rows of those of a group that have any."""
    lessons: list[_Lesson] = []
    missing: list[MissingSplitError] = []
    for task in map(benchmark, members):
        try:
            lessons += _benchmark_lessons(task, request)
        except MissingSplitError as error:
            missing.append(error)
    if len(missing) == len(members):
        raise DataError(f"No task of the group {name} has training rows: {missing[0]}")
    return lessons


def _lesson(example: Example, kind: LearnedKind, request: Request) -> _Lesson:
    in_words = request.by_generation or example.choice is None
    return _Lesson((kind if in_words else CHOICE).item(example), reading.question_keys(example))
