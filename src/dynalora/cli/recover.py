"""`dynalora recover`."""

from __future__ import annotations

from typing import Annotated

import typer

from dynalora.cli import lab_options as shared
from dynalora.cli.lab_options import listed, option
from dynalora.cli.shared import ConfigOption, after_imports, console, or_resume, settings


def recover(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SOURCE",
            help="Run folder of dynalora forgetting, or an adapter after Task B.",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = None,
    output: shared.Output = None,
    initial: Annotated[
        str | None, option("--initial", help="The adapter after Task A, if SOURCE is an adapter.")
    ] = None,
    task_a: Annotated[str | None, option("--task-a", help="To recover. \\[SOURCE's]")] = None,
    task_b: Annotated[str | None, option("--task-b", help="The other. \\[SOURCE's]")] = None,
    strategies: Annotated[
        str | None, option("--strategies", help="With commas. \\[rlgr,random,naive]", panel="Recovery")
    ] = None,
    examples: Annotated[
        int | None, option("--examples", "-n", help="Of Task A. \\[8]", panel="Recovery")
    ] = None,
    batch_size: Annotated[
        int | None, option("--batch-size", "-b", help="Examples per step. \\[8]", panel="Recovery")
    ] = None,
    epochs: Annotated[
        int | None, option("--epochs", help="Passes over the examples. \\[2]", panel="Recovery")
    ] = None,
    learning_rate: Annotated[
        float | None,
        option("--learning-rate", "--lr", help="Constant, of AdamW. \\[1e-4]", panel="Recovery"),
    ] = None,
    weight_decay: Annotated[
        float | None, option("--weight-decay", help="Never on gates. \\[0]", panel="Recovery")
    ] = None,
    max_grad_norm: Annotated[
        float | None, option("--max-grad-norm", help="Gradient clipping; 0: none. \\[1]", panel="Recovery")
    ] = None,
    tau: Annotated[
        float | None,
        option("--tau", help="Low rank: at most one singular value above this. \\[0.001]", panel="Recovery"),
    ] = None,
    checkpoints: Annotated[
        int | None, option("--checkpoints", help="Only SOURCE's first seeds. \\[all]", panel="Recovery")
    ] = None,
    model: shared.Model = None,
    data: shared.Data = None,
    train_limit: shared.TrainLimit = None,
    max_length: shared.MaxLength = None,
    system: shared.System = None,
    template: shared.Template = None,
    by_generation: shared.ByGeneration = None,
    run_code: shared.RunCode = None,
    data_seed: shared.DataSeed = None,
    dtype: shared.Dtype = None,
    held_out: shared.HeldOut = None,
    generated: shared.Generated = None,
    generated_tokens: shared.GeneratedTokens = None,
    eval_batch_size: shared.EvalBatchSize = None,
    seed: shared.Seed = None,
    seeds: shared.Seeds = None,
    threads: shared.Threads = None,
    resume: shared.Resume = None,
) -> None:
    """Recover a forgotten task from a few examples: rlgr, random or naive.

    rlgr takes out what Task B wrote into matrices that Task A left at
    effective rank 0 or 1, random as much elsewhere, naive nothing; then all
    train on the examples. Model, tasks and measuring are those of the
    source run unless given.

    [bold]Example[/bold]

    [cyan]dynalora recover runs/forgetting -o runs/recovery --examples 8 --seeds 5[/cyan]
    """
    flags = dict(locals())
    flags.pop("config")
    flags["strategies"] = listed(strategies)
    from dynalora.jobs.stages.recovery import run_recovery
    from dynalora.jobs.stages.settings import RecoverSpec

    after_imports()
    spec = settings(RecoverSpec, config, flags)
    with or_resume("recover", spec.output):
        run_recovery(spec, console=console())
