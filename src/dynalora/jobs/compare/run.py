"""Methods against each other: methods × learning rates × seeds × tasks, as cells that are run once each.

A cell is one training run with its measurements. It runs in a new process, so that its peak memory is measured apart
from other cells' and a crash stops no other, and it leaves one file, written whole or not at all. Any number of
`dynalora compare` may work on the same folder at the same time, on one machine or on several that share it: a cell is
locked by the process that runs it.

The learning rate is chosen for each method and task from the same grid: the first seed runs at all rates, the lowest
loss on questions that were set aside of the training ones wins, and the other seeds run at that rate only. Held-out
questions are never chosen on.

Layout of the folder::

    config.yaml                                the settings of whoever came last
    plan.json                                  ranks and numbers of parameters
    cells/arc_easy/dira_r16_lr0.0005_seed42.json   everything that was measured
    cells/….json.lock                          taken by a process that lives
    logs/….log                                 what the cell said
    cells.csv, results.csv, results.json, results.md, results.tex, report.html, plots/
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from dynalora.common.progress import rich_progress
from dynalora.errors import ConfigError
from dynalora.evaluation.heads import CAUSAL_LM
from dynalora.jobs.compare.grid import Comparison, Grid
from dynalora.jobs.compare.planning import plan, task_places
from dynalora.jobs.compare.recorded import Recorded, write_plan
from dynalora.jobs.compare.runner import InProcessRunner, Runner
from dynalora.jobs.compare.settings import CompareSpec
from dynalora.jobs.compare.store import CellStore, shared_settings
from dynalora.jobs.compare.tables import plan_table
from dynalora.jobs.compare.writing import show_tables, write_results
from dynalora.lab.data.conversations import load_named_text
from dynalora.lab.models import local_model_name, quantization_config, resolve_dtype
from dynalora.lab.report import rich_table

if TYPE_CHECKING:
    from rich.console import Console

    from dynalora.lab.tasks.task import ExperimentTask

logger = logging.getLogger(__name__)


def compare(spec: CompareSpec, *, console: Console) -> int:
    """Run the comparison as the command does.

    Args:
        spec: What is compared, and whether anything is run.
        console: Where progress and the closing tables are shown.

    Returns:
        The exit status: 1 if a cell failed, else 0.

    Raises:
        DynaloraError: As [`run_compare`][dynalora.jobs.compare.run.run_compare].
    """
    failed = run_compare(spec, console=console, run=not spec.report).failed
    if failed:
        logger.error("%d cells failed; call the command again to try them once more.", len(failed))
    return int(bool(failed))


def run_compare(
    spec: CompareSpec, *, console: Console | None = None, apart: bool = True, run: bool = True
) -> Comparison:
    """Run all cells that are missing, and write tables, plots and the report.

    Args:
        spec: What is compared.
        console: Where progress and the closing tables are shown; None: nowhere.
        apart: Run every cell in a new process. False: in this one, one after another; their peak memory is then this
            process's.
        run: False: run nothing, and write tables, plots and the report of the cells that are there. Neither data nor
            model are needed then.

    Returns:
        The cells with their results. One that failed does not stop the others.

    Raises:
        DynaloraError: Whatever is wrong with the settings, the tasks, the folder or the target modules, before
            anything is run; or nothing is to be run, and no cell is there.
    """
    store = CellStore(spec.output, shared_settings(spec), report_only=not run)
    store.check()
    grid, tasks = _planned(spec, store, console) if run else _recorded(spec, store)
    if run:
        store.open(spec.settings())
        write_plan(store.folder, grid.contestants)
    if console is not None:
        console.print(rich_table(plan_table(grid.contestants)))
        for sentence in grid.provenance():
            console.print(sentence, highlight=False, markup=False)
    failed = (Runner if apart else InProcessRunner)(grid, console).run() if run else []
    comparison = Comparison(grid, tasks, tuple(failed))
    report = write_results(comparison)
    if console is not None:
        show_tables(comparison, console)
        console.print(f"Report: {report}", highlight=False, markup=False)
    return comparison


def _planned(spec: CompareSpec, store: CellStore, console: Console | None) -> tuple[Grid, dict[str, ExperimentTask]]:
    """The grid of what is to be run, with all that it needs looked for and checked."""
    tasks = {source: spec.load_task(source) for source in spec.tasks}
    for source, task in tasks.items():
        if spec.loss_on_prompts and CAUSAL_LM not in task.heads:
            raise ConfigError(f"loss_on_prompts needs a causal language model, which {source} is not learned by.")
    for name in spec.texts:
        load_named_text(name, "texts")
    with rich_progress(console) as progress:
        local_model_name(spec.model, progress=progress)
    contestants = plan(spec, tasks)
    for quantization in {contestant.quantization for contestant in contestants} | {spec.quantization}:
        if quantization is not None:
            quantization_config(quantization, resolve_dtype(spec.dtype))  # its library is there
    grid = Grid(spec, contestants, task_places(tasks), store)
    grid.done()  # cells with other settings are refused before anything is written
    return grid, tasks


def _recorded(spec: CompareSpec, store: CellStore) -> tuple[Grid, dict[str, ExperimentTask]]:
    """The grid of what was run, out of the cells alone."""
    recorded = Recorded(spec)
    grid = Grid(spec, recorded.contestants(), recorded.places(), store)
    if not grid.done():
        raise ConfigError(
            f"'{spec.output}' has no cell with these settings; call the command with the folder's own config.yaml."
        )
    return grid, {}
