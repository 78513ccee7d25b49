"""`dynalora demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from dynalora.cli.shared import ConfigOption, after_imports, console, settings


def demo(
    config: ConfigOption = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Run folder: new or empty. \\[runs/demo]", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Another model: Hub id or folder. \\[SmolLM2-135M-Instruct]",
            show_default=False,
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option("--methods", help="What to compare, with commas. \\[disel,lora]", show_default=False),
    ] = None,
    r: Annotated[
        int | None, typer.Option("--rank", "-r", help="Same for all. \\[16]", show_default=False)
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Optimizer steps per method.", show_default=False)
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help="Peak learning rate.", show_default=False)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", help="Questions per step.", show_default=False)
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="Another task of reasoning-gym.", show_default=False)
    ] = None,
    held_out: Annotated[
        int | None, typer.Option("--held-out", help="Number of held-out questions.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="Of the data, the start and the order. \\[42]", show_default=False),
    ] = None,
) -> None:
    """Fine-tune a small real model with DISeL and LoRA; compare learning and forgetting.

    Needs no GPU and no data: the model is fetched once and kept, the task is
    generated. A few minutes on two cores. The run folder gets both adapters,
    the metrics, plots and a report.

    [bold]Examples[/bold]

    [cyan]dynalora demo[/cyan]
    [cyan]dynalora demo --methods dira,lora --rank 8 -o runs/demo-dira[/cyan]
    """
    flags = dict(locals())
    flags.pop("config")
    if methods is not None:
        flags["methods"] = [item.strip() for item in methods.split(",") if item.strip()]
    from dynalora.jobs.demo.run import run_demo
    from dynalora.jobs.demo.settings import DemoSpec

    after_imports()
    run_demo(settings(DemoSpec, config, flags), console=console())
