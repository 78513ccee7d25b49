"""The transfer matrix: train on each of several tasks, measure on all of them, with several methods (DiRA App. D).

Every cell (method, task, seed) leaves one file, all at once; what is there is not run again.

Layout of the run folder, besides what every run has::

    cells/base.json                   scores of the untouched model
    cells/dira/0-ARC-Easy-seed-42.json
    transfer.csv                      all scores, a row per cell and task measured on
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dynalora.drawing.comparison import plot_transfer
from dynalora.jobs.stages.experiment import Experiment, Result, Results, run_experiment
from dynalora.jobs.stages.settings import TransferSpec
from dynalora.lab.report import Cell, Table
from dynalora.lab.run_folder import RunFolder
from dynalora.lab.scores import mean_accuracy, mean_loss, percent, shown_scores
from dynalora.lab.training.settings import train_settings
from dynalora.lab.units import UnitStore
from dynalora.lab.workbench import Workbench

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing
    from rich.console import Console

BASE = "base"


def run_transfer(spec: TransferSpec, *, console: Console | None = None) -> list[dict[str, Any]]:
    """Train and measure every cell, and write the run folder.

    Args:
        spec: What to do.
        console: Where progress and the closing tables are shown; None: nowhere.

    Returns:
        One result per cell, the untouched model's first: `method`, `task`, `seed`, and `scores` by task.

    Raises:
        DynaloraError: Whatever is wrong with the settings, the tasks, the run folder or the target modules, before
            the model's weights are loaded.
    """
    configs = [spec.config(method) for method in spec.methods]

    def prepare() -> Workbench:
        workbench = Workbench(spec, spec.tasks, console, validation=spec.validation)
        for config in configs:
            workbench.check(config)
        return workbench

    return run_experiment(spec, prepare, lambda workbench, folder: _Transfer(spec, workbench, folder), console)


@dataclass(frozen=True)
class Training:
    """One training with its measurements, or those of the base model.

    Attributes:
        name: Its place among the results.
        method: Of the adapter; `base`: none.
        task: The source of the task that is trained on; None for the base model.
        seed: Of the run; None for the base model.
    """

    name: str = BASE
    method: str = BASE
    task: str | None = None
    seed: int | None = None


class _Transfer(Experiment[Training]):
    """One run of the experiment."""

    table_file = "transfer.csv"
    columns: ClassVar[Mapping[str, str]] = {"method": "method", "trained_on": "task", "seed": "seed"}
    measured_column = "measured_on"

    def __init__(self, spec: TransferSpec, workbench: Workbench, folder: RunFolder) -> None:
        sources = {source: source for source in spec.tasks}
        super().__init__(spec, workbench, folder, sources, UnitStore(folder.path / "cells"))
        self.spec = spec

    def run(self) -> None:
        self.complete(Training())
        for seed in range(self.spec.seed, self.spec.seed + self.spec.seeds):
            for method in self.spec.methods:
                for number, (task, name) in enumerate(self.names.items()):
                    # The number tells tasks apart whose names differ in other signs than letters and digits.
                    plain = re.sub(r"[^\w.-]+", "-", name)
                    self.complete(Training(f"{method}/{number}-{plain}-seed-{seed}", method, task, seed))
            self.report()

    def title(self, result: Result) -> str:
        if result["task"] is None:
            return "the base model"
        return f"{result['method']} on {self.names[result['task']]}, seed {result['seed']}"

    def work(self, unit: Training) -> dict[str, Any]:
        result: dict[str, Any] = {"method": unit.method, "task": unit.task, "seed": unit.seed}
        label = self.title(result)
        if unit.task is None or unit.seed is None:
            return {**result, "scores": self.scores(self.workbench.model, label)}
        # A configuration belongs to the adapter that was made from it, so every training has a new one.
        config = self.spec.config(unit.method)
        how = train_settings(self.spec)
        trained = self.workbench.train(config, unit.task, how, seed=unit.seed, label=label, choice=self.spec)
        scores = self.scores(trained.model, label)
        self.workbench.take_off(trained.model)
        for record in trained.records:
            self.folder.log({**record, "run": unit.name})
        cost = {"steps": trained.steps, "trainable_parameters": trained.trainable_parameters}
        return {**result, "scores": scores, **cost}

    def heading(self) -> str:
        return f"Transfer between {len(self.names)} tasks: {' and '.join(self.spec.methods)}"

    def summary(self) -> str:
        return _summary(self.results, self.spec.methods, self.names)

    def closing_tables(self) -> list[Table]:
        return [transfer_table(self.results, method, self.names) for method in self.spec.methods]

    def figures(self) -> Mapping[str, tuple[Drawing | None, str]]:
        return transfer_figures(self.results, self.spec.methods, self.names)


def transfer_table(results: Results, method: str, names: Mapping[str, str]) -> Table:
    """One method's scores: trained on a row's task, measured on a column's.

    Args:
        results: What [`run_transfer`][dynalora.jobs.stages.transfer.run_transfer] returns.
        method: Which method.
        names: Names of the tasks by their source.
    """
    rows: list[list[Cell]] = []
    for source, name in [(None, "no training"), *names.items()]:
        cells: list[Cell] = [name]
        for column in names:
            cells += shown_scores(_records(results, method, source, column))
        rows.append(cells)
    columns = [text for name in names.values() for text in (f"{name}: accuracy, %", "loss")]
    return Table(
        ["trained on", *columns], rows, title=f"Transfer with {method}",
        note="Loss: nats per token of the right answers. In brackets 95 % intervals: Student's t over the seeds, "
        "or over the questions where there is one.",
    )  # fmt: skip


def _records(results: Results, method: str, trained_on: str | None, measured_on: str) -> list[Result]:
    label = BASE if trained_on is None else method
    return [
        result["scores"][measured_on]
        for result in results
        if result["method"] == label and result["task"] == trained_on
    ]


def transfer_figures(
    results: Results, methods: Sequence[str], names: Mapping[str, str]
) -> dict[str, tuple[Drawing, str]]:
    """The heat maps of accuracy and of loss, methods side by side, with their captions.

    Args:
        results: What [`run_transfer`][dynalora.jobs.stages.transfer.run_transfer] returns.
        methods: In this order.
        names: Names of the tasks by their source.
    """
    accuracy: dict[str, list[list[float | None]]] = {}
    loss: dict[str, list[list[float | None]]] = {}
    for method in methods:
        accuracy[method], loss[method] = [], []
        for source in (*names, None):
            records = [_records(results, method, source, column) for column in names]
            shares = [percent(mean_accuracy(of_column)) if of_column else None for of_column in records]
            accuracy[method].append([share.value if share else None for share in shares])
            loss[method].append([mean_loss(of_column).value if of_column else None for of_column in records])
    rows, columns = [*names.values(), "no training"], list(names.values())
    figures: dict[str, tuple[Drawing, str]] = {}
    if any(cell is not None for grid in accuracy.values() for row in grid for cell in row):
        drawing = plot_transfer(
            accuracy, rows, columns, label="accuracy, %", title="Accuracy of one task's adapter on another"
        )
        figures["transfer_accuracy"] = (drawing, "Accuracy, trained on a row's task, measured on a column's.")
    drawing = plot_transfer(
        loss, rows, columns, label="loss, nats per token", title="Loss of one task's adapter on another",
        decimals=2, larger_is_better=False,
    )  # fmt: skip
    figures["transfer_loss"] = (
        drawing,
        "Negative log-likelihood of the right answers, trained on a row's task, measured on a column's; "
        "darker is better.",
    )
    return figures


def _summary(results: Results, methods: Sequence[str], names: Mapping[str, str]) -> str:
    parts = []
    for method in methods:
        same_task, other_tasks = (
            [
                mean_loss(records).value
                for source in names
                for column in names
                if (source == column) is same and (records := _records(results, method, source, column))
            ]
            for same in (True, False)
        )
        on_it, on_others = sum(same_task) / len(same_task), sum(other_tasks) / len(other_tasks)
        parts.append(f"{method}: mean loss {on_it:.3f} on the task trained on, {on_others:.3f} on others")
    return "; ".join(parts) + "."
