"""The demo: one small real model, one task, two adapters of the same rank, measured before and after.

The base model is measured once. Then each method in turn gets a fresh adapter on the same base model, is trained on
the same batches in the same order with the same learning-rate schedule, is measured the same way, and is taken off
again, which gives the base model back unchanged.
"""

from __future__ import annotations

import functools
import gc
import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dynalora.common.names import IGNORED_LABEL
from dynalora.common.progress import Progress, rich_progress
from dynalora.errors import ConfigError
from dynalora.evaluation.scoring import Score, evaluate
from dynalora.evaluation.tasks import Task, load_task
from dynalora.evaluation.tokens import TokenizedSet, Tokens, tokenize
from dynalora.forgetting.retention import (
    BasePredictions,
    OwnText,
    Retention,
    base_predictions,
    own_text,
    retention,
)
from dynalora.jobs.demo.report import (
    READING,
    SHOWN,
    DemoResult,
    DemoRow,
    comparison_table,
    samples_table,
    summary,
    summary_table,
)
from dynalora.jobs.demo.report import (
    figures as figures_of,
)
from dynalora.jobs.demo.settings import DemoSpec
from dynalora.lab.configs import adapter_config
from dynalora.lab.data.collator import Collator
from dynalora.lab.machine import peak
from dynalora.lab.models import load_model, load_tokenizer
from dynalora.lab.packaged_models import demo_model
from dynalora.lab.report import Report, Section, rich_table, save_figures, write_report
from dynalora.lab.run_folder import RunFolder
from dynalora.lab.targets import check_targets
from dynalora.lab.training.checkpoints import save_adapter
from dynalora.lab.training.train import TrainResult, take_off, train_adapter

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing
    from peft import PeftModel
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASK = "needle_haystack"


TASK_OPTIONS = {"min_num_statements": 3, "max_num_statements": 6}


# Half as long as the one that SmolLM2's chat template adds by itself: on a CPU every prompt token costs time.
SYSTEM = "Answer briefly."


OUTPUT = "runs/demo"


def run_demo(
    spec: DemoSpec | None = None,
    *,
    console: Console | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> DemoResult:
    """Measure the base model, train and measure each method, and write the run folder.

    Args:
        spec: What to do; None: the defaults.
        console: Where progress and the closing table are shown; None: nowhere.
        model: A base model that is already loaded, used instead of `spec.model`. It is unchanged afterwards.
        tokenizer: Its tokenizer; needed with `model`.

    Returns:
        The measurements; they, the adapters, plots and `report.html` are also in the run folder.

    Raises:
        ConfigError: A setting, the method, the task or the target modules; before the model is loaded.
        RunFolderError: The run folder cannot be used.
        UnsupportedError: Reasoning-gym (or, for the default model, gguf) is not installed.
        ModelError: The model cannot be had.
    """
    began = time.perf_counter()
    how = spec or DemoSpec()
    if (model is None) != (tokenizer is None):
        raise ConfigError("model and tokenizer belong together; pass both or neither.")
    configs = {name: _config(name, how) for name in how.methods}
    output = how.output or _free_folder(OUTPUT)
    RunFolder.check(output, how.settings())
    assert how.steps is not None
    task = load_task(
        how.task or TASK,
        train_size=how.steps * how.batch_size * how.gradient_accumulation,
        held_out_size=how.held_out,
        seed=how.seed,
        options=how.task_options if how.task else TASK_OPTIONS,
    )
    with rich_progress(console) as progress:
        origin, system = "given by the caller", how.system or ""
        if model is None and how.model is None and how.system is None:
            system = SYSTEM
        if model is None or tokenizer is None:
            source, origin = (how.model, how.model) if how.model else _demo_source(progress)
            tokenizer = load_tokenizer(source)
            progress("Loading the model", 0, None)
            model = load_model(source, dtype="float32")
            progress("Loading the model", 1, 1)
        for config in configs.values():
            check_targets(model, config)
        with RunFolder.create(output, how.settings()) as run:
            demo = _Demo(how, task, system, origin, model, tokenizer, run, progress, console)
            result = demo.run(configs, began)
            run.finish()
    if console is not None:
        console.print(rich_table(summary_table(result.rows)))
        console.print(
            f"Adapters: {run.adapter.parent}\nReport:   {run.report}", highlight=False, markup=False
        )
    return result


def _free_folder(wanted: str) -> str:
    """`wanted`, or with the first number behind it that makes it new."""
    names = itertools.chain([wanted], (f"{wanted}-{number}" for number in itertools.count(2)))
    return next(
        name
        for name in names
        if not Path(name).exists() or (Path(name).is_dir() and not any(Path(name).iterdir()))
    )


def _config(method: str, how: DemoSpec) -> Any:
    options = {"gate_bias_init": how.gate_bias_init} if method.lower() == "disel" else {}
    return adapter_config(
        method, r=how.r, alpha=how.alpha, target_modules=how.target_modules, options=options
    )


def _demo_source(progress: Progress) -> tuple[str, str]:
    found = demo_model(progress=progress)
    return found.path, found.origin


@dataclass
class _Demo:
    """One run of the demo: what all its steps share."""

    how: DemoSpec
    task: Task
    system: str
    origin: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    run_folder: RunFolder
    progress: Progress
    console: Console | None

    def run(self, configs: dict[str, Any], began: float) -> DemoResult:
        how = self.how
        training = tokenize([item.conversation(self.system) for item in self.task.train], self.tokenizer)
        held_out = tokenize([item.conversation(self.system) for item in self.task.held_out], self.tokenizer)
        base = self._score(self.model, held_out, "base model")
        self.run_folder.log(_score_record("base", base))
        text = own_text(
            self.model,
            self.tokenizer,
            texts=how.retention_texts,
            tokens=how.retention_tokens,
            progress=self.progress,
        )
        reference = base_predictions(self.model, text, progress=self.progress)
        rows: list[DemoRow] = []
        scores = {"base": base}
        records: dict[str, list[dict[str, Any]]] = {}
        gates: Drawing | None = None
        for index, (name, config) in enumerate(configs.items()):
            trained = train_adapter(
                self.model, self.tokenizer, config, training, settings=how, run=self.run_folder, label=name,
                console=self.console,
            )  # fmt: skip
            records[name] = trained.records
            # The first method's adapter is the run's adapter, which the other commands find by themselves.
            folder = "adapter" if index == 0 else f"adapter-{name}"
            save_adapter(trained.model, self.tokenizer, self.run_folder, name=folder)
            score = self._score(trained.model, held_out, name)
            kept = retention(trained.model, text, base=reference, name=name, progress=self.progress)
            scores[name] = score
            rows.append(_row(trained, base, score, kept))
            self.run_folder.log(
                {
                    **_score_record(name, score),
                    "step": trained.steps,
                    "retention": asdict(kept),
                    **_cost(rows[-1]),
                }
            )
            if getattr(trained.model.active_peft_config, "gated", False):
                gates = self._gates(trained.model, held_out, text)
            # Gives the base model back; without the result nothing holds the adapter's weights any more.
            self.model = take_off(trained.model)
            del trained
            gc.collect()
        result = DemoResult(rows, scores, self.task, self.origin, time.perf_counter() - began, peak())
        self._report(result, records, gates, reference)
        return result

    def _score(self, model: Any, held_out: TokenizedSet, name: str) -> Score:
        return evaluate(
            model, self.tokenizer, held_out.rows, samples=min(SHOWN, self.how.held_out), name=name,
            progress=self.progress,
        )  # fmt: skip

    def _gates(self, model: PeftModel, held_out: TokenizedSet, text: OwnText) -> Drawing:
        """Histograms of DISeL's gates on the task and on the base model's own text."""
        from dynalora.drawing.gates import plot_gates
        from dynalora.forgetting.gate_recording import record_gates

        collator = Collator(self.tokenizer.pad_token_id or 0)
        own: list[Tokens] = [
            {"input_ids": list(ids), "labels": [IGNORED_LABEL] * start + list(ids[start:])}
            for ids, start in zip(text.rows, text.starts, strict=True)
        ]
        rows = {"the task's answers": held_out.rows[:32], "the base model's own text": own[:16]}
        found: dict[str, Sequence[Any]] = {}
        for name, some in rows.items():
            batches = [dict(collator(some[start : start + 8])) for start in range(0, len(some), 8)]
            listen = functools.partial(self.progress, f"Recording the gates on {name}")
            listen(0, len(batches))
            found[name] = record_gates(model, batches, progress=listen)
        return plot_gates(found)

    def _report(
        self,
        result: DemoResult,
        records: dict[str, list[dict[str, Any]]],
        gates: Drawing | None,
        reference: BasePredictions,
    ) -> None:
        figures = figures_of(result, records)
        if gates is not None:
            figures["gates"] = (
                gates,
                "DISeL's gates on the task's answers and on the base model's own text, by depth.",
            )
        pictures = save_figures(self.run_folder.write, figures, svg=False)
        task, how = self.task, self.how
        options = ", ".join(f"{name} = {value}" for name, value in task.options.items())
        batch = how.batch_size * how.gradient_accumulation
        system = f" System message: “{self.system}”" if self.system else ""
        about = (
            f"Base model: {result.origin}. Task: {task.name} of reasoning-gym{f' ({options})' if options else ''}."
            f"{system} There are {len(task.train):,} training and {len(task.held_out):,} held-out questions from seed "
            f"{task.seed}, none twice. Always giving the most frequent answer would be right on "
            f"{100 * task.majority:.1f} % of them. Training: AdamW, {how.steps} steps of {batch} questions, "
            f"learning rate {how.learning_rate:g} ({how.schedule}), rank {how.r}; every method sees the same batches "
            f"in the same order. Retention is measured on {reference.text.tokens:,} tokens that the base model wrote."
        )
        sections = [
            Section("Result", text=READING, tables=[summary_table(result.rows), comparison_table(result)]),
            Section("Plots", figures=pictures),
            Section("What the models say", text=about, tables=[samples_table(result)]),
            Section("Settings", listing=yaml.safe_dump(how.settings(), sort_keys=False, allow_unicode=True)),
        ]
        title = f"Demo: {' and '.join(row.method for row in result.rows)} on {task.name}"
        write_report(Report(title, summary(result), sections), self.run_folder.report)


def _row(trained: TrainResult, base: Score, score: Score, kept: Retention) -> DemoRow:
    return DemoRow(
        method=trained.label,
        accuracy_before=base.accuracy,
        accuracy_after=score.accuracy,
        answer_loss_before=base.answer_loss,
        answer_loss_after=score.answer_loss,
        kl=kept.kl,
        kl_error=kept.kl_error,
        loss_shift=kept.loss_shift,
        trainable_parameters=trained.trainable_parameters,
        step_seconds=trained.step_seconds,
        train_seconds=trained.seconds,
    )


def _score_record(name: str, score: Score) -> dict[str, Any]:
    return {"run": name, "accuracy": asdict(score.accuracy), "answer_loss": score.answer_loss}


def _cost(row: DemoRow) -> dict[str, Any]:
    return {
        "trainable_parameters": row.trainable_parameters,
        "median_step_seconds": row.step_seconds,
        "train_seconds": row.train_seconds,
    }
