"""The files of a comparison: every cell as CSV, tables in several formats, plots, and the report."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynalora.common.files import csv_text, write_file
from dynalora.jobs.compare.grid import Comparison
from dynalora.jobs.compare.plots import (
    plot_cost,
    plot_frontier,
    plot_kept,
    plot_learning,
    plot_parameters,
    plot_ranks,
)
from dynalora.jobs.compare.summaries import Summary, _value, kept_numbers, summaries
from dynalora.jobs.compare.tables import cost_table, kept_table, plan_table, result_table
from dynalora.lab.report import (
    Report,
    Section,
    Table,
    latex_table,
    listing,
    markdown_table,
    rich_table,
    save_figures,
    write_report,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawn
    from rich.console import Console


def cells_csv(comparison: Comparison) -> str:
    """Every cell with a result, a row each."""
    grid = comparison.grid
    texts = list(
        dict.fromkeys(
            text for cell in grid.known() for text in ((grid.result(cell) or {}).get("retention") or {})
        )
    )
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    about = ("place", "label", "method", "r", "learning_rate", "seed")
    measured = ("accuracy", "loss", "loss_error", "questions")
    trained = ("trainable_parameters", "steps", "step_seconds", "peak_bytes", "seconds")
    still = list(
        dict.fromkeys(name for cell in grid.known() for name in kept_numbers(grid.result(cell) or {}))
    )
    writer.writerow(
        [
            *about, *measured, "validation_loss", *(f"kl {text}" for text in texts),
            *(f"kept {name}" for name in still), *trained, "chosen",
        ]
    )  # fmt: skip
    for task in grid.places:
        chosen = {own.label: grid.chosen_rate(task, own) for own in grid.contestants}
        for cell in grid.known():
            result = grid.result(cell)
            if cell.task != task or result is None:
                continue
            kept, training = result.get("retention") or {}, result.get("training") or {}
            writer.writerow(
                [
                    *(getattr(cell, name) for name in about), *(result["test"][name] for name in measured),
                    (result.get("validation") or {}).get("loss"), *(kept.get(text, {}).get("kl") for text in texts),
                    *(kept_numbers(result).get(name) for name in still),
                    *(training.get(name) for name in trained),
                    int(chosen.get(cell.label) == cell.learning_rate),
                ]
            )  # fmt: skip
    return buffer.getvalue()


def _table_csv(tables: Sequence[Table]) -> str:
    """Tables below each other, each with its own header."""
    return "".join(
        csv_text(["table", *table.columns], ([table.title, *row] for row in table.text)) for table in tables
    )


def _as_record(one: Summary) -> dict[str, Any]:
    return {
        **{name: value for name, value in asdict(one).items() if name != "results"},
        "seeds": list(one.results),
    }


def write_results(comparison: Comparison) -> Path:
    """Tables, plots and the report, from the cells that are there; returns the report."""
    grid = comparison.grid
    folder = grid.store.folder
    found = summaries(comparison)
    by_place = {place: _tables(comparison, place, own) for place, own in found.items()}
    tables = [table for own in by_place.values() for table in own]
    cost = cost_table(comparison, found)
    write_file(folder / "cells.csv", cells_csv(comparison))
    write_file(folder / "results.csv", _table_csv([*tables, cost]))
    records = {place: [_as_record(one) for one in own] for place, own in found.items()}
    write_file(folder / "results.json", json.dumps(records, indent=1) + "\n")
    write_file(folder / "results.md", "\n".join(map(markdown_table, [*tables, cost])))
    write_file(folder / "results.tex", "\n".join(map(latex_table, [*tables, cost])))

    def write(name: str, content: bytes) -> None:
        write_file(folder / name, content)

    sections = [Section("Compared", text=" ".join(grid.provenance()), tables=[plan_table(grid.contestants)])]
    for task, place in grid.places.items():
        own = found[place]
        drawn: dict[str, tuple[Drawn | None, str]] = {}
        for number, text in enumerate(dict.fromkeys(text for one in own for text in one.kl)):
            drawn[f"frontier-{place}" + (f"-{number + 1}" if number else "")] = (
                plot_frontier(comparison, task, text),
                f"Loss against KL from the base model on {text}; below and to the left is better. Numbers are learning "
                "rates.",
            )
        drawn[f"kept-{place}"] = (
            plot_kept(comparison, task),
            "Accuracy against benchmarks that nothing was trained for. Numbers are learning rates.",
        )
        drawn[f"parameters-{place}"] = (
            plot_parameters(comparison, place, own),
            "At the chosen learning rates, with 95 % intervals.",
        )
        drawn[f"learning-{place}"] = plot_learning(comparison, place, own), "Mean over the seeds."
        drawn[f"ranks-{place}"] = plot_ranks(own, place), "Singular values of s·ΔW above 0.001, first seed."
        sections.append(
            Section(
                place,
                text=comparison.tasks[task].about,
                tables=by_place[place],
                figures=save_figures(write, drawn),
            )
        )
    bars = save_figures(
        write, {"cost": (plot_cost(comparison, found), "Whiskers: smallest and largest of the cells.")}
    )
    sections.append(Section("Cost", tables=[cost], figures=bars))
    if comparison.failed:
        failed = Table(
            ["cell", "last line"], [[cell.title, line] for cell, line in comparison.failed], title="Failed"
        )
        sections.insert(1, Section("Failed cells", tables=[failed]))
    sections.append(Section("Settings", listing=listing(grid.spec.settings())))
    methods = ", ".join(own.label for own in grid.contestants)
    title = f"{methods} on {', '.join(grid.places.values())}"
    return write_report(Report(title, _told(comparison, found), sections), folder / "report.html")


def _tables(comparison: Comparison, place: str, own: Sequence[Summary]) -> list[Table]:
    """The tables of one task."""
    kept = kept_table(comparison, place, own)
    return [result_table(comparison, place, own), *([kept] if kept is not None else [])]


def _told(comparison: Comparison, found: Mapping[str, Sequence[Summary]]) -> str:
    """The result in a few sentences."""
    grid = comparison.grid
    done, total = grid.done(), grid.total
    said = [f"{done} of {total} cells are done."] if done < total else []
    for place, own in found.items():
        trained = [one for one in own if one.learning_rate is not None and one.loss is not None]
        if not trained:
            continue
        best = min(trained, key=lambda one: _value(one.loss))
        better = [
            one.label
            for one in trained
            if one.loss_apart and one.loss_apart.p < 0.05 and one.loss_apart.value < 0
        ]
        worse = [
            one.label
            for one in trained
            if one.loss_apart and one.loss_apart.p < 0.05 and one.loss_apart.value > 0
        ]
        reference = grid.spec.reference
        said.append(
            f"{place}: the lowest loss has {best.label} ({_value(best.loss):.4f}); beyond chance better than "
            f"{reference}: {', '.join(better) or 'none'}; worse: {', '.join(worse) or 'none'}."
        )
    return " ".join(said) or "No cell is done yet."


def show_tables(comparison: Comparison, console: Console) -> None:
    """The closing tables."""
    found = summaries(comparison)
    for place, own in found.items():
        for table in _tables(comparison, place, own):
            console.print(rich_table(table))
    console.print(rich_table(cost_table(comparison, found)))
