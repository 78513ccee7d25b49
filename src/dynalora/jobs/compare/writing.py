"""The files of a comparison: every cell as CSV, tables in several formats, plots, and the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynalora.common.files import csv_text, write_file
from dynalora.jobs.compare import decisions
from dynalora.jobs.compare.explore import explorer
from dynalora.jobs.compare.grid import Comparison
from dynalora.jobs.compare.plots import (
    differ_in_size,
    plot_cost,
    plot_frontier,
    plot_kept,
    plot_learning,
    plot_over_time,
    plot_parameters,
    plot_ranks,
    plot_scaled,
)
from dynalora.jobs.compare.summaries import Summary, by_rate, kept_numbers, summaries
from dynalora.jobs.compare.tables import cost_table, kept_table, plan_table, rate_table, result_table, scaled_tables
from dynalora.jobs.compare.verdict import conclusion
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
    from matplotlib.figure import Figure as Drawing
    from rich.console import Console

_NAMED = 4  # most methods that a title names


def cells_csv(comparison: Comparison) -> str:
    """Every cell with a result, a row each."""
    grid, results = comparison.grid, comparison.grid.results()
    texts = list(dict.fromkeys(text for _, result in results for text in result.get("retention") or {}))
    retention_tasks = list(dict.fromkeys(name for _, result in results for name in kept_numbers(result)))
    of_cell = ("place", "label", "method", "r", "learning_rate", "seed")
    measured = ("accuracy", "loss", "loss_error", "questions")
    trained = ("trainable_parameters", "steps", "step_seconds", "peak_bytes", "seconds")
    header = [
        *of_cell, *measured, "validation_loss", *(f"kl {text}" for text in texts),
        *(f"kept {name}" for name in retention_tasks), "kl task prompts", "norm", *trained, "chosen",
    ]  # fmt: skip
    rates = {
        (task, contestant.label): grid.chosen_rate(task, contestant) if grid.chooses else None
        for task in grid.places
        for contestant in grid.contestants
    }
    rows = []
    for cell, result in sorted(results, key=lambda entry: list(grid.places).index(entry[0].task)):
        retention, training = result.get("retention") or {}, result.get("training") or {}
        rows.append(
            [
                *(getattr(cell, name) for name in of_cell), *(result["test"][name] for name in measured),
                (result.get("validation") or {}).get("loss"),
                *(retention.get(text, {}).get("kl") for text in texts),
                *(kept_numbers(result).get(name) for name in retention_tasks),
                *((result.get("change") or {}).get(name) for name in ("prompts_kl", "norm")),
                *(training.get(name) for name in trained),
                int(rates.get((cell.task, cell.label)) == cell.learning_rate),
            ]
        )  # fmt: skip
    return csv_text(header, rows)


def curves_csv(comparison: Comparison) -> str:
    """Every cell at every factor of its update, a row each."""
    results = comparison.grid.results()
    texts = list(dict.fromkeys(text for _, result in results for text in result.get("retention") or {}))
    of_cell = ("place", "label", "learning_rate", "seed")
    rows = [
        [
            *(getattr(cell, name) for name in of_cell), point["factor"], point["test"]["loss"],
            (point.get("validation") or {}).get("loss"), *((point["kl"].get(text) or {}).get("kl") for text in texts),
        ]
        for cell, result in results
        for point in result.get("curve") or []
    ]  # fmt: skip
    return csv_text([*of_cell, "factor", "loss", "validation_loss", *(f"kl {text}" for text in texts)], rows)


def _table_csv(tables: Sequence[Table]) -> str:
    """Tables below each other, each with its own header."""
    return "".join(csv_text(["table", *table.columns], ([table.title, *row] for row in table.text)) for table in tables)


def _as_record(summary: Summary) -> dict[str, Any]:
    values = {name: value for name, value in asdict(summary).items() if name != "results"}
    return {**values, "seeds": list(summary.results)}


def write_results(comparison: Comparison) -> Path:
    """Tables, plots and the report, from the cells that are there; returns the report."""
    grid = comparison.grid
    folder, by_place = grid.store.folder, summaries(comparison)
    cost = cost_table(comparison, by_place)
    tables = {place: _tables(comparison, task, by_place[place]) for task, place in grid.places.items()}
    all_tables = [*(table for of_task in tables.values() for table in of_task), cost]
    write_file(folder / "cells.csv", cells_csv(comparison))
    write_file(folder / "curves.csv", curves_csv(comparison))
    write_file(folder / "results.csv", _table_csv(all_tables))
    records = {place: [_as_record(summary) for summary in of_task] for place, of_task in by_place.items()}
    write_file(folder / "results.json", json.dumps(records, indent=1) + "\n")
    write_file(folder / "results.md", "\n".join(map(markdown_table, all_tables)))
    write_file(folder / "results.tex", "\n".join(map(latex_table, all_tables)))

    def write(name: str, content: bytes) -> None:
        write_file(folder / name, content)

    sections = []
    if comparison.failed:
        failed = [[cell.title, line] for cell, line in comparison.failed]
        sections.append(Section("Failed cells", tables=[Table(["cell", "last line"], failed, title="Failed")]))
    for task, place in grid.places.items():
        pictures = save_figures(write, _figures(comparison, task, by_place[place]))
        sections.append(
            Section(
                place, text=comparison.about(task), tables=tables[place], figures=pictures,
                explorer=explorer(comparison, task),
            )
        )  # fmt: skip
    bars = (plot_cost(comparison, by_place), "Whiskers: smallest and largest of the cells.")
    sections.append(Section("Cost", tables=[cost], figures=save_figures(write, {"cost": bars})))
    plan = [plan_table(grid.contestants)]
    sections.append(Section("Compared", text=" ".join(grid.provenance()), tables=plan))
    sections.append(Section("Settings", listing=listing(grid.spec.settings())))
    labels = [contestant.label for contestant in grid.contestants]
    methods = ", ".join(labels) if len(labels) <= _NAMED else f"{len(labels)} methods"
    title = f"{methods} on {', '.join(grid.places.values())}"
    return write_report(Report(title, conclusion(comparison, by_place), sections), folder / "report.html")


def _figures(comparison: Comparison, task: str, of_task: Sequence[Summary]) -> dict[str, tuple[Drawing | None, str]]:
    """The plots of one task by their file's name, each with its caption."""
    place, chooses = comparison.grid.places[task], comparison.grid.chooses
    several_rates = any(len(contestant.learning_rates) > 1 for contestant in comparison.grid.contestants)
    rings = "; rings mark the chosen ones" if chooses and several_rates else ""
    figures: dict[str, tuple[Drawing | None, str]] = {}
    for number, text in enumerate(dict.fromkeys(text for summary in of_task for text in summary.kl)):
        scaled = plot_scaled(comparison, task, text)
        figures[f"frontier-{place}" + (f"-{number + 1}" if number else "")] = (
            plot_frontier(comparison, task, text) if several_rates or scaled is None else None,
            f"Loss against KL from the base model on {text}; below and to the left is better. Numbers are learning "
            f"rates{rings}.",
        )
        figures[f"scaled-{place}" + (f"-{number + 1}" if number else "")] = (
            scaled,
            f"Every run along factors of its update, from as trained (large marker, with its learning rate{rings}) "
            f"down; on {text}. Below and to the left is better.",
        )
    figures[f"kept-{place}"] = (
        plot_kept(comparison, task),
        "Accuracy against benchmarks that nothing was trained for. Numbers are learning rates.",
    )
    if not chooses:  # what follows shows each method at its learning rate
        return figures
    return {
        **figures,
        f"parameters-{place}": (
            plot_parameters(comparison, place, of_task) if differ_in_size(comparison.grid.contestants) else None,
            "At the chosen learning rates, with 95 % intervals.",
        ),
        f"learning-{place}": (plot_learning(comparison, place, of_task), "Mean over the seeds."),
        f"over-time-{place}": (
            plot_over_time(comparison, task, of_task),
            "Measured during training at the chosen learning rates, means over the seeds; dotted: the base model.",
        ),
        f"ranks-{place}": (plot_ranks(of_task, place), "Singular values of s·ΔW above 0.001, first seed."),
        **decisions.figures(place, of_task, {one.label: one.method for one in comparison.grid.contestants}),
    }


def _tables(comparison: Comparison, task: str, of_task: Sequence[Summary]) -> list[Table]:
    """The tables of one task."""
    grid, place = comparison.grid, comparison.grid.places[task]
    retention = kept_table(comparison, place, of_task)
    several = grid.spec.all_rates and any(len(contestant.learning_rates) > 1 for contestant in grid.contestants)
    return [
        *([rate_table(comparison, place, by_rate(comparison, task) if grid.chooses else of_task)] if several else []),
        *([result_table(comparison, place, of_task)] if grid.chooses else []),
        *scaled_tables(comparison, place, of_task),
        *([retention] if retention is not None else []),
    ]


def show_tables(comparison: Comparison, console: Console) -> None:
    """Show the tables of all tasks, and what the methods cost."""
    by_place = summaries(comparison)
    for task, place in comparison.grid.places.items():
        for table in _tables(comparison, task, by_place[place]):
            console.print(rich_table(table))
    console.print(rich_table(cost_table(comparison, by_place)))
