"""What share of a training step the methods' own work at optimizer steps is, at a 7B model's shapes.

python benchmarks/driver_share.py [--layers 1] [--tokens 256] [--steps 6] [--methods dira,disel,dislora,pedyra]

The model is a number of Llama-2-7B's blocks with random weights; all its linear layers are adapted. A driver's work
does not depend on the number of tokens, so its share of a step with 2,048 tokens is an eighth of that of one with 256.

Counted are the multiplications of all matrix products and the numbers that all operations read and write, by a dispatch
mode, in forward and backward and in the optimizer's step; the driver's are those of that step less those of the same
AdamW on the same gradients without a driver. Measured are the processor's seconds of one thread, likewise.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dynalora
from dynalora.lab.configs import adapter_config
from dynalora.lab.report import Table, markdown_table

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
VIEWS = (
    "view",
    "t",
    "transpose",
    "unbind",
    "split",
    "detach",
    "slice",
    "select",
    "expand",
    "empty",
    "unsqueeze",
    "alias",
)


class Counter(TorchDispatchMode):
    """Counts multiplications of products, and numbers read and written.

    Attributes:
        multiplications: Of matrix products.
        numbers: Read and written by all operations but views.
    """

    def __init__(self) -> None:
        super().__init__()
        self.multiplications = self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.lstrip("_") in VIEWS or name == "_unsafe_view":
            return result
        tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
        self.numbers += sum(tensor.numel() for tensor in tensors)
        if name in PRODUCTS:
            left, right = [leaf for leaf in args if isinstance(leaf, torch.Tensor)][-2:]
            self.multiplications += left.numel() * right.shape[-1]
        return result


@dataclass
class Share:
    """A method's figures: of the pass forward and back, and of the driver."""

    method: str
    seconds: tuple[float, float]
    multiplications: tuple[int, int]
    numbers: tuple[int, int]


def model_of(layers: int) -> Any:
    """So many blocks of a Llama-2-7B, with random weights."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def twin(parameters: list[torch.nn.Parameter]) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """Parameters of the same shapes without an adapter, and their optimizer."""
    copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    return copies, torch.optim.AdamW(copies, lr=1e-4)


def share(method: str, args: argparse.Namespace) -> Share:
    """Train for a few steps and count the last."""
    torch.manual_seed(0)
    options: dict[str, Any] = {} if method == "disel" else {"total_steps": 1000}
    if method == "dislora":
        options["init_weights"] = False  # neither the start nor the one choice of directions is part of a step
    if method == "pedyra":  # scores at every step, and ranks moved at every third
        options |= {"adjust_start": 2, "adjust_interval": 3, "adjust_end": args.steps, "adjust_size": 4}
    config = adapter_config(method, r=args.r, options=options)
    model = peft.get_peft_model(model_of(args.layers), config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    tokens = torch.randint(0, 32, (1, args.tokens))
    passes: list[float] = []
    driven: list[float] = []
    counts: list[tuple[int, int]] = []
    for step in range(args.steps):
        counters = [Counter() for _ in range(3)]
        last = step == args.steps - 1
        began = time.thread_time()
        with counters[0] if last else torch.enable_grad():
            model(input_ids=tokens, labels=tokens).loss.backward()
        done = time.thread_time()
        copies, plain = twin(parameters)  # anew at every step, since ranks move
        for copy, parameter in zip(copies, parameters, strict=True):
            copy.grad = torch.zeros_like(parameter)
        plain.step()  # makes its state
        for copy, parameter in zip(copies, parameters, strict=True):
            copy.grad = parameter.grad.detach().clone()
        times = []
        for counter, each in ((counters[1], plain), (counters[2], optimizer)):
            start = time.thread_time()
            with counter if last else torch.enable_grad():
                each.step()
            times.append(time.thread_time() - start)
        optimizer.zero_grad()
        if step and not last:  # the first makes state; counting takes time
            passes.append(done - began)
            driven.append(times[1] - times[0])
        counts = [(counter.multiplications, counter.numbers) for counter in counters]
    there, without, with_driver = counts
    return Share(
        method,
        (statistics.median(passes), statistics.mean(driven)),
        (there[0], with_driver[0] - without[0]),
        (there[1], with_driver[1] - without[1]),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 1), ("tokens", 256), ("steps", 6), ("r", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--methods", default="dira,disel,dislora,pedyra")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[Any]] = []
    for method in args.methods.split(","):
        found = share(method, args)
        name = dynalora.methods.METHODS[method].title
        parts = (found.seconds, found.multiplications, found.numbers)
        shares = [part[1] / sum(part) for part in parts]
        rows.append(
            [name, f"{found.seconds[0]:.2f}", f"{1000 * found.seconds[1]:.0f}", *(f"{100 * s:.2f} %" for s in shares)]
        )
        print(rows[-1], flush=True)
    columns = [
        "method",
        "forward and backward (s)",
        "driver (ms)",
        "share, measured",
        "of multiplications",
        "of numbers moved",
    ]
    title = f"{args.layers} block(s) of 7B, r = {args.r}, {args.tokens} tokens, {args.steps} steps"
    print(title, markdown_table(Table(columns, rows)), sep="\n\n")


if __name__ == "__main__":
    main()
