"""One cell of a comparison: a training run with everything that is measured of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from dynalora.common.names import IGNORED_LABEL
from dynalora.common.progress import Progress, rich_progress, silent
from dynalora.errors import ConfigError, DynaloraError
from dynalora.evaluation.heads import CAUSAL_LM, MASKED_LM, head_of
from dynalora.evaluation.masked_lm import under_head
from dynalora.evaluation.run import measure, task_list
from dynalora.evaluation.windows import model_window, within_window
from dynalora.forgetting.landscape import rank_landscape
from dynalora.forgetting.monitor import OWN_TEXT
from dynalora.forgetting.retention import BasePredictions, predictions_within, retention
from dynalora.forgetting.texts import MeasuredText, own_text
from dynalora.jobs.compare.contestants import BASE, Cell
from dynalora.jobs.compare.decisions import OF_A_MATRIX, metrics_of, trajectory_record, without_layers
from dynalora.jobs.compare.over_time import OverTime
from dynalora.jobs.compare.planning import kept_tasks
from dynalora.jobs.compare.settings import CompareSpec
from dynalora.jobs.compare.store import CellStore, shared_settings
from dynalora.lab.baselines import edits_base
from dynalora.lab.data.conversations import MONITORED_LENGTH, load_named_text, measured_text
from dynalora.lab.machine import forget_training_peak, machine, training_peak
from dynalora.lab.models import load_model, load_tokenizer, local_model_name, placed
from dynalora.lab.scaling import scalable
from dynalora.lab.training.settings import train_settings
from dynalora.lab.training.train import TrainResult, train_adapter

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dynalora.evaluation.results import TaskScore
    from dynalora.lab.tasks.task import ExperimentTask


def run_cell(spec: CompareSpec, cell: Cell, *, console: Console | None = None) -> dict[str, Any]:
    """Train and measure one cell, and write its result, unless it is there.

    Args:
        spec: What is compared.
        cell: Which one.
        console: Where progress is shown; None: nowhere.

    Returns:
        The result: `test` and `validation` scores, `retention` by text, `kept` by benchmark, `training` (loss by step,
        times, memory, parameters, the method's metrics), `landscape`, `trajectory` (how ranks moved), `over_time` and
        `masked` where they are asked for, `curve` (losses and KL by factor of the update) and `change` (its size, and
        KL on the task's prompts).

    Raises:
        filelock.Timeout: Another process has the cell.
        DynaloraError: Whatever is wrong with the settings or the data, or training has diverged.
    """
    store = CellStore(spec.output, shared_settings(spec))
    return store.complete(cell, lambda: _Run(spec, cell, console).run())


class _Run:
    """The work of one cell."""

    def __init__(self, spec: CompareSpec, cell: Cell, console: Console | None) -> None:
        self.spec, self.cell, self.console = spec, cell, console
        self.base = cell.method == BASE

    def run(self) -> dict[str, Any]:
        spec, cell = self.spec, self.cell
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        task = spec.load_task(cell.task)
        held_out = task
        validation = None
        if spec.validation:
            task, validation = task.validation(spec.validation, seed=spec.data_seed)
        self.heads, self.labels = task.heads, task.labels
        with rich_progress(self.console) as progress:
            self.path = local_model_name(spec.model, progress=progress)
        model: Any = self._load(self.cell.quantization)
        head = head_of(model.config, self.heads)
        assert head is not None  # it was loaded as one of them
        self.head = head
        tokenizer = load_tokenizer(self.path, template=spec.template if head is CAUSAL_LM else None)
        if spec.loss_on_prompts and head is not CAUSAL_LM:
            raise ConfigError("loss_on_prompts needs a causal language model; leave it out.")
        if head.encoder_decoder:
            tokenizer.model_max_length = model_window(model, tokenizer)
        self.texts = self._texts(model, tokenizer)
        result: dict[str, Any] = {"machine": machine(), "task": task.about}
        prompts: MeasuredText | None = None
        if not self.base:
            longest = within_window(spec.max_length, model, tokenizer)
            rows = task.training(tokenizer, system=spec.system or "", max_length=longest)
            how = train_settings(
                spec, seed=cell.seed, learning_rate=cell.learning_rate, weight_decay=cell.weight_decay, log_every=1,
                eval_every=0, save_every=0,
            )  # fmt: skip
            forget_training_peak()
            over_time = OverTime(spec, held_out, validation, tokenizer, lambda model: self._kept(model, tokenizer))
            trained = train_adapter(
                model, tokenizer, cell.config(self.head.task_type), rows, settings=how, label=cell.label,
                console=self.console, collator=task.collator(tokenizer), best=over_time.best,
                at_steps=over_time.at_steps,
            )  # fmt: skip
            model = trained.model
            result |= over_time.record()
            prompts = _prompts(rows) if self.texts else None
            result |= {"training": _training(trained, len(rows)), "landscape": self._landscape(model)}
            result["training"]["metrics"] = metrics_of(cell.method, trained.records)
            result["trajectory"] = trajectory_record(model)
        parts = {"test": held_out} | ({} if validation is None else {"validation": validation})
        with rich_progress(self.console) as progress:
            for name, part in parts.items():
                with self._mixed_precision(model):
                    score = part.measure(model, tokenizer, spec.measuring, name=name, progress=progress)
                result[name] = score.record()
            if spec.mask_layers and not self.base:

                def masked(name: str) -> TaskScore:
                    return held_out.measure(model, tokenizer, spec.measuring, name=name, progress=progress)

                with self._mixed_precision(model):
                    result["masked"] = without_layers(model, masked)
            # The base model apart, where switching the adapter off does not give it back.
            self.apart = self._load(self.spec.quantization) if self._needs_base_apart() else None
            texts = {} if self.base else self.texts
            self.predicted = predictions_within(self.apart or model, texts, _PREDICTIONS, progress=progress)
            result["retention"] = self._retention(model, progress)
            result["kept"] = self._kept(model, tokenizer, progress)
            if prompts is not None:
                kl = retention(model, prompts, base=self.apart, name="the task's prompts", progress=progress).kl
                result |= self._scaled(model, tokenizer, parts, result, progress)
                result["change"] = {"norm": result.pop("norm"), "prompts_kl": kl}
        return result

    def _scaled(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        parts: Mapping[str, ExperimentTask],
        result: Mapping[str, Any],
        progress: Progress,
    ) -> dict[str, Any]:
        """The size of what training changed, and losses and KL with less of it; the model is of no use afterwards."""
        point = {"test": _losses(result["test"]), "kl": _kl(result["retention"])}
        if "validation" in parts:
            point["validation"] = _losses(result["validation"])
        curve: list[dict[str, Any]] = [{"factor": 1.0, **point}]
        ready = scalable(model, self.apart, lambda: self._load(self.spec.quantization))
        if ready is None:
            return {"norm": None, "curve": curve}
        factors = sorted({factor for factor in self.spec.factors if factor != 1}, reverse=True)
        how = replace(self.spec.measuring, losses_only=True)
        for factor in factors:
            with ready.at(factor) as scaled:
                point = {}
                for name, part in parts.items():
                    with self._mixed_precision(scaled):
                        score = part.measure(scaled, tokenizer, how, name=f"{name} × {factor:g}", progress=progress)
                    point[name] = _losses(score.record())
                point["kl"] = _kl(
                    {
                        name: asdict(
                            retention(
                                scaled, text, base=self._base_of(name, ready.base), name=f"{name} × {factor:g}",
                                progress=progress,
                            )
                        )
                        for name, text in self.texts.items()
                    }
                )  # fmt: skip
            curve.append({"factor": factor, **point})
        return {"norm": ready.norm, "curve": curve}

    def _base_of(self, text: str, apart: torch.nn.Module | None) -> BasePredictions | torch.nn.Module | None:
        """What the KL on a text is measured against: the base model's predictions, if all of them could be kept."""
        predicted = self.predicted[text]
        return predicted if predicted.complete or apart is None else apart

    def _mixed_precision(self, model: torch.nn.Module) -> AbstractContextManager[Any]:
        """What losses are computed in: as in training. KL never is: bfloat16's rounding would count."""
        return torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=self.spec.bf16)

    def _needs_base_apart(self) -> bool:
        return bool(self.texts) and not self.base and not (self._on_the_base() and not self._edits_base())

    def _landscape(self, model: Any) -> list[dict[str, Any]] | None:
        """Effective ranks and nuclear norms by matrix; None where factors are not the whole change of the weights."""
        if self._edits_base():
            return None
        try:
            rows = rank_landscape(model)
        except DynaloraError:
            return None
        return [{name: getattr(row, name) for name in OF_A_MATRIX} for row in rows]

    def _edits_base(self) -> bool:
        """Whether switching the adapter off does not give back the base model."""
        return edits_base(self.cell.method, self.cell.config(self.head.task_type))

    def _on_the_base(self) -> bool:
        """Whether the adapter stands on the base model that all are measured against."""
        return self.cell.quantization == self.spec.quantization

    def _load(self, quantization: str | None) -> PreTrainedModel:
        torch.manual_seed(self.cell.seed)  # a new head
        model: PreTrainedModel = load_model(
            self.path, dtype=self.spec.dtype, quantization=quantization, heads=self.heads, labels=self.labels
        )
        accelerated = torch.accelerator.is_available()
        placed(model, torch.accelerator.current_accelerator() if accelerated else None)
        return model

    def _texts(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, MeasuredText]:
        if not self.spec.retention or self.head is not CAUSAL_LM:
            return {}
        base = model if self._on_the_base() else self._load(self.spec.quantization)
        with rich_progress(self.console) as progress:
            texts: dict[str, MeasuredText] = {OWN_TEXT: own_text(base, tokenizer, progress=progress)}
        for text in self.spec.texts:
            name, passages = load_named_text(text, "texts")
            texts[name] = measured_text(passages, tokenizer)
        return texts

    def _retention(self, model: Any, progress: Progress) -> dict[str, Any] | None:
        if not self.texts:
            return None
        if self.base:
            return {name: {"kl": 0.0, "kl_error": 0.0, "loss_shift": 0.0} for name in self.texts}
        measured = {}
        for name, text in self.texts.items():
            result = retention(
                model, text, base=self._base_of(name, self.apart), name=f"{self.cell.label} on {name}",
                progress=progress,
            )  # fmt: skip
            measured[name] = {**asdict(result), "tokens": text.tokens}
        return measured

    def _kept(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, progress: Progress = silent
    ) -> dict[str, dict[str, Any]]:
        """The main number of every benchmark that shows what was kept, and of the further ones."""
        kept = set(task_list(self.spec.retention_tasks) if self.spec.retention_tasks else [])
        numbers = {}
        for prepared in kept_tasks(self.spec):
            measured = model
            if self.head.new:
                original = load_model(self.path, dtype=self.spec.dtype, heads=(MASKED_LM,)).to(model.device)
                measured = under_head(model, original)
            result = measure(
                measured, tokenizer, prepared, batch_size=self.spec.measuring.batch_size,
                max_new_tokens=min(prepared.task.max_new_tokens, self.spec.generated_tokens),
                system=self.spec.system or "", name=self.cell.label, progress=progress,
            )  # fmt: skip
            number = result.scores[result.main]
            numbers[result.task] = {
                "title": result.title, "metric": result.main, "share": result.main in result.percent,
                "items": result.items, "value": number.value, "low": number.low, "high": number.high,
                **({} if prepared.task.name in kept else {"further": True}),
            }  # fmt: skip
        return numbers


def _training(trained: TrainResult, rows: int) -> dict[str, Any]:
    return {
        "rows": rows,
        "steps": trained.steps,
        "trainable_parameters": trained.trainable_parameters,
        "parameters": trained.parameters,
        "step_seconds": trained.step_seconds,
        "step_seconds_quartiles": trained.step_seconds_quartiles,
        "seconds": trained.seconds,
        "peak_bytes": training_peak(),
        "losses": [[record["step"], record["loss"]] for record in trained.records if "loss" in record],
    }


_PREDICTIONS = 2**30
"""Bytes that the base model's predictions may take while a curve is measured."""
_PROMPTS = 32
"""Number of the task's prompts that KL is measured on, and below of the tokens of each."""


def _prompts(rows: Any) -> MeasuredText | None:
    """The prompts of the first training questions; None if they have none."""
    prompts = []
    for row in rows.rows[:_PROMPTS]:
        length = next((place for place, label in enumerate(row["labels"]) if label != IGNORED_LABEL), 0)
        prompts.append(tuple(row["input_ids"][:length][-MONITORED_LENGTH:]))
    prompts = [prompt for prompt in prompts if len(prompt) > 1]
    return MeasuredText(tuple(prompts), (1,) * len(prompts)) if prompts else None


def _losses(score: Mapping[str, Any]) -> dict[str, Any]:
    return {name: score[name] for name in ("loss", "loss_error", "losses", "counts")}


def _kl(measured: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {text: {name: row[name] for name in ("kl", "kl_error")} for text, row in measured.items()}
