"""`dynalora transfer`."""

from __future__ import annotations

from typing import Annotated

from dynalora.cli import lab_options as shared
from dynalora.cli.lab_options import listed, option
from dynalora.cli.shared import ConfigOption, after_imports, console, method_options, or_resume, settings


def transfer(
    config: ConfigOption = None,
    tasks: Annotated[
        list[str] | None, option("--task", help="Repeatable; at least two. As for forgetting.")
    ] = None,
    output: shared.Output = None,
    methods: Annotated[
        str | None, option("--methods", help="With commas. \\[lora,dira]", panel="Training")
    ] = None,
    r: shared.Rank = None,
    alpha: shared.Alpha = None,
    target_modules: shared.TargetModules = None,
    method_option: Annotated[
        list[str] | None,
        option(
            "--option",
            "-O",
            metavar="METHOD.NAME=VALUE",
            help="Any other field of a method's configuration; repeatable.",
            panel="Training",
        ),
    ] = None,
    steps: shared.Steps = None,
    learning_rate: shared.LearningRate = None,
    schedule: shared.Schedule = None,
    warmup: shared.Warmup = None,
    weight_decay: shared.WeightDecay = None,
    batch_size: shared.BatchSize = None,
    gradient_accumulation: shared.GradientAccumulation = None,
    max_grad_norm: shared.MaxGradNorm = None,
    gradient_checkpointing: shared.GradientCheckpointing = None,
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
    log_every: shared.LogEvery = None,
    threads: shared.Threads = None,
    resume: shared.Resume = None,
) -> None:
    """Train on each of several tasks, measure on all: heat maps, methods side by side.

    [bold]Example[/bold]

    [cyan]dynalora transfer --task data/ARC-Easy --task data/openbookqa --task data/gsm8k -o runs/transfer[/cyan]
    """
    flags = dict(locals())
    for name in ("config", "method_option"):
        flags.pop(name)
    flags["methods"] = listed(methods)
    from dynalora.jobs.stages.settings import TransferSpec
    from dynalora.jobs.stages.transfer import run_transfer

    after_imports()
    flags["method_options"] = method_options(config, method_option)
    spec = settings(TransferSpec, config, flags)
    with or_resume("transfer", spec.output):
        run_transfer(spec, console=console())
