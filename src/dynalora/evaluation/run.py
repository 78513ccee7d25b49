"""Measuring a model on a benchmark: everything that can fail is tried before the model computes anything.

```python
prepared = prepare("gsm8k", data="benchmarks", limit=200)
result = measure(model, tokenizer, prepared)
print(result.scores["strict"])
```
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from dynalora.common.progress import Progress, silent
from dynalora.common.statistics import Interval, unweighted_mean
from dynalora.errors import ConfigError, check_least
from dynalora.evaluation.benchmarks import GROUPS, benchmark
from dynalora.evaluation.harness import FORGETTING_SUITE, SUITE, find_tasks
from dynalora.evaluation.heads import described
from dynalora.evaluation.kinds.base import Benchmark, Example, Measuring, Prepared, Subject
from dynalora.evaluation.kinds.choice import CHOICE
from dynalora.evaluation.kinds.generate import GENERATE
from dynalora.evaluation.kinds.harness import HarnessKind
from dynalora.evaluation.metrics import EXACT, Metric
from dynalora.evaluation.results import TaskResult
from dynalora.evaluation.sandbox import Limits
from dynalora.evaluation.sources import Source
from dynalora.evaluation.tasks import load_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATED = "reasoning_gym:"
_HARNESS = "lm_eval:"
_GENERATED_ITEMS = 200


def task_list(names: Sequence[str]) -> list[str]:
    """Names with groups replaced by their members, none twice.

    Raises:
        ConfigError: There is no name, or one is unknown.
    """
    if not names:
        raise ConfigError("No task is named; give at least one.")
    members: dict[str, None] = {}
    groups = {**GROUPS, f"{_HARNESS}{SUITE}": tuple(f"{_HARNESS}{task}" for task in FORGETTING_SUITE)}
    for name in names:
        for member in groups.get(name.strip().lower(), (name,)):
            elsewhere = member.startswith((_GENERATED, _HARNESS))
            members[member if elsewhere else benchmark(member).name] = None
    return list(members)


def check_harness(names: Sequence[str]) -> None:
    """Refuse tasks that lm-evaluation-harness does not have, before the data of any other task are fetched.

    Raises:
        ConfigError: As [`find_tasks`][dynalora.evaluation.harness.find_tasks].
        UnsupportedError: Lm-evaluation-harness is not installed.
    """
    harness = [name.removeprefix(_HARNESS) for name in names if name.startswith(_HARNESS)]
    if harness:
        find_tasks(harness)


def prepare(
    name: str,
    *,
    data: str | os.PathLike[str] | None = None,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    likelihood: bool = False,
    metrics: Sequence[str] | None = None,
    run_code: bool = False,
    weak_sandbox: bool = False,
    limits: Limits | None = None,
    shots: int | None = None,
    max_length: int | None = None,
) -> Prepared:
    """Read a task's items and make sure that everything is there to score them.

    Args:
        name: Of the task, see [`benchmarks`][dynalora.evaluation.benchmarks].
        data: A folder laid out as [`sources`][dynalora.evaluation.sources] says; None: the Hub.
        split: None: test, or dev where there is no test.
        limit: The first items only; None: all (200 of a generated task).
        seed: Of a generated task.
        likelihood: For multiple choice, take the likeliest option (log-likelihood per token) instead of generating.
        metrics: Names of those to compute; None: all of the task's.
        run_code: Execute generated code, in a sandbox; tasks that need it are refused without.
        weak_sandbox: Execute it even where the system cannot contain it.
        limits: Of generated code; None: the defaults.
        shots: Examples before each question of a task of lm-evaluation-harness; None: the task's own number. Other
            tasks have none.
        max_length: Longest input of such a task in tokens; None: what the model takes.

    Raises:
        ConfigError: There is no such task, metric or way to score it, or generated code is not to be executed.
        DataError: The split is missing, cannot be read or is malformed.
        UnsupportedError: A package is missing, or generated code cannot be contained.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; give 1 or more, or leave it out.")
    if name.startswith(_HARNESS):
        check_least(0, shots=shots)
        check_least(1, max_length=max_length)
        return _harness_task(name, limit, shots, max_length)
    if name.startswith(_GENERATED):
        return _generated_task(name, limit or _GENERATED_ITEMS, seed)
    task = benchmark(name)
    if likelihood and not task.options:
        raise ConfigError(f"The task {task.name} has no options to compare; leave out `likelihood`.")
    chosen = _metrics(task, metrics)
    if likelihood:
        task, chosen = replace(task, kind=CHOICE), ()
    check_scoring(task, chosen, run_code=run_code, weak_sandbox=weak_sandbox)
    split, rows = task.source.rows(split, folder=data, limit=None if task.source.text else limit)
    items: list[Example] = []
    for where, row in rows:
        items += task.items(row, where)
    if not task.source.text:
        items = items[:limit]
    return Prepared(task, split, tuple(items), chosen, weak_sandbox, limits or Limits(), limit)


def check_scoring(
    task: Benchmark, metrics: Sequence[Metric], *, run_code: bool = False, weak_sandbox: bool = False
) -> None:
    """Make sure that everything is there, and allowed, to score a task's answers.

    Args:
        task: The benchmark.
        metrics: Those of its metrics that are to be computed.
        run_code: Execute generated code, in a sandbox.
        weak_sandbox: Execute it even where the system cannot contain it.

    Raises:
        ConfigError: The task needs generated code to be executed, and that is not allowed.
        UnsupportedError: A package is missing, or generated code cannot be contained.
    """
    for metric in metrics:
        metric.check()
    task.kind.check(task, run_code=run_code, weak_sandbox=weak_sandbox)


def measure(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    *,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    beams: int = 1,
    window: int = 512,
    system: str = "",
    name: str = "the model",
    progress: Progress = silent,
) -> TaskResult:
    """Measure a model on a prepared task.

    Args:
        model: Of a kind that the task takes (`prepared.task.kind.heads`), with or without adapter; left in the mode it
            was in.
        tokenizer: The model's; its chat template, if it has one, writes the prompts.
        prepared: As [`prepare`][dynalora.evaluation.run.prepare] returns it.
        batch_size: Items per batch.
        max_new_tokens: Longest answer; None: the task's.
        beams: Beams that answers are searched with; 1: the likeliest token each time.
        window: Tokens per window, for perplexity.
        system: A system message before every question that is answered by generation; empty: what the chat template
            adds by itself.
        name: Of the model, for `progress`.
        progress: Called with the number of items done.

    Raises:
        ConfigError: The model is of the wrong kind, or the tokenizer lacks what the task needs.
        DataError: Every item is longer than the model's window.
    """
    began = time.perf_counter()
    _check_model(model, prepared.task)
    how = Measuring(batch_size=batch_size, generated_tokens=max_new_tokens, beams=beams, window=window, system=system)
    result = prepared.task.kind.measure(Subject(model, tokenizer, name, progress), prepared, how)
    return replace(result, seconds=time.perf_counter() - began)


def group_mean(results: Sequence[TaskResult]) -> Interval:
    """The unweighted mean of the tasks' main numbers; its interval takes the tasks as independent.

    Raises:
        DataError: There are no results.
    """
    return unweighted_mean([result.scores[result.main] for result in results])


def _check_model(model: torch.nn.Module, task: Benchmark) -> None:
    """Make sure that a model is of a kind that the task takes, with as many outputs as it has classes."""
    heads = task.kind.heads
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    head = next((head for head in heads if head.fits(base)), None)
    if head is None:
        raise ConfigError(f"The task {task.name} needs {described(heads)}, and the model is a {type(base).__name__}.")
    outputs = int(getattr(base.config, "num_labels", task.labels)) if head.labelled else task.labels
    if outputs != task.labels:
        raise ConfigError(
            f"The task {task.name} has {task.labels} classes, and the model's head has {outputs}; load it with "
            f"num_labels={task.labels}."
        )


def _metrics(task: Benchmark, names: Sequence[str] | None) -> tuple[Metric, ...]:
    if names is None:
        return task.metrics
    by_name = {name: metric for metric in task.metrics for name in metric.names}
    for name in names:
        if name not in by_name:
            raise ConfigError(
                f"The task {task.name} has no metric '{name}'; its metrics are {', '.join(by_name) or task.main}."
            )
    return tuple({id(by_name[name]): by_name[name] for name in names}.values())


# --- tasks whose rows come from elsewhere -------------------------------------------------------------------------


def _no_items(row: Mapping[str, Any], where: str) -> list[Example]:
    return []


def _generated_task(name: str, size: int, seed: int) -> Prepared:
    generator = name.removeprefix(_GENERATED)
    generated = load_task(generator, train_size=1, held_out_size=size, seed=seed)
    items = tuple(Example(item.question, item.answer, item.answer) for item in generated.held_out)
    task = Benchmark(name, generator.replace("_", " "), Source(name), _no_items, (EXACT,), GENERATE, max_new_tokens=64)
    return Prepared(task, f"held out, seed {seed}", items, task.metrics)


def _harness_task(name: str, limit: int | None, shots: int | None, max_length: int | None) -> Prepared:
    task = name.removeprefix(_HARNESS)
    if len(find_tasks([task])[0]) > 1:
        raise ConfigError(f"{name} stands for several tasks; name them one by one.")
    kind = HarnessKind(task, shots, max_length)
    return Prepared(Benchmark(name, task, Source(name), _no_items, (), kind), "the harness's", (), limit=limit)
