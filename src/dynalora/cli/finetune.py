"""`dynalora finetune`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dynalora.cli.lab_options import Quantization
from dynalora.cli.shared import ConfigOption, after_imports, console, method_options, or_resume, settings
from dynalora.methods import method_names

_JOB, _DATA, _METHOD, _TRAINING, _RUN = "Model, data, result", "Data in detail", "Method", "Training", "Run"


def _option(*names: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **more)


def finetune(
    config: ConfigOption = None,
    model: Annotated[
        str | None, _option("--model", "-m", help="Hub id or folder of a causal language model.", panel=_JOB)
    ] = None,
    data: Annotated[
        str | None,
        _option(
            "--data", "-d", help="Hub id, .jsonl/.json/.csv/.parquet file (.gz too), or folder.", panel=_JOB
        ),
    ] = None,
    output: Annotated[
        str | None, _option("--output", "-o", help="Run folder: new or empty.", panel=_JOB)
    ] = None,
    method: Annotated[
        str | None,
        _option(
            "--method",
            help=f"{', '.join(method_names())}; PEFT's lora, rslora, lora+, dora, pissa, adalora, randlora, miss or "
            "p-tuning; or the file of a PEFT configuration. \\[disel]",
            panel=_METHOD,
        ),
    ] = None,
    r: Annotated[
        int | None, _option("--rank", "-r", help="Rank of the adapter. \\[16]", panel=_METHOD)
    ] = None,
    alpha: Annotated[
        float | None,
        _option(
            "--alpha", help="Updates are scaled by alpha / rank. \\[the method's default]", panel=_METHOD
        ),
    ] = None,
    dropout: Annotated[
        float | None, _option("--dropout", help="On the adapter's input. \\[0]", panel=_METHOD)
    ] = None,
    target_modules: Annotated[
        str | None,
        _option(
            "--target-modules",
            "-t",
            help="Names with commas, a regular expression, or all-linear. \\[all-linear]",
            panel=_METHOD,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        _option(
            "--option",
            "-O",
            metavar="NAME=VALUE",
            help="Any other field of the method's configuration; repeatable.",
            panel=_METHOD,
        ),
    ] = None,
    steps: Annotated[
        int | None, _option("--steps", help="Optimizer steps, instead of epochs.", panel=_TRAINING)
    ] = None,
    epochs: Annotated[
        float | None, _option("--epochs", help="Passes over the data. \\[1]", panel=_TRAINING)
    ] = None,
    learning_rate: Annotated[
        float | None,
        _option("--learning-rate", "--lr", help="Peak learning rate of AdamW. \\[2e-4]", panel=_TRAINING),
    ] = None,
    schedule: Annotated[
        str | None,
        _option("--schedule", help="cosine, linear or constant_with_warmup. \\[cosine]", panel=_TRAINING),
    ] = None,
    warmup: Annotated[
        float | None, _option("--warmup", help="Part of the steps. \\[0.03]", panel=_TRAINING)
    ] = None,
    weight_decay: Annotated[
        float | None, _option("--weight-decay", help="Never on gates. \\[0]", panel=_TRAINING)
    ] = None,
    batch_size: Annotated[
        int | None, _option("--batch-size", "-b", help="Sequences per device. \\[8]", panel=_TRAINING)
    ] = None,
    gradient_accumulation: Annotated[
        int | None,
        _option("--gradient-accumulation", help="Batches per optimizer step. \\[1]", panel=_TRAINING),
    ] = None,
    max_grad_norm: Annotated[
        float | None, _option("--max-grad-norm", help="Gradient clipping; 0: none. \\[1]", panel=_TRAINING)
    ] = None,
    template: Annotated[
        str | None,
        _option("--template", help="chat, alpaca, llm-adapters, magicoder or none. \\[chat]", panel=_DATA),
    ] = None,
    max_length: Annotated[
        int | None, _option("--max-length", help="Longest sequence, in tokens. \\[512]", panel=_TRAINING)
    ] = None,
    seed: Annotated[
        int | None, _option("--seed", help="Of the start, the split and the order. \\[42]", panel=_TRAINING)
    ] = None,
    dtype: Annotated[
        str | None,
        _option("--dtype", help="Base weights: auto, float32, bfloat16, float16. \\[auto]", panel=_TRAINING),
    ] = None,
    quantization: Quantization = None,
    gradient_checkpointing: Annotated[
        bool | None,
        _option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Less memory, more time.",
            panel=_TRAINING,
        ),
    ] = None,
    prompt_field: Annotated[
        str | None, _option("--prompt-field", help="Field with the prompt. \\[found]", panel=_DATA)
    ] = None,
    response_field: Annotated[
        str | None, _option("--response-field", help="Field with the response. \\[found]", panel=_DATA)
    ] = None,
    input_field: Annotated[
        str | None, _option("--input-field", help="Optional text after the prompt.", panel=_DATA)
    ] = None,
    messages_field: Annotated[
        str | None,
        _option("--messages-field", help="Field with a chat, instead of the three above.", panel=_DATA),
    ] = None,
    split: Annotated[
        str | None, _option("--split", help="Which split to train on. \\[train]", panel=_DATA)
    ] = None,
    subset: Annotated[
        str | None, _option("--subset", help="Configuration of a Hub data set.", panel=_DATA)
    ] = None,
    limit: Annotated[int | None, _option("--limit", help="Use only the first rows.", panel=_DATA)] = None,
    eval_data: Annotated[
        str | None, _option("--eval-data", help="Held-out data from elsewhere.", panel=_DATA)
    ] = None,
    eval_split: Annotated[str | None, _option("--eval-split", help="Held-out split.", panel=_DATA)] = None,
    eval_fraction: Annotated[
        float | None, _option("--eval-fraction", help="Part to hold out otherwise. \\[0.05]", panel=_DATA)
    ] = None,
    log_every: Annotated[
        int | None, _option("--log-every", help="Steps. \\[a hundredth of the run]", panel=_RUN)
    ] = None,
    eval_every: Annotated[
        int | None, _option("--eval-every", help="Steps; 0: only at both ends. \\[a fifth]", panel=_RUN)
    ] = None,
    save_every: Annotated[
        int | None, _option("--save-every", help="Steps; 0: no checkpoints. \\[a tenth]", panel=_RUN)
    ] = None,
    retention: Annotated[
        bool | None,
        _option("--retention/--no-retention", help="Measure what the model forgot. \\[yes]", panel=_RUN),
    ] = None,
    monitor_every: Annotated[
        int | None,
        _option(
            "--monitor-every", help="Steps between measures of retention; 0: none. \\[a tenth]", panel=_RUN
        ),
    ] = None,
    monitor_text: Annotated[
        list[str] | None,
        _option(
            "--monitor-text",
            metavar="NAME=SOURCE",
            help="Further text to measure it on; repeatable.",
            panel=_RUN,
        ),
    ] = None,
    max_forgetting: Annotated[
        float | None,
        _option("--max-forgetting", help="Stop above this KL from the base, nats per token.", panel=_RUN),
    ] = None,
    keep_best: Annotated[
        bool | None,
        _option("--keep-best/--no-keep-best", help="Keep the best within it, and do not stop.", panel=_RUN),
    ] = None,
    trust_remote_code: Annotated[
        bool | None, _option("--trust-remote-code", help="Run code that comes with the model.", panel=_RUN)
    ] = None,
    resume: Annotated[
        bool | None, _option("--resume", help="Continue the killed run in --output.", panel=_RUN)
    ] = None,
) -> None:
    """Fine-tune your model on your data, and see what it learned and what it forgot.

    Data are rows with a prompt and a response (the usual field names are
    found by themselves) or chat messages; the loss is on the responses only.
    The run folder gets the adapter, the metrics, plots and a report.

    [bold]Examples[/bold]

    [cyan]dynalora finetune -m Qwen/Qwen3-0.6B -d my.jsonl -o runs/first[/cyan]
    [cyan]dynalora finetune -m ./model -d my.csv -o runs/b --method dira -O penalty_weight=1e-3[/cyan]
    [cyan]dynalora finetune --config runs/first/config.yaml -o runs/higher --lr 5e-4[/cyan]
    [cyan]dynalora finetune --config runs/first/config.yaml --resume[/cyan]  (continues a killed run)
    """
    flags = dict(locals())
    for name in ("config", "option"):
        flags.pop(name)
    from dynalora.jobs.finetune.run import finetune as run
    from dynalora.jobs.finetune.settings import FinetuneSpec

    after_imports()
    flags["method_options"] = method_options(config, option)
    spec = settings(FinetuneSpec, config, flags)
    with or_resume("finetune", spec.output):
        run(spec, console=console())
