"""Options that the experiments on forgetting share: model and data, training, measuring."""

from __future__ import annotations

from typing import Annotated, Any

import typer

_DATA, _TRAINING, _MEASURING, _RUN = "Model and data", "Training", "Measuring", "Run"


def option(*names: str, help: str, panel: str | None = None, **more: Any) -> Any:
    """An option without a default of its own: the settings class has them all."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **more)


Output = Annotated[str | None, option("--output", "-o", help="Run folder: new or empty.")]
Model = Annotated[
    str | None, option("--model", "-m", help="Hub id, folder, or smollm2. \\[smollm2]", panel=_DATA)
]
Data = Annotated[
    str | None,
    option("--data", help="Folder with benchmarks' files, as for evaluate. \\[the Hub]", panel=_DATA),
]
TrainLimit = Annotated[
    int | None,
    option("--train-limit", help="Training questions per task. \\[all; 1000 generated]", panel=_DATA),
]
MaxLength = Annotated[
    int | None,
    option("--max-length", help="Longer training questions are left out; tokens. \\[256]", panel=_DATA),
]
System = Annotated[
    str | None, option("--system", help="System message. \\[the chat template's]", panel=_DATA)
]
Template = Annotated[
    str | None,
    option("--template", help="Prompts: chat, or a paper's format, as for evaluate. \\[chat]", panel=_DATA),
]
ByGeneration = Annotated[
    bool | None,
    option(
        "--by-generation/--by-likelihood",
        help="How multiple choice is learned and answered. \\[by likelihood]",
        panel=_MEASURING,
    ),
]
RunCode = Annotated[
    bool | None,
    option("--run-code", help="Execute generated code (HumanEval, MBPP), in a sandbox.", panel=_MEASURING),
]
DataSeed = Annotated[int | None, option("--data-seed", help="Of generated questions. \\[0]", panel=_DATA)]
Dtype = Annotated[
    str | None,
    option("--dtype", help="Base weights: auto, float32, bfloat16, float16. \\[auto]", panel=_DATA),
]
Threads = Annotated[int | None, option("--threads", help="Of torch. \\[its own choice]", panel=_RUN)]
Resume = Annotated[bool | None, option("--resume", help="Continue the killed run in --output.", panel=_RUN)]

HeldOut = Annotated[
    int | None, option("--held-out", help="Held-out questions per task. \\[200]", panel=_MEASURING)
]
Generated = Annotated[
    int | None,
    option(
        "--generated", help="Questions per task answered by generation; 0: none. \\[64]", panel=_MEASURING
    ),
]
GeneratedTokens = Annotated[
    int | None, option("--generated-tokens", help="Longest generated answer. \\[256]", panel=_MEASURING)
]
EvalBatchSize = Annotated[
    int | None, option("--eval-batch-size", help="Questions per forward pass. \\[8]", panel=_MEASURING)
]

Rank = Annotated[int | None, option("--rank", "-r", help="Rank of the adapter. \\[16]", panel=_TRAINING)]
Alpha = Annotated[
    float | None, option("--alpha", help="Updates are scaled by alpha / rank.", panel=_TRAINING)
]
Quantization = Annotated[
    str | None,
    option(
        "--quantization", help="4bit or 8bit base weights (bitsandbytes), or int8 (torchao).", panel=_TRAINING
    ),
]
TargetModules = Annotated[
    str | None,
    option(
        "--target-modules",
        "-t",
        help="Names with commas, a regular expression, or all-linear. \\[all-linear]",
        panel=_TRAINING,
    ),
]
Steps = Annotated[int | None, option("--steps", help="Optimizer steps. \\[60]", panel=_TRAINING)]
LearningRate = Annotated[
    float | None, option("--learning-rate", "--lr", help="Peak, of AdamW. \\[2e-4]", panel=_TRAINING)
]
Schedule = Annotated[
    str | None,
    option("--schedule", help="cosine, linear or constant_with_warmup. \\[cosine]", panel=_TRAINING),
]
Warmup = Annotated[float | None, option("--warmup", help="Part of the steps. \\[0.03]", panel=_TRAINING)]
WeightDecay = Annotated[float | None, option("--weight-decay", help="Never on gates. \\[0]", panel=_TRAINING)]
BatchSize = Annotated[
    int | None, option("--batch-size", "-b", help="Questions per forward pass. \\[8]", panel=_TRAINING)
]
GradientAccumulation = Annotated[
    int | None,
    option("--gradient-accumulation", help="Batches per optimizer step. \\[1]", panel=_TRAINING),
]
MaxGradNorm = Annotated[
    float | None, option("--max-grad-norm", help="Gradient clipping; 0: none. \\[1]", panel=_TRAINING)
]
GradientCheckpointing = Annotated[
    bool | None,
    option(
        "--gradient-checkpointing/--no-gradient-checkpointing",
        help="Less memory, more time.",
        panel=_TRAINING,
    ),
]
LogEvery = Annotated[int | None, option("--log-every", help="Steps. \\[a hundredth of the run]", panel=_RUN)]
Seed = Annotated[int | None, option("--seed", help="Of the first run.", panel=_RUN)]
Seeds = Annotated[int | None, option("--seeds", help="Number of runs, seed, seed + 1, …", panel=_RUN)]


def listed(value: str | None) -> list[str] | None:
    """A list that was given with commas."""
    return None if value is None else [item.strip() for item in value.split(",") if item.strip()]
