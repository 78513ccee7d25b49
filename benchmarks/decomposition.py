"""Time, memory and accuracy of the few smallest singular triplets against the full decomposition.

For every shape: median wall time of `smallest_triplets` and of `torch.linalg.svd`, taken in turns in one process, so
that whatever else the machine does meets both; peak memory of each in a process of its own; and the error against the
full decomposition in float64.

    python benchmarks/decomposition.py --output benchmarks/decomposition.md
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dynalora.spectral.decomposition import Triplets, largest_triplets, smallest_triplets

TRIPLETS: dict[str, Callable[[Tensor, int], Triplets]] = {"smallest": smallest_triplets, "largest": largest_triplets}


@dataclass(frozen=True)
class Case:
    """A weight to decompose."""

    name: str
    make: Callable[[], Tensor]
    large: bool = False


def gaussian(out: int, width: int) -> Callable[[], Tensor]:
    def make() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(out, width, generator=generator) / width**0.5

    return make


def decaying(out: int, width: int) -> Callable[[], Tensor]:
    """Singular values that decay slowly over most of their range, and then steeply to 1e-6 of the largest."""

    def make() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        side = min(out, width)
        at = torch.linspace(0, 1, side, dtype=torch.float64)
        weight = torch.zeros(out, width, dtype=torch.float64)
        weight[:side, :side] = torch.diag(10 ** (-1.5 * at - 4.5 * at**24))
        # Reflections mix rows and columns and keep the singular values.
        for _ in range(3):
            rows = torch.linalg.qr(torch.randn(out, 64, generator=generator, dtype=torch.float64)).Q
            columns = torch.linalg.qr(torch.randn(width, 64, generator=generator, dtype=torch.float64)).Q
            weight -= 2 * rows @ (rows.T @ weight)
            weight -= 2 * (weight @ columns) @ columns.T
        return weight.float()

    return make


def smollm() -> list[Case]:
    """One weight of every distinct shape of SmolLM2-135M, from its middle layer, if the model can be had."""
    try:
        from transformers import AutoModelForCausalLM

        from dynalora.lab.packaged_models import demo_model

        model = AutoModelForCausalLM.from_pretrained(demo_model().path, dtype=torch.float32)
    except Exception as error:
        print(f"SmolLM2-135M is not to be had ({error}); Gaussian weights instead", file=sys.stderr)
        shapes = {"q_proj": (576, 576), "k_proj": (192, 576), "gate_proj": (1536, 576), "down_proj": (576, 1536)}
        return [Case(f"SmolLM2 {name}, Gaussian", gaussian(*shape)) for name, shape in shapes.items()]
    layer = model.model.layers[len(model.model.layers) // 2]
    cases: dict[tuple[int, ...], Case] = {}
    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.detach().clone()
            cases.setdefault(tuple(weight.shape), Case(f"SmolLM2-135M {name.split('.')[-1]}", lambda w=weight: w))
    return list(cases.values())


def llama() -> list[Case]:
    return [
        Case("Llama-7B q_proj, Gaussian", gaussian(4096, 4096), True),
        Case("Llama-7B down_proj, Gaussian", gaussian(4096, 11008), True),
        Case("Llama-7B gate_proj, Gaussian", gaussian(11008, 4096), True),
        Case("decaying to 1e-6", decaying(4096, 4096), True),
    ]


def all_cases(which: str) -> list[Case]:
    return (smollm() if which != "llama" else []) + (llama() if which != "smollm" else [])


def timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def memory(arguments: argparse.Namespace, index: int, what: str) -> float:
    """Peak memory beyond what stood before, in MiB, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure-memory", f"{index},{what}", "--models", arguments.models,
         "--rank", str(arguments.rank), "--which", arguments.which, "--threads", str(arguments.threads)],
        capture_output=True, text=True, check=True, env=os.environ,
    )  # fmt: skip
    return float(done.stdout.strip().splitlines()[-1])


def added_peak(function: Callable[[], object]) -> float:
    """How far resident memory rises above what it is now while a function runs, in MiB (Linux only)."""

    def kilobytes(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = kilobytes("VmRSS")
    function()
    return (kilobytes("VmHWM") - before) / 1024


def accuracy(weight: Tensor, made: Triplets, which: str, k: int) -> tuple[str, str]:
    """Distance of the right subspaces, ‖P − P_full‖₂, and the largest relative error of a singular value."""
    _, values, down = torch.linalg.svd(weight.double(), full_matrices=False)
    part = slice(-k, None) if which == "smallest" else slice(0, k)
    own, theirs = made.down.double(), down[part]
    # The sine of the largest angle: what is left of one basis outside the other. Equal to ‖P − P_full‖₂.
    outside = own - (own @ theirs.T) @ theirs
    error = float(torch.linalg.matrix_norm(outside, 2))
    relative = float(((made.values.double() - values[part]) / values[part].clamp_min(1e-300)).abs().max())
    return f"{error:.0e}", f"{relative:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=["all", "smollm", "llama"], default="all", help="whose shapes")
    parser.add_argument("--which", choices=list(TRIPLETS), default="smallest", help="which triplets")
    parser.add_argument("--rank", type=int, default=16, help="how many triplets (default: 16)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds for small weights (default: 7)")
    parser.add_argument("--large-rounds", type=int, default=3, help="rounds for 4096 and wider (default: 3)")
    parser.add_argument("--large-reference", action="store_true",
                        help="errors for 4096 and wider too, against a float64 decomposition of minutes")  # fmt: skip
    parser.add_argument("--only", default="", help="only weights whose name or shape (4096x11008) contains this")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--output", type=Path, help="also write the table to this Markdown file")
    parser.add_argument("--measure-memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    k, fast = arguments.rank, TRIPLETS[arguments.which]

    def full(weight: Tensor) -> object:
        return torch.linalg.svd(weight, full_matrices=False)

    cases = all_cases(arguments.models)
    if arguments.measure_memory:
        index, what = arguments.measure_memory.split(",")
        small = torch.randn(64, 64)
        fast(small, 4), full(small)  # libraries load at first use
        weight = cases[int(index)].make()
        print(added_peak(lambda: fast(weight, k) if what == "fast" else full(weight)))
        return

    head = f"| weight | shape | full SVD | {arguments.which} {k} | ratio | memory, full | memory | subspace | values |"
    lines = [head, "|" + "---|" * 9]
    print("\n".join(lines), flush=True)
    for index, case in enumerate(cases):
        weight = case.make()
        if arguments.only not in case.name and arguments.only not in "x".join(map(str, weight.shape)):
            continue
        if not case.large:
            fast(weight, k)
            full(weight)
        times: list[tuple[float, float]] = []
        for _ in range(arguments.large_rounds if case.large else arguments.rounds):
            times.append((timed(lambda: fast(weight, k)), timed(lambda: full(weight))))  # noqa: B023
        ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(slow / quick for quick, slow in times)
        used = ["–", "–"]
        if not arguments.no_memory:
            used = [f"{memory(arguments, index, what):.0f} MiB" for what in ("full", "fast")]
        errors = ("–", "–")
        if not case.large or arguments.large_reference:
            errors = accuracy(weight, fast(weight, k), arguments.which, k)
        shape = " × ".join(map(str, weight.shape))
        lines.append(
            f"| {case.name} | {shape} | {theirs * 1e3:.0f} ms | {ours * 1e3:.0f} ms | {ratio:.1f} | {used[0]} | "
            f"{used[1]} | {errors[0]} | {errors[1]} |"
        )
        print(lines[-1], flush=True)
    note = (
        f"torch {torch.__version__}, {arguments.threads} threads, {platform.machine()}, load average "
        f"{os.getloadavg()[0]:.1f}; medians. Memory is the peak beyond the weight itself. Subspace is ‖P − P_full‖₂ "
        "for the right vectors, values the largest relative error of a singular value, both against float64."
    )
    print(f"\n{note}")
    if arguments.output:
        command = " ".join(["python", *sys.argv])
        title = "# A few singular triplets against the full decomposition"
        arguments.output.write_text(f"{title}\n\n`{command}`\n\n" + "\n".join(lines) + f"\n\n{note}\n")


if __name__ == "__main__":
    main()
