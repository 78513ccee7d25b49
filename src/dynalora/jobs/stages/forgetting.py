"""Forgetting in three stages: train on Task A, go on with Task B, come back to Task A (DiRA §5, Table 4, Figures 1, 2).

After every stage the adapter is saved, with its rank landscape and its scores on both tasks. The scores are written
last, so a run that was killed goes on with the first stage that has none; a finished one is never run again.

Layout of the run folder, besides what every run has::

    base/result.json                  scores of the untouched model
    seed-42/initial/                  after Task A: adapter/, landscape.json, result.json
    seed-42/interference/             after Task B
    seed-42/recovered/                after Task A again
    stages.csv                        all scores, a row per seed, stage and task
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dynalora.drawing.landscape import plot_stages
from dynalora.forgetting.landscape import LandscapeRow, rank_landscape
from dynalora.forgetting.recovery import LOW_RANK, ablated
from dynalora.jobs.stages.experiment import Experiment, Result, Results, run_experiment, score_bars
from dynalora.jobs.stages.settings import ForgettingSpec
from dynalora.jobs.stages.stage_files import ADAPTER, RESULT, read_landscape, stage_folder, write_landscape
from dynalora.lab.report import Cell, Table
from dynalora.lab.run_folder import RunFolder
from dynalora.lab.scores import mean_line, shown_scores
from dynalora.lab.training.settings import train_settings
from dynalora.lab.training.train import TrainResult
from dynalora.lab.units import UnitStore
from dynalora.lab.workbench import Workbench

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing
    from peft import PeftModel
    from rich.console import Console

BASE = "base"
STAGES = ("initial", "interference", "recovered")
"""The stages of a run in order: after Task A, after Task B, and after Task A again."""
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

    def prepare() -> Workbench:
        workbench = Workbench(spec, [spec.task_a, spec.task_b], console, validation=spec.validation)
        workbench.check(config)
        return workbench

    return run_experiment(spec, prepare, lambda workbench, folder: _Forgetting(spec, workbench, folder), console)


@dataclass(frozen=True)
class Stage:
    """One stage of one run.

    Attributes:
        stage: `base` or one of [`STAGES`][dynalora.jobs.stages.forgetting.STAGES].
        seed: Of the run; None for the base model.
    """

    stage: str
    seed: int | None = None

    @property
    def name(self) -> str:
        """Its folder in the run folder."""
        return self.stage if self.seed is None else str(stage_folder(Path(), self.seed, self.stage))


class _Forgetting(Experiment[Stage]):
    """One run of the experiment."""

    table_file = "stages.csv"
    columns: ClassVar[Mapping[str, str]] = {"seed": "seed", "stage": "stage"}
    more_columns = ("mean_effective_rank", "low_rank_matrices", "nuclear_norm", "energy", "steps")

    def __init__(self, spec: ForgettingSpec, workbench: Workbench, folder: RunFolder) -> None:
        sources = {"a": spec.task_a, "b": spec.task_b}
        store: UnitStore[Stage] = UnitStore(folder.path, ending=f"/{RESULT}")
        super().__init__(spec, workbench, folder, sources, store)
        self.spec = spec

    def run(self) -> None:
        self.complete(Stage(BASE))
        for seed in range(self.spec.seed, self.spec.seed + self.spec.seeds):
            for stage in STAGES:
                self.complete(Stage(stage, seed))
            self.report()

    def title(self, result: Result) -> str:
        return TITLES[result["stage"]] + ("" if result["seed"] is None else f", seed {result['seed']}")

    def work(self, unit: Stage) -> dict[str, Any]:
        result = {"stage": unit.stage, "seed": unit.seed}
        if unit.seed is None:
            return {**result, "scores": self.scores(self.workbench.model, TITLES[BASE])}
        return {**result, **self._train(unit.stage, unit.seed)}

    def _train(self, stage: str, seed: int) -> dict[str, Any]:
        spec, name, place = self.spec, f"seed {seed}, {TITLES[stage]}", f"seed-{seed}/{stage}"
        source = self.sources["b" if stage == "interference" else "a"]
        before = STAGES[: STAGES.index(stage)]
        # Always from the file, so that a resumed run does what an uninterrupted one does.
        start = stage_folder(self.folder.path, seed, before[-1]) / ADAPTER if before else spec.config()
        how = train_settings(spec, steps=spec.stage_steps[stage])
        trained = self.workbench.train(start, source, how, seed=seed, label=name, choice=spec)
        rows = rank_landscape(trained.model, tau=spec.tau)
        result = {
            "task": source,
            "scores": self.scores(trained.model, name),
            **_landscape_numbers(rows, spec.tau),
            **_cost(trained),
        }
        if spec.ablation and not before:
            result["ablation"] = self._ablation(trained.model)
        with self.folder.replacing(f"{place}/{ADAPTER}") as adapter:
            trained.model.save_pretrained(str(adapter))
            self.workbench.tokenizer.save_pretrained(str(adapter))
        write_landscape(self.folder.path / place, rows)
        for record in trained.records:
            self.folder.log({**record, "seed": seed, "stage": stage})
        self.workbench.take_off(trained.model)
        return result

    def _ablation(self, model: PeftModel) -> dict[str, Any]:
        scores = {}
        for half in HALVES:
            with ablated(model, half):
                scores[half] = self.scores(model, f"without the {half}")
        return scores

    def heading(self) -> str:
        names = " → ".join(self.names[which] for which in ("a", "b", "a"))
        return f"Forgetting with {self.spec.method.lower()}: {names}"

    def summary(self) -> str:
        first, then, again = (mean_line(_records(self.results, stage, "a")) for stage in STAGES)
        a, b = self.names["a"], self.names["b"]
        return f"{a} once it was learned: {first}. After learning {b}: {then}. After learning {a} again: {again}."

    def closing_tables(self) -> list[Table]:
        return [stage_table(self.results, self.spec)]

    def tables(self) -> list[Table]:
        ablation = ablation_table(self.results)
        return [
            *self.closing_tables(),
            landscape_table(self.results),
            energy_table(self._landscapes()),
            *([ablation] if ablation else []),
        ]

    def _landscapes(self) -> dict[str, list[list[LandscapeRow]]]:
        """Landscapes by the stage's title, one per seed."""
        seeds = sorted({result["seed"] for result in self.results if result["seed"] is not None})
        return {
            TITLES[stage]: [read_landscape(stage_folder(self.folder.path, seed, stage)) for seed in seeds]
            for stage in STAGES
        }

    def figures(self) -> Mapping[str, tuple[Drawing | None, str]]:
        method, landscapes = self.spec.method.lower(), self._landscapes()
        count = len(landscapes[TITLES[STAGES[0]]])
        seeds = f"{count} seed{'s' if count > 1 else ''}"
        accuracy, loss = score_bars(
            {
                f"Task {which.upper()}: {name}": {
                    _two_lines(TITLES[stage]): _records(self.results, stage, which)
                    for stage in _stages_in(self.results)
                }
                for which, name in self.names.items()
            },
            titles=(f"Accuracy after each stage ({method})", f"Loss of the right answers after each stage ({method})"),
        )
        return {
            "rank_landscape": (
                plot_stages(
                    landscapes, "effective_rank", label="effective rank",
                    title=f"Rank landscape of {method} over the stages (τ = {self.spec.tau:g}, {seeds})",
                ),
                f"Singular values of s·ΔW above {self.spec.tau:g}, by layer; lines are means over the seeds.",
            ),
            "nuclear_norm": (
                plot_stages(
                    landscapes, "nuclear_norm", label="nuclear norm",
                    title=f"Nuclear norm of {method}'s updates over the stages ({seeds})",
                ),
                "Sum of the singular values of s·ΔW, by layer; lines are means over the seeds.",
            ),
            "accuracy": (accuracy, "Accuracy on both tasks after each stage, with 95 % intervals."),
            "loss": (
                loss,
                "Negative log-likelihood of the right answers after each stage, with 95 % intervals; less is better.",
            ),
        }  # fmt: skip


def _landscape_numbers(rows: Sequence[LandscapeRow], tau: float) -> dict[str, Any]:
    squares = [[value * value for value in row.singular_values] for row in rows]
    total = math.fsum(math.fsum(values) for values in squares)
    above = math.fsum(value * value for row in rows for value in row.singular_values if value > tau)
    return {
        "matrices": len(rows),
        "mean_effective_rank": sum(row.effective_rank for row in rows) / len(rows),
        "low_rank_matrices": sum(row.effective_rank <= LOW_RANK for row in rows),
        "nuclear_norm": math.fsum(row.nuclear_norm for row in rows),
        "energy": above / total if total else 0.0,
    }


def _cost(trained: TrainResult) -> dict[str, Any]:
    losses = [record["loss"] for record in trained.records if "loss" in record]
    return {
        "steps": trained.steps,
        "train_loss_first": losses[0] if losses else None,
        "train_loss_last": losses[-1] if losses else None,
        "trainable_parameters": trained.trainable_parameters,
        "step_seconds": trained.step_seconds,
        **({} if trained.best_step is None else {"best_step": trained.best_step}),
    }


def _of_stage(results: Results, stage: str) -> list[Result]:
    return [result for result in results if result["stage"] == stage]


def _stages_in(results: Results) -> list[str]:
    return [stage for stage in (BASE, *STAGES) if _of_stage(results, stage)]


def _records(results: Results, stage: str, which: str) -> list[Result]:
    return [result["scores"][which] for result in _of_stage(results, stage)]


# --- what is shown ----------------------------------------------------------------------------------------------


def stage_table(results: Results, spec: ForgettingSpec) -> Table:
    """Accuracy and loss on both tasks after every stage (DiRA Table 4).

    Args:
        results: What [`run_forgetting`][dynalora.jobs.stages.forgetting.run_forgetting] returns.
        spec: What was asked for.
    """
    rows: list[list[Cell]] = []
    for stage in _stages_in(results):
        cells: list[Cell] = [TITLES[stage]]
        for which in ("a", "b"):
            cells += shown_scores(_records(results, stage, which))
        rows.append(cells)
    count = len(_of_stage(results, STAGES[0]))
    over = f"over {count} seeds, Student's t" if count > 1 else "over the questions, as there is a single seed"
    return Table(
        ["after", "accuracy A, %", "loss A", "accuracy B, %", "loss B"], rows,
        title=f"{spec.method.lower()}: A = {_name(spec.task_a)}, B = {_name(spec.task_b)}",
        note=f"Loss: nats per token of the right answers. In brackets 95 % intervals {over}; the base model's are over "
        "the questions.",
    )  # fmt: skip


def _name(source: str) -> str:
    return source if ":" in source else Path(source).name


def landscape_table(results: Results) -> Table:
    """What the landscape came to in every stage: means over the seeds."""
    rows: list[list[Cell]] = []
    for stage in STAGES:
        of_stage = _of_stage(results, stage)
        if of_stage:
            mean = {
                name: sum(result[name] for result in of_stage) / len(of_stage)
                for name in ("mean_effective_rank", "low_rank_matrices", "nuclear_norm", "energy")
            }
            rows.append([TITLES[stage], of_stage[0]["matrices"], *(f"{value:.4g}" for value in mean.values())])
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
        for of_stage in landscapes.values():
            shares = [_landscape_numbers(landscape, tau)["energy"] for landscape in of_stage]
            cells.append(f"{100 * sum(shares) / len(shares):.2f}")
        rows.append(cells)
    return Table(["τ", *landscapes], rows, title="Spectral energy above τ, %", note="All matrices together.")


def ablation_table(results: Results) -> Table | None:
    """Scores after Task A without the updates of half of the layers (DiRA Table 7); None if not measured."""
    measured = [result for result in _of_stage(results, "initial") if "ablation" in result]
    if not measured:
        return None
    rows: list[list[Cell]] = []
    variants = {"all layers": [result["scores"] for result in measured]} | {
        f"without the {half} half": [result["ablation"][half] for result in measured] for half in HALVES
    }
    for name, scores in variants.items():
        cells: list[Cell] = [name]
        for which in ("a", "b"):
            cells += shown_scores([score[which] for score in scores])
        rows.append(cells)
    return Table(
        ["updates after Task A", "accuracy A, %", "loss A", "accuracy B, %", "loss B"], rows, title="Ablation",
        note="The front half are the layers next to the input.",
    )  # fmt: skip


def _two_lines(title: str) -> str:
    return title.replace(" (", "\n(").replace("base ", "base\n")
