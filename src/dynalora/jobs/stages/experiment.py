"""What the experiments in stages share: units one after the other, a table of scores that grows, and a report.

An experiment works in a run folder, which is locked as a whole. Each unit leaves one result file; a run that was
killed goes on with the first unit that has none, and a finished one is never run again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol

from dynalora.common.files import csv_text
from dynalora.drawing.comparison import differing, plot_bars
from dynalora.lab.report import Report, Section, Table, listing, rich_table, save_figures, write_report
from dynalora.lab.run_folder import RunFolder
from dynalora.lab.scores import SCORE_COLUMNS, mean_accuracy, mean_loss, percent, score_line
from dynalora.lab.settings import defaults_of
from dynalora.lab.units import U, UnitStore
from dynalora.lab.workbench import Workbench

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing
    from rich.console import Console

Result = Mapping[str, Any]
Results = Sequence[Result]


class ExperimentSettings(Protocol):
    """What an experiment needs of its settings."""

    @property
    def output(self) -> str:
        """The run folder."""

    @property
    def resume(self) -> bool:
        """Whether a killed run is continued."""

    def settings(self) -> dict[str, Any]:
        """What `config.yaml` holds."""


class Experiment(ABC, Generic[U]):
    """One run of an experiment.

    Args:
        spec: What to do.
        workbench: The base model and the tasks.
        folder: The run folder.
        sources: The tasks that are measured, by the name that results have for them.
        store: Where units' results are.

    Attributes:
        results: What the units' files hold, in order.
    """

    table_file: ClassVar[str]
    """Name of the file with all scores."""
    columns: ClassVar[Mapping[str, str]]
    """Columns of that file before the scores, each with its name in results."""
    measured_column: ClassVar[str] = "task"
    """The column that says which task a row's scores are of."""
    more_columns: ClassVar[Sequence[str]] = ()
    """Columns of that file after the scores."""

    def __init__(
        self,
        spec: ExperimentSettings,
        workbench: Workbench,
        folder: RunFolder,
        sources: Mapping[str, str],
        store: UnitStore[U],
    ) -> None:
        self.settings, self.workbench, self.folder, self.store = spec.settings(), workbench, folder, store
        self.sources = dict(sources)
        self.results: list[dict[str, Any]] = []

    @property
    def names(self) -> dict[str, str]:
        """The tasks' names, by the name that results have for them."""
        return {which: self.workbench.tasks[source].name for which, source in self.sources.items()}

    @abstractmethod
    def run(self) -> None:
        """Complete all units, and report."""

    @abstractmethod
    def work(self, unit: U) -> dict[str, Any]:
        """Do a unit's work; returns its result, with `scores` by the names of `sources`."""

    @abstractmethod
    def title(self, result: Result) -> str:
        """A result's unit in words."""

    def complete(self, unit: U) -> dict[str, Any]:
        """A unit's result: read if it is there, and else worked for, logged and shown."""
        fresh = not self.store.file(unit).exists()
        if fresh:
            self.folder.forget_metrics_behind("scores")
        result = self.store.complete(unit, partial(self.work, unit))
        # A run may have been killed between a unit's file and its record.
        if not any(record.get("run") == unit.name and "scores" in record for record in self.folder.metrics()):
            self.folder.log({**result, "run": unit.name})
        if fresh:
            scores = [score_line(name, result["scores"][which]) for which, name in self.names.items()]
            self.workbench.say(f"{self.title(result)}: {'; '.join(scores)}")
        else:
            self.workbench.say(f"{self.title(result)}: there already.")
        self.results.append(result)
        self.folder.write(self.table_file, self._table())
        return result

    def scores(self, model: Any, name: str) -> dict[str, Any]:
        """A model's scores on all tasks.

        Args:
            model: The base model, with an adapter or without.
            name: Of the run, in progress.
        """
        measured = self.workbench.measure(model, name)
        return {which: measured[source].record() for which, source in self.sources.items()}

    def _table(self) -> str:
        header = [*self.columns, self.measured_column, *SCORE_COLUMNS, *self.more_columns]
        rows = [
            [
                *(result[name] for name in self.columns.values()), which,
                *(score[name] for name in SCORE_COLUMNS), *(result.get(name) for name in self.more_columns),
            ]
            for result in self.results
            for which, score in result["scores"].items()
        ]  # fmt: skip
        return csv_text(header, rows)

    # --- the report ---------------------------------------------------------------------------------------------

    @abstractmethod
    def heading(self) -> str:
        """The report's title."""

    @abstractmethod
    def summary(self) -> str:
        """The result in a sentence or two."""

    @abstractmethod
    def closing_tables(self) -> list[Table]:
        """The tables that are shown at the end."""

    @abstractmethod
    def figures(self) -> Mapping[str, tuple[Drawing | None, str]]:
        """Plots by their file's name, each with its caption; None: there was nothing to draw."""

    def tables(self) -> list[Table]:
        """The tables of the report."""
        return self.closing_tables()

    def introduction(self) -> str:
        """What was done, for the report."""
        return " ".join(f"{self.workbench.tasks[source].about}." for source in self.sources.values())

    def report(self) -> None:
        """Write plots and the report, from the results so far."""
        pictures = save_figures(self.folder.write, self.figures())
        sections = [
            Section("Result", text=self.introduction(), tables=self.tables()),
            Section("Plots", figures=pictures),
            Section("Settings", listing=listing(self.settings)),
        ]
        write_report(Report(self.heading(), self.summary(), sections), self.folder.report)


def run_experiment(
    spec: ExperimentSettings,
    prepare: Callable[[], Workbench],
    experiment: Callable[[Workbench, RunFolder], Experiment[Any]],
    console: Console | None,
) -> list[dict[str, Any]]:
    """Run an experiment in its run folder; returns its results.

    Args:
        spec: What to do.
        prepare: Loads tasks and tokenizer and checks them, before the folder is made.
        experiment: Makes the experiment.
        console: Where progress and the closing tables are shown; None: nowhere.

    Raises:
        DynaloraError: Whatever is wrong with the tasks or the run folder.
    """
    settings, defaults = spec.settings(), defaults_of(type(spec))
    RunFolder.check(spec.output, settings, resume=spec.resume, defaults=defaults)
    workbench = prepare()
    with RunFolder.create(spec.output, settings, resume=spec.resume, defaults=defaults) as folder:
        running = experiment(workbench, folder)
        running.run()
        folder.finish()
    if console is not None:
        for table in running.closing_tables():
            console.print(rich_table(table))
        console.print(f"Report: {folder.report}", highlight=False, markup=False)
    return running.results


def score_bars(
    records: Mapping[str, Mapping[str, Results]],
    *,
    titles: tuple[str, str],
    lines: Mapping[str, Mapping[str, Results]] | None = None,
    decimals: int = 2,
) -> tuple[Drawing | None, Drawing]:
    """Bar charts of accuracy and of loss, with 95 % intervals.

    Args:
        records: Scores of runs by panel and bar.
        titles: Of the two charts.
        lines: Scores of runs by panel and horizontal line, to compare with.
        decimals: Number of digits of losses.

    Returns:
        Accuracy (None where nothing is answered right or wrong, or all alike) and loss.
    """
    accuracy = {
        panel: {bar: percent(mean_accuracy(runs)) for bar, runs in bars.items()} for panel, bars in records.items()
    }
    loss = {panel: {bar: mean_loss(runs) for bar, runs in bars.items()} for panel, bars in records.items()}
    shares: dict[str, dict[str, float | None]] = {}
    losses: dict[str, dict[str, float | None]] = {}
    for panel, of_panel in (lines or {}).items():
        means = {line: percent(mean_accuracy(runs)) for line, runs in of_panel.items()}
        shares[panel] = {line: mean.value if mean else None for line, mean in means.items()}
        losses[panel] = {line: mean_loss(runs).value for line, runs in of_panel.items()}
    drawing = None
    if differing(number for panels in (accuracy, shares) for bars in panels.values() for number in bars.values()):
        drawing = plot_bars(accuracy, label="accuracy, %", title=titles[0], lines=shares)
    return drawing, plot_bars(loss, label="loss, nats per token", title=titles[1], lines=losses, decimals=decimals)
