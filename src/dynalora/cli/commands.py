"""The commands: what each is called, which settings it takes, which job it starts, and how it is explained.

A job is a function that takes the settings and a console. Jobs and settings are named, so that the list of commands
loads neither, and the help of a command only its own settings.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from dynalora.lab.settings import Settings


def named(place: str) -> Any:
    """What stands at `module:name`."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of the program.

    Attributes:
        takes: The class of its settings, as `module:class`.
        job: What it starts, as `module:function`. A number that the function returns is the exit status.
        help: A sentence and an explanation.
        examples: Calls that work, which close its `--help`.
        resume: Flags with which an interrupted run goes on from its folder; None: it cannot.
        idle: Whether it does something without any settings.
    """

    takes: str
    job: str
    help: str
    examples: tuple[str, ...]
    resume: str | None = None
    idle: bool = False

    @cached_property
    def settings(self) -> type[Settings]:
        """What it can be told."""
        return cast("type[Settings]", named(self.takes))


COMMANDS = {
    "demo": Command(
        takes="dynalora.jobs.demo.settings:DemoSpec",
        job="dynalora.jobs.demo.run:run_demo",
        help="""Fine-tune a small real model with DiRA and LoRA; compare what they learn and what they forget.

        Needs no GPU and no data: the model is fetched once and kept, the task is generated. A few minutes on two
        cores. The run folder gets both adapters, the metrics, plots and a report.""",
        examples=("dynalora demo", "dynalora demo --methods dira,lora --rank 8 -o runs/demo-dira"),
        idle=True,
    ),
    "finetune": Command(
        takes="dynalora.jobs.finetune.settings:FinetuneSpec",
        job="dynalora.jobs.finetune.run:run_finetune",
        help="""Fine-tune your model on your data, and see what it learned and what it forgot.

        Data are rows with a prompt and a response (the usual names of fields are recognised) or chat messages, and
        the loss is on the responses only; or rows of plain text, which is learned whole. The run folder gets the
        adapter, the metrics, plots and a report.""",
        examples=(
            "dynalora finetune -m Qwen/Qwen3-0.6B -d my.jsonl -o runs/first",
            "dynalora finetune -m ./model -d my.csv -o runs/b --method dira -O penalty_weight=1e-3",
            "dynalora finetune -m Qwen/Qwen3-0.6B -d my.jsonl -o runs/first --dry-run",
            "dynalora finetune --config runs/first/config.yaml -o runs/higher --lr 5e-4",
            "dynalora finetune --config runs/first/config.yaml --resume",
        ),
        resume=" --resume",
    ),
    "chat": Command(
        takes="dynalora.jobs.chat.settings:ChatSpec",
        job="dynalora.jobs.chat.run:run_chat",
        help="""Talk to an adapter, and hear what its base model would have said.

        Answers appear as they are written. /base switches the adapter off, and on again, each with a conversation of
        its own; /reset starts a new one; /quit leaves. Lines can also be piped in: every line is a message.""",
        examples=("dynalora chat runs/first", "dynalora chat runs/first --temperature 0.7"),
    ),
    "generate": Command(
        takes="dynalora.jobs.generate.settings:GenerateSpec",
        job="dynalora.jobs.generate.run:run_generate",
        help="""Answer all prompts of a file, and write prompts and answers as JSON lines.

        Rows have the formats that finetune reads; where they have responses, these are copied beside the answers.
        With --base the base model answers, too.""",
        examples=("dynalora generate runs/first --data held-out.jsonl --output answers.jsonl --base",),
    ),
    "evaluate": Command(
        takes="dynalora.jobs.evaluate.settings:EvaluateSpec",
        job="dynalora.jobs.evaluate.run:run_evaluate",
        help="""Measure a model or an adapter on benchmarks by name.

        Groups: commonsense, arithmetic, code, glue. Also reasoning_gym:NAME and lm_eval:NAME. Every number comes with
        its 95 % interval.""",
        examples=(
            "dynalora evaluate runs/first --task arc_easy --task gsm8k --limit 200",
            "dynalora evaluate runs/first --task commonsense --template llm-adapters --json results.json",
            "dynalora evaluate smollm2 --task humaneval --data benchmarks --run-code",
        ),
    ),
    "compare": Command(
        takes="dynalora.jobs.compare.settings:CompareSpec",
        job="dynalora.jobs.compare.run:compare",
        help="""Compare methods × learning rates × seeds × tasks: one table, one report.

        Every cell runs once, in a process of its own. Call it again to go on after a kill, to add methods or seeds,
        or at the same time elsewhere to share the cells. Learning rates are chosen per method and task on training
        questions set aside; ranks so that all train as many parameters.""",
        examples=(
            "dynalora compare --tasks arc_easy,openbookqa --lrs 2e-4,5e-4,1e-3 -o runs/compare",
            "dynalora compare --tasks sst2 --model roberta-base --methods lora,dora,dira -o runs/glue",
            "dynalora compare --config runs/compare/config.yaml --jobs 2",
        ),
        resume="",
    ),
    "bench": Command(
        takes="dynalora.jobs.bench.settings:BenchSpec",
        job="dynalora.jobs.bench.run:run_bench",
        help="""Time training steps, or generation, of the methods against PEFT's LoRA, in turns in one process.

        Forward, backward and optimizer (with the driver) apart; medians, ratios within a round, and peak memory. With
        --generate prefill and time per further token, with a key-value cache.""",
        examples=(
            "dynalora bench",
            "dynalora bench -m ./model --methods lora,disel --dtypes bfloat16 --json bench.json",
            "dynalora bench --generate --length 64 --new-tokens 64",
        ),
        idle=True,
    ),
    "landscape": Command(
        takes="dynalora.jobs.landscape.settings:LandscapeSpec",
        job="dynalora.jobs.landscape.run:run_landscape",
        help="""Show how much rank adapters really use, per kind of module, side by side.

        Effective rank, nuclear norm and energy, exact from the adapters' factors; the base model is needed for PEFT's
        LoRA and with --data only. Of full models, the difference of their weights is measured, streamed from disk.""",
        examples=(
            "dynalora landscape runs/first runs/second --plot landscape.png",
            "dynalora landscape ./tuned --against ./original --csv landscape.csv",
        ),
    ),
    "gates": Command(
        takes="dynalora.jobs.gates.settings:GatesSpec",
        job="dynalora.jobs.gates.report:run_gates",
        help="""Show on which text a DISeL adapter's gates open, and where.

        Mean gates by domain, depth and kind of module (0 is closed, 1 is open), and how well they tell the first
        domain from the others: the area under the ROC curve. Of instruction data only response tokens count; of plain
        text (any text file, or rows with a text field) all do.""",
        examples=(
            "dynalora gates runs/first --domain math=held-out.jsonl --domain general=wiki.txt -o runs/first-gates",
        ),
    ),
    "forgetting": Command(
        takes="dynalora.jobs.stages.settings:ForgettingSpec",
        job="dynalora.jobs.stages.forgetting:run_forgetting",
        help="""Train on Task A, on Task B, on Task A again; see what is forgotten.

        A task is one of reasoning-gym (NAME or NAME:option=value,…), or files: data/ARC-Easy for
        data/ARC-Easy.train.jsonl and data/ARC-Easy.dev.jsonl (multiple choice as in LLM-Adapters, word problems as in
        GSM8K, or prompts and responses as for dynalora finetune). After each stage the run folder gets the adapter, its
        rank landscape and the scores on both tasks; a finished stage is never run again.""",
        examples=(
            "dynalora forgetting --task-a data/ARC-Easy --task-b data/gsm8k -o runs/forgetting --seeds 3",
            "dynalora forgetting --config runs/forgetting/config.yaml --resume",
        ),
        resume=" --resume",
    ),
    "recover": Command(
        takes="dynalora.jobs.stages.settings:RecoverSpec",
        job="dynalora.jobs.stages.recovery:run_recovery",
        help="""Recover a forgotten task from a few examples: rlgr, random or naive.

        rlgr takes out what Task B wrote into matrices that Task A left at effective rank 0 or 1, random as much
        elsewhere, naive nothing; then all train on the examples. Model, tasks and measuring are those of the source
        run unless given.""",
        examples=("dynalora recover runs/forgetting -o runs/recovery --examples 8 --seeds 5",),
        resume=" --resume",
    ),
    "transfer": Command(
        takes="dynalora.jobs.stages.settings:TransferSpec",
        job="dynalora.jobs.stages.transfer:run_transfer",
        help="Train on each of several tasks, measure on all: heat maps, methods side by side.",
        examples=("dynalora transfer --task data/ARC-Easy --task data/openbookqa --task data/gsm8k -o runs/transfer",),
        resume=" --resume",
    ),
    "linear-model": Command(
        takes="dynalora.jobs.linear_model.settings:LinearModelSpec",
        job="dynalora.jobs.linear_model.report:run_linear_model",
        help="""Show where a fixed update must fail: DISeL's linear model, solved and trained.

        Two Gaussian populations, of which only one needs the update. Full fine-tuning and LoRA end at the best fixed
        correction, DISeL at the Bayes-optimal one; both are known in closed form.""",
        examples=("dynalora linear-model --separation 2 -o runs/linear-model",),
        idle=True,
    ),
    "trim": Command(
        takes="dynalora.jobs.trim.settings:TrimSpec",
        job="dynalora.jobs.trim.run:run_trim",
        help="""Scale an adapter's update down until it forgets no more than you allow.

        Forgetting falls faster than learning does. The largest factor is taken at which KL(base ‖ tuned) on text that
        the base model writes is at most --max-kl; the new adapter gets the whole curve of factors beside it, with the
        held-out loss of a run of finetune.""",
        examples=("dynalora trim runs/first trimmed --max-kl 0.05",),
    ),
    "compact": Command(
        takes="dynalora.jobs.compact.settings:CompactSpec",
        job="dynalora.jobs.compact.run:run_compact",
        help="""Remove an adapter's dead components: a smaller adapter of the same method.

        What DiRA has brought to nothing is left out, so that the adapter takes less memory and time. The base model
        is not needed.""",
        examples=("dynalora compact runs/first smaller",),
    ),
    "export": Command(
        takes="dynalora.jobs.export.settings:ExportSpec",
        job="dynalora.jobs.export.run:run_export",
        help="""Write an adapter as a plain PEFT LoRA, which loads where dynalora is not installed.

        The export is exact, and is compared with the adapter before it is kept; with --max-rank or --tolerance it is
        the best of its rank, and its error is printed. The base model is not needed. DISeL's update depends on the
        input, so it has no exact LoRA: with --calibrate a snapshot is written, and its price measured with the base
        model. The last lines say which servers take the result, and how it is loaded.""",
        examples=("dynalora export runs/first lora-for-serving",),
    ),
    "merge": Command(
        takes="dynalora.jobs.merge.settings:MergeSpec",
        job="dynalora.jobs.merge.run:run_merge",
        help="""Merge an adapter into its base model: a whole model, which loads without dynalora and PEFT.

        The merged model is compared with the adapter before it is kept. Refused where weights cannot hold what the
        adapter does: for DISeL's gates export a snapshot first, and merge that.""",
        examples=("dynalora merge runs/dira --output merged",),
    ),
    "serve-check": Command(
        takes="dynalora.jobs.serve_check.settings:ServeCheckSpec",
        job="dynalora.jobs.serve_check.run:run_serve_check",
        help="""Say which servers take an adapter, why others do not, and what to type for them.

        PEFT, vLLM, SGLang and llama.cpp, by their own rules, checked on the adapter's files. No server is needed, and
        no base model.""",
        examples=("dynalora serve-check runs/first",),
    ),
    "push": Command(
        takes="dynalora.jobs.push.settings:PushSpec",
        job="dynalora.jobs.push.run:run_push",
        help="""Upload an adapter with its tokenizer and its card to the Hugging Face Hub.

        The repository is private unless you say otherwise. Nothing else that lies in the folder is uploaded.""",
        examples=("dynalora push runs/first my-adapter --dry-run", "dynalora push runs/first my-adapter"),
    ),
}
