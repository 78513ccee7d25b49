"""Train DiRA to a budget of ranks: how the run becomes faster and smaller, and which form of the penalty learns more.

    python benchmarks/budget.py --data FOLDER --output FILE.json

FOLDER holds commonsense/ARC-Easy.{train,dev}.jsonl.gz (as in LLM-Adapters); the model is SmolLM2-135M-Instruct unless
--model names another. Three runs on the same batches: a budget with the proximal penalty, one with the penalty in the
gradient, and a LoRA whose rank is the budget's everywhere. Of each, tenth by tenth: mean rank, processor seconds of a
step (the median), and bytes of the adapter with its gradients and optimizer state; and the held-out loss at the end.
Processor seconds count this process's own work, so other processes disturb them less than the time of day. Then steps
of the adapter as it began and as it ended are timed in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import dynalora
from dynalora.common.files import write_file
from dynalora.lab.machine import machine

WARMUP = 2
"""Steps of each adapter before those that are timed in turns."""


def load(arguments: argparse.Namespace) -> tuple[Any, list[Any], Any]:
    """The base model, batches of token ids and labels for every step, and the held-out rows."""
    import torch

    from dynalora.evaluation.run import prepare
    from dynalora.evaluation.tokens import ensure_chat_template, ensure_pad_token, tokenize
    from dynalora.lab.data.collator import Collator
    from dynalora.lab.models import load_model, load_tokenizer
    from dynalora.lab.packaged_models import demo_model

    path = arguments.model or demo_model().path
    tokenizer = load_tokenizer(path)
    ensure_chat_template(tokenizer)
    ensure_pad_token(tokenizer)
    model: Any = load_model(path, dtype="float32")
    rows = {}
    for split in ("train", "dev"):
        items = prepare("arc_easy", data=arguments.data, split=split).items
        conversations = [item.choice.item.conversation() for item in items if item.choice]
        rows[split] = tokenize(conversations[: 8 * arguments.steps * arguments.batch_size], tokenizer)
    short = [row for row in rows["train"].rows if len(row["input_ids"]) <= arguments.length]
    generator = torch.Generator().manual_seed(arguments.seed)
    collate = Collator(tokenizer.pad_token_id)
    batches = [
        collate([short[i] for i in torch.randint(len(short), (arguments.batch_size,), generator=generator).tolist()])
        for _ in range(arguments.steps)
    ]
    held_out = rows["dev"]
    del held_out.rows[arguments.questions :]
    return model, batches, held_out


def adapter_bytes(model: Any, optimizer: Any) -> int:
    """Bytes of the trained parameters, as many for their gradients, and of the optimizer's state."""
    import torch

    trained = sum(2 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    states = [value for state in optimizer.state.values() for value in state.values()]
    return trained + sum(value.numel() * value.element_size() for value in states if isinstance(value, torch.Tensor))


def mean_rank(model: Any) -> float:
    """The mean rank over the adapted matrices."""
    return statistics.fmean(row.rank for row in dynalora.rank_landscape(model))


def train(base: Any, config: Any, batches: Sequence[Any], held_out: Any, lr: float, seed: int) -> dict[str, Any]:
    """One run: its tenths, its end, and the adapter that it ends with."""
    import peft
    import torch

    from dynalora.lab.training.train import held_out_loss

    torch.manual_seed(seed)
    model = peft.get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    steps = len(batches)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
    )
    tenths, seconds = [], []
    for number, batch in enumerate(batches, start=1):
        began = time.process_time()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        seconds.append(time.process_time() - began)
        if number % max(1, steps // 10) == 0 or number == steps:
            tenths.append({
                "step": number, "loss": float(loss), "rank": mean_rank(model), "seconds": statistics.median(seconds),
                "bytes": adapter_bytes(model, optimizer),
            })  # fmt: skip
            seconds = []
    ranks = [row.rank for row in dynalora.rank_landscape(model)]
    return {"tenths": tenths, "held_out": held_out_loss(model, held_out), "ranks": ranks, "model": model}


def in_turns(first: Any, last: Any, batch: Any, rounds: int) -> dict[str, Any]:
    """Processor seconds of a step of two adapters on the same base weights, in turns."""
    import torch

    runs = []
    for model in (first, last):
        # A rate of almost nothing: what is timed is the step, and the adapter shall stay as it is.
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-12)
        runs.append((model.train(), optimizer, []))
    for number in range(WARMUP + rounds):
        for model, optimizer, seconds in runs if number % 2 else runs[::-1]:
            began = time.process_time()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if number >= WARMUP:
                seconds.append(time.process_time() - began)
    ratios = [last / first for first, last in zip(runs[0][2], runs[1][2], strict=True)]
    names = ("at the start", "at the end")
    return {
        "seconds": dict(zip(names, (run[2] for run in runs), strict=True)),
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2] if rounds > 1 else ratios * 2,
        "bytes": dict(zip(names, (adapter_bytes(run[0], run[1]) for run in runs), strict=True)),
    }


def main(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All three runs, and the steps in turns."""
    import peft
    import torch

    from dynalora.jobs.bench.setup import sharing_copy

    torch.set_num_threads(arguments.threads)
    base, batches, held_out = load(arguments)
    base.requires_grad_(False)
    budget: dict[str, Any] = {
        "r": arguments.r, "alpha": arguments.r, "target_rank": arguments.target_rank, "target_modules": "all-linear",
        "total_steps": arguments.steps,
    }  # fmt: skip
    uniform = {**budget, "r": round(arguments.target_rank), "alpha": arguments.target_rank, "target_rank": None}
    configs = {
        "proximal": dynalora.DiraConfig(**budget, penalty_mode="proximal"),
        "gradient": dynalora.DiraConfig(**budget, penalty_mode="gradient"),
        "uniform": dynalora.DiraConfig(**uniform, penalty_weight=0.0),
    }
    runs: dict[str, Any] = {}
    for name, config in configs.items():
        runs[name] = train(sharing_copy(base), config, batches, held_out, arguments.lr, arguments.seed)
        for tenth in runs[name]["tenths"]:
            console.print(
                f"{name}: step {tenth['step']}, loss {tenth['loss']:.3f}, mean rank {tenth['rank']:.2f}, "
                f"{tenth['seconds']:.2f} s a step, {tenth['bytes'] / 2**20:.1f} MiB", highlight=False,
            )  # fmt: skip
        console.print(f"{name}: held-out loss {runs[name]['held_out']:.4f}", highlight=False)
    ended = runs["proximal"].pop("model")
    plain = dynalora.DiraConfig(r=arguments.r, target_modules="all-linear", penalty_weight=0.0)
    began = peft.get_peft_model(sharing_copy(base), plain)
    dynalora.restart_schedule(ended, WARMUP + arguments.rounds)
    turns = in_turns(began, ended, batches[0], arguments.rounds)
    low, high = turns["quartiles"]
    sizes = [turns["bytes"][name] / 2**20 for name in ("at the start", "at the end")]
    console.print(
        f"A step at the end takes {turns['ratio']:.3f} [{low:.3f}, {high:.3f}] of one at the start; adapter, gradients "
        f"and optimizer state {sizes[1]:.1f} MiB after {sizes[0]:.1f}.", highlight=False,
    )  # fmt: skip
    for run in runs.values():
        run.pop("model", None)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    return {"settings": settings, "machine": machine(), "runs": runs, "turns": turns}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with commonsense/")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--model", help="another model")
    parser.add_argument("--r", type=int, default=16, help="rank at the start")
    parser.add_argument("--target-rank", type=float, default=4.0, help="average rank at the end")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=8, help="questions a step")
    parser.add_argument("--length", type=int, default=90, help="tokens above which a training question is left out")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak of AdamW's learning rate")
    parser.add_argument("--questions", type=int, default=80, help="held-out questions")
    parser.add_argument("--rounds", type=int, default=8, help="steps that are timed in turns")
    parser.add_argument("--seed", type=int, default=0, help="of adapters and batches")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    given = parser.parse_args()
    if given.output.exists():
        sys.exit(f"{given.output} exists; choose another --output.")
    write_file(given.output, json.dumps(main(given, Console()), indent=1) + "\n", replace=False)
