"""Measuring a model on a benchmark: everything that can fail is tried before the model computes anything.

```python
prepared = prepare("gsm8k", data="benchmarks", limit=200)
result = measure(model, tokenizer, prepared)
print(result.scores["strict"])
```
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from dynalora.common.progress import Progress, silent
from dynalora.common.statistics import Estimate, Interval, unweighted_mean
from dynalora.errors import ConfigError, DataError
from dynalora.evaluation.benchmarks import GROUPS, Benchmark, Example, benchmark
from dynalora.evaluation.generation import batches_by_length, chat_prompt, evaluating, generate
from dynalora.evaluation.harness import FORGETTING_SUITE, SUITE, find_tasks, run_harness
from dynalora.evaluation.masked_lm import mask_windows, masked_lm_perplexity
from dynalora.evaluation.metrics import EXACT, Metric
from dynalora.evaluation.multiple_choice import Choice, option_lengths, option_scores
from dynalora.evaluation.perplexity import perplexity, windows
from dynalora.evaluation.sandbox import Limits, check_sandbox, run_program
from dynalora.evaluation.seq2seq import is_encoder_decoder, shortened
from dynalora.evaluation.sources import Source
from dynalora.evaluation.spans import mark_answers
from dynalora.evaluation.tasks import load_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_GENERATED = "reasoning_gym:"
_HARNESS = "lm_eval:"
_GENERATED_ITEMS = 200


@dataclass(frozen=True)
class Prepared:
    """A task that is ready to be measured.

    Attributes:
        task: The benchmark.
        split: The split that was read.
        items: Its items.
        metrics: Those to compute.
        likelihood: Score options by likelihood instead of generating.
        weak_sandbox: Generated code is executed even where it cannot be contained.
        limits: Of generated code.
        harness: Name of the lm-evaluation-harness task; empty: none.
        limit: Of the harness's items.
        shots: Examples before each of the harness's questions; None: as many as the task has by itself.
    """

    task: Benchmark
    split: str
    items: tuple[Example, ...] = field(repr=False)
    metrics: tuple[Metric, ...] = ()
    likelihood: bool = False
    weak_sandbox: bool = False
    limits: Limits = field(default_factory=Limits)
    harness: str = ""
    limit: int | None = None
    shots: int | None = None


@dataclass(frozen=True)
class TaskResult:
    """What a model achieved on a task.

    Attributes:
        task: Its name.
        title: As its paper writes it.
        split: That was measured on.
        items: Number of items.
        main: The name of the number that stands for the task.
        scores: By name, each with its 95 % interval; shares are between 0 and 1.
        percent: Names that are shares.
        values: By name, one value per item, for comparisons on the same items; None where an item does not count.
        answers: What the model said, one per item; empty for tasks in which it says nothing.
        too_long: Items that do not fit into the model's window; they count as wrong (classification,
            encoder-decoders and questions about passages: lose their end).
        seconds: Wall-clock time.
    """

    task: str
    title: str
    split: str
    items: int
    main: str
    scores: dict[str, Interval]
    percent: tuple[str, ...]
    values: dict[str, tuple[float | None, ...]] = field(default_factory=dict, repr=False)
    answers: tuple[str, ...] = field(default=(), repr=False)
    too_long: int = 0
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return asdict(self)


def task_list(names: Sequence[str]) -> list[str]:
    """Names with groups replaced by their members, none twice.

    Raises:
        ConfigError: There is no name, or one is unknown.
    """
    if not names:
        raise ConfigError("No task is named; give at least one.")
    found: dict[str, None] = {}
    groups = {**GROUPS, f"{_HARNESS}{SUITE}": tuple(f"{_HARNESS}{own}" for own in FORGETTING_SUITE)}
    for name in names:
        for own in groups.get(name.strip().lower(), (name,)):
            known = own if own.startswith((_GENERATED, _HARNESS)) else benchmark(own).name
            found[known] = None
    return list(found)


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

    Raises:
        ConfigError: There is no such task, metric or way to score it, or generated code is not to be executed.
        DataError: The split is missing, cannot be read or is malformed.
        UnsupportedError: A package is missing, or generated code cannot be contained.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; give 1 or more, or leave it out.")
    limits = limits or Limits()
    if name.startswith(_HARNESS):
        if shots is not None and shots < 0:
            raise ConfigError(f"shots is {shots}; give 0 or more.")
        return _harness_task(name, limit, shots)
    if name.startswith(_GENERATED):
        return _generated_task(name, limit or _GENERATED_ITEMS, seed)
    task = benchmark(name)
    if likelihood and not (task.how == "generate" and task.source.file.startswith("commonsense/")):
        raise ConfigError(f"The task {task.name} has no options to compare; leave out likelihood.")
    chosen = _metrics(task, metrics)
    if likelihood:
        chosen = ()
    check_scoring(task, chosen, run_code=run_code, weak_sandbox=weak_sandbox)
    split, rows = task.source.rows(split, folder=data, limit=None if task.source.text else limit)
    items: list[Example] = []
    for where, row in rows:
        items += task.read(row, where)
    if not task.source.text:
        items = items[:limit]
    return Prepared(task, split, tuple(items), chosen, likelihood, weak_sandbox, limits, limit=limit)


def check_scoring(
    task: Benchmark, metrics: Sequence[Metric], *, run_code: bool = False, weak_sandbox: bool = False
) -> None:
    """Make sure that everything is there, and allowed, to score a task's answers.

    Args:
        task: The benchmark.
        metrics: Those of its metrics that are wanted.
        run_code: Execute generated code, in a sandbox.
        weak_sandbox: Execute it even where the system cannot contain it.

    Raises:
        ConfigError: The task needs generated code to be executed, and that is not allowed.
        UnsupportedError: A package is missing, or generated code cannot be contained.
    """
    for metric in metrics:
        metric.check()
    if task.how == "code":
        if not run_code:
            raise ConfigError(
                f"The task {task.name} executes code that the model writes; allow it with run_code=True "
                "(--run-code). It runs in a sandbox, without network and without your files."
            )
        check_sandbox(weak=weak_sandbox, packages=task.packages)


def measure(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    *,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    window: int = 512,
    system: str = "",
    name: str = "the model",
    progress: Progress = silent,
) -> TaskResult:
    """Measure a model on a prepared task.

    Args:
        model: With or without adapter; left in the mode it was in. Classification needs a model with a classification
            head, marking answers one with a question-answering head, masked perplexity one with a
            masked-language-modelling head, all else a causal language model; an encoder-decoder can do what is answered
            by generation, code excepted.
        tokenizer: The model's; its chat template, if it has one, writes the prompts.
        prepared: As [`prepare`][dynalora.evaluation.run.prepare] returns it.
        batch_size: Items per batch.
        max_new_tokens: Longest answer; None: the task's.
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
    task, items = prepared.task, prepared.items
    what = f"{task.title}: {name}"
    result = TaskResult(task.name, task.title, prepared.split, len(items), task.main, {}, ())
    if prepared.harness:
        result = _harness(model, tokenizer, prepared, batch_size, result)
    elif task.how in ("perplexity", "masked perplexity"):
        _need_head(model, task, "lm" if task.how == "perplexity" else "masked")
        text = "".join(item.prompt for item in items)
        rows = windows(tokenizer, text, min(window, model_window(model, tokenizer) - 2), prepared.limit)
        if task.how == "perplexity":
            score = perplexity(model, rows, batch_size=batch_size, what=what, progress=progress)
        else:
            score = masked_lm_perplexity(
                model, mask_windows(rows, tokenizer), batch_size=batch_size, name=name, progress=progress
            ).interval
        result = replace(result, items=len(rows), scores={"perplexity": score})
    elif task.how == "classify":
        _need_head(model, task, "classes")
        logits, cut = class_logits(
            model, tokenizer, items, batch_size=batch_size, what=what, progress=progress
        )
        result = _scored(replace(result, too_long=cut), prepared, classes(logits))
    elif task.how == "extract":
        _need_head(model, task, "spans")
        marked = mark_answers(
            model, tokenizer, items, max_length=span_window(model, tokenizer), batch_size=batch_size, what=what,
            progress=progress,
        )  # fmt: skip
        result = replace(result, answers=tuple(marked.answers), too_long=marked.cut)
        result = _scored(result, prepared, marked.answers)
    elif prepared.likelihood:
        _need_head(model, task, "lm")
        result = _likelihood(model, tokenizer, items, batch_size, what, progress, result)
    else:
        _need_head(model, task, "lm" if task.how == "code" else "text")
        longest = task.max_new_tokens if max_new_tokens is None else max_new_tokens
        answers, cut = _answers(model, tokenizer, task, items, longest, batch_size, system, what, progress)
        result = replace(result, answers=tuple(answers), too_long=cut)
        if task.how == "code":
            passed = _execute(prepared, answers, f"{task.title}: running what {name} wrote", progress)
            result = _scored(result, prepared, passed)
        else:
            result = _scored(result, prepared, answers)
    return replace(result, seconds=time.perf_counter() - began)


def model_kind(prepared: Prepared) -> tuple[str, int]:
    """What kind of model a task needs, and its number of classes.

    Returns:
        `lm` for a causal language model, `text` for one or an encoder-decoder, `masked` for a masked language model,
        `spans` for one that marks answers, or `classes` with their number (else 0).
    """
    task = prepared.task
    if task.how == "classify":
        return "classes", task.labels
    if task.how == "masked perplexity":
        return "masked", 0
    if task.how == "extract":
        return "spans", 0
    causal = task.how in ("perplexity", "code") or prepared.likelihood or prepared.harness
    return "lm" if causal else "text", 0


def group_mean(results: Sequence[TaskResult]) -> Interval:
    """The unweighted mean of the tasks' main numbers; its interval takes the tasks as independent.

    Raises:
        DataError: There are no results.
    """
    return unweighted_mean([result.scores[result.main] for result in results])


def model_window(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a model can take: the smaller of what its configuration and its tokenizer say."""
    config = getattr(model, "config", None)
    said = [
        getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "seq_length")
    ] + [getattr(tokenizer, "model_max_length", None)]
    return min(
        [int(value) for value in said if isinstance(value, (int, float)) and 0 < value < 10**9] or [10**9]
    )


def span_window(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a window over a passage: 384, as in BERT's script, or what the model can take if that is less."""
    return within_window(384, model, tokenizer)


def within_window(max_length: int, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """A length in tokens that the model can take: `max_length`, or its window if that is shorter."""
    # Of an encoder-decoder the window is the question's alone, which is cut to it.
    return max_length if is_encoder_decoder(model) else min(max_length, model_window(model, tokenizer))


# --- the ways to measure ------------------------------------------------------------------------------------------


def fitting(lengths: Sequence[int], room: int, what: str, *, then: str = "count as wrong") -> list[int]:
    """Indices of items that fit into the model's window; says how many do not.

    Args:
        lengths: Of the items, in tokens.
        room: Tokens that the model can take.
        what: The items' name.
        then: What happens with those that do not fit, for the warning.

    Raises:
        DataError: None does.
    """
    fits = [index for index, length in enumerate(lengths) if length <= room]
    if not fits:
        raise DataError(
            f"All {len(lengths)} prompts of {what} are longer than the model's window (the shortest has {min(lengths)} "
            f"tokens, {max(0, room)} fit); take shorter ones, fewer new tokens, or a model with a longer window."
        )
    if len(fits) < len(lengths):
        logger.warning(
            "%d of %d prompts of %s are longer than the %d tokens that the model's window has room for and %s.",
            len(lengths) - len(fits), len(lengths), what, max(0, room), then,
        )  # fmt: skip
    return fits


def _answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Benchmark,
    items: Sequence[Example],
    longest: int,
    batch_size: int,
    system: str,
    what: str,
    progress: Progress,
) -> tuple[list[str], int]:
    """What the model says to each item, and how many items were too long to be asked, or to be asked in full."""
    prompts = []
    for item in items:
        ids = chat_prompt(tokenizer, item.prompt, system)
        if item.prefix:
            ids += list(tokenizer(item.prefix, add_special_tokens=False)["input_ids"])
        prompts.append(ids)
    room = model_window(model, tokenizer)
    cut = 0
    if is_encoder_decoder(model):
        # Its answer has a window of its own, and of a long text the beginning is read, as everybody does.
        cut = sum(len(ids) > room for ids in prompts)
        if cut:
            logger.warning(
                "%d of %d prompts of %s are longer than the model's window of %d tokens and lose their end.",
                cut, len(prompts), task.title, room,
            )  # fmt: skip
        prompts = [shortened(ids, room) for ids in prompts]
    else:
        room -= longest
    fits = fitting([len(ids) for ids in prompts], room, task.title)
    said = generate(
        model, tokenizer, [prompts[index] for index in fits], max_new_tokens=longest, batch_size=batch_size,
        stop=task.stop, strip=task.how != "code", what=what, progress=progress,
    )  # fmt: skip
    answers = [""] * len(items)
    for index, text in zip(fits, said, strict=True):
        answers[index] = text
    return answers, cut + len(items) - len(fits)


def _likelihood(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Example],
    batch_size: int,
    what: str,
    progress: Progress,
    result: TaskResult,
) -> TaskResult:
    choices: list[Choice] = []
    for item in items:
        if item.choice is None:
            raise DataError(f"{item.where} has no options to compare; leave out likelihood.")
        choices.append(item.choice)
    fits = fitting(option_lengths(tokenizer, choices), model_window(model, tokenizer), result.title)
    scores = option_scores(
        model,
        tokenizer,
        [choices[index] for index in fits],
        batch_size=batch_size,
        name=what,
        progress=progress,
    )
    found: dict[str, list[float | None]] = {
        "accuracy": [0.0] * len(items), "accuracy_raw": [0.0] * len(items), "right_loss": [None] * len(items),
    }  # fmt: skip
    for name, values in (
        ("accuracy", scores.correct()),
        ("accuracy_raw", scores.correct(normalised=False)),
        ("right_loss", scores.right_losses),
    ):
        for index, value in zip(fits, values, strict=True):
            found[name][index] = float(value)
    metric = Metric(tuple(found), items=lambda answers, references: found)
    intervals, values_by_name = metric.score(items, items)
    return replace(
        result, scores=intervals, values=values_by_name, percent=("accuracy", "accuracy_raw"), main="accuracy",
        too_long=len(items) - len(fits),
    )  # fmt: skip


def class_logits(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Example],
    *,
    batch_size: int = 16,
    what: str = "Classifying",
    progress: Progress = silent,
) -> tuple[torch.Tensor, int]:
    """What a model with a classification head says of every text.

    Texts longer than the model's window lose their end.

    Args:
        model: Left in the mode it was in.
        tokenizer: The model's.
        items: With one text or two.
        batch_size: Items per batch.
        what: Description given to `progress`.
        progress: Called with the number of items done.

    Returns:
        Logits (items, classes), or (items, 1) of a regression, float32 on the CPU; and how many texts were cut.

    Raises:
        ConfigError: The tokenizer has no padding token and batches have more than one item.
    """
    if tokenizer.pad_token_id is None and batch_size > 1:
        raise ConfigError(
            "The tokenizer has no padding token, which classification in batches needs; set tokenizer.pad_token and "
            "the model's config.pad_token_id, or take batch_size 1."
        )
    room = min(model_window(model, tokenizer), 512)
    plain = [tokenizer(item.prompt, item.second or None)["input_ids"] for item in items]
    cut = sum(len(ids) > room for ids in plain)
    if cut:
        logger.warning("%d of %d texts are longer than %d tokens and lose their end.", cut, len(items), room)
    device = next(model.parameters()).device
    found: dict[int, torch.Tensor] = {}
    progress(what, 0, len(items))
    with evaluating(model), torch.inference_mode():
        for batch in batches_by_length([len(ids) for ids in plain], batch_size):
            pairs: Any = [[items[i].prompt for i in batch]]
            if items[batch[0]].second:
                pairs.append([items[i].second for i in batch])
            made = tokenizer(
                *pairs, truncation=True, max_length=room, padding=len(batch) > 1, return_tensors="pt"
            ).to(device)
            found |= zip(batch, model(**made).logits.float().cpu(), strict=True)
            progress(what, len(found), len(items))
    return torch.stack([found[index] for index in range(len(items))]), cut


def classes(logits: torch.Tensor) -> list[int] | list[float]:
    """The likeliest class of every row of logits (items, classes), or the value itself where there is one output."""
    return logits[:, 0].tolist() if logits.shape[-1] == 1 else logits.argmax(-1).tolist()


def _execute(prepared: Prepared, answers: Sequence[str], what: str, progress: Progress) -> list[bool]:
    passed = []
    progress(what, 0, len(answers))
    for done, (item, answer) in enumerate(zip(prepared.items, answers, strict=True), start=1):
        assert item.program is not None
        outcome = run_program(
            item.program(answer), prepared.limits, weak=prepared.weak_sandbox, packages=prepared.task.packages
        )
        passed.append(outcome.passed)
        progress(what, done, len(answers))
    return passed


def _scored(result: TaskResult, prepared: Prepared, answers: Sequence[Any]) -> TaskResult:
    scores: dict[str, Interval] = {}
    values: dict[str, tuple[float | None, ...]] = {}
    references = [item.reference for item in prepared.items]
    for metric in prepared.metrics:
        intervals, each = metric.score(answers, references)
        scores |= intervals
        values |= each
    percent = tuple(
        name for metric in prepared.metrics if metric.percent for name in metric.names if name in scores
    )
    main = result.main if result.main in scores else next(iter(scores))
    return replace(result, scores=scores, values=values, percent=percent, main=main)


def _need_head(model: torch.nn.Module, task: Benchmark, head: str) -> None:
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    kind = type(base).__name__
    text = not any(own in kind for own in ("SequenceClassification", "MaskedLM", "QuestionAnswering"))
    has = {
        "classes": "SequenceClassification" in kind,
        "spans": "QuestionAnswering" in kind,
        "masked": "MaskedLM" in kind,
        "text": text,
        "lm": text and not is_encoder_decoder(base),
    }
    if not has[head]:
        wanted = {
            "classes": "a model with a classification head (AutoModelForSequenceClassification)",
            "spans": "a model with a question-answering head (AutoModelForQuestionAnswering)",
            "masked": "a masked language model (AutoModelForMaskedLM)",
            "lm": "a causal language model (AutoModelForCausalLM)",
            "text": "a causal language model (AutoModelForCausalLM) or an encoder-decoder (AutoModelForSeq2SeqLM)",
        }[head]
        raise ConfigError(f"The task {task.name} needs {wanted}, and the model is a {kind}.")
    if head == "classes":
        outputs = int(getattr(base.config, "num_labels", task.labels))
        if outputs != task.labels:
            raise ConfigError(
                f"The task {task.name} has {task.labels} classes, and the model's head has {outputs}; "
                f"load it with num_labels={task.labels}."
            )


def _metrics(task: Benchmark, names: Sequence[str] | None) -> tuple[Metric, ...]:
    if names is None:
        return task.metrics
    known = {name: metric for metric in task.metrics for name in metric.names}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"The task {task.name} has no metric '{name}'; its metrics are {', '.join(known) or task.main}."
            )
    chosen = {id(known[name]): known[name] for name in names}
    return tuple(chosen.values())


# --- tasks from elsewhere -----------------------------------------------------------------------------------------


def _nothing(row: Any, where: str) -> list[Example]:
    return []


def _generated_task(name: str, size: int, seed: int) -> Prepared:
    own = name.removeprefix(_GENERATED)
    made = load_task(own, train_size=1, held_out_size=size, seed=seed)
    items = tuple(Example(item.question, item.answer, item.answer) for item in made.held_out)
    task = Benchmark(name, own.replace("_", " "), Source(name), _nothing, (EXACT,), max_new_tokens=64)
    return Prepared(task, f"held out, seed {seed}", items, task.metrics)


def _harness_task(name: str, limit: int | None, shots: int | None) -> Prepared:
    own = name.removeprefix(_HARNESS)
    if len(find_tasks([own])[0]) > 1:
        raise ConfigError(f"{name} stands for several tasks; name them one by one.")
    task = Benchmark(name, own, Source(name), _nothing, ())
    return Prepared(task, "the harness's", (), harness=own, limit=limit, shots=shots)


def _harness(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    batch_size: int,
    result: TaskResult,
) -> TaskResult:
    (found,) = run_harness(
        model,
        tokenizer,
        [prepared.harness],
        num_fewshot=prepared.shots,
        limit=prepared.limit,
        batch_size=batch_size,
    )
    scores = {name: Estimate(value, error or 0.0).interval for name, (value, error) in found.numbers.items()}
    main = next(name for name in scores if name.split(" ")[0] == found.metric)
    percent = tuple(
        name for name in scores if name.split(" ")[0] in ("acc", "acc_norm", "exact_match", "f1", "em")
    )
    return replace(result, items=found.samples or 0, scores=scores, percent=percent, main=main)
