"""`dynalora compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from dynalora.cli import lab_options as shared
from dynalora.cli.lab_options import listed, option
from dynalora.cli.shared import ConfigOption, after_imports, complain, console, settings

_COMPARED, _TRAINING, _MEASURING, _RUN = "What is compared", "Training", "Measuring", "Run"


def compare(
    config: ConfigOption = None,
    tasks: Annotated[
        str | None,
        option("--tasks", help="With commas: benchmarks, generated tasks, or files.", panel=_COMPARED),
    ] = None,
    output: Annotated[
        str | None, option("--output", "-o", help="Folder: new, or of this very comparison.")
    ] = None,
    methods: Annotated[
        str | None,
        option("--methods", help="With commas. \\[lora and dynalora's four]", panel=_COMPARED),
    ] = None,
    variant: Annotated[
        list[str] | None,
        option(
            "--variant",
            metavar="LABEL=METHOD,NAME=VALUE,…",
            help="A method with settings of its own (r, alpha, learning_rates, any option); repeatable.",
            panel=_COMPARED,
        ),
    ] = None,
    reference: Annotated[
        str | None,
        option("--reference", help="What all others are compared with. \\[lora]", panel=_COMPARED),
    ] = None,
    learning_rates: Annotated[
        str | None,
        option("--learning-rates", "--lrs", help="The grid, with commas. \\[2e-4]", panel=_COMPARED),
    ] = None,
    seeds: Annotated[int | None, option("--seeds", help="Runs per method. \\[3]", panel=_COMPARED)] = None,
    all_rates: Annotated[
        bool | None,
        option(
            "--all-rates/--chosen-rate",
            help="Every seed at every learning rate, or only the first. \\[only the first]",
            panel=_COMPARED,
        ),
    ] = None,
    match_parameters: Annotated[
        bool | None,
        option(
            "--match-parameters/--same-rank",
            help="Ranks such that all train as many parameters. \\[match]",
            panel=_COMPARED,
        ),
    ] = None,
    r: shared.Rank = None,
    alpha: shared.Alpha = None,
    dropout: Annotated[
        float | None, option("--dropout", help="On the adapter's input. \\[0]", panel=_TRAINING)
    ] = None,
    target_modules: shared.TargetModules = None,
    steps: Annotated[int | None, option("--steps", help="Optimizer steps. \\[100]", panel=_TRAINING)] = None,
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
    quantization: shared.Quantization = None,
    validation: Annotated[
        int | None,
        option(
            "--validation",
            help="Training questions that learning rates are chosen on. \\[100]",
            panel=_MEASURING,
        ),
    ] = None,
    held_out: shared.HeldOut = None,
    generated: shared.Generated = None,
    generated_tokens: shared.GeneratedTokens = None,
    eval_batch_size: shared.EvalBatchSize = None,
    retention: Annotated[
        bool | None,
        option("--retention/--no-retention", help="Measure what is forgotten. \\[yes]", panel=_MEASURING),
    ] = None,
    text: Annotated[
        list[str] | None,
        option(
            "--text",
            metavar="NAME=SOURCE",
            help="Measure that on this text, too; repeatable.",
            panel=_MEASURING,
        ),
    ] = None,
    retention_tasks: Annotated[
        str | None,
        option(
            "--retention-tasks",
            help="With commas: benchmarks that nothing is trained for, measured on every model.",
            panel=_MEASURING,
        ),
    ] = None,
    retention_items: Annotated[
        int | None, option("--retention-items", help="The first items of each. \\[all]", panel=_MEASURING)
    ] = None,
    retention_shots: Annotated[
        int | None,
        option(
            "--retention-shots",
            help="Examples before each question of lm_eval tasks. \\[the task's]",
            panel=_MEASURING,
        ),
    ] = None,
    seed: shared.Seed = None,
    jobs: Annotated[
        int | None, option("--jobs", "-j", help="Cells at the same time. \\[one per GPU, or one]", panel=_RUN)
    ] = None,
    threads: shared.Threads = None,
    report: Annotated[
        bool, option("--report", help="Run nothing: report on the cells that are there.", panel=_RUN)
    ] = False,
) -> None:
    """Compare methods × learning rates × seeds × tasks: one table, one report.

    Every cell runs once, in a process of its own. Call it again to go on
    after a kill, to add methods or seeds, or at the same time elsewhere to
    share the cells. Learning rates are chosen per method and task on
    training questions set aside; ranks so that all train as many parameters.

    [bold]Examples[/bold]

    [cyan]dynalora compare --tasks arc_easy,openbookqa --lrs 2e-4,5e-4,1e-3 -o runs/compare[/cyan]
    [cyan]dynalora compare --tasks sst2 --model roberta-base --methods lora,dora,dira -o runs/glue[/cyan]
    [cyan]dynalora compare --config runs/compare/config.yaml --jobs 2[/cyan]
    """
    flags = dict(locals())
    flags.pop("config")
    flags.pop("report")
    from dynalora.jobs.compare.run import run_compare
    from dynalora.jobs.compare.settings import CompareSpec, variant_from
    from dynalora.lab.settings import read_yaml

    after_imports()
    for name in ("tasks", "methods", "learning_rates", "retention_tasks"):
        flags[name] = listed(flags[name])
    flags["texts"] = flags.pop("text")
    given = flags.pop("variant")
    if given:
        kept = (read_yaml(config).get("variants") or {}) if config is not None else {}
        flags["variants"] = {**kept, **dict(variant_from(one) for one in given)}
    spec = settings(CompareSpec, config, flags)
    try:
        comparison = run_compare(spec, console=console(), run=not report)
    except KeyboardInterrupt:
        complain(
            f"Interrupted; finished cells are kept. Go on with: dynalora compare --config {spec.output}/config.yaml"
        )
        raise typer.Exit(130) from None
    if comparison.failed:
        complain(f"{len(comparison.failed)} cells failed; call the command again to try them once more.")
        raise typer.Exit(1)
