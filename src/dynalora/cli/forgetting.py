"""`dynalora forgetting`."""

from __future__ import annotations

from typing import Annotated

from dynalora.cli import lab_options as shared
from dynalora.cli.lab_options import option
from dynalora.cli.shared import ConfigOption, after_imports, console, method_options, or_resume, settings


def forgetting(
    config: ConfigOption = None,
    task_a: Annotated[str | None, option("--task-a", help="Learned, forgotten, learned again.")] = None,
    task_b: Annotated[str | None, option("--task-b", help="Makes it forgotten.")] = None,
    output: shared.Output = None,
    method: Annotated[
        str | None, option("--method", help="dira, any other, or lora. \\[dira]", panel="Training")
    ] = None,
    r: shared.Rank = None,
    alpha: shared.Alpha = None,
    dropout: Annotated[
        float | None, option("--dropout", help="On the adapter's input. \\[0]", panel="Training")
    ] = None,
    target_modules: shared.TargetModules = None,
    method_option: Annotated[
        list[str] | None,
        option(
            "--option",
            "-O",
            metavar="NAME=VALUE",
            help="Any other field of the method's configuration; repeatable.",
            panel="Training",
        ),
    ] = None,
    steps: shared.Steps = None,
    steps_b: Annotated[
        int | None, option("--steps-b", help="Steps on Task B. \\[as many]", panel="Training")
    ] = None,
    steps_recovered: Annotated[
        int | None,
        option("--steps-recovered", help="Steps on Task A again. \\[as many]", panel="Training"),
    ] = None,
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
    tau: Annotated[
        float | None,
        option("--tau", help="A singular value counts above this. \\[0.001]", panel="Measuring"),
    ] = None,
    ablation: Annotated[
        bool | None,
        option(
            "--ablation/--no-ablation",
            help="Also measure Task A without half of the layers.",
            panel="Measuring",
        ),
    ] = None,
    seed: shared.Seed = None,
    seeds: shared.Seeds = None,
    log_every: shared.LogEvery = None,
    threads: shared.Threads = None,
    resume: shared.Resume = None,
) -> None:
    """Train on Task A, on Task B, on Task A again; see what is forgotten.

    A task is one of reasoning-gym (NAME or NAME:option=value,…), or files:
    data/ARC-Easy for data/ARC-Easy.train.jsonl and data/ARC-Easy.dev.jsonl
    (multiple choice as in LLM-Adapters, or word problems as in GSM8K).
    After each stage the run folder gets the adapter, its rank landscape
    and the scores on both tasks; a finished stage is never run again.

    [bold]Examples[/bold]

    [cyan]dynalora forgetting --task-a data/ARC-Easy --task-b data/gsm8k -o runs/forgetting --seeds 3[/cyan]
    [cyan]dynalora forgetting --config runs/forgetting/config.yaml --resume[/cyan]  (continues a killed run)
    """
    flags = dict(locals())
    for name in ("config", "method_option"):
        flags.pop(name)
    from dynalora.jobs.stages.forgetting import run_forgetting
    from dynalora.jobs.stages.settings import ForgettingSpec

    after_imports()
    flags["method_options"] = method_options(config, method_option)
    spec = settings(ForgettingSpec, config, flags)
    with or_resume("forgetting", spec.output):
        run_forgetting(spec, console=console())
