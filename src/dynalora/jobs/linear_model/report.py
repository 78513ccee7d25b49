"""The comparison on the linear model as a run folder: numbers, plots and a report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from dynalora.common.files import csv_text
from dynalora.common.progress import rich_progress
from dynalora.drawing import runs as plots
from dynalora.drawing import style as drawing
from dynalora.jobs.linear_model.populations import PopulationLosses
from dynalora.jobs.linear_model.settings import LinearModelSpec
from dynalora.jobs.linear_model.training import (
    BAYES_TOLERANCE,
    DISEL,
    NAMES,
    LinearModelResult,
    compare_on_linear_model,
)
from dynalora.lab.report import Cell, Report, Section, Table, rich_table, write_report
from dynalora.lab.report import Figure as Picture
from dynalora.lab.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console


def run_linear_model(
    spec: LinearModelSpec | None = None, *, console: Console | None = None
) -> LinearModelResult:
    """Compare on the linear model and write a run folder with the numbers, plots and a report.

    Args:
        spec: Settings; None: the defaults.
        console: Where progress and the table are shown; None: nowhere.

    Raises:
        RunFolderError: The run folder cannot be used.
        TrainingError: A loss is no longer a number.
    """
    how = spec or LinearModelSpec()
    output = how.output or "runs/linear-model"
    with RunFolder.create(output, how.settings()) as run:
        with rich_progress(console) as progress:
            result = compare_on_linear_model(how, progress=progress)
        for row in result.rows:
            for step, losses in row.curve:
                run.log({"method": row.method, "step": step, **asdict(losses), "mixture": losses.mixture})
        table = losses_table(result)
        run.write("losses.csv", _csv(result))
        run.write("losses.json", json.dumps(_plain(result), indent=2) + "\n")
        drawn = {
            "losses": (plot_losses(result), "Loss on each population; closed forms are hatched."),
            "training": (
                plot_training(result),
                "Loss on the mixture during training, with the closed forms.",
            ),
            "gates": (plot_gate_curve(result), "What the gates have learned, against the Bayes posterior."),
        }
        pictures = []
        for name, (made, caption) in drawn.items():
            pictures.append(Picture(plots.save_figure(run, name, made), caption))
        sections = [Section("Losses", _reading(result), tables=[table], figures=pictures)]
        write_report(Report("A fixed update against a gated one", _verdict(result), sections), run.report)
        run.finish()
    if console is not None:
        console.print(rich_table(table))
        console.print(_verdict(result), highlight=False, markup=False)
        console.print(f"Report: {run.report}", highlight=False, markup=False)
    return result


def losses_table(result: LinearModelResult) -> Table:
    """All losses, closed forms first."""
    closed = {
        "no correction": result.base,
        "best fixed correction": result.fixed,
        "Bayes-optimal correction": result.bayes,
    }
    rows: list[list[Cell]] = [
        [name, "closed form", losses.fine_tuning, losses.pre_training, losses.mixture, None, None]
        for name, losses in closed.items()
    ]
    for row in result.rows:
        losses = row.losses
        rows.append(
            [
                NAMES[row.method],
                "trained",
                losses.fine_tuning,
                losses.pre_training,
                losses.mixture,
                f"{100 * row.excess:+.2f} %",
                f"{row.trainable_parameters:,}",
            ]
        )
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
    parts = [
        f"{NAMES[row.method]} ends {100 * row.excess:+.2f} % from "
        f"{'Bayes' if row.tolerance == BAYES_TOLERANCE else 'the best fixed correction'}"
        + ("" if row.reached else f" (not within {100 * row.tolerance:.0f} %: train longer)")
        for row in result.rows
    ]
    return "; ".join(parts) + "."


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
    rows = (
        *((name, "closed form", losses) for name, losses in closed.items()),
        *((row.method, "trained", row.losses) for row in result.rows),
    )
    return csv_text(
        header,
        ([name, kind, own.fine_tuning, own.pre_training, own.mixture] for name, kind, own in rows),
    )


# --- plots ------------------------------------------------------------------------------------------------


def plot_losses(result: LinearModelResult) -> Figure:
    """Loss of every correction on both populations, side by side (DISeL Figure 1)."""
    trained = {NAMES[row.method]: row.losses for row in result.rows}
    shown: Mapping[str, PopulationLosses] = {
        **{name: losses for name, losses in trained.items() if name != NAMES[DISEL]},
        "best fixed\n(closed form)": result.fixed,
        NAMES[DISEL]: trained[NAMES[DISEL]],
        "Bayes\n(closed form)": result.bayes,
    }
    made, (axis,) = drawing.figure(width=6.8, height=3.8)
    populations = (
        ("fine-tuning population", [losses.fine_tuning for losses in shown.values()]),
        ("pre-training population", [losses.pre_training for losses in shown.values()]),
    )
    for side, (label, values) in enumerate(populations):
        bars = axis.bar(
            [place + (side - 0.5) * 0.38 for place in range(len(shown))], values, width=0.36, label=label,
            color=("0.35", "0.8")[side], edgecolor="black", linewidth=0.6,
        )  # fmt: skip
        for bar, name in zip(bars, shown, strict=True):
            if "closed form" in name:
                bar.set_hatch("///")
        axis.bar_label(bars, fmt="%.3g", fontsize=8, padding=2)
    axis.set_xticks(range(len(shown)), list(shown), fontsize=9)
    axis.grid(False, axis="x")
    axis.set_ylabel("expected squared error")
    axis.set_title("A fixed update leaves an error on both populations", fontsize=10)
    axis.margins(y=0.12)
    axis.legend(frameon=False, fontsize=8)
    return made


def plot_training(result: LinearModelResult) -> Figure:
    """Loss on the mixture during training, with the two closed forms as lines."""
    made, (axis,) = drawing.figure()
    for index, row in enumerate(result.rows):
        axis.plot(
            [step for step, _ in row.curve], [losses.mixture for _, losses in row.curve], label=NAMES[row.method],
            color=drawing.PALETTE[index], marker=drawing.MARKERS[index], markersize=3.5, linewidth=1.3,
        )  # fmt: skip
    axis.axhline(
        result.fixed.mixture, color="black", linestyle="--", linewidth=1, label="best fixed correction"
    )
    axis.axhline(
        result.bayes.mixture, color="black", linestyle=":", linewidth=1.4, label="Bayes-optimal correction"
    )
    axis.set_yscale("log")
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("expected squared error, mixture")
    axis.set_title("Only the gated update gets below the best fixed correction", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    return made


def plot_gate_curve(result: LinearModelResult) -> Figure:
    """DISeL's gates against the logit of the posterior, with the posterior itself."""
    made, (axis,) = drawing.figure(width=5.2)
    curve = result.gates
    logits: Sequence[float] = torch.linspace(min(curve.logit), max(curve.logit), 200).tolist()
    axis.plot(
        logits, [1 / (1 + math.exp(-value)) for value in logits], color="black", linestyle="--", linewidth=1.2,
        label="Bayes posterior p(x)",
    )  # fmt: skip
    axis.fill_between(
        curve.logit, curve.low, curve.high, color="0.8", label="gates, 10 % to 90 %", linewidth=0
    )
    axis.plot(
        curve.logit,
        curve.gate,
        color=drawing.PALETTE[0],
        marker="o",
        markersize=4,
        linewidth=1,
        label="mean gate",
    )
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlabel("log-odds that the input belongs to the fine-tuning population")
    axis.set_ylabel("gate")
    axis.set_title("What the gates have learned", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    return made
