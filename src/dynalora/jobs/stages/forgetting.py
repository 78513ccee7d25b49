"""Forgetting in three stages: train on Task A, go on with Task B, come back to Task A (DiRA §5, Table 4, Figures 1, 2).

After every stage the adapter is kept, with its rank landscape and its scores on both tasks. A stage is written all at
once, so a run that was killed goes on with the first stage that is not there; a finished one is never run again.

Layout of the run folder, besides what every run has::

    base/result.json                  scores of the untouched model
    seed-42/initial/                  after Task A: adapter/, landscape.json, result.json
    seed-42/interference/             after Task B
    seed-42/recovered/                after Task A again
    stages.csv                        all scores, a row per seed, stage and task
"""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynalora.common.statistics import Interval, mean_interval
from dynalora.drawing.bars import plot_bars
from dynalora.drawing.landscape import plot_stages
from dynalora.forgetting.landscape import LandscapeRow, rank_landscape
from dynalora.forgetting.recovery import LOW_RANK, ablated
from dynalora.jobs.stages.settings import ForgettingSpec
from dynalora.jobs.stages.stage_files import ADAPTER, RESULT, read_landscape, stage_folder, write_landscape
from dynalora.lab.report import Cell, Report, Section, Table, listing, rich_table, save_figures, write_report
from dynalora.lab.run_folder import RunFolder
from dynalora.lab.scores import mean_accuracy, mean_loss, percent, shown_accuracy, shown_loss
from dynalora.lab.settings import defaults_of
from dynalora.lab.training.train import TrainResult
from dynalora.lab.units import as_json, read_result
from dynalora.lab.workbench import Workbench, train_settings

if TYPE_CHECKING:
    from peft import PeftModel
    from rich.console import Console

BASE = "base"
STAGES = ("initial", "interference", "recovered")
TITLES = {
    BASE: "base model",
    "initial": "Task A (initial)",
    "interference": "Task B (interference)",
    "recovered": "Task A (recovered)",
}
HALVES = ("front", "back")
TAUS = (5e-3, 1e-3, 5e-4, 1e-4)
"""Thresholds of the energy table (DiRA Table 3 has the first two)."""


def run_forgetting(spec: ForgettingSpec, *, console: Console | None = None) -> list[dict[str, Any]]:
    """Run the three stages for every seed, and write the run folder.

    Args:
        spec: What to do.
        console: Where progress and the closing tables are shown; None: nowhere.

    Returns:
        One result per seed and stage, the untouched model's first: `stage`, `seed`, and `scores` by `a` and `b`.

    Raises:
        DynaloraError: Whatever is wrong with the settings, the tasks, the run folder or the target modules, before
            the model's weights are loaded.
    """
    config = spec.config()
    RunFolder.check(spec.output, spec.settings(), resume=spec.resume, defaults=defaults_of(type(spec)))
    lab = Workbench(spec, [spec.task_a, spec.task_b], console)
    lab.check(config)
    with RunFolder.create(
        spec.output, spec.settings(), resume=spec.resume, defaults=defaults_of(type(spec))
    ) as run:
        results = _Stages(spec, lab, run).run()
        run.finish()
    if console is not None:
        console.print(rich_table(stage_table(results, spec)))
        console.print(f"Report: {run.report}", highlight=False, markup=False)
    return results


@dataclass
class _Stages:
    """One run of the experiment."""

    spec: ForgettingSpec
    lab: Workbench
    folder: RunFolder
    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def sources(self) -> dict[str, str]:
        return {"a": self.spec.task_a, "b": self.spec.task_b}

    def run(self) -> list[dict[str, Any]]:
        self._base()
        for seed in range(self.spec.seed, self.spec.seed + self.spec.seeds):
            before: Path | None = None
            for stage in STAGES:
                before = self._stage(seed, stage, before)
            self._report()
        return self.results

    def _base(self) -> None:
        done = read_result(self.folder.path / BASE / RESULT)
        if done is None:
            scores = self._scores(self.lab.model, TITLES[BASE])
            done = {"stage": BASE, "seed": None, "scores": scores}
            self._keep(BASE, done)
        self._add(done)

    def _stage(self, seed: int, stage: str, before: Path | None) -> Path:
        """Run a stage unless it is there; returns its folder."""
        place = stage_folder(self.folder.path, seed, stage)
        done = read_result(place / RESULT)
        if done is not None:
            self.lab.say(f"Seed {seed}, {TITLES[stage]}: there already.")
        else:
            done = self._train(seed, stage, before)
        self._add(done)
        return place

    def _train(self, seed: int, stage: str, before: Path | None) -> dict[str, Any]:
        spec, name = self.spec, f"seed {seed}, {TITLES[stage]}"
        began = time.perf_counter()
        source = self.sources["b" if stage == "interference" else "a"]
        # Always from the file, so that a resumed run does what an uninterrupted one does.
        start = self.spec.config() if before is None else before / ADAPTER
        how = train_settings(spec, steps=spec.stage_steps[stage])
        trained = self.lab.train(start, source, how, seed=seed, label=name)
        rows = rank_landscape(trained.model, tau=spec.tau)
        done = {
            "stage": stage,
            "seed": seed,
            "task": source,
            "scores": self._scores(trained.model, name),
            **_landscape_numbers(rows, spec.tau),
            **_cost(trained),
        }
        if spec.ablation and stage == "initial":
            done["ablation"] = self._ablation(trained.model)
        done["seconds"] = time.perf_counter() - began
        self._keep(f"seed-{seed}/{stage}", done, trained, rows)
        self.lab.take_off(trained.model)
        return done

    def _scores(self, model: Any, name: str) -> dict[str, Any]:
        found = self.lab.measure(model, name)
        return {which: found[source].record() for which, source in self.sources.items()}

    def _ablation(self, model: PeftModel) -> dict[str, Any]:
        found = {}
        for half in HALVES:
            with ablated(model, half):
                found[half] = self._scores(model, f"without the {half}")
        return found

    def _keep(
        self,
        name: str,
        done: Mapping[str, Any],
        trained: TrainResult | None = None,
        rows: Sequence[LandscapeRow] = (),
    ) -> None:
        """Write a stage, all of it or nothing; its result is what says that it is done."""
        with self.folder.replacing(name) as place:
            if trained is not None:
                trained.model.save_pretrained(str(place / ADAPTER))
                self.lab.tokenizer.save_pretrained(str(place / ADAPTER))
                write_landscape(place, rows)
            (place / RESULT).write_text(as_json(done), encoding="utf-8")
        for record in trained.records if trained is not None else ():
            self.folder.log({**record, "seed": done["seed"], "stage": done["stage"]})
        self.folder.log({**done, "run": name})
        self.lab.say(_line(done, self.lab, self.sources))

    def _add(self, done: dict[str, Any]) -> None:
        self.results.append(done)
        self.folder.write("stages.csv", _csv(self.results))

    def _report(self) -> None:
        """Tables, plots and the page, from what there is so far."""
        spec, tasks = self.spec, {which: self.lab.tasks[source] for which, source in self.sources.items()}
        seeds = sorted({done["seed"] for done in self.results if done["seed"] is not None})
        landscapes = {
            TITLES[stage]: [read_landscape(stage_folder(self.folder.path, seed, stage)) for seed in seeds]
            for stage in STAGES
        }
        method = spec.method.lower()
        of = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
        made = {
            "rank_landscape": (
                plot_stages(
                    landscapes,
                    "effective_rank",
                    label="effective rank",
                    title=f"Rank landscape of {method} over the stages (τ = {spec.tau:g}, {of})",
                ),
                f"Singular values of s·ΔW above {spec.tau:g}, by layer; lines are means over the seeds.",
            ),
            "nuclear_norm": (
                plot_stages(
                    landscapes,
                    "nuclear_norm",
                    label="nuclear norm",
                    title=f"Nuclear norm of {method}'s updates over the stages ({of})",
                ),
                "Sum of the singular values of s·ΔW, by layer; lines are means over the seeds.",
            ),
            **_score_figures(self.results, {which: task.name for which, task in tasks.items()}, method),
        }
        pictures = save_figures(self.folder.write, made)
        tables = [stage_table(self.results, spec), landscape_table(self.results), energy_table(landscapes)]
        if ablation := ablation_table(self.results):
            tables.append(ablation)
        about = " ".join(f"{task.about}." for task in tasks.values())
        sections = [
            Section("Result", text=about, tables=tables),
            Section("Plots", figures=pictures),
            Section("Settings", listing=listing(spec.settings())),
        ]
        names = " → ".join(tasks[which].name for which in ("a", "b", "a"))
        title = f"Forgetting with {method}: {names}"
        write_report(Report(title, _summary(self.results, tasks["a"].name), sections), self.folder.report)


def _landscape_numbers(rows: Sequence[LandscapeRow], tau: float) -> dict[str, Any]:
    squares = [[value * value for value in row.singular_values] for row in rows]
    total = math.fsum(math.fsum(own) for own in squares)
    kept = math.fsum(value * value for row in rows for value in row.singular_values if value > tau)
    return {
        "matrices": len(rows),
        "mean_effective_rank": sum(row.effective_rank for row in rows) / len(rows),
        "low_rank_matrices": sum(row.effective_rank <= LOW_RANK for row in rows),
        "nuclear_norm": math.fsum(row.nuclear_norm for row in rows),
        "energy": kept / total if total else 0.0,
    }


def _cost(trained: TrainResult) -> dict[str, Any]:
    losses = [record["loss"] for record in trained.records if "loss" in record]
    return {
        "steps": trained.steps,
        "train_loss_first": losses[0] if losses else None,
        "train_loss_last": losses[-1] if losses else None,
        "trainable_parameters": trained.trainable_parameters,
        "step_seconds": trained.step_seconds,
    }


def _line(done: Mapping[str, Any], lab: Workbench, sources: Mapping[str, str]) -> str:
    name = TITLES[done["stage"]] + (f", seed {done['seed']}" if done["seed"] is not None else "")
    told = []
    for which, source in sources.items():
        score = done["scores"][which]
        right = "–" if score["accuracy"] is None else f"{100 * score['accuracy']:.1f} %"
        told.append(f"{lab.tasks[source].name} {right}, loss {score['loss']:.3f}")
    return f"{name}: {'; '.join(told)}"


def _of_stage(results: Sequence[Mapping[str, Any]], stage: str) -> list[Mapping[str, Any]]:
    return [done for done in results if done["stage"] == stage]


def _stages_in(results: Sequence[Mapping[str, Any]]) -> list[str]:
    return [stage for stage in (BASE, *STAGES) if _of_stage(results, stage)]


def _records(results: Sequence[Mapping[str, Any]], stage: str, which: str) -> list[Mapping[str, Any]]:
    return [done["scores"][which] for done in _of_stage(results, stage)]


# --- what is shown ----------------------------------------------------------------------------------------------


def stage_table(results: Sequence[Mapping[str, Any]], spec: ForgettingSpec) -> Table:
    """Accuracy and loss on both tasks after every stage (DiRA Table 4).

    Args:
        results: What [`run_forgetting`][dynalora.jobs.stages.forgetting.run_forgetting] returns.
        spec: What was asked for.
    """
    rows: list[list[Cell]] = []
    for stage in _stages_in(results):
        cells: list[Cell] = [TITLES[stage]]
        for which in ("a", "b"):
            records = _records(results, stage, which)
            cells += [shown_accuracy(mean_accuracy(records)), shown_loss(mean_loss(records))]
        rows.append(cells)
    count = len(_of_stage(results, STAGES[0]))
    over = (
        f"over {count} seeds, Student's t" if count > 1 else "over the questions, as there is a single seed"
    )
    return Table(
        ["after", "accuracy A, %", "loss A", "accuracy B, %", "loss B"], rows,
        title=f"{spec.method.lower()}: A = {_name(spec.task_a)}, B = {_name(spec.task_b)}",
        note=f"Loss: nats per token of the right answers. In brackets 95 % intervals {over}; the base model's are over "
        "the questions.",
    )  # fmt: skip


def _name(source: str) -> str:
    return source if ":" in source else Path(source).name


def landscape_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """What the landscape came to in every stage: means over the seeds."""
    rows: list[list[Cell]] = []
    for stage in STAGES:
        found = _of_stage(results, stage)
        if found:
            mean = {
                name: sum(done[name] for done in found) / len(found)
                for name in ("mean_effective_rank", "low_rank_matrices", "nuclear_norm", "energy")
            }
            rows.append([TITLES[stage], found[0]["matrices"], *(f"{value:.4g}" for value in mean.values())])
    return Table(
        ["after", "matrices", "effective rank", "of them 0 or 1", "nuclear norm", "energy"], rows,
        title="Rank landscape",
        note="Effective rank: mean over the matrices; of them 0 or 1: number of matrices; nuclear norm: sum over the "
        "matrices; energy: share of all squared singular values above τ. Means over the seeds.",
    )  # fmt: skip


def energy_table(landscapes: Mapping[str, Sequence[Sequence[LandscapeRow]]]) -> Table:
    """Spectral energy above several thresholds, in percent (DiRA Table 3)."""
    rows: list[list[Cell]] = []
    for tau in TAUS:
        cells: list[Cell] = [f"{tau:g}"]
        for found in landscapes.values():
            shares = [_landscape_numbers(rows_, tau)["energy"] for rows_ in found]
            cells.append(f"{100 * sum(shares) / len(shares):.2f}")
        rows.append(cells)
    return Table(["τ", *landscapes], rows, title="Spectral energy above τ, %", note="All matrices together.")


def ablation_table(results: Sequence[Mapping[str, Any]]) -> Table | None:
    """Scores after Task A without the updates of half of the layers (DiRA Table 7); None if not measured."""
    found = [done for done in _of_stage(results, "initial") if "ablation" in done]
    if not found:
        return None
    rows: list[list[Cell]] = []
    variants = {"all layers": [done["scores"] for done in found]} | {
        f"without the {half} half": [done["ablation"][half] for done in found] for half in HALVES
    }
    for name, scores in variants.items():
        cells: list[Cell] = [name]
        for which in ("a", "b"):
            records = [score[which] for score in scores]
            cells += [shown_accuracy(mean_accuracy(records)), shown_loss(mean_loss(records))]
        rows.append(cells)
    return Table(
        ["updates after Task A", "accuracy A, %", "loss A", "accuracy B, %", "loss B"], rows, title="Ablation",
        note="The front half are the layers next to the input.",
    )  # fmt: skip


def _score_figures(
    results: Sequence[Mapping[str, Any]], names: Mapping[str, str], method: str
) -> dict[str, tuple[Any, str]]:
    stages = _stages_in(results)
    accuracy: dict[str, dict[str, Interval | None]] = {}
    loss: dict[str, dict[str, Interval | None]] = {}
    for which, name in names.items():
        task = f"Task {which.upper()}: {name}"
        found = {stage: mean_accuracy(_records(results, stage, which)) for stage in stages}
        accuracy[task] = {_two_lines(TITLES[stage]): percent(found[stage]) for stage in stages}
        loss[task] = {
            _two_lines(TITLES[stage]): mean_loss(_records(results, stage, which)) for stage in stages
        }
    drawn = None
    if any(number is not None for panel in accuracy.values() for number in panel.values()):
        drawn = plot_bars(accuracy, label="accuracy, %", title=f"Accuracy after each stage ({method})")
    return {
        "accuracy": (drawn, "Accuracy on both tasks after each stage, with 95 % intervals."),
        "loss": (
            plot_bars(
                loss,
                label="loss, nats per token",
                title=f"Loss of the right answers after each stage ({method})",
                decimals=2,
            ),
            "Negative log-likelihood of the right answers after each stage, with 95 % intervals; less is better.",
        ),
    }


def _two_lines(title: str) -> str:
    return title.replace(" (", "\n(").replace("base ", "base\n")


def _summary(results: Sequence[Mapping[str, Any]], task: str) -> str:
    told = []
    for stage in STAGES:
        loss = mean_interval([record["loss"] for record in _records(results, stage, "a")]).value
        right = mean_accuracy(_records(results, stage, "a"))
        share = "" if right is None else f"{100 * right.value:.1f} % right, "
        told.append(f"{share}loss {loss:.3f} after {TITLES[stage]}")
    return f"{task}: {'; '.join(told)}."


def _csv(results: Sequence[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    extra = ["mean_effective_rank", "low_rank_matrices", "nuclear_norm", "energy", "steps"]
    names = ["accuracy", "accuracy_low", "accuracy_high", "loss", "loss_error", "questions"]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["seed", "stage", "task", *names, *extra])
    for done in results:
        for which, score in done["scores"].items():
            numbers = [score[name] for name in names] + [done.get(name) for name in extra]
            writer.writerow([done["seed"], done["stage"], which, *numbers])
    return buffer.getvalue()
