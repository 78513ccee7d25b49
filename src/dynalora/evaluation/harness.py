"""Tasks of lm-evaluation-harness by name, on a model that is already loaded (extra `eval`).

The harness's own command line loads adapters without importing dynalora and so knows its methods only as exported
plain LoRA; here the model is handed over as it is, with whatever adapters are active.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from dynalora.common.extras import missing
from dynalora.common.names import did_you_mean
from dynalora.errors import ConfigError, UnsupportedError, check_least
from dynalora.evaluation.causal import prompt_length
from dynalora.evaluation.generation import evaluating

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

FORGETTING_SUITE: Mapping[str, str] = {
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_challenge": "acc_norm",
    "arc_easy": "acc_norm",
    "lambada_openai": "acc",
    "boolq": "acc",
    "piqa": "acc_norm",
    "triviaqa": "exact_match",
    "openbookqa": "acc_norm",
    "sciq": "acc",
    "mmlu": "acc",
    "medqa_4options": "acc",
    "commonsense_qa": "acc",
    "nq_open": "exact_match",
}
"""The 14 benchmarks whose unweighted mean is the retention score of DISeL (App. III.6, Table 10), each with its metric.
The paper calls the metric of TriviaQA and NaturalQuestions accuracy; the harness's name for it is `exact_match`."""

SUITE = "forgetting"
"""The name that stands for all of them."""

_PREFERRED = ("acc_norm", "acc", "exact_match", "f1", "perplexity", "word_perplexity")


@dataclass(frozen=True)
class HarnessResult:
    """One task's result.

    Attributes:
        task: Its name in the harness.
        metric: The metric's name in the harness.
        value: The metric.
        error: Its standard error as the harness gives it; None where it gives none.
        samples: Number of questions; None where the harness does not say.
        numbers: Every metric of the task by name, with its standard error or None; the harness's filters stand in
            brackets behind the name, as in `exact_match (strict-match)`.
    """

    task: str
    metric: str
    value: float
    error: float | None
    samples: int | None
    numbers: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)


def find_tasks(tasks: Sequence[str], *, include_path: str | os.PathLike[str] | None = None) -> tuple[list[str], Any]:
    """Make sure that the harness has these tasks, before a model is loaded.

    Args:
        tasks: Names of tasks or groups; `forgetting` stands for the 14 of `FORGETTING_SUITE`.
        include_path: Folder with task files of your own.

    Returns:
        The names, none twice, and the harness's task manager that knows them.

    Raises:
        ConfigError: No task is named, one is unknown, or one would execute the code that a model writes: the harness
            has no sandbox.
        UnsupportedError: Lm-evaluation-harness is not installed.
    """
    names = list(dict.fromkeys(name for task in tasks for name in (FORGETTING_SUITE if task == SUITE else [task])))
    if not names:
        raise ConfigError(f"No task is named; give names of harness tasks, or '{SUITE}'.")
    if importlib.util.find_spec("lm_eval") is None:
        raise missing("lm_eval", f"The harness task {names[0]}", "eval")
    from lm_eval.tasks import TaskManager

    manager: Any = None
    if include_path is not None:
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
    mine = set() if manager is None else set(manager.all_tasks)
    if not mine.issuperset(names):
        manager = _its_own(TaskManager)
        if mine.intersection(names):
            manager = TaskManager(include_path=str(include_path))
    for name in names:
        if name not in mine and name not in manager.all_tasks:
            near = did_you_mean(name, {*mine, *manager.all_tasks}, brief=True)
            raise ConfigError(f"lm-evaluation-harness has no task '{name}'; {near} (`lm_eval ls tasks`).")
        if any(word in name for word in ("humaneval", "mbpp")):
            raise ConfigError(
                f"lm-evaluation-harness would execute the code of '{name}' without a sandbox; take "
                "humaneval or mbpp, which have one."
            )
    return names, manager


@cache
def _its_own(kind: Callable[[], Any]) -> Any:
    """The manager of the harness's own tasks; reading their thousands of files takes it several seconds."""
    return kind()


def run_harness(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = (SUITE,),
    *,
    metrics: Mapping[str, str] | None = None,
    num_fewshot: int | None = 5,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    seed: int = 1234,
    include_path: str | os.PathLike[str] | None = None,
) -> list[HarnessResult]:
    """Measure a model on tasks of lm-evaluation-harness.

    Args:
        model: A causal language model, with or without adapters; it is left in the mode it was in.
        tokenizer: The model's.
        tasks: Names of tasks or groups; `forgetting` stands for the 14 of `FORGETTING_SUITE`.
        metrics: Task → metric to report, where it is to be another one than `FORGETTING_SUITE` says, or for other
            tasks than the first there is of acc_norm, acc, exact_match, f1 and perplexity.
        num_fewshot: Examples before each question, 5 in the authors' script; None: each task's own default.
        limit: Only the first questions of each task, for a quick look.
        batch_size: Requests per forward pass.
        max_length: Longest input in tokens (512 in the paper); None: what the model takes.
        seed: Of the choice of examples.
        include_path: Folder with task files of your own.

    Returns:
        A result for each task in order.

    Raises:
        ConfigError: A number is out of range, a task is unknown to the harness, would execute generated code, or has no
            such metric.
        UnsupportedError: Lm-evaluation-harness is not installed, or the adapter is of prompt learning.
    """
    check_least(1, batch_size=batch_size, limit=limit, max_length=max_length)
    check_least(0, num_fewshot=num_fewshot)
    if prompt_length(model):
        raise UnsupportedError(
            "lm-evaluation-harness cannot measure prompt learning: it takes the logits of the virtual tokens for the "
            "text's; take dynalora's own tasks."
        )
    names, manager = find_tasks(tasks, include_path=include_path)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with evaluating(model):
        wrapped = HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length, backend="causal"
        )
        output: Any = simple_evaluate(
            model=wrapped,
            tasks=names,
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    main_metrics = {**FORGETTING_SUITE, **(metrics or {})}
    return [_result(name, output, main_metrics.get(name)) for name in names]


def harness_mean(results: Sequence[HarnessResult]) -> float:
    """Unweighted mean over the tasks: with all of `FORGETTING_SUITE`, the retention score of DISeL.

    Raises:
        ConfigError: There is no result.
    """
    if not results:
        raise ConfigError("There are no results to take the mean of; run at least one task.")
    return sum(result.value for result in results) / len(results)


def _result(name: str, output: Mapping[str, Any], metric: str | None) -> HarnessResult:
    numbers: Mapping[str, Any] = output["results"].get(name) or output.get("groups", {}).get(name) or {}
    every: dict[str, tuple[float, float | None]] = {}
    # The harness writes "metric,filter"; the first filter is the task's strictest.
    first: dict[str, str] = {}
    for key, value in numbers.items():
        measured, comma, kind = key.partition(",")
        if not comma or measured.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = numbers.get(f"{measured}_stderr,{kind}")
        called = measured if kind == "none" else f"{measured} ({kind})"
        every[called] = (float(value), float(error) if isinstance(error, (int, float)) else None)
        first.setdefault(measured, called)
    if not every:
        raise ConfigError(f"lm-evaluation-harness gives no number for '{name}'; name its subtasks instead.")
    if metric is None:
        metric = next(candidate for candidate in (*_PREFERRED, *first) if candidate in first)
    if metric not in first:
        raise ConfigError(f"Task '{name}' has no metric '{metric}'; it has {', '.join(first)}. Name one in metrics.")
    samples = output.get("n-samples", {}).get(name, {}).get("effective")
    return HarnessResult(name, metric, *every[first[metric]], None if samples is None else int(samples), every)
