"""How a step's time, its memory and an adapter's start grow with rank, tokens, layers and adapters attached.

python benchmarks/scaling.py --output FOLDER [--methods lora,dira,disel,dislora,pedyra] [--rounds 5] [--most 4096]

Blocks of SmolLM2's shapes (keys and values of half the width, so that rank 256 fits), linear layers alone and with
random weights, so that what is measured is the adapted layers.
One quantity varies at a time, the others stay at r = 16, 512 tokens, 4 blocks and one adapter. All methods take turns,
round by round. Time is one thread's processor time of a step forward, back and of the optimizer (median of the rounds);
memory what is kept from forward for backward; the start is the time to make the adapter. The exponent is the slope of a
line through the logarithms of the last half of the points, where what does not grow weighs least.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import dynalora
from dynalora.drawing.style import describe, legend, looks, panels, save
from dynalora.lab.configs import adapter_config
from dynalora.lab.report import Table, markdown_table

SHAPES = {
    "q_proj": (576, 576), "k_proj": (576, 288), "v_proj": (576, 288), "o_proj": (576, 576),
    "gate_proj": (576, 1536), "up_proj": (576, 1536), "down_proj": (1536, 576),
}  # fmt: skip
USUAL = {"rank": 16, "tokens": 512, "layers": 4, "adapters": 1}
VALUES = {
    "rank": (8, 16, 32, 64, 128, 256),
    "tokens": (128, 256, 512, 1024, 2048, 4096),
    "layers": (1, 2, 4, 8),
    "adapters": (1, 2, 4, 8),
}
MEASURES = ("step (ms)", "saved (MiB)", "start (s)")


class Block(nn.Module):
    """The linear layers of a Llama's block, in its order and with its shared inputs, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        for name, (inputs, outputs) in SHAPES.items():
            setattr(self, name, nn.Linear(inputs, outputs, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X (tokens, 576) → (tokens, 576)."""
        layers: Any = self
        x = layers.o_proj(layers.q_proj(x) + torch.cat([layers.k_proj(x), layers.v_proj(x)], dim=1))
        return x + layers.down_proj(nn.functional.silu(layers.gate_proj(x)) * layers.up_proj(x))


class Contestant:
    """One method at one size."""

    def __init__(self, method: str, base: nn.Module, sizes: dict[str, int]) -> None:
        options: dict[str, Any] = {} if method in ("lora", "disel") else {"total_steps": 1000}
        config = adapter_config(method, r=sizes["rank"], target_modules=list(SHAPES), options=options)
        config.task_type = None  # blocks are no language model
        shared = {id(parameter): parameter for parameter in base.parameters()}
        inner = copy.deepcopy(base, shared)
        gc.collect()  # or a collection falls into the time of one of them
        began = time.thread_time()
        self.model: Any = peft.get_peft_model(inner, config)
        self.start = time.thread_time() - began
        for number in range(1, sizes["adapters"]):
            self.model.add_adapter(f"other{number}", copy.deepcopy(config))
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step(self, x: torch.Tensor) -> float:
        """Make a step; its seconds."""
        began = time.thread_time()
        self.model(x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.thread_time() - began

    def saved(self, x: torch.Tensor) -> int:
        """Bytes kept from forward for backward, without weights."""
        held = {tensor.untyped_storage().data_ptr() for tensor in self.model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in held:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = self.model(x)
        size = sum(kept.values())
        del result
        return size


def measure(sizes: dict[str, int], methods: list[str], rounds: int) -> dict[str, tuple[float, float, float]]:
    """The measures of every method at some sizes."""
    torch.manual_seed(0)
    base = nn.Sequential(*(Block() for _ in range(sizes["layers"]))).requires_grad_(False)
    contestants = {method: Contestant(method, base, sizes) for method in methods}
    x = torch.randn(sizes["tokens"], 576)
    saved = {}
    for method, contestant in contestants.items():
        contestant.step(x)
        contestant.step(x)
        saved[method] = contestant.saved(x)
    times: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(rounds):
        for method, contestant in contestants.items():
            times[method].append(contestant.step(x))
    return {
        method: (1000 * statistics.median(times[method]), saved[method] / 2**20, contestant.start)
        for method, contestant in contestants.items()
    }


def exponent(values: list[int], results: list[float]) -> float:
    """The slope of log(result) over log(value) in the last half of the points."""
    half = max(0, min(len(values) // 2, len(values) - 2))
    x = [math.log(value) for value in values[half:]]
    y = [math.log(max(result, 1e-9)) for result in results[half:]]
    centre = statistics.mean(x)
    return sum((a - centre) * b for a, b in zip(x, y, strict=True)) / sum((a - centre) ** 2 for a in x)


def table(varied: str, measure_at: int, found: dict[int, dict[str, tuple[float, ...]]], methods: list[str]) -> str:
    """One measure over one quantity, with exponents."""
    known = dynalora.methods.METHODS
    values = list(found)
    rows: list[list[Any]] = []
    for method in methods:
        results = [found[value][method][measure_at] for value in values]
        title = known[method].title if method in known else "LoRA"
        rows.append([title, *(f"{result:.3g}" for result in results), f"{exponent(values, results):.2f}"])
    return markdown_table(Table([f"{MEASURES[measure_at]} over {varied}", *map(str, values), "exponent"], rows))


def draw(results: dict[str, dict[int, dict[str, tuple[float, ...]]]], methods: list[str], path: Path) -> None:
    """Curves of all measures over all quantities, on logarithmic axes."""
    from matplotlib.ticker import NullFormatter

    known = dynalora.methods.METHODS
    shown = looks(methods)
    drawn, axes = panels(len(MEASURES) * len(results), columns=len(results))
    for column, (varied, found) in enumerate(results.items()):
        for row, name in enumerate(MEASURES):
            axis = axes[row * len(results) + column]
            for method in methods:
                title = known[method].title if method in known else "LoRA"
                numbers = [found[value][method][row] for value in found]
                axis.loglog(list(found), numbers, **shown[method].line(), label=title)
            axis.set_xticks(list(found), [str(value) for value in found], minor=False)
            axis.set_xticks([], minor=True)
            axis.yaxis.set_minor_formatter(NullFormatter())
            describe(axis, x=varied, y=name)
    legend(axes[0])
    save(drawn, path, overwrite=True)


def main() -> None:
    """Measure what is missing, and write tables and curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", default="lora,dira,disel,dislora,pedyra")
    parser.add_argument("--varied", default=",".join(VALUES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--most", type=int, default=4096, help="Leave out larger values.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["DYNALORA_DECOMPOSITION_CACHE_GIB"] = "0"  # a start that was computed before would take no time
    args.output.mkdir(parents=True, exist_ok=True)
    methods, results = args.methods.split(","), {}
    texts = []
    for varied in args.varied.split(","):
        path = args.output / f"{varied}.json"
        if not path.exists():
            found = {
                value: measure({**USUAL, varied: value}, methods, args.rounds)
                for value in VALUES[varied]
                if value <= args.most
            }
            path.write_text(json.dumps(found))
        results[varied] = {int(value): row for value, row in json.loads(path.read_text()).items()}
        texts += [table(varied, number, results[varied], methods) for number in range(len(MEASURES))]
        print(*texts[-len(MEASURES) :], sep="\n\n", flush=True)
    (args.output / "scaling.md").write_text("\n\n".join(texts) + "\n")
    draw(results, methods, args.output / "scaling.png")


if __name__ == "__main__":
    main()
