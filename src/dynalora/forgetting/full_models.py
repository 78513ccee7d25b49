"""The rank landscape of full fine-tuning: the difference of two models' weights (DiRA §5.1).

Both models are read from their safetensors files, matrix by matrix and block by block. Neither is ever in memory, and
neither is built: their classes need not be known here.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dynalora.common.progress import Progress, counted, silent
from dynalora.errors import CheckpointError, ConfigError
from dynalora.forgetting.landscape import PAPER_TAU, LandscapeRow, check_tau, landscape_row
from dynalora.spectral.spectrum import matrix_spectrum

_INDEX = "model.safetensors.index.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}


def model_landscape(
    tuned: str | os.PathLike[str],
    base: str | os.PathLike[str],
    tau: float = PAPER_TAU,
    *,
    modules: str | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> list[LandscapeRow]:
    """The landscape of W_tuned − W_base, for every matrix that both models have.

    Singular values come from the Gram matrix on the shorter side; see
    `dynalora.spectral.spectrum.matrix_spectrum` for the error and the memory.

    Args:
        tuned: Folder of the fine-tuned model, with `model.safetensors` or shards and their index.
        base: Folder of the model that it was made from.
        tau: Threshold τ on singular values; the paper's 0.001 by default. Half-precision weights are rounded, which
            by itself leaves a difference: of a weight w by up to 0.4 % of w in bfloat16.
        modules: Regular expression that a module's name must contain; None takes all, embeddings included.
        device: Where to compute; it must have float64.
        progress: Called with the number of matrices done.

    Returns:
        One row per matrix, by name, layers in order. `rank` is the shorter side.

    Raises:
        ConfigError: `tau` is negative, or `modules` is no regular expression.
        CheckpointError: A folder has no safetensors, or is damaged; or no matrix is in both.
    """
    check_tau(tau)
    try:
        pattern = re.compile(modules or "")
    except re.error as error:
        raise ConfigError(f"modules is '{modules}', which is not a valid regular expression ({error}).") from None
    with ExitStack() as stack:
        first, second = (_matrices(Path(folder), stack) for folder in (tuned, base))
        shared = [name for name in first if name in second and pattern.search(name)]
        names = [name for name in shared if _shape(first[name]()) == _shape(second[name]())]
        if not names:
            raise CheckpointError(
                f"'{tuned}' and '{base}' have no matrix of one name and shape"
                + (f" that contains '{modules}'" if modules else "")
                + "; give two models of one architecture."
            )
        if len(names) < len(shared):
            odd = next(name for name in shared if name not in names)
            warnings.warn(
                f"{len(shared) - len(names)} matrices differ in shape between the two models and are left out "
                f"(the first: {odd}).",
                stacklevel=2,
            )
        rows = []
        for name in counted(sorted(names, key=_natural), "Comparing weights", progress):
            after, before = first[name](), second[name]()

            def difference(rows: slice, columns: slice, after: Any = after, before: Any = before) -> torch.Tensor:
                # Subtracted in float64, because the two weights nearly cancel.
                minuend: torch.Tensor = after[rows, columns].to(device).double()
                subtrahend: torch.Tensor = before[rows, columns].to(device).double()
                return minuend - subtrahend

            shape = _shape(after)
            sigma = matrix_spectrum((shape[0], shape[1]), difference, device)
            rows.append(landscape_row(name.removesuffix(".weight"), min(shape), sigma, tau))
    return rows


def _matrices(folder: Path, stack: ExitStack) -> dict[str, Callable[[], Any]]:
    """For each floating-point matrix of a model, a function that opens it."""
    index = folder / _INDEX
    try:
        if index.exists():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            files = [file.name for file in sorted(folder.glob("*.safetensors"))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"'{index}' cannot be read ({error}); fetch the model again.") from error
    if not files or (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"'{folder}' holds no full model in safetensors; give the folder of one, saved by save_pretrained()."
        )
    matrices: dict[str, Callable[[], Any]] = {}
    for name in files:
        try:
            opened = stack.enter_context(safe_open(folder / name, framework="pt"))
            for key in opened.keys():  # noqa: SIM118 (not a mapping)
                part = opened.get_slice(key)
                if len(part.get_shape()) == 2 and part.get_dtype() in _FLOATS:
                    matrices[key] = partial(opened.get_slice, key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"'{folder / name}' cannot be read ({error}); fetch the model again.") from error
    return matrices


def _shape(part: Any) -> tuple[int, ...]:
    return tuple(part.get_shape())


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts `layers.10` after `layers.9`."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]
