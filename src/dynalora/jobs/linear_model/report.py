"""The comparison on the linear model as a run folder: numbers, plots and a report."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from dynalora.common.files import csv_text
from dynalora.common.progress import rich_progress
from dynalora.drawing.linear_model import plot_gate_curve, plot_mixture_losses, plot_population_losses
from dynalora.jobs.linear_model.populations import PopulationLosses
from dynalora.jobs.linear_model.settings import LinearModelSpec
from dynalora.jobs.linear_model.training import DISEL, NAMES, LinearModelResult, compare_on_linear_model
from dynalora.lab.report import Cell, Report, Section, Table, save_figures, say, write_report
from dynalora.lab.run_folder import RunFolder


def run_linear_model(spec: LinearModelSpec | None = None, *, console: Console | None = None) -> LinearModelResult:
    """Compare on the linear model and write a run folder with the numbers, plots and a report.

    Raises:
        RunFolderError: The run folder cannot be used.
        TrainingError: A loss is no longer a number.
    """
    spec = spec or LinearModelSpec()
    output = spec.output or "runs/linear-model"
    with RunFolder.create(output, spec.settings()) as run:
        with rich_progress(console) as progress:
            result = compare_on_linear_model(spec, progress=progress)
        for row in result.rows:
            for step, losses in row.curve:
                run.log({"method": row.method, "step": step, **asdict(losses), "mixture": losses.mixture})
        table = losses_table(result)
        run.write("losses.csv", _csv(result))
        run.write("losses.json", json.dumps(_plain(result), indent=2) + "\n")
        pictures = save_figures(run.write, figures(result))
        sections = [Section("Losses", _reading(result), tables=[table], figures=pictures)]
        write_report(Report("A fixed update against a gated one", _verdict(result), sections), run.report)
        run.finish()
    say(console, table, _verdict(result), f"Report: {run.report}")
    return result


def figures(result: LinearModelResult) -> dict[str, tuple[Figure, str]]:
    """The figures of the report with their captions, by the name of their file."""
    trained = {NAMES[row.method]: row.losses for row in result.rows}
    gated = trained.pop(NAMES[DISEL])
    fixed, bayes = "best fixed\n(closed form)", "Bayes\n(closed form)"
    shown = {**trained, fixed: result.fixed, NAMES[DISEL]: gated, bayes: result.bayes}
    curves = {NAMES[row.method]: [(step, losses.mixture) for step, losses in row.curve] for row in result.rows}
    levels = {"best fixed correction": result.fixed.mixture, "Bayes-optimal correction": result.bayes.mixture}
    return {
        "losses": (
            plot_population_losses(
                {name: (losses.fine_tuning, losses.pre_training) for name, losses in shown.items()},
                closed_forms=(fixed, bayes),
            ),
            "Loss on each population; closed forms are hatched.",
        ),
        "training": (
            plot_mixture_losses(curves, levels),
            "Loss on the mixture during training, with the closed forms.",
        ),
        "gates": (plot_gate_curve(**vars(result.gates)), "What the gates have learned, against the Bayes posterior."),
    }


def losses_table(result: LinearModelResult) -> Table:
    """All losses, closed forms first."""
    closed = {
        "no correction": result.base,
        "best fixed correction": result.fixed,
        "Bayes-optimal correction": result.bayes,
    }
    rows: list[list[Cell]] = [[name, "closed form", *_numbers(losses), None, None] for name, losses in closed.items()]
    for row in result.rows:
        more = (f"{100 * row.excess:+.2f} %", f"{row.trainable_parameters:,}")
        rows.append([NAMES[row.method], "trained", *_numbers(row.losses), *more])
    return Table(
        ["correction", "how", "fine-tuning", "pre-training", "mixture", "above its optimum", "parameters"],
        rows,
        title="Expected squared error per population",
        note="The optimum of full fine-tuning and LoRA is the best fixed correction (of LoRA's rank), that of DISeL is "
        f"Bayes. Trained models are measured on {result.spec.samples:,} samples.",
    )


def _reading(result: LinearModelResult) -> str:
    return (
        "Half of the inputs need the update, the other half must stay as they were. A fixed update has to settle "
        "between them, and applies about half of what is needed everywhere; a gate can tell the inputs apart as well "
        "as their overlap allows."
    )


def _verdict(result: LinearModelResult) -> str:
    """What a fixed update and what a gated one got to, beside the least that each can."""
    ends = {NAMES[row.method]: f"{row.losses.mixture:.4g}" for row in result.rows}
    gated = ends.pop(NAMES[DISEL])
    text = (
        f"No fixed update can have an error below {result.fixed.mixture:.4g} on the mixture: "
        + " and ".join(f"{name} ends at {error}" for name, error in ends.items())
        + f". {NAMES[DISEL]}'s gate ends at {gated}, where {result.bayes.mixture:.4g} is the least that is possible."
    )
    short = [row for row in result.rows if not row.reached]
    for row in short:
        text += (
            f" {NAMES[row.method]} is {100 * row.excess:+.2f} % from its optimum, not within "
            f"{100 * row.tolerance:.0f} %: train longer."
        )
    return text


def _plain(result: LinearModelResult) -> dict[str, Any]:
    def losses(value: PopulationLosses) -> dict[str, float]:
        return {**asdict(value), "mixture": value.mixture}

    return {
        "settings": result.spec.settings(),
        "closed_forms": {
            "no_correction": losses(result.base),
            "best_fixed": losses(result.fixed),
            "bayes": losses(result.bayes),
        },
        "trained": {
            row.method: {
                "losses": losses(row.losses),
                "optimum": losses(row.optimum),
                "excess": row.excess,
                "tolerance": row.tolerance,
                "reached": row.reached,
                "trainable_parameters": row.trainable_parameters,
                "seconds": row.seconds,
            }
            for row in result.rows
        },
        "gates": asdict(result.gates),
    }


def _csv(result: LinearModelResult) -> str:
    header = ["correction", "kind", "fine_tuning", "pre_training", "mixture"]
    closed = {"none": result.base, "best_fixed": result.fixed, "bayes": result.bayes}
    rows = [[name, "closed form", *_numbers(losses)] for name, losses in closed.items()]
    return csv_text(header, [*rows, *([row.method, "trained", *_numbers(row.losses)] for row in result.rows)])


def _numbers(losses: PopulationLosses) -> tuple[float, float, float]:
    return losses.fine_tuning, losses.pre_training, losses.mixture
