"""The transfer matrix: train on each of several tasks, measure on all of them, with several methods (DiRA App. D).

Every cell (method, task, seed) leaves one file, all at once; what is there is not run again.

Layout of the run folder, besides what every run has::

    cells/base.json                   scores of the untouched model
    cells/dira/0-ARC-Easy-seed-42.json
    transfer.csv                      all scores, a row per cell and task measured on
"""

from __future__ import annotations

import csv
import io
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dynalora.drawing.transfer import plot_transfer
from dynalora.jobs.stages.settings import TransferSpec
from dynalora.lab.report import Cell, Report, Section, Table, listing, rich_table, save_figures, write_report
from dynalora.lab.run_folder import RunFolder
from dynalora.lab.scores import mean_accuracy, mean_loss, percent, shown_accuracy, shown_loss
from dynalora.lab.settings import defaults_of
from dynalora.lab.units import as_json, read_result
from dynalora.lab.workbench import Workbench, train_settings

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
    configs = {method: spec.config(method) for method in spec.methods}
    RunFolder.check(spec.output, spec.settings(), resume=spec.resume, defaults=defaults_of(type(spec)))
    lab = Workbench(spec, spec.tasks, console)
    for config in configs.values():
        lab.check(config)
    results: list[dict[str, Any]] = []
    with RunFolder.create(
        spec.output, spec.settings(), resume=spec.resume, defaults=defaults_of(type(spec))
    ) as run:
        _cell(spec, lab, run, results, BASE, None, None)
        for seed in range(spec.seed, spec.seed + spec.seeds):
            for method in spec.methods:
                for task in spec.tasks:
                    _cell(spec, lab, run, results, method, task, seed)
            _report(spec, lab, run, results)
        run.finish()
    if console is not None:
        for method in spec.methods:
            console.print(rich_table(transfer_table(results, method, lab_names(lab))))
        console.print(f"Report: {run.report}", highlight=False, markup=False)
    return results


def lab_names(lab: Workbench) -> dict[str, str]:
    """The tasks' names by their source."""
    return {source: task.name for source, task in lab.tasks.items()}


def _cell(
    spec: TransferSpec,
    lab: Workbench,
    run: RunFolder,
    results: list[dict[str, Any]],
    method: str,
    task: str | None,
    seed: int | None,
) -> None:
    """One training with its measurements, unless it is there."""
    name = BASE
    if task is not None:
        # The number keeps apart what looks alike once only letters and digits are left of it.
        plain = re.sub(r"[^\w.-]+", "-", lab.tasks[task].name)
        name = f"{method}/{spec.tasks.index(task)}-{plain}-seed-{seed}"
    done = read_result(run.path / f"cells/{name}.json")
    if done is None:
        began = time.perf_counter()
        told: dict[str, Any] = {}
        if task is None or seed is None:
            found = lab.measure(lab.model, "the base model")
        else:
            label = f"{method} on {lab.tasks[task].name}, seed {seed}"
            # A configuration belongs to the adapter it has made: every cell gets its own.
            trained = lab.train(spec.config(method), task, train_settings(spec), seed=seed, label=label)
            found = lab.measure(trained.model, label)
            lab.take_off(trained.model)
            told = {"steps": trained.steps, "trainable_parameters": trained.trainable_parameters}
            for record in trained.records:
                run.log({**record, "run": name})
        done = {
            "method": method,
            "task": task,
            "seed": seed,
            "scores": {source: score.record() for source, score in found.items()},
            **told,
            "seconds": time.perf_counter() - began,
        }
        run.write(f"cells/{name}.json", as_json(done))
        run.log({**done, "run": name})
        lab.say(f"{name}: " + "; ".join(_told(lab.tasks[s].name, done["scores"][s]) for s in lab.tasks))
    results.append(done)
    run.write("transfer.csv", _csv(results))


def _told(task: str, score: Mapping[str, Any]) -> str:
    right = "–" if score["accuracy"] is None else f"{100 * score['accuracy']:.1f} %"
    return f"{task} {right}, loss {score['loss']:.3f}"


def transfer_table(results: Sequence[Mapping[str, Any]], method: str, names: Mapping[str, str]) -> Table:
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
            records = _records(results, method, source, column)
            if not records:
                cells += [None, None]
                continue
            cells += [shown_accuracy(mean_accuracy(records)), shown_loss(mean_loss(records))]
        rows.append(cells)
    columns = [text for name in names.values() for text in (f"{name}: accuracy, %", "loss")]
    return Table(
        ["trained on", *columns], rows, title=f"Transfer with {method}",
        note="Loss: nats per token of the right answers. In brackets 95 % intervals: Student's t over the seeds, "
        "or over the questions where there is one.",
    )  # fmt: skip


def _records(
    results: Sequence[Mapping[str, Any]], method: str, trained_on: str | None, measured_on: str
) -> list[Mapping[str, Any]]:
    wanted = BASE if trained_on is None else method
    return [
        done["scores"][measured_on]
        for done in results
        if done["method"] == wanted and done["task"] == trained_on
    ]


def transfer_figures(
    results: Sequence[Mapping[str, Any]], methods: Sequence[str], names: Mapping[str, str]
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
            shares = [percent(mean_accuracy(found)) if found else None for found in records]
            accuracy[method].append([share.value if share else None for share in shares])
            loss[method].append([mean_loss(found).value if found else None for found in records])
    rows, columns = [*names.values(), "no training"], list(names.values())
    figures: dict[str, tuple[Drawing, str]] = {}
    if any(cell is not None for grid in accuracy.values() for row in grid for cell in row):
        drawn = plot_transfer(
            accuracy, rows, columns, label="accuracy, %", title="Accuracy of one task's adapter on another"
        )
        figures["transfer_accuracy"] = (drawn, "Accuracy, trained on a row's task, measured on a column's.")
    drawn = plot_transfer(
        loss, rows, columns, label="loss, nats per token", title="Loss of one task's adapter on another",
        decimals=2, larger_is_better=False,
    )  # fmt: skip
    figures["transfer_loss"] = (
        drawn,
        "Negative log-likelihood of the right answers, trained on a row's task, measured on a column's; "
        "darker is better.",
    )
    return figures


def _report(spec: TransferSpec, lab: Workbench, run: RunFolder, results: Sequence[Mapping[str, Any]]) -> None:
    names = lab_names(lab)
    pictures = save_figures(run.write, transfer_figures(results, spec.methods, names))
    tables = [transfer_table(results, method, names) for method in spec.methods]
    about = " ".join(f"{task.about}." for task in lab.tasks.values())
    sections = [
        Section("Result", text=about, tables=tables),
        Section("Plots", figures=pictures),
        Section("Settings", listing=listing(spec.settings())),
    ]
    title = f"Transfer between {len(names)} tasks: {' and '.join(spec.methods)}"
    write_report(Report(title, _summary(results, spec.methods, names), sections), run.report)


def _summary(results: Sequence[Mapping[str, Any]], methods: Sequence[str], names: Mapping[str, str]) -> str:
    told = []
    for method in methods:
        own, other = (
            [
                mean_loss(found).value
                for source in names
                for column in names
                if (source == column) is same and (found := _records(results, method, source, column))
            ]
            for same in (True, False)
        )
        here, elsewhere = sum(own) / len(own), sum(other) / len(other)
        told.append(f"{method}: mean loss {here:.3f} on the task trained on, {elsewhere:.3f} on others")
    return "; ".join(told) + "."


def _csv(results: Sequence[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    names = ["accuracy", "accuracy_low", "accuracy_high", "loss", "loss_error", "questions"]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["method", "trained_on", "seed", "measured_on", *names])
    for done in results:
        for source, score in done["scores"].items():
            writer.writerow([done["method"], done["task"], done["seed"], source, *(score[n] for n in names)])
    return buffer.getvalue()
