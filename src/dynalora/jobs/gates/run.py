"""Record gates over domains, show the tables and write the files and the folder that were asked for."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from dynalora.common.files import write_file
from dynalora.common.progress import rich_progress
from dynalora.drawing.gates import plot_gates
from dynalora.drawing.style import rendered
from dynalora.jobs.gates.record import GatesResult, compare_gates
from dynalora.jobs.gates.report import domains_table, kinds_table, separation_table, summary, write_gates
from dynalora.jobs.gates.settings import GatesSpec
from dynalora.lab.report import rich_table
from dynalora.lab.run_folder import RunFolder


def run_gates(spec: GatesSpec, *, console: Console) -> GatesResult:
    """Record, show and write the gates.

    Args:
        spec: Which adapter, on which text, and which files to write.
        console: Where progress and the tables are shown.

    Raises:
        DynaloraError: As [`compare_gates`][dynalora.jobs.gates.record.compare_gates], or the folder is in use.
    """
    if spec.output is not None:
        RunFolder.check(spec.output, spec.settings())
    with rich_progress(console) as progress:
        result = compare_gates(spec, progress=progress)
    if len(result.records) == 1:
        ((name, record),) = result.records.items()
        note = f"Over {record.tokens:,} {result.counted[name].removeprefix('all ')}"
        note += "; early, middle and late are thirds of the layers."
        console.print(rich_table(kinds_table(record, note=note)))
    else:
        console.print(rich_table(domains_table(result)))
        console.print(rich_table(separation_table(result)))
        console.print(summary(result), highlight=False, markup=False)
    if spec.plot is not None:
        write_file(Path(spec.plot), rendered(plot_gates(result.records)))
        console.print(f"Written: {spec.plot}", highlight=False, markup=False)
    if spec.output is not None:
        with RunFolder.create(spec.output, spec.settings()) as run:
            write_gates(result, run)
            run.finish()
        console.print(f"Report: {run.report}", highlight=False, markup=False)
    return result
