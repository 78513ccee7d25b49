"""`dynalora linear-model`."""

from __future__ import annotations

from typing import Annotated

import typer

from dynalora.cli.shared import ConfigOption, console, settings


def linear_model(
    config: ConfigOption = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", help="Run folder: new or empty. \\[runs/linear-model]", show_default=False
        ),
    ] = None,
    in_features: Annotated[
        int | None, typer.Option("--in-features", help="Length of the inputs. \\[16]", show_default=False)
    ] = None,
    out_features: Annotated[
        int | None, typer.Option("--out-features", help="Length of the targets. \\[16]", show_default=False)
    ] = None,
    task_rank: Annotated[
        int | None,
        typer.Option("--task-rank", help="Rank of the update that is needed. \\[4]", show_default=False),
    ] = None,
    r: Annotated[
        int | None, typer.Option("--rank", "-r", help="Of LoRA and DISeL. \\[4]", show_default=False)
    ] = None,
    separation: Annotated[
        float | None,
        typer.Option(
            "--separation",
            help="Of each population's mean from 0, in standard deviations. \\[1.5]",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Optimizer steps per method. \\[4000]", show_default=False)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", help="Samples per step. \\[256]", show_default=False)
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", "--lr", help="Peak learning rate. \\[0.02]", show_default=False),
    ] = None,
    gate_bias_init: Annotated[
        float | None,
        typer.Option("--gate-bias-init", help="Start of DISeL's gates. \\[-3]", show_default=False),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", help="To measure the losses on. \\[200000]", show_default=False),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="Of the maps, the start and the samples. \\[0]", show_default=False),
    ] = None,
) -> None:
    """Show where a fixed update must fail: DISeL's linear model, solved and trained.

    Two Gaussian populations, of which only one needs the update. Full
    fine-tuning and LoRA end at the best fixed correction, DISeL at the
    Bayes-optimal one; both are known in closed form.

    [bold]Example[/bold]

    [cyan]dynalora linear-model --separation 2 -o runs/linear-model[/cyan]
    """
    flags = dict(locals())
    flags.pop("config")
    from dynalora.jobs.linear_model.report import run_linear_model
    from dynalora.jobs.linear_model.settings import LinearModelSpec

    run_linear_model(settings(LinearModelSpec, config, flags), console=console())
