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

import csv
import io
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynalora.common.progress import rich_progress
from dynalora.common.statistics import Interval, mean_interval
from dynalora.drawing.bars import plot_bars
from dynalora.errors import CheckpointError, ConfigError
from dynalora.forgetting.landscape import LandscapeRow, rank_landscape
from dynalora.forgetting.recovery import STRATEGIES, low_rank_modules, recover
from dynalora.jobs.stages.settings import RecoverSpec
from dynalora.jobs.stages.stage_files import ADAPTER, RESULT, read_landscape, stage_folder
from dynalora.lab.adapters import adapter_folder, read_config
from dynalora.lab.lab_settings import LabSettings
from dynalora.lab.report import Cell, Report, Section, Table, listing, rich_table, save_figures, write_report
from dynalora.lab.run_folder import CONFIG, RunFolder
from dynalora.lab.scores import mean_accuracy, mean_loss, percent, shown_accuracy, shown_loss
from dynalora.lab.settings import defaults_of, read_yaml, settings_from
from dynalora.lab.units import as_json, read_result
from dynalora.lab.workbench import Workbench

if TYPE_CHECKING:
    from rich.console import Console

BEFORE = "before"
LABELS = {BEFORE: "before recovery", "rlgr": "RLGR", "random": "random", "naive": "naive"}

_INHERITED = tuple(LabSettings.__dataclass_fields__)


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
    if (folder / CONFIG).exists() and "task_a" in (told := read_yaml(folder / CONFIG)):
        missing = [name for name in ("task_a", "task_b", *_INHERITED) if getattr(spec, name) is None]
        inherited: dict[str, Any] = {name: told.get(name) for name in missing}
        spec = replace(spec, **inherited)
        seeds = sorted(
            int(found[1])
            for entry in folder.iterdir()
            if (found := re.fullmatch(r"seed-(\d+)", entry.name))
            and (stage_folder(folder, int(found[1]), "interference") / RESULT).exists()
        )[: spec.checkpoints]
        if not seeds:
            raise CheckpointError(f"No seed in '{folder}' has finished Task B; resume that run first.")
        found_all = []
        for seed in seeds:
            first = stage_folder(folder, seed, "initial")
            done = read_result(first / RESULT)
            found_all.append(
                Checkpoint(
                    f"seed-{seed}",
                    stage_folder(folder, seed, "interference") / ADAPTER,
                    first / ADAPTER,
                    read_landscape(first),
                    # Other questions would make another number.
                    done["scores"] if done and _same_questions(spec, told) else None,
                )
            )
        return spec, found_all
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
        named = read_config(spec.source).base_model_name_or_path
        if not named:
            raise ConfigError(
                f"The adapter '{spec.source}' does not say which base model it belongs to; name it."
            )
        spec = replace(spec, model=named)
    return spec, [Checkpoint("adapter", adapter, initial)]


def _same_questions(spec: RecoverSpec, told: Mapping[str, Any]) -> bool:
    names = (
        "task_a", "task_b", "model", "data", "held_out", "generated", "generated_tokens", "system", "template",
        "by_generation", "data_seed",
    )  # fmt: skip
    return all(getattr(spec, name) == told.get(name) for name in names)


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
    spec, checkpoints = resolve(spec)
    RunFolder.check(spec.output, spec.settings(), resume=spec.resume, defaults=defaults_of(type(spec)))
    known = {name: getattr(spec, name) for name in _INHERITED if getattr(spec, name) is not None}
    how = settings_from(LabSettings, known, source="the settings")
    how._check_lab()
    assert spec.task_a is not None  # resolved
    assert spec.task_b is not None
    lab = Workbench(how, [spec.task_a, spec.task_b], console)
    if len(pool := lab.training(spec.task_a)) < spec.examples:
        raise ConfigError(
            f"examples is {spec.examples}, and {spec.task_a} has {len(pool)} training questions of at most "
            f"{how.max_length} tokens; ask for fewer, or raise max_length."
        )
    with RunFolder.create(
        spec.output, spec.settings(), resume=spec.resume, defaults=defaults_of(type(spec))
    ) as run:
        recoveries = _Recoveries(spec, lab, run, checkpoints)
        results = recoveries.run()
        run.finish()
    if console is not None:
        for table in (result_table(results), comparison_table(results)):
            if table is not None:
                console.print(rich_table(table))
        console.print(f"Report: {run.report}", highlight=False, markup=False)
    return results


@dataclass
class _Recoveries:
    """One run of the experiment."""

    spec: RecoverSpec
    lab: Workbench
    folder: RunFolder
    checkpoints: Sequence[Checkpoint]
    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def sources(self) -> dict[str, str]:
        return {"a": str(self.spec.task_a), "b": str(self.spec.task_b)}

    def run(self) -> list[dict[str, Any]]:
        for checkpoint in self.checkpoints:
            landscape = checkpoint.landscape or self._landscape(checkpoint)
            low = len(low_rank_modules(landscape, tau=self.spec.tau))
            self.lab.say(
                f"{checkpoint.name}: {low} of {len(landscape)} matrices have effective rank 0 or 1 after Task A."
            )
            if low in (0, len(landscape)):
                self.lab.say(
                    f"{checkpoint.name}: rlgr and random zero the same {'none' if low == 0 else 'all'} of them; choose "
                    "another tau to tell them apart."
                )
            self._unit(checkpoint, landscape, BEFORE, None)
            for seed in self.spec.run_seeds:
                for strategy in self.spec.strategies:
                    self._unit(checkpoint, landscape, strategy, seed)
            self._report()
        return self.results

    def _landscape(self, checkpoint: Checkpoint) -> list[LandscapeRow]:
        model = self.lab.attach(checkpoint.initial)
        rows = rank_landscape(model)
        self.lab.take_off(model)
        return rows

    def _unit(
        self, checkpoint: Checkpoint, landscape: list[LandscapeRow], strategy: str, seed: int | None
    ) -> None:
        """One recovery, unless it is there."""
        name = strategy if seed is None else f"{strategy}-{seed}"
        file = f"results/{checkpoint.name}/{name}.json"
        done = read_result(self.folder.path / file)
        if done is None:
            began = time.perf_counter()
            model = self.lab.attach(checkpoint.adapter)
            told: dict[str, Any] = {"zeroed": 0, "modules": [], "losses": []}
            if seed is not None:
                told = self._recover(model, landscape, strategy, seed)
            found = self.lab.measure(model, f"{checkpoint.name}, {name}")
            self.lab.take_off(model)
            done = {
                "checkpoint": checkpoint.name,
                "strategy": strategy,
                "seed": seed,
                "matrices": len(landscape),
                "scores": {which: found[source].record() for which, source in self.sources.items()},
                **told,
                "seconds": time.perf_counter() - began,
            }
            self.folder.write(file, as_json(done))
            self.folder.log({**done, "run": f"{checkpoint.name}/{name}"})
            self._tell(done)
        self.results.append(done)
        self.folder.write("recovery.csv", _csv(self.results))

    def _recover(self, model: Any, landscape: list[LandscapeRow], strategy: str, seed: int) -> dict[str, Any]:
        spec = self.spec
        pool = self.lab.training(self.sources["a"]).rows
        # The same examples for every strategy of a seed, so that they can be compared pair by pair.
        chosen = random.Random(seed).sample(pool, spec.examples)
        batches = [
            self.lab.collator(chosen[start : start + spec.batch_size])
            for start in range(0, len(chosen), spec.batch_size)
        ]
        with rich_progress(self.lab.console) as progress:
            found = recover(
                model, batches, strategy=strategy, landscape=landscape, tau=spec.tau, epochs=spec.epochs,
                learning_rate=spec.learning_rate, weight_decay=spec.weight_decay, max_grad_norm=spec.max_grad_norm,
                seed=seed, progress=progress,
            )  # fmt: skip
        return {"zeroed": len(found.zeroed), "modules": list(found.zeroed), "losses": list(found.losses)}

    def _tell(self, done: Mapping[str, Any]) -> None:
        told = []
        for which, source in self.sources.items():
            score = done["scores"][which]
            right = "–" if score["accuracy"] is None else f"{100 * score['accuracy']:.1f} %"
            told.append(f"{self.lab.tasks[source].name} {right}, loss {score['loss']:.3f}")
        name = LABELS[done["strategy"]] + (f", seed {done['seed']}" if done["seed"] is not None else "")
        zeroed = f" ({done['zeroed']} matrices zeroed)" if done["zeroed"] else ""
        self.lab.say(f"{done['checkpoint']}, {name}{zeroed}: {'; '.join(told)}")

    def _report(self) -> None:
        names = {which: self.lab.tasks[source].name for which, source in self.sources.items()}
        initial = [checkpoint.scores for checkpoint in self.checkpoints if checkpoint.scores is not None]
        pictures = save_figures(self.folder.write, recovery_figures(self.results, names, initial))
        tables = [result_table(self.results)]
        if (compared := comparison_table(self.results)) is not None:
            tables.append(compared)
        spec = self.spec
        about = (
            f"Recovery of {names['a']} from {spec.examples} examples ({spec.epochs} epochs in batches of "
            f"{spec.batch_size}, learning rate {spec.learning_rate:g}), starting from "
            f"{len({done['checkpoint'] for done in self.results})} adapter(s) trained on {names['a']} and then on "
            f"{names['b']}. "
            + " ".join(f"{self.lab.tasks[source].about}." for source in self.sources.values())
        )
        sections = [
            Section("Result", text=about, tables=tables),
            Section("Plots", figures=pictures),
            Section("Settings", listing=listing(spec.settings())),
        ]
        title = f"Recovery of {names['a']} after {names['b']}"
        write_report(Report(title, _summary(self.results, names), sections), self.folder.report)


# --- what is shown ----------------------------------------------------------------------------------------------


def _of(results: Sequence[Mapping[str, Any]], strategy: str) -> list[Mapping[str, Any]]:
    return [done for done in results if done["strategy"] == strategy]


def _strategies(results: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in (BEFORE, *STRATEGIES) if _of(results, name)]


def result_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Accuracy and loss on both tasks, before and after recovery with every strategy.

    Args:
        results: What [`run_recovery`][dynalora.jobs.stages.recovery.run_recovery] returns.
    """
    rows: list[list[Cell]] = []
    for strategy in _strategies(results):
        found = _of(results, strategy)
        zeroed = sum(done["zeroed"] for done in found) / len(found)
        cells: list[Cell] = [LABELS[strategy], f"{zeroed:.4g} of {found[0]['matrices']}"]
        for which in ("a", "b"):
            records = [done["scores"][which] for done in found]
            cells += [shown_accuracy(mean_accuracy(records)), shown_loss(mean_loss(records))]
        rows.append([*cells, len(found)])
    return Table(
        ["", "zeroed", "accuracy A, %", "loss A", "accuracy B, %", "loss B", "runs"], rows, title="Recovery",
        note="Loss: nats per token of the right answers. In brackets 95 % intervals: Student's t over the runs "
        "(those of one checkpoint share it), or over the questions where there is one run.",
    )  # fmt: skip


def comparison_table(results: Sequence[Mapping[str, Any]]) -> Table | None:
    """RLGR minus the others, pair by pair: same checkpoint, seed and examples; None if there is nothing to compare."""
    runs = {(done["strategy"], done["checkpoint"], done["seed"]): done["scores"] for done in results}
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
                _signed(difference, 1),
                _signed(
                    mean_interval([first[which]["loss"] - second[which]["loss"] for first, second in pairs]),
                    4,
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


def _signed(interval: Interval | None, decimals: int) -> str | None:
    if interval is None:
        return None
    value, low, high = (f"{x:+.{decimals}f}" for x in (interval.value, interval.low, interval.high))
    return value if interval.low == interval.high else f"{value} ({low} to {high})"


def recovery_figures(
    results: Sequence[Mapping[str, Any]],
    names: Mapping[str, str],
    initial: Sequence[Mapping[str, Any]] = (),
) -> dict[str, tuple[Any, str]]:
    """The bar charts of accuracy (DiRA Figure 3) and loss, with their captions.

    Args:
        results: What [`run_recovery`][dynalora.jobs.stages.recovery.run_recovery] returns.
        names: Names of the tasks by `a` and `b`.
        initial: Scores after Task A by `a` and `b`, one per checkpoint, to compare with.
    """
    accuracy: dict[str, dict[str, Interval | None]] = {}
    loss: dict[str, dict[str, Interval | None]] = {}
    accuracy_lines: dict[str, dict[str, float | None]] = {}
    loss_lines: dict[str, dict[str, float | None]] = {}
    shown = [strategy for strategy in _strategies(results) if strategy != BEFORE]
    for which, name in names.items():
        task = f"Task {which.upper()}: {name}"
        records = {s: [done["scores"][which] for done in _of(results, s)] for s in (BEFORE, *shown)}
        accuracy[task] = {LABELS[s]: percent(mean_accuracy(records[s])) for s in shown}
        loss[task] = {LABELS[s]: mean_loss(records[s]) for s in shown}
        heights = {"before recovery": records[BEFORE]}
        if initial:
            heights["after Task A"] = [score[which] for score in initial]
        shares = {line: percent(mean_accuracy(found)) for line, found in heights.items()}
        accuracy_lines[task] = {line: share.value if share else None for line, share in shares.items()}
        loss_lines[task] = {line: mean_loss(found).value for line, found in heights.items()}
    figures: dict[str, tuple[Any, str]] = {}
    if any(number is not None for panel in accuracy.values() for number in panel.values()):
        figures["recovery_accuracy"] = (
            plot_bars(
                accuracy, label="accuracy, %", title=f"Accuracy after recovery of {names['a']}", lines=accuracy_lines
            ),
            "Accuracy on both tasks after recovery, with 95 % intervals.",
        )  # fmt: skip
    figures["recovery_loss"] = (
        plot_bars(
            loss,
            label="loss, nats per token",
            title=f"Loss of the right answers after recovery of {names['a']}",
            lines=loss_lines,
            decimals=3,
        ),
        "Negative log-likelihood of the right answers after recovery, with 95 % intervals; less is better.",
    )
    return figures


def _summary(results: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    told = []
    for strategy in _strategies(results):
        parts = []
        for which in ("a", "b"):
            records = [done["scores"][which] for done in _of(results, strategy)]
            right = mean_accuracy(records)
            share = "" if right is None else f"{100 * right.value:.1f} % right, "
            parts.append(f"{names[which]} {share}loss {mean_loss(records).value:.3f}")
        told.append(f"{LABELS[strategy]}: {'; '.join(parts)}")
    return ". ".join(told) + "."


def _csv(results: Sequence[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    names = ["accuracy", "accuracy_low", "accuracy_high", "loss", "loss_error", "questions"]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["checkpoint", "strategy", "seed", "zeroed", "matrices", "task", *names])
    for done in results:
        about = [done[name] for name in ("checkpoint", "strategy", "seed", "zeroed", "matrices")]
        for which, score in done["scores"].items():
            writer.writerow([*about, which, *(score[name] for name in names)])
    return buffer.getvalue()
