"""`dynalora evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from dynalora.cli.shared import ConfigOption, ModelOption, after_imports, console, settings


def evaluate(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL_OR_ADAPTER", help="A run folder, folder or Hub id.", show_default=False
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", "-t", help="A task or group of tasks; repeatable.", show_default=False),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", help="Folder with benchmark files. \\[the Hub]", show_default=False),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="train, dev or test. \\[test, else dev]", show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", help="The first items of each task.", show_default=False)
    ] = None,
    model: ModelOption = None,
    template: Annotated[
        str | None,
        typer.Option(
            "--template",
            help="Prompts: chat, alpaca, metamath, llm-adapters, magicoder or none. \\[chat]",
            show_default=False,
        ),
    ] = None,
    likelihood: Annotated[
        bool | None,
        typer.Option(
            "--likelihood",
            help="Multiple choice: the likeliest option, nothing generated.",
            show_default=False,
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="Only this metric; repeatable. \\[all]", show_default=False),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", help="Items per batch. \\[16]", show_default=False)
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", help="Longest answer. \\[the task's]", show_default=False),
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", help="Tokens per window of text. \\[512]", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of generated tasks. \\[0]", show_default=False)
    ] = None,
    run_code: Annotated[
        bool | None,
        typer.Option("--run-code", help="Execute the code the model writes, sandboxed.", show_default=False),
    ] = None,
    weak_sandbox: Annotated[
        bool | None,
        typer.Option(
            "--weak-sandbox", help="Execute it even where it cannot be contained.", show_default=False
        ),
    ] = None,
    code_seconds: Annotated[
        float | None,
        typer.Option("--code-seconds", help="Time limit of each program. \\[5]", show_default=False),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(
            "--shots",
            help="Examples before each question of lm_eval tasks. \\[the task's]",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="auto, float32, bfloat16, float16. \\[auto]", show_default=False),
    ] = None,
    quantization: Annotated[
        str | None,
        typer.Option(
            "--quantization",
            help="4bit or 8bit weights (bitsandbytes), or int8 (torchao).",
            show_default=False,
        ),
    ] = None,
    json: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="FILE.json",
            help="Also write everything measured to a file.",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Measure a model or an adapter on benchmarks by name.

    Groups: commonsense, arithmetic, code, glue. Also reasoning_gym:NAME and
    lm_eval:NAME. Every number comes with its 95 % interval.

    [bold]Examples[/bold]

    [cyan]dynalora evaluate runs/first --task arc_easy --task gsm8k --limit 200[/cyan]
    [cyan]dynalora evaluate runs/first --task commonsense --template llm-adapters --json results.json[/cyan]
    [cyan]dynalora evaluate smollm2 --task humaneval --data benchmarks --run-code[/cyan]
    """
    flags = {name: value for name, value in locals().items() if name != "config"}
    from dynalora.common.progress import rich_progress
    from dynalora.jobs.evaluate.run import evaluate as run
    from dynalora.jobs.evaluate.run import results_table
    from dynalora.jobs.evaluate.settings import EvaluateSpec
    from dynalora.lab.report import rich_table

    after_imports()
    for name in ("task", "metric"):  # typer gives an empty list where the flag was not given
        flags[name] = [own for given in flags[name] or [] for own in given.split(",")] or None
    spec = settings(EvaluateSpec, config, flags)
    screen = console()
    with rich_progress(screen) as progress:
        results = run(spec, progress=progress)
    screen.print(rich_table(results_table(results)))
    if spec.json is not None:
        screen.print(f"Written: {spec.json}", highlight=False, markup=False)
