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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dynalora.common.names import IGNORED_LABEL
from dynalora.common.progress import Progress, rich_progress
from dynalora.common.statistics import Interval, mcnemar, paired_difference
from dynalora.drawing import runs as plots
from dynalora.errors import ConfigError
from dynalora.evaluation.scoring import Score, evaluate
from dynalora.evaluation.tasks import Task, load_task
from dynalora.forgetting.retention import (
    BasePredictions,
    OwnText,
    Retention,
    base_predictions,
    own_text,
    retention,
)
from dynalora.jobs.finetune import BASELINE, adapter_config, check_targets, load_model, load_tokenizer
from dynalora.lab import data
from dynalora.lab.machine import peak
from dynalora.lab.packaged_models import demo_model
from dynalora.lab.report import Cell, Figure, Report, Section, Table, rich_table, write_report
from dynalora.lab.run_folder import RunFolder
from dynalora.lab.training import TrainResult, TrainSettings, save_adapter, take_off, train_adapter

if TYPE_CHECKING:
    from peft import PeftModel
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASK = "needle_haystack"
TASK_OPTIONS = {"min_num_statements": 3, "max_num_statements": 6}

# Half as long as the one that SmolLM2's chat template adds by itself: on a CPU every prompt token costs time.
SYSTEM = "Answer briefly."

SHOWN = 8
OUTPUT = "runs/demo"


@dataclass(frozen=True, kw_only=True)
class DemoSpec(TrainSettings):
    """What the demo does. Every setting has a default, and the defaults take a few minutes on two cores.

    Attributes:
        output: The run folder, new or empty; None: `runs/demo`, or the first of `runs/demo-2`, … that is free.
        model: Hub id or folder of another causal language model; None: SmolLM2-135M-Instruct.
        methods: What to compare, in this order; `lora` is PEFT's LoRA. Each at most once.
        r: Rank of every adapter.
        alpha: Scales every update by alpha / r; None: each method's default.
        target_modules: Names, a regular expression, or `all-linear`.
        gate_bias_init: Start of DISeL's gate biases.
        task: A task of reasoning-gym; None: the demo's own.
        task_options: Options of the task's generator; given only together with `task`.
        system: System message of every question; None: a short one for the demo's own model, none for others.
        held_out: Number of held-out questions.
        retention_texts: Number of texts the base model writes for measuring retention.
        retention_tokens: Longest of them, in tokens.
    """

    output: str | None = None
    model: str | None = None
    methods: list[str] = field(default_factory=lambda: ["disel", BASELINE])
    r: int = 16
    alpha: float | None = None
    target_modules: list[str] | str = "all-linear"
    gate_bias_init: float = -3.0
    task: str | None = None
    task_options: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    held_out: int = 200
    retention_texts: int = 32
    retention_tokens: int = 48

    steps: int | None = 40
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup: float = 0.1
    batch_size: int = 8
    log_every: int | None = 1
    eval_every: int | None = 0
    save_every: int | None = 0

    def _check(self) -> None:
        super()._check()
        for name in ("held_out", "retention_texts", "retention_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give a whole number of at least 1.")
        if self.steps is None:
            raise ConfigError("steps is missing; give the number of optimizer steps.")
        if not self.methods:
            raise ConfigError("methods is empty; name at least one.")
        twice = {name for name in self.methods if self.methods.count(name) > 1}
        if twice:
            raise ConfigError(
                f"methods lists {', '.join(sorted(twice))} more than once; name each at most once."
            )
        if self.task is None and self.task_options:
            raise ConfigError("task_options are given without a task; name the task they belong to.")

    def settings(self) -> dict[str, Any]:
        """The settings as written to the run folder."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "output"}


@dataclass(frozen=True)
class DemoRow:
    """One method's result, before (the base model) and after training.

    Attributes:
        method: Its name.
        accuracy_before: Share of held-out questions answered right, with its 95 % interval.
        accuracy_after: The same after training.
        answer_loss_before: Loss of the right answers, nats per token.
        answer_loss_after: The same after training.
        kl: KL(base ‖ tuned) on text that the base model wrote, nats per token.
        kl_error: Its standard error.
        loss_shift: Loss on that text minus the base model's, nats per token.
        trainable_parameters: Number of trained parameters.
        step_seconds: Median time of an optimizer step; None for runs of very few steps.
        train_seconds: Time of the whole training.
    """

    method: str
    accuracy_before: Interval
    accuracy_after: Interval
    answer_loss_before: float
    answer_loss_after: float
    kl: float
    kl_error: float
    loss_shift: float
    trainable_parameters: int
    step_seconds: float | None
    train_seconds: float


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo found.

    Attributes:
        rows: One per method, in the order they were trained.
        scores: Base model and methods by name → their held-out scores.
        task: What they were trained on.
        origin: Where the base model came from.
        seconds: Time of the whole demo.
        peak_memory: Most memory the process has held, in bytes; None where the system does not say.
    """

    rows: list[DemoRow]
    scores: dict[str, Score]
    task: Task
    origin: str
    seconds: float
    peak_memory: int | None


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
        training = data.tokenize([item.conversation(self.system) for item in self.task.train], self.tokenizer)
        held_out = data.tokenize(
            [item.conversation(self.system) for item in self.task.held_out], self.tokenizer
        )
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
        gates: bytes | None = None
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

    def _score(self, model: Any, held_out: data.TokenizedSet, name: str) -> Score:
        return evaluate(
            model, self.tokenizer, held_out.rows, samples=min(SHOWN, self.how.held_out), name=name,
            progress=self.progress,
        )  # fmt: skip

    def _gates(self, model: PeftModel, held_out: data.TokenizedSet, text: OwnText) -> bytes:
        """Histograms of DISeL's gates on the task and on the base model's own text."""
        from dynalora.drawing.gates import plot_gates
        from dynalora.drawing.style import rendered
        from dynalora.forgetting.gates import record_gates

        collator = data.Collator(self.tokenizer.pad_token_id or 0)
        own: list[data.Tokens] = [
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
        return rendered(plot_gates(found))

    def _report(
        self,
        result: DemoResult,
        records: dict[str, list[dict[str, Any]]],
        gates: bytes | None,
        reference: BasePredictions,
    ) -> None:
        figures = _figures(result, records)
        if gates is not None:
            figures["gates"] = (
                gates,
                "DISeL's gates on the task's answers and on the base model's own text, by depth.",
            )
        for name, (content, _) in figures.items():
            self.run_folder.write(f"plots/{name}.png", content)
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
            Section("Result", text=_READING, tables=[summary_table(result.rows), comparison_table(result)]),
            Section("Plots", figures=[Figure(content, caption) for content, caption in figures.values()]),
            Section("What the models say", text=about, tables=[_samples(result)]),
            Section("Settings", listing=yaml.safe_dump(how.settings(), sort_keys=False, allow_unicode=True)),
        ]
        title = f"Demo: {' and '.join(row.method for row in result.rows)} on {task.name}"
        write_report(Report(title, _summary(result), sections), self.run_folder.report)


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


# --- what is shown ----------------------------------------------------------------------------------------


def summary_table(rows: Sequence[DemoRow]) -> Table:
    """The demo's one table: the base model's row first, then each method's."""
    first = rows[0]
    shown: list[list[Cell]] = [
        ["base model", _share(first.accuracy_before), f"{first.answer_loss_before:.3f}", "0", "0", None, None]
    ]
    for row in rows:
        shown.append(
            [
                row.method,
                _share(row.accuracy_after),
                f"{row.answer_loss_after:.3f}",
                f"{row.kl:.4f} ± {row.kl_error:.4f}",
                f"{row.loss_shift:+.4f}",
                row.trainable_parameters,
                None if row.step_seconds is None else f"{row.step_seconds:.2f}",
            ]
        )
    return Table(
        ["", "accuracy", "answer loss", "KL from base", "loss shift", "trainable parameters", "step (s)"],
        shown,
        note=(
            "Accuracy: held-out questions answered exactly right by greedy decoding, with Wilson's 95 % interval. "
            "Answer loss: nats per token of the right answers. KL(base ‖ tuned), with its standard error, and loss "
            "shift: nats per token of text that the base model itself wrote; 0 is an unchanged model. Step: median "
            "time of an optimizer step; `dynalora bench` compares step times precisely."
        ),
    )


def comparison_table(result: DemoResult) -> Table:
    """Differences in accuracy on the same questions: each method against the base model and against the others."""
    names = list(result.scores)
    rows: list[list[Cell]] = []
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            a, b = result.scores[first].correct, result.scores[second].correct
            difference, p = paired_difference(a, b), mcnemar(a, b)
            interval = (
                f"{100 * difference.value:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
            )
            rows.append([f"{second} − {first}", interval, "< 0.0001" if p < 1e-4 else f"{p:.4f}"])
    return Table(
        ["accuracy on the same questions", "difference in points (95 % interval)", "McNemar's p"],
        rows,
        note="Interval: adjusted Wald for paired proportions. p: exact, two-sided. One training run per method.",
    )


def _share(accuracy: Interval) -> str:
    return f"{100 * accuracy.value:.1f} % ({100 * accuracy.low:.1f}–{100 * accuracy.high:.1f})"


def _summary(result: DemoResult) -> str:
    base = result.rows[0]
    reached = ", ".join(f"{100 * row.accuracy_after.value:.1f} % with {row.method}" for row in result.rows)
    memory = f" and {result.peak_memory / 1e9:.1f} GB of memory" if result.peak_memory else ""
    before = f"{100 * base.accuracy_before.value:.1f} %"
    return (
        f"Accuracy on {len(result.task.held_out):,} held-out questions went from {before} to {reached}. "
        f"All of it took {result.seconds / 60:.1f} minutes{memory}."
    )


_READING = (
    "Higher accuracy and lower answer loss mean that more of the task was learned; part of that is to answer in the "
    "form asked for, as the samples below show. KL and loss shift nearer to 0 mean that more of the base model was "
    "kept. The two have to be read together: an adapter that learns nothing forgets nothing either."
)


def _samples(result: DemoResult) -> Table:
    names = list(result.scores)
    rows: list[list[Cell]] = []
    for index, item in enumerate(result.task.held_out[:SHOWN]):
        said = [(score.samples[index : index + 1] or ("",))[0][:200] for score in result.scores.values()]
        rows.append([item.question, item.answer, *said])
    return Table(
        ["question", "right answer", *names], rows, title="The first held-out questions",
        note="Greedy decoding, cut at the length of the longest right answer.",
    )  # fmt: skip


def _figures(result: DemoResult, records: dict[str, list[dict[str, Any]]]) -> dict[str, tuple[bytes, str]]:
    accuracy: dict[str, float | tuple[float, float, float]] = {
        name: (score.accuracy.value, score.accuracy.low, score.accuracy.high)
        for name, score in result.scores.items()
    }
    draw: list[tuple[str, Callable[[], bytes], str]] = [
        (
            "accuracy",
            lambda: plots.bars(accuracy, ylabel="held-out accuracy"),
            "Held-out accuracy, 95 % intervals.",
        ),
        ("loss", lambda: plots.loss_curves(records), "Training loss of each method, on the same batches."),
        (
            "retention",
            lambda: plots.retention_bars(
                {row.method: row.kl for row in result.rows},
                {row.method: row.loss_shift for row in result.rows},
            ),
            "Distance from the base model on the base model's own text; smaller is better.",
        ),
    ]
    return {name: (make(), caption) for name, make, caption in draw}
