"""`dynalora evaluate`: a model, or an adapter on its base model, on benchmarks by name."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from dynalora.common.files import write_file
from dynalora.common.names import is_path
from dynalora.common.progress import Progress, rich_progress, silent
from dynalora.errors import ConfigError
from dynalora.evaluation.benchmarks import GROUPS
from dynalora.evaluation.heads import LANGUAGE_MODELS, Head, common_heads
from dynalora.evaluation.kinds.base import Prepared
from dynalora.evaluation.results import TaskResult
from dynalora.evaluation.run import check_harness, group_mean, measure, prepare, task_list
from dynalora.evaluation.sandbox import Limits
from dynalora.evaluation.seq2seq import is_encoder_decoder
from dynalora.jobs.evaluate.settings import EvaluateSpec
from dynalora.lab.adapters import adapter_folder, load_adapter, read_config
from dynalora.lab.models import load_model, load_tokenizer, local_model_name, placed
from dynalora.lab.report import Cell, Table, say


def run_evaluate(spec: EvaluateSpec, *, console: Console) -> list[TaskResult]:
    """Measure, and show the results as a table; see [`evaluate`][dynalora.jobs.evaluate.run.evaluate]."""
    with rich_progress(console) as progress:
        results = evaluate(spec, progress=progress)
    say(console, results_table(results), *([f"Written: {spec.json}"] if spec.json is not None else []))
    return results


def evaluate(spec: EvaluateSpec, *, progress: Progress = silent) -> list[TaskResult]:
    """Measure a model on the tasks of a spec, one after the other.

    Data, metrics and the sandbox are checked for all tasks before the model is loaded. With `spec.json`, the file is
    written anew after every task, so that what is measured is kept whatever happens.

    Raises:
        ConfigError: A setting, or tasks that need different kinds of models.
        DataError: The data.
        CheckpointError: The adapter.
        UnsupportedError: A package is missing, or generated code cannot be contained.
    """
    names = task_list(spec.task)
    check_harness(names)
    tasks = [
        prepare(
            name, data=spec.data, split=spec.split, limit=spec.limit, seed=spec.seed, likelihood=spec.likelihood,
            metrics=spec.metric, run_code=spec.run_code, weak_sandbox=spec.weak_sandbox,
            limits=Limits(seconds=spec.code_seconds), shots=spec.shots, max_length=spec.max_length,
        )
        for name in names
    ]  # fmt: skip
    heads, labels = _common_model(tasks)
    model, tokenizer = _load(spec, heads, labels)
    results: list[TaskResult] = []
    for prepared in tasks:
        results.append(
            measure(
                model, tokenizer, prepared, batch_size=spec.batch_size, max_new_tokens=spec.max_new_tokens,
                beams=spec.beams, window=spec.window, name=spec.source, progress=progress,
            )
        )  # fmt: skip
        if spec.json is not None:
            write_file(spec.json, as_json(spec, results), replace=len(results) > 1)
    return results


def as_json(spec: EvaluateSpec, results: Sequence[TaskResult]) -> str:
    """Settings and results as JSON text."""
    content = {
        "settings": spec.settings(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "results": [result.record() for result in results],
        "means": {name: asdict(group_mean(members)) for name, members in _groups(results)},
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
    for name, members in _groups(results):
        mean = group_mean(members)
        scale = 100 if all(result.main in result.percent for result in members) else 1
        rows.append(
            [
                f"mean of {name}", "", sum(result.items for result in members),
                "main number" + (" %" if scale == 100 else ""), f"{scale * mean.value:.2f}",
                f"{scale * mean.low:.2f} – {scale * mean.high:.2f}", "",
            ]
        )  # fmt: skip
    cut = {result.title: result.too_long for result in results if result.too_long}
    note = "95 % intervals: Wilson's for shares, Student's for other means, bootstrap or normal for the rest."
    if cut:
        longer = ", ".join(f"{title} {count}" for title, count in cut.items())
        note += (
            f" Longer than the model's window: {longer}; they count as wrong (classification, encoder-decoders and "
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


def _common_model(tasks: Sequence[Prepared]) -> tuple[tuple[Head, ...], int]:
    """The kinds of models that serve all tasks, and the number of classes.

    Raises:
        ConfigError: None does.
    """
    needs: dict[tuple[tuple[Head, ...], int], str] = {}
    for prepared in tasks:
        heads = prepared.task.kind.heads
        labels = prepared.task.labels if any(head.labelled for head in heads) else 0
        needs[heads, labels] = prepared.task.name
    common = common_heads([heads for heads, _ in needs])
    numbers = {labels for _, labels in needs}
    if not common or len(numbers) > 1:
        raise ConfigError(
            f"The tasks {' and '.join(needs.values())} need different kinds of models; measure them apart."
        )
    return common, numbers.pop()


def _load(spec: EvaluateSpec, heads: Sequence[Head], labels: int) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The model, on a GPU if there is one, and its tokenizer with the prompt template."""
    model: Any
    if is_adapter(spec.source):
        config = read_config(spec.source)
        base = spec.model or str(config.base_model_name_or_path or "")
        folder = adapter_folder(spec.source)
        # The tokenizer saved with an adapter has the template it was trained with.
        saved = (Path(folder) / "tokenizer_config.json").exists()
        model = load_adapter(
            spec.source, spec.model, dtype=spec.dtype, quantization=spec.quantization, heads=heads, labels=labels
        )  # fmt: skip
        tokenizer = load_tokenizer(folder if saved else base, template=_template(spec, model))
    else:
        name = local_model_name(spec.source)
        model = load_model(name, dtype=spec.dtype, quantization=spec.quantization, heads=heads, labels=labels)
        reads_prompts = heads[0] in LANGUAGE_MODELS
        tokenizer = load_tokenizer(name, template=_template(spec, model) if reads_prompts else None)
        if heads[0].new:
            trained = getattr(AutoConfig.from_pretrained(name), "architectures", None) or []
            if not any(heads[0].model_class in architecture for architecture in trained):
                raise ConfigError(
                    f"'{spec.source}' has no trained {heads[0].new} head; give an adapter or a model that was "
                    "fine-tuned for the task."
                )
    if heads[0].new and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return placed(model, "cuda" if torch.cuda.is_available() else None), tokenizer


def _template(spec: EvaluateSpec, model: torch.nn.Module) -> str | None:
    """How prompts are written; None for encoder-decoders, which read a question as it is."""
    if not is_encoder_decoder(model):
        return spec.template
    if spec.template != "chat":
        raise ConfigError(
            f"'{spec.source}' is an encoder-decoder, which has no prompt template; leave out `template` "
            f"'{spec.template}'."
        )
    return None


def is_adapter(source: str) -> bool:
    """Whether a folder or Hub id holds an adapter rather than a model."""
    path = Path(source)
    if path.exists():
        return any((path / name).exists() for name in ("adapter_config.json", "adapter", "run.json"))
    if is_path(source) or "/" not in source:
        return False
    try:
        return find_adapter_config_file(source) is not None
    except Exception:  # not there, or no network: loading it as a model will say so
        return False
