"""`dynalora bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynalora.cli.shared import ConfigOption, after_imports, console, settings


def bench(
    config: ConfigOption = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Hub id or folder; smollm2: the demo's model. \\[smollm2]"),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods", help="With commas; ratios are to lora. \\[lora,dira,disel]", show_default=False
        ),
    ] = None,
    dtypes: Annotated[
        str | None,
        typer.Option(
            "--dtypes", help="Of the base weights, with commas. \\[float32,bfloat16]", show_default=False
        ),
    ] = None,
    r: Annotated[
        int | None, typer.Option("--rank", "-r", help="Same for all. \\[16]", show_default=False)
    ] = None,
    target_modules: Annotated[
        str | None,
        typer.Option("--target-modules", "-t", help="Same for all. \\[all-linear]", show_default=False),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", help="Sequences per step. \\[4]", show_default=False)
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", "-l", help="Tokens per sequence. \\[128]", show_default=False)
    ] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", help="Measured steps per method. \\[20]", show_default=False)
    ] = None,
    warmup: Annotated[
        int | None, typer.Option("--warmup", help="Steps before measuring. \\[3]", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of the random tokens. \\[0]", show_default=False)
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", help="CPU threads. \\[torch's choice]", show_default=False)
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda or auto. \\[auto]", show_default=False)
    ] = None,
    control: Annotated[
        bool | None,
        typer.Option(
            "--control", help="Measure lora twice: the ratio of the two is the noise.", show_default=False
        ),
    ] = None,
    memory: Annotated[
        bool | None,
        typer.Option(
            "--memory/--no-memory", help="Measure memory of training steps too. \\[yes]", show_default=False
        ),
    ] = None,
    generate: Annotated[
        bool | None,
        typer.Option(
            "--generate", help="Time greedy generation instead of training steps.", show_default=False
        ),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option("--new-tokens", help="With --generate: tokens per prompt. \\[32]", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE.json", help="Also write everything measured to a file."),
    ] = None,
) -> None:
    """Time training steps, or generation, of the methods against PEFT's LoRA, in turns in one process.

    Forward, backward and optimizer (with the driver) apart; medians,
    ratios within a round, and peak memory. With --generate prefill and
    time per further token, with a key-value cache.

    [bold]Examples[/bold]

    [cyan]dynalora bench[/cyan]
    [cyan]dynalora bench -m ./model --methods lora,disel --dtypes bfloat16 --json bench.json[/cyan]
    [cyan]dynalora bench --generate --length 64 --new-tokens 64[/cyan]
    """
    flags = dict(locals())
    for name in ("config", "output"):
        flags.pop(name)
    for name in ("methods", "dtypes"):
        if flags[name] is not None:
            flags[name] = [item.strip() for item in flags[name].split(",") if item.strip()]
    from dynalora.common.files import write_file
    from dynalora.common.progress import rich_progress
    from dynalora.errors import ConfigError
    from dynalora.jobs.bench import generation
    from dynalora.jobs.bench.settings import BenchSpec
    from dynalora.jobs.bench.training import as_json, bench, tables
    from dynalora.lab.report import rich_table

    after_imports()
    spec = settings(BenchSpec, config, flags)
    if output is not None and output.is_dir():
        raise ConfigError(f"'{output}' is a folder; give --json the name of a file.")
    screen = console()
    with rich_progress(screen) as progress:
        if spec.generate:
            generated = generation.bench_generation(spec, progress=progress)
            shown = generation.generation_tables(spec, generated)
            written = generation.generation_json(spec, generated)
        else:
            results = bench(spec, progress=progress)
            shown, written = tables(spec, results), as_json(spec, results)
    for table in shown:
        screen.print(rich_table(table))
    if output is not None:
        write_file(output, written)
        screen.print(f"Written: {output}", highlight=False, markup=False)
