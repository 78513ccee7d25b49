"""Measure a model, or an adapter on its base model, on benchmarks by name; one table, one JSON file."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dynalora.common.files import write_file
from dynalora.common.progress import Progress, silent
from dynalora.errors import ConfigError
from dynalora.evaluation.benchmarks import GROUPS
from dynalora.evaluation.run import TaskResult, group_mean, measure, model_kind, prepare, task_list
from dynalora.evaluation.sandbox import Limits
from dynalora.evaluation.seq2seq import is_encoder_decoder
from dynalora.jobs.evaluate.settings import EvaluateSpec
from dynalora.lab.adapters import adapter_folder, load_adapter, read_config
from dynalora.lab.models import load_model, load_tokenizer, local_model_name, placed
from dynalora.lab.report import Cell, Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def evaluate(spec: EvaluateSpec, *, progress: Progress = silent) -> list[TaskResult]:
    """Measure a model on the tasks of a spec, one after the other.

    Data, metrics and the sandbox are checked for all tasks before the model is loaded. With `spec.json`, the file is
    written anew after every task, so that what is measured is kept whatever happens.

    Args:
        spec: What to do.
        progress: Called as items are done.

    Returns:
        One result per task.

    Raises:
        ConfigError: A setting, or tasks that need different kinds of models.
        DataError: The data.
        CheckpointError: The adapter.
        UnsupportedError: A package is missing, or generated code cannot be contained.
    """
    names = task_list(spec.task)
    tasks = [
        prepare(
            name,
            data=spec.data,
            split=spec.split,
            limit=spec.limit,
            seed=spec.seed,
            likelihood=spec.likelihood,
            metrics=spec.metric,
            run_code=spec.run_code,
            weak_sandbox=spec.weak_sandbox,
            limits=Limits(seconds=spec.code_seconds),
            shots=spec.shots,
        )
        for name in names
    ]
    heads = {model_kind(prepared): prepared.task.name for prepared in tasks}
    if ("lm", 0) in heads:
        heads.pop(("text", 0), None)  # a causal language model does for both
    if len(heads) > 1:
        raise ConfigError(
            f"The tasks {' and '.join(heads.values())} need different kinds of models; measure them apart."
        )
    (head, labels), *_ = heads
    model, tokenizer = _load(spec, head, labels)
    results: list[TaskResult] = []
    for prepared in tasks:
        results.append(
            measure(
                model, tokenizer, prepared, batch_size=spec.batch_size, max_new_tokens=spec.max_new_tokens,
                window=spec.window, name=spec.source, progress=progress,
            )
        )  # fmt: skip
        if spec.json is not None:
            write_file(spec.json, as_json(spec, results))
    return results


def as_json(spec: EvaluateSpec, results: Sequence[TaskResult]) -> str:
    """Settings and results as JSON text."""
    content = {
        "settings": {name: value for name, value in asdict(spec).items() if name != "json"},
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "results": [result.record() for result in results],
        "means": {name: asdict(group_mean(own)) for name, own in _groups(results)},
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def results_table(results: Sequence[TaskResult]) -> Table:
    """The results, one row per number, with the mean of every group that is whole."""
    rows: list[list[Cell]] = []
    for result in results:
        for name, score in result.scores.items():
            scale = 100 if name in result.percent else 1
            low, high = score.low * scale, score.high * scale
            rows.append(
                [
                    result.title, result.split, result.items, name + (" %" if scale == 100 else ""),
                    f"{score.value * scale:.2f}", f"{low:.2f} – {high:.2f}", f"{result.seconds:.0f} s",
                ]
            )  # fmt: skip
    for name, own in _groups(results):
        mean = group_mean(own)
        rows.append(
            [
                f"mean of {name}", "", sum(result.items for result in own), "main number %",
                f"{100 * mean.value:.2f}", f"{100 * mean.low:.2f} – {100 * mean.high:.2f}", "",
            ]
        )  # fmt: skip
    cut = {result.title: result.too_long for result in results if result.too_long}
    note = "95 % intervals: Wilson's for shares, Student's for other means, bootstrap or normal for the rest."
    if cut:
        told = ", ".join(f"{title} {count}" for title, count in cut.items())
        note += (
            f" Longer than the model's window: {told}; they count as wrong (classification, encoder-decoders and "
            "questions about passages: lose their end)."
        )
    columns = ["task", "split", "items", "metric", "value", "95 % interval", "time"]
    return Table(columns, rows, title="Evaluation", note=note)


def _groups(results: Sequence[TaskResult]) -> list[tuple[str, list[TaskResult]]]:
    by_name = {result.task: result for result in results}
    return [
        (name, [by_name[member] for member in members])
        for name, members in GROUPS.items()
        if all(member in by_name for member in members)
    ]


def _load(spec: EvaluateSpec, head: str, labels: int) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The model, on a GPU if there is one, and its tokenizer with the prompt template."""
    model: Any
    if is_adapter(spec.source):
        config = read_config(spec.source)
        base = spec.model or str(config.base_model_name_or_path or "")
        folder = adapter_folder(spec.source)
        # The tokenizer saved with an adapter has the template it was trained with.
        own = (Path(folder) / "tokenizer_config.json").exists()
        model = load_adapter(
            spec.source,
            spec.model,
            dtype=spec.dtype,
            quantization=spec.quantization,
            head=head,
            labels=labels,
        )
        tokenizer = load_tokenizer(folder if own else base, template=_template(spec, model))
    else:
        name = local_model_name(spec.source)
        model = load_model(name, dtype=spec.dtype, quantization=spec.quantization, head=head, labels=labels)
        asked = head in ("lm", "text")
        tokenizer = load_tokenizer(name, template=_template(spec, model) if asked else None)
        if head in _TRAINED and not _has_own_head(name, head):
            raise ConfigError(
                f"'{spec.source}' has no trained {_TRAINED[head][1]} head; give an adapter or a model that was "
                "fine-tuned for the task."
            )
    if head == "classes" and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return placed(model, "cuda" if torch.cuda.is_available() else None), tokenizer


def _template(spec: EvaluateSpec, model: torch.nn.Module) -> str | None:
    """How prompts are written; None for encoder-decoders, which read a question as it is."""
    if not is_encoder_decoder(model):
        return spec.template
    if spec.template != "chat":
        raise ConfigError(
            f"'{spec.source}' is an encoder-decoder, which has no prompt template; leave out template "
            f"'{spec.template}'."
        )
    return None


_TRAINED = {
    "classes": ("SequenceClassification", "classification"),
    "spans": ("QuestionAnswering", "question-answering"),
}
"""Heads that a model without fine-tuning does not have: kind of model, and in words."""


def _has_own_head(name: str, head: str) -> bool:
    from transformers import AutoConfig

    architectures = getattr(AutoConfig.from_pretrained(name), "architectures", None) or []
    return any(_TRAINED[head][0] in own for own in architectures)


def is_adapter(source: str) -> bool:
    """Whether a folder or Hub id holds an adapter rather than a model."""
    path = Path(source)
    if path.exists():
        return any((path / name).exists() for name in ("adapter_config.json", "adapter", "run.json"))
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        return False
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        return find_adapter_config_file(source) is not None
    except Exception:  # not there, or no network: loading it as a model will say so
        return False
