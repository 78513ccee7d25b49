"""Time a training step with and without `retain`, in turns on one model's shapes.

    python benchmarks/retain.py
    python benchmarks/retain.py --layers 4 --rounds 21

The model has SmolLM2-135M's shapes and random weights, which do not change what a step costs. DiRA without its penalty
is a LoRA; it is trained with `retain` and without, one step each in every round, and the ratio is taken within a
round. A third model is the one without once more: its ratio is the noise of the measurement.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import peft
import torch
import transformers

import dynalora
from dynalora.forgetting.retain import read_curvature, retain_cost
from dynalora.forgetting.texts import MeasuredText
from dynalora.jobs.bench.setup import now

WARMUP = 2  # rounds before those that are timed


def adapted(layers: int, rank: int, retain: float | None) -> Any:
    """A model with an adapter on all linear layers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    adapter = dynalora.DiraConfig(r=rank, target_modules="all-linear", penalty_weight=0.0, retain=retain)
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), adapter)
    if retain is not None:
        rows = torch.randint(49152, (16, 64)).tolist()
        read_curvature(model, MeasuredText(tuple(map(tuple, rows)), (1,) * len(rows)))
        print(f"memory of the curvature: {retain_cost(model).bytes / 2**30:.3f} GiB")
    return model.train()


def main() -> None:
    """Time, and print medians with quartiles."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("layers", 30), ("rank", 8), ("rounds", 15), ("batch-size", 8), ("length", 80)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    models = {
        label: adapted(options.layers, options.rank, weight)
        for label, weight in (("without", None), ("without, again", None), ("retain", 1.0))
    }
    optimizers = {
        label: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        for label, model in models.items()
    }
    device = torch.device("cpu")
    seconds: dict[str, list[float]] = {label: [] for label in models}
    for index in range(WARMUP + options.rounds):
        tokens = torch.randint(49152, (options.batch_size, options.length))
        for label, model in models.items():
            began = now(device)
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizers[label].step()
            optimizers[label].zero_grad()
            if index >= WARMUP:
                seconds[label].append(now(device) - began)
    print(f"{options.layers} layers, r = {options.rank}, {options.batch_size} x {options.length} tokens, "
          f"{torch.get_num_threads()} threads, {options.rounds} rounds")  # fmt: skip
    for label, times in seconds.items():
        ratios = [time / other for time, other in zip(times, seconds["without"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{label:15} {statistics.median(times):.3f} s   ratio {middle:.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
