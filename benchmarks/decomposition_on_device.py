"""A few singular triplets of every weight shape of a model on an accelerator: the ways there are, in time and error.

python benchmarks/decomposition_on_device.py --shapes 1B,7B,70B --json decomposition.json

For every distinct shape of a Llama of that size, with Gaussian weights:

* `full`: `torch.linalg.svd` in float32 (`full, gesvd`: by the other driver of cuSOLVER), all triplets of it;
* `gram`: the Gram matrix in float64 and all its eigenvectors, and the values from ‖W·v‖;
* `smallest`, `largest`: what the library does (`dynalora.spectral`).

Errors are of the smallest triplets (`largest`: of the largest) against `torch.linalg.svd` in float64, where the shorter
side is at most `--reference`; else against `gram`: the sine of the largest angle between the right subspaces, and the
largest relative error of a singular value.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynalora.spectral.decomposition import largest_triplets, smallest_triplets

# Distinct shapes (out, in): query, key (grouped), gate, down.
SHAPES = {
    "tiny": [(96, 96), (32, 96), (200, 96), (96, 200)],
    "1B": [(2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)],
    "7B": [(4096, 4096), (11008, 4096), (4096, 11008)],
    "70B": [(8192, 8192), (28672, 8192)],
}

Made = tuple[Tensor, Tensor]
"""Values (k) in descending order, and right vectors (k, in), float64."""


def full(weight: Tensor, k: int, which: str, driver: str | None = None) -> Made:
    _, values, down = torch.linalg.svd(weight, full_matrices=False, driver=driver)
    part = slice(-k, None) if which == "smallest" else slice(0, k)
    return values[part].double(), down[part].double()


def gram(weight: Tensor, k: int, which: str) -> Made:
    """By the eigenvectors of the smaller Gram matrix."""
    exact = weight.double()
    wide = exact.shape[0] < exact.shape[1]
    tall = exact.mT if wide else exact
    vectors = torch.linalg.eigh(tall.mT @ tall).eigenvectors
    side = (vectors[:, :k] if which == "smallest" else vectors[:, -k:]).flip(-1)
    image = tall @ side
    values = image.norm(dim=0)
    other = image / values
    return values, (other if wide else side).mT


def ours(weight: Tensor, k: int, which: str) -> Made:
    made = (smallest_triplets if which == "smallest" else largest_triplets)(weight, k)
    return made.values.double(), made.down.double()


def errors(made: Made, reference: Made) -> tuple[float, float]:
    """Sine of the largest angle between the subspaces, and the largest relative error of a value."""
    outside = made[1] - (made[1] @ reference[1].mT) @ reference[1]
    return float(torch.linalg.matrix_norm(outside, 2)), float(((made[0] - reference[0]) / reference[0]).abs().max())


def measured(function: Callable[[], Made], rounds: int, device: torch.device) -> tuple[Made, float, float | None]:
    """What a function returns, its median time in seconds (without the first, if there are more), its peak in MiB."""
    cuda = device.type == "cuda"
    times, peak = [], None
    for _ in range(rounds):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        began = time.perf_counter()
        made = function()
        if cuda:
            torch.cuda.synchronize()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        times.append(time.perf_counter() - began)
    return made, statistics.median(times[1:] or times), peak


def ways(shape: tuple[int, int], args: argparse.Namespace) -> dict[str, tuple[Callable[[Tensor], Made], int]]:
    """How to decompose a weight, and how often."""
    k, side, rounds = args.rank, min(shape), args.rounds
    found: dict[str, tuple[Callable[[Tensor], Made], int]] = {
        "gram": (lambda w: gram(w, k, "smallest"), rounds),
        "smallest": (lambda w: ours(w, k, "smallest"), rounds),
        "largest": (lambda w: ours(w, k, "largest"), rounds),
    }
    if side <= args.full:
        found["full"] = (lambda w: full(w, k, "smallest"), rounds if side <= 2048 else 1)
    if side <= args.reference and shape[0] == shape[1] and torch.device(args.device).type == "cuda":
        found["full, gesvd"] = (lambda w: full(w, k, "smallest", "gesvd"), 1)
    return found


def main() -> None:
    """Measure, print, and write everything to a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1B,7B", help=f"of {', '.join(SHAPES)}, with commas")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", type=int, default=4096, help="longest shorter side for the full decomposition")
    parser.add_argument("--reference", type=int, default=2048, help="likewise for float64, and for gesvd")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    warm = torch.randn(700, 700, device=device)
    for function, _ in ways((700, 700), args).values():  # libraries load at first use
        function(warm)
    rows: list[dict[str, Any]] = []
    for size in args.shapes.split(","):
        for shape in SHAPES[size]:
            generator = torch.Generator(device).manual_seed(0)
            weight = torch.randn(*shape, generator=generator, device=device) / shape[1] ** 0.5
            if min(shape) <= args.reference:
                _, values, down = torch.linalg.svd(weight.double(), full_matrices=False)
                ends = {"smallest": slice(-args.rank, None), "largest": slice(0, args.rank)}
                references = {which: (values[part], down[part]) for which, part in ends.items()}
            else:
                references = {which: gram(weight, args.rank, which) for which in ("smallest", "largest")}
            for name, (function, rounds) in ways(shape, args).items():
                row: dict[str, Any] = {"model": size, "shape": shape, "way": name}
                try:
                    made, seconds, peak = measured(lambda: function(weight), rounds, device)  # noqa: B023
                    subspace, value = errors(made, references["largest" if name == "largest" else "smallest"])
                    row |= {"seconds": seconds, "peak_mib": peak, "subspace": subspace, "values": value}
                except Exception as error:  # out of memory, or no convergence: a finding
                    row["error"] = f"{type(error).__name__}: {error}"[:300]
                rows.append(row)
                print(row, flush=True)
            if args.json is not None:
                on = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
                found = {"device": on, "torch": torch.__version__, "rank": args.rank, "rows": rows}
                args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
