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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynalora.common.names import IGNORED_LABEL
from dynalora.common.progress import Progress, rich_progress
from dynalora.drawing.gates import plot_gates
from dynalora.errors import ConfigError
from dynalora.evaluation.scoring import Score, evaluate
from dynalora.evaluation.tasks import Task, load_task
from dynalora.evaluation.tokens import TokenizedSet, Tokens, tokenize
from dynalora.evaluation.windows import model_window
from dynalora.forgetting.gate_recording import record_gates
from dynalora.forgetting.retention import BasePredictions, Retention, base_predictions, retention
from dynalora.forgetting.texts import OwnText, own_text
from dynalora.jobs.demo.report import (
    READING,
    SHOWN,
    DemoResult,
    DemoRow,
    comparison_table,
    description,
    figures,
    samples_table,
    summary,
    summary_table,
)
from dynalora.jobs.demo.settings import DemoSpec
from dynalora.lab.choices import label_of, own_methods
from dynalora.lab.configs import adapter_config, check_rank, check_targets
from dynalora.lab.data.collator import batches_of
from dynalora.lab.distance import Continued, continued, distance_table, in_words, openings
from dynalora.lab.machine import peak
from dynalora.lab.models import load_model, load_tokenizer
from dynalora.lab.packaged_models import ModelSource, demo_model
from dynalora.lab.report import Report, Section, Table, listing, save_figures, say, write_report
from dynalora.lab.run_folder import RunFolder
from dynalora.lab.training.checkpoints import save_adapter
from dynalora.lab.training.settings import train_settings
from dynalora.lab.training.train import TrainResult, take_off, train_adapter

TASK = "needle_haystack"
TASK_OPTIONS = {"min_num_statements": 3, "max_num_statements": 6}


# Half as long as the one that SmolLM2's chat template adds by itself: on a CPU every prompt token costs time.
SYSTEM = "Answer briefly."
OUTPUT = "runs/demo"
_ANY_LENGTH = 2**31


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

    Raises:
        ConfigError: A setting, the method, the task or the target modules; before the model is loaded.
        RunFolderError: The run folder cannot be used.
        UnsupportedError: Reasoning-gym (or, for the default model, gguf) is not installed.
        ModelError: The model cannot be had.
    """
    began = time.perf_counter()
    spec = spec or DemoSpec()
    if (model is None) != (tokenizer is None):
        raise ConfigError("model and tokenizer belong together; pass both or neither.")
    configs = {name: _config(name, spec) for name in spec.methods}
    output = spec.output or _free_folder(OUTPUT)
    RunFolder.check(output, spec.settings())
    assert spec.steps is not None
    task = load_task(
        spec.task or TASK,
        train_size=spec.steps * spec.batch_size * spec.gradient_accumulation,
        held_out_size=spec.held_out,
        seed=spec.seed,
        options=spec.task_options if spec.task else TASK_OPTIONS,
    )
    with rich_progress(console) as progress:
        origin, system = "given by the caller", spec.system or ""
        if model is None and spec.model is None and spec.system is None:
            system = SYSTEM
        if model is None or tokenizer is None:
            chosen = ModelSource(spec.model, spec.model) if spec.model else demo_model(progress=progress)
            source, origin = chosen.path, chosen.origin
            tokenizer = load_tokenizer(source)
            progress("Loading the model", 0, None)
            model = load_model(source, dtype="float32")
            progress("Loading the model", 1, 1)
        for config in configs.values():
            check_rank(model, config, check_targets(model, config))
        with RunFolder.create(output, spec.settings()) as run:
            demo = _Demo(spec, task, system, origin, model, tokenizer, run, progress, console)
            result = demo.run(configs, began)
            run.finish()
    say(console, summary(result), summary_table(result), f"Adapters: {run.adapter.parent}\nReport:   {run.report}")
    return result


def _free_folder(path: str) -> str:
    """`path` if it is new or empty, else with the first number behind it that makes it so."""
    names = itertools.chain([path], (f"{path}-{number}" for number in itertools.count(2)))
    return next(
        name for name in names if not Path(name).exists() or (Path(name).is_dir() and not any(Path(name).iterdir()))
    )


def _config(method: str, spec: DemoSpec) -> Any:
    options: dict[str, Any] = {"gate_bias_init": spec.gate_bias_init} if method.lower() == "disel" else {}
    if label_of(method) in own_methods():
        options["retain"] = spec.retain
    return adapter_config(method, r=spec.r, alpha=spec.alpha, target_modules=spec.target_modules, options=options)


@dataclass
class _Demo:
    """One run of the demo: what all its steps share."""

    spec: DemoSpec
    task: Task
    system: str
    origin: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    run_folder: RunFolder
    progress: Progress
    console: Console | None

    def run(self, configs: dict[str, Any], began: float) -> DemoResult:
        spec = self.spec
        training, held_out = (
            tokenize([item.conversation(self.system) for item in items], self.tokenizer)
            for items in (self.task.train, self.task.held_out)
        )
        base = self._score(self.model, held_out, "base model")
        self.run_folder.log(_score_record("base", base))
        scores = {"base": base}
        shots, solved = self._with_examples()
        if solved is not None:
            name = f"base, {shots} examples"
            scores[name] = self._score(self.model, solved, f"base model, {shots} examples")
            self.run_folder.log(_score_record(name, scores[name]))
        text = own_text(
            self.model, self.tokenizer, texts=spec.retention_texts, tokens=spec.retention_tokens,
            progress=self.progress,
        )  # fmt: skip
        reference = base_predictions(self.model, text, progress=self.progress)
        result = DemoResult([], scores, self.task, self.origin, shots=shots)
        begun = openings(text, self.tokenizer)
        said = [Continued("base model", 0.0, continued(self.model, self.tokenizer, text, progress=self.progress))]
        records: dict[str, list[dict[str, Any]]] = {}
        gates: Figure | None = None
        for name, config in configs.items():
            trained = train_adapter(
                self.model, self.tokenizer, config, training,
                settings=train_settings(spec, eval_every=0, save_every=0), run=self.run_folder, label=name,
                console=self.console,
            )  # fmt: skip
            # The first method's adapter is the run's adapter, which the other commands find by themselves.
            folder = f"adapter-{name}" if records else "adapter"
            records[name] = trained.records
            save_adapter(trained.model, self.tokenizer, self.run_folder, name=folder)
            score = self._score(trained.model, held_out, name)
            forgotten = retention(trained.model, text, base=reference, name=name, progress=self.progress)
            self._add(result, trained, score, forgotten)
            goes_on = continued(trained.model, self.tokenizer, text, progress=self.progress)
            said.append(Continued(result.rows[-1].title, forgotten.kl, goes_on))
            if getattr(trained.model.active_peft_config, "gated", False):
                gates = self._gates(trained.model, held_out, text)
            # Gives the base model back; without the result nothing holds the adapter's weights any more.
            self.model = take_off(trained.model)
            del trained
            gc.collect()
        result = replace(result, seconds=time.perf_counter() - began, peak_memory=peak())
        self._report(result, records, gates, reference, distance_table(said, begun))
        return result

    def _with_examples(self) -> tuple[int, TokenizedSet | None]:
        """The held-out questions, each after as many solved ones as are asked for and fit, and how many these are."""
        window = model_window(self.model, self.tokenizer)
        for shots in range(self.spec.shots, 0, -1):
            solved = [{**turn, "weight": 0} for item in self.task.train[:shots] for turn in item.conversation()]
            conversations = []
            for item in self.task.held_out:
                *before, question, answer = item.conversation(self.system)
                conversations.append([*before, *solved, question, answer])
            rows = tokenize(conversations, self.tokenizer, max_length=_ANY_LENGTH)
            if max(len(row["input_ids"]) for row in rows.rows) <= window:
                return shots, rows
        return 0, None

    def _score(self, model: Any, held_out: TokenizedSet, name: str) -> Score:
        return evaluate(
            model, self.tokenizer, held_out.rows, samples=min(SHOWN, self.spec.held_out), name=name,
            progress=self.progress,
        )  # fmt: skip

    def _add(self, result: DemoResult, trained: TrainResult, score: Score, forgotten: Retention) -> None:
        """Add one method's measurements to the result, and log them."""
        base = result.scores["base"]
        result.scores[trained.label] = score
        result.rows.append(
            DemoRow(
                method=trained.label, accuracy_before=base.accuracy, accuracy_after=score.accuracy,
                answer_loss_before=base.answer_loss, answer_loss_after=score.answer_loss, kl=forgotten.kl,
                kl_error=forgotten.kl_error, loss_shift=forgotten.loss_shift,
                trainable_parameters=trained.trainable_parameters, step_seconds=trained.step_seconds,
                train_seconds=trained.seconds,
                retain=getattr(trained.model.active_peft_config, "retain", None),
            )
        )  # fmt: skip
        self.run_folder.log(
            {
                **_score_record(trained.label, score), "step": trained.steps, "retention": asdict(forgotten),
                "trainable_parameters": trained.trainable_parameters, "median_step_seconds": trained.step_seconds,
                "train_seconds": trained.seconds,
            }
        )  # fmt: skip

    def _gates(self, model: PeftModel, held_out: TokenizedSet, text: OwnText) -> Figure:
        """Histograms of DISeL's gates on the task and on the base model's own text."""
        written: list[Tokens] = [
            {"input_ids": list(ids), "labels": [IGNORED_LABEL] * start + list(ids[start:])}
            for ids, start in zip(text.rows[:16], text.starts[:16], strict=True)
        ]
        recorded: dict[str, Sequence[Any]] = {}
        for name, rows in {
            "the task's answers": held_out.rows[:32], "the base model's own text": written
        }.items():  # fmt: skip
            batches = batches_of(rows, self.tokenizer.pad_token_id)
            report = functools.partial(self.progress, f"Recording the gates on {name}")
            report(0, len(batches))
            recorded[name] = record_gates(model, batches, progress=report)
        return plot_gates(recorded)

    def _report(
        self,
        result: DemoResult,
        records: dict[str, list[dict[str, Any]]],
        gates: Figure | None,
        reference: BasePredictions,
        distances: Table,
    ) -> None:
        spec = self.spec
        caption = "DISeL's gates on the task's answers and on the base model's own text, by depth."
        drawn = {**figures(result, records), "gates": (gates, caption)}
        paragraph = description(spec, result, self.system, retention_tokens=reference.text.tokens)
        sections = [
            Section("Result", text=READING, tables=[summary_table(result), comparison_table(result)]),
            Section("Plots", figures=save_figures(self.run_folder.write, drawn, svg=False)),
            Section("What the models say", text=paragraph, tables=[samples_table(result)]),
            Section("What the KL means", text=in_words(result.rows[-1].kl), tables=[distances]),
            Section("Settings", listing=listing(spec.settings())),
        ]
        title = f"Demo: {' and '.join(row.method for row in result.rows)} on {self.task.name}"
        write_report(Report(title, summary(result), sections), self.run_folder.report)


def _score_record(name: str, score: Score) -> dict[str, Any]:
    return {"run": name, "accuracy": asdict(score.accuracy), "answer_loss": score.answer_loss}
