"""Recovery of a forgotten task from a few examples: RLGR against random and naive recovery (DiRA §5.2, Figure 3).

It starts from adapters that were trained on Task A and then on Task B: those of a run of `dynalora forgetting`, or one
that is named. Every recovery takes its examples from Task A's training questions with a seed, is measured on both
tasks, and leaves one file, all at once; what is there is not run again.

Layout of the run folder, besides what every run has::

    results/seed-42/before.json       scores of the adapter after Task B
    results/seed-42/rlgr-0.json       after a recovery with seed 0
    recovery.csv                      all scores, a row per recovery and task
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dynalora.common.progress import rich_progress
from dynalora.common.statistics import mean_interval
from dynalora.errors import CheckpointError, ConfigError
from dynalora.forgetting.landscape import LandscapeRow, rank_landscape
from dynalora.forgetting.recovery import STRATEGIES, low_rank_modules, recover
from dynalora.jobs.stages.experiment import Experiment, Result, Results, run_experiment, score_bars
from dynalora.jobs.stages.settings import RecoverSpec
from dynalora.jobs.stages.stage_files import ADAPTER, RESULT, read_landscape, stage_folder
from dynalora.lab.adapters import adapter_folder, read_config
from dynalora.lab.lab_settings import LabSettings
from dynalora.lab.report import Cell, Table
from dynalora.lab.run_folder import CONFIG, RunFolder
from dynalora.lab.scores import mean_line, shown_interval, shown_scores
from dynalora.lab.settings import read_yaml, settings_from
from dynalora.lab.units import UnitStore, read_result
from dynalora.lab.workbench import Workbench

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing
    from rich.console import Console

BEFORE = "before"
LABELS = {BEFORE: "before recovery", "rlgr": "RLGR", "random": "random", "naive": "naive"}

_INHERITED = tuple(item.name for item in fields(LabSettings))


@dataclass(frozen=True)
class Checkpoint:
    """An adapter to start from.

    Attributes:
        name: For files and tables.
        adapter: Folder of the adapter after Task B.
        initial: Folder of the adapter after Task A.
        landscape: The landscape after Task A; None: not read yet.
        scores: The scores after Task A by `a` and `b`, where they are known.
    """

    name: str
    adapter: Path
    initial: Path
    landscape: list[LandscapeRow] | None = None
    scores: Mapping[str, Any] | None = None


def resolve(spec: RecoverSpec) -> tuple[RecoverSpec, list[Checkpoint]]:
    """Fill in what the source run says, and find the adapters to start from.

    Args:
        spec: What was asked for.

    Returns:
        The settings without gaps that matter, and the adapters.

    Raises:
        ConfigError: Neither the settings nor the source say which tasks or which initial adapter.
        CheckpointError: The source is no run of `dynalora forgetting` with a finished Task B, and no adapter.
    """
    folder = Path(spec.source)
    if (folder / CONFIG).exists() and "task_a" in (settings := read_yaml(folder / CONFIG)):
        missing = [name for name in ("task_a", "task_b", *_INHERITED) if getattr(spec, name) is None]
        inherited: dict[str, Any] = {name: settings.get(name) for name in missing}
        spec = replace(spec, **inherited)
        seeds = sorted(
            int(match[1])
            for entry in folder.iterdir()
            if (match := re.fullmatch(r"seed-(\d+)", entry.name))
            and (stage_folder(folder, int(match[1]), "interference") / RESULT).exists()
        )[: spec.checkpoints]
        if not seeds:
            raise CheckpointError(f"No seed in '{folder}' has finished Task B; resume that run first.")
        checkpoints = []
        for seed in seeds:
            first = stage_folder(folder, seed, "initial")
            result = read_result(first / RESULT)
            checkpoints.append(
                Checkpoint(
                    f"seed-{seed}",
                    stage_folder(folder, seed, "interference") / ADAPTER,
                    first / ADAPTER,
                    read_landscape(first),
                    # Other questions would make another number.
                    result["scores"] if result and _same_questions(spec, settings) else None,
                )
            )
        return spec, checkpoints
    adapter = Path(adapter_folder(spec.source))
    for name, remedy in (
        ("initial", "the adapter after Task A"),
        ("task_a", "the task to recover"),
        ("task_b", "the other task"),
    ):
        if getattr(spec, name) is None:
            raise ConfigError(
                f"{name} is missing, and '{spec.source}' is no run of dynalora forgetting; name {remedy}."
            )
    initial = Path(adapter_folder(str(spec.initial)))
    if spec.model is None:
        model = read_config(spec.source).base_model_name_or_path
        if not model:
            raise ConfigError(f"The adapter '{spec.source}' does not say which base model it belongs to; name it.")
        spec = replace(spec, model=model)
    return spec, [Checkpoint("adapter", adapter, initial)]


def _same_questions(spec: RecoverSpec, settings: Mapping[str, Any]) -> bool:
    names = (
        "task_a", "task_b", "model", "data", "held_out", "generated", "generated_tokens", "beams", "system",
        "template", "by_generation", "data_seed",
    )  # fmt: skip
    return all(getattr(spec, name) == settings.get(name) for name in names)


def run_recovery(spec: RecoverSpec, *, console: Console | None = None) -> list[dict[str, Any]]:
    """Recover from every checkpoint with every strategy and seed, and write the run folder.

    Args:
        spec: What to do.
        console: Where progress and the closing tables are shown; None: nowhere.

    Returns:
        One result per recovery and one `before` per checkpoint: `checkpoint`, `strategy`, `seed`, `zeroed` (number of
        matrices), and `scores` by `a` and `b`.

    Raises:
        DynaloraError: Whatever is wrong with the settings, the source, the tasks or the run folder, before the
            model's weights are loaded.
    """
    resolved, checkpoints = resolve(spec)

    def prepare() -> Workbench:
        values = {name: getattr(resolved, name) for name in _INHERITED if getattr(resolved, name) is not None}
        how = settings_from(LabSettings, values, source="the settings")
        assert resolved.task_a is not None
        assert resolved.task_b is not None
        workbench = Workbench(how, [resolved.task_a, resolved.task_b], console)
        if len(pool := workbench.training(resolved.task_a)) < resolved.examples:
            raise ConfigError(
                f"examples is {resolved.examples}, and {resolved.task_a} has {len(pool)} training questions of at most "
                f"{how.max_length} tokens; ask for fewer, or raise max_length."
            )
        return workbench

    return run_experiment(
        resolved, prepare, lambda workbench, folder: _Recovery(resolved, workbench, folder, checkpoints), console
    )


@dataclass(frozen=True)
class Recovery:
    """One recovery, or the adapter before any.

    Attributes:
        checkpoint: The adapter that it starts from.
        landscape: That adapter's landscape after Task A.
        strategy: `before`, or one of the strategies.
        seed: Of the recovery; None before any.
    """

    checkpoint: Checkpoint
    landscape: list[LandscapeRow]
    strategy: str = BEFORE
    seed: int | None = None

    @property
    def name(self) -> str:
        """Its place among the results."""
        return f"{self.checkpoint.name}/{self.strategy}" + ("" if self.seed is None else f"-{self.seed}")


class _Recovery(Experiment[Recovery]):
    """One run of the experiment."""

    table_file = "recovery.csv"
    columns: ClassVar[Mapping[str, str]] = {
        name: name for name in ("checkpoint", "strategy", "seed", "zeroed", "matrices")
    }

    def __init__(
        self, spec: RecoverSpec, workbench: Workbench, folder: RunFolder, checkpoints: Sequence[Checkpoint]
    ) -> None:
        sources = {"a": str(spec.task_a), "b": str(spec.task_b)}
        super().__init__(spec, workbench, folder, sources, UnitStore(folder.path / "results"))
        self.spec, self.checkpoints = spec, checkpoints

    def run(self) -> None:
        for checkpoint in self.checkpoints:
            landscape = checkpoint.landscape or self._landscape(checkpoint)
            low = len(low_rank_modules(landscape, tau=self.spec.tau))
            self.workbench.say(
                f"{checkpoint.name}: {low} of {len(landscape)} matrices have effective rank 0 or 1 after Task A."
            )
            if low in (0, len(landscape)):
                self.workbench.say(
                    f"{checkpoint.name}: rlgr and random zero the same {'none' if low == 0 else 'all'} of them; choose "
                    "another tau to tell them apart."
                )
            self.complete(Recovery(checkpoint, landscape))
            for seed in self.spec.run_seeds:
                for strategy in self.spec.strategies:
                    self.complete(Recovery(checkpoint, landscape, strategy, seed))
            self.report()

    def _landscape(self, checkpoint: Checkpoint) -> list[LandscapeRow]:
        model = self.workbench.attach(checkpoint.initial)
        rows = rank_landscape(model)
        self.workbench.take_off(model)
        return rows

    def title(self, result: Result) -> str:
        seed = "" if result["seed"] is None else f", seed {result['seed']}"
        zeroed = f" ({result['zeroed']} matrices zeroed)" if result["zeroed"] else ""
        return f"{result['checkpoint']}, {LABELS[result['strategy']]}{seed}{zeroed}"

    def work(self, unit: Recovery) -> dict[str, Any]:
        model = self.workbench.attach(unit.checkpoint.adapter)
        recovered: dict[str, Any] = {"zeroed": 0, "modules": [], "losses": []}
        if unit.seed is not None:
            recovered = self._recover(model, unit.landscape, unit.strategy, unit.seed)
        scores = self.scores(model, unit.name)
        self.workbench.take_off(model)
        return {
            "checkpoint": unit.checkpoint.name,
            "strategy": unit.strategy,
            "seed": unit.seed,
            "matrices": len(unit.landscape),
            "scores": scores,
            **recovered,
        }

    def _recover(self, model: Any, landscape: list[LandscapeRow], strategy: str, seed: int) -> dict[str, Any]:
        spec = self.spec
        pool = self.workbench.training(self.sources["a"]).rows
        # The same examples for every strategy of a seed, so that they can be compared pair by pair.
        examples = random.Random(seed).sample(pool, spec.examples)
        batches = [
            self.workbench.collator(examples[start : start + spec.batch_size])
            for start in range(0, len(examples), spec.batch_size)
        ]
        with rich_progress(self.workbench.console) as progress:
            recovery = recover(
                model, batches, strategy=strategy, landscape=landscape, tau=spec.tau, epochs=spec.epochs,
                learning_rate=spec.learning_rate, weight_decay=spec.weight_decay, max_grad_norm=spec.max_grad_norm,
                seed=seed, progress=progress,
            )  # fmt: skip
        zeroed = list(recovery.zeroed)
        return {"zeroed": len(zeroed), "modules": zeroed, "losses": list(recovery.losses)}

    def heading(self) -> str:
        return f"Recovery of {self.names['a']} after {self.names['b']}"

    def introduction(self) -> str:
        spec, names = self.spec, self.names
        adapters = len({result["checkpoint"] for result in self.results})
        return (
            f"Recovery of {names['a']} from {spec.examples} examples ({spec.epochs} epochs in batches of "
            f"{spec.batch_size}, learning rate {spec.learning_rate:g}), starting from {adapters} adapter(s) trained on "
            f"{names['a']} and then on {names['b']}. {super().introduction()}"
        )

    def summary(self) -> str:
        sentences = []
        for strategy in _strategies(self.results):
            parts = [
                f"{name} {mean_line(_records(self.results, strategy, which))}" for which, name in self.names.items()
            ]
            sentences.append(f"{LABELS[strategy]}: {'; '.join(parts)}.")
        return " ".join(sentences)

    def closing_tables(self) -> list[Table]:
        comparison = comparison_table(self.results)
        return [result_table(self.results), *([comparison] if comparison else [])]

    def figures(self) -> Mapping[str, tuple[Drawing | None, str]]:
        initial = [checkpoint.scores for checkpoint in self.checkpoints if checkpoint.scores is not None]
        return recovery_figures(self.results, self.names, initial)


# --- what is shown ----------------------------------------------------------------------------------------------


def _of(results: Results, strategy: str) -> list[Result]:
    return [result for result in results if result["strategy"] == strategy]


def _records(results: Results, strategy: str, which: str) -> list[Result]:
    return [result["scores"][which] for result in _of(results, strategy)]


def _strategies(results: Results) -> list[str]:
    return [name for name in (BEFORE, *STRATEGIES) if _of(results, name)]


def result_table(results: Results) -> Table:
    """Accuracy and loss on both tasks, before and after recovery with every strategy.

    Args:
        results: What [`run_recovery`][dynalora.jobs.stages.recovery.run_recovery] returns.
    """
    rows: list[list[Cell]] = []
    for strategy in _strategies(results):
        of_strategy = _of(results, strategy)
        zeroed = sum(result["zeroed"] for result in of_strategy) / len(of_strategy)
        cells: list[Cell] = [LABELS[strategy], f"{zeroed:.4g} of {of_strategy[0]['matrices']}"]
        for which in ("a", "b"):
            cells += shown_scores(_records(results, strategy, which))
        rows.append([*cells, len(of_strategy)])
    return Table(
        ["", "zeroed", "accuracy A, %", "loss A", "accuracy B, %", "loss B", "runs"], rows, title="Recovery",
        note="Loss: nats per token of the right answers. In brackets 95 % intervals: Student's t over the runs "
        "(those of one checkpoint share it), or over the questions where there is one run.",
    )  # fmt: skip


def comparison_table(results: Results) -> Table | None:
    """RLGR minus the others, pair by pair: same checkpoint, seed and examples; None if there is nothing to compare."""
    runs = {(result["strategy"], result["checkpoint"], result["seed"]): result["scores"] for result in results}
    rows: list[list[Cell]] = []
    for other in STRATEGIES[1:]:
        pairs = [
            (runs["rlgr", checkpoint, seed], scores)
            for (strategy, checkpoint, seed), scores in runs.items()
            if strategy == other and ("rlgr", checkpoint, seed) in runs
        ]
        if not pairs:
            continue
        cells: list[Cell] = [f"RLGR − {LABELS[other]}"]
        for which in ("a", "b"):
            accuracies = [
                (first[which]["accuracy"], second[which]["accuracy"])
                for first, second in pairs
                if first[which]["accuracy"] is not None and second[which]["accuracy"] is not None
            ]
            difference = mean_interval([100 * (a - b) for a, b in accuracies]) if accuracies else None
            cells += [
                shown_interval(difference, 1, sign="+"),
                shown_interval(
                    mean_interval([first[which]["loss"] - second[which]["loss"] for first, second in pairs]),
                    4,
                    sign="+",
                ),
            ]
        rows.append([*cells, len(pairs)])
    if not rows:
        return None
    return Table(
        ["", "accuracy A, points", "loss A", "accuracy B, points", "loss B", "pairs"], rows, title="Differences",
        note="Paired by checkpoint and seed, which fix the examples. In brackets 95 % intervals (Student's t over the "
        "pairs; a single pair has none). Less loss is better.",
    )  # fmt: skip


def recovery_figures(
    results: Results, names: Mapping[str, str], initial: Results = ()
) -> dict[str, tuple[Drawing | None, str]]:
    """The bar charts of accuracy (DiRA Figure 3) and loss, with their captions.

    Args:
        results: What [`run_recovery`][dynalora.jobs.stages.recovery.run_recovery] returns.
        names: Names of the tasks by `a` and `b`.
        initial: Scores after Task A by `a` and `b`, one per checkpoint, to compare with.
    """
    strategies = [strategy for strategy in _strategies(results) if strategy != BEFORE]
    panels = {which: f"Task {which.upper()}: {name}" for which, name in names.items()}
    lines = {
        panel: {
            "before recovery": _records(results, BEFORE, which),
            **({"after Task A": [scores[which] for scores in initial]} if initial else {}),
        }
        for which, panel in panels.items()
    }
    accuracy, loss = score_bars(
        {
            panel: {LABELS[strategy]: _records(results, strategy, which) for strategy in strategies}
            for which, panel in panels.items()
        },
        titles=(
            f"Accuracy after recovery of {names['a']}",
            f"Loss of the right answers after recovery of {names['a']}",
        ),
        lines=lines,
        decimals=3,
    )
    return {
        "recovery_accuracy": (accuracy, "Accuracy on both tasks after recovery, with 95 % intervals."),
        "recovery_loss": (
            loss,
            "Negative log-likelihood of the right answers after recovery, with 95 % intervals; less is better.",
        ),
    }
