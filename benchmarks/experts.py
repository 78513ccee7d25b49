"""Adapters on the experts of a mixture: a training step and its memory, beside PEFT's `target_parameters`.

    python benchmarks/experts.py

A Qwen3-MoE of four layers with 32 experts of 256 x 256, four of them for a token, and random weights; experts alone are
adapted, with rank 8. Steps of 512 tokens are timed in turns, ratios are taken within a round. Peak memory is that of a
process that makes one method's steps alone.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from typing import Any

import peft
import torch
import transformers

import dynalora
from dynalora.jobs.bench.setup import now
from dynalora.lab.machine import peak

RANK = 8
WARMUP = 2  # rounds before those that are timed
METHODS = {
    "PEFT": lambda: peft.LoraConfig(
        r=RANK, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    ),
    "DiRA": lambda: dynalora.DiraConfig(r=RANK, target_modules=["gate_up_proj", "down_proj"], total_steps=10**6),
    "DISeL": lambda: dynalora.DiselConfig(r=RANK, target_modules=["gate_up_proj", "down_proj"]),
}


def adapted(method: str) -> tuple[Any, torch.optim.Optimizer]:
    """A mixture with its experts adapted, and an optimizer."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=256, moe_intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=32, num_experts_per_tok=4,
    )  # fmt: skip
    model = peft.get_peft_model(transformers.Qwen3MoeForCausalLM(config), METHODS[method]()).train()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def step(model: Any, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> None:
    """One training step on tokens (texts, length)."""
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    """Time, and print medians with quartiles."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--memory-of", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    tokens = torch.randint(1000, (4, 128), generator=torch.Generator().manual_seed(1))
    if options.memory_of:
        model, optimizer = adapted(options.memory_of)
        for _ in range(3):
            step(model, optimizer, tokens)
        print(peak() or 0)
        return
    trained = {method: adapted(method) for method in METHODS}
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    device = torch.device("cpu")
    for index in range(WARMUP + options.rounds):
        for method, (model, optimizer) in trained.items():
            began = now(device)
            step(model, optimizer, tokens)
            if index >= WARMUP:
                seconds[method].append(now(device) - began)
    print(f"{torch.get_num_threads()} threads, {options.rounds} rounds")
    for method, times in seconds.items():
        ratios = [time / other for time, other in zip(times, seconds["PEFT"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        count = sum(p.numel() for p in trained[method][0].parameters() if p.requires_grad)
        child = subprocess.run(
            [sys.executable, __file__, "--memory-of", method], capture_output=True, text=True, check=True
        )
        print(
            f"{method:6} {statistics.median(times):.3f} s   ratio {middle:.2f} [{low:.2f}, {high:.2f}]   "
            f"{int(child.stdout.split()[-1]) / 2**20:.0f} MiB   {count:,} trained numbers"
        )


if __name__ == "__main__":
    main()
