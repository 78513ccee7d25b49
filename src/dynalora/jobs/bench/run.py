"""Time training steps or generation, show the tables and write the file that was asked for."""

from __future__ import annotations

from rich.console import Console

from dynalora.common.files import write_file
from dynalora.common.progress import rich_progress
from dynalora.jobs.bench import generation, training
from dynalora.jobs.bench.settings import BenchSpec
from dynalora.lab.report import say


def run_bench(spec: BenchSpec, *, console: Console) -> None:
    """Do the measurement that the settings ask for."""
    with rich_progress(console) as progress:
        if spec.generate:
            generated = generation.bench_generation(spec, progress=progress)
            tables = generation.generation_tables(spec, generated)
            text = generation.generation_json(spec, generated)
        else:
            measured = training.bench(spec, progress=progress)
            tables, text = training.tables(spec, measured), training.as_json(spec, measured)
    say(console, *tables)
    if spec.json is not None:
        write_file(spec.json, text, replace=False)
        say(console, f"Written: {spec.json}")
