"""`dynalora gates`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynalora.cli.shared import (
    AdapterArgument,
    ConfigOption,
    ModelOption,
    after_imports,
    console,
    load_adapted,
    settings,
)


def gates(
    adapter: AdapterArgument = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            "--domain",
            metavar="NAME=SOURCE",
            help="Text of a domain; the first is compared with the others. May be given again.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", help="A single domain, without a name.", show_default=False),
    ] = None,
    model: ModelOption = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", help="Folder for tables, plots and a report: new or empty.", show_default=False
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Which split. \\[train]", show_default=False)
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", help="Use the first rows or passages. \\[64]", show_default=False),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", help="Longest document, in tokens. \\[512]", show_default=False),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", help="Documents at once. \\[8]", show_default=False)
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option("--plot", metavar="FILE.png", help="Also draw histograms.", show_default=False),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Show on which text a DISeL adapter's gates open, and where.

    Mean gates by domain, depth and kind of module (0 is closed, 1 is open), and
    how well they tell the first domain from the others: the area under the ROC
    curve. Of instruction data only response tokens count; of plain text (any
    text file, or rows with a text field) all do.

    [bold]Example[/bold]

    [cyan]dynalora gates runs/first --domain math=held-out.jsonl --domain general=wiki.txt -o runs/first-gates[/cyan]
    """
    flags = {
        "adapter": adapter,
        "data": data,
        "model": model,
        "output": output,
        "split": split,
        "limit": limit,
    }
    flags |= {"max_length": max_length, "batch_size": batch_size, "plot": plot}
    from dynalora.common.files import write_file
    from dynalora.common.progress import rich_progress
    from dynalora.drawing.gates import plot_gates
    from dynalora.drawing.style import rendered
    from dynalora.jobs.gates.record import compare_gates
    from dynalora.jobs.gates.report import domains_table, kinds_table, separation_table, summary, write_gates
    from dynalora.jobs.gates.settings import GatesSpec
    from dynalora.lab.report import rich_table
    from dynalora.lab.run_folder import RunFolder

    spec = settings(GatesSpec, config, {**flags, "domains": _named(domain)})
    after_imports()
    if spec.output is not None:
        RunFolder.check(spec.output, spec.settings())
    screen = console()
    with rich_progress(screen) as progress:
        result = compare_gates(spec, progress=progress, load=load_adapted)
    if len(result.records) == 1:
        ((name, record),) = result.records.items()
        note = f"Over {record.tokens:,} {result.counted[name].removeprefix('all ')}"
        note += "; early, middle and late are thirds of the layers."
        screen.print(rich_table(kinds_table(record, note=note)))
    else:
        screen.print(rich_table(domains_table(result)))
        screen.print(rich_table(separation_table(result)))
        screen.print(summary(result), highlight=False, markup=False)
    if spec.plot is not None:
        write_file(Path(spec.plot), rendered(plot_gates(result.records)))
        screen.print(f"Written: {spec.plot}", highlight=False, markup=False)
    if spec.output is not None:
        with RunFolder.create(spec.output, spec.settings()) as run:
            write_gates(result, run)
            run.finish()
        screen.print(f"Report: {run.report}", highlight=False, markup=False)


def _named(pairs: list[str] | None) -> dict[str, str] | None:
    """`["math=file.jsonl"]` as a mapping; None if there is none."""
    from dynalora.errors import ConfigError

    named: dict[str, str] = {}
    for pair in pairs or ():
        name, sign, source = (part.strip() for part in pair.partition("="))
        if not (name and sign and source):
            raise ConfigError(f"The domain '{pair}' is not of the form NAME=SOURCE.")
        if name in named:
            raise ConfigError(f"The domain '{name}' is given twice; give each name once.")
        named[name] = source
    return named or None
