"""Singular triplets of weights, kept on disk: the smallest or the largest of each, and no more than are asked for.

`smallest_triplets` and `largest_triplets` take a weight, `decompose_each` takes many and looks in the
cache first. How they are computed stands in `dynalora.spectral.triplets`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from dynalora.common.progress import late_progress
from dynalora.errors import DynaloraError
from dynalora.spectral.blocks import ROWS
from dynalora.spectral.cache import DecompositionCache, open_cache
from dynalora.spectral.triplets import Which, of_one

ALGORITHM_VERSION = 1  # part of the cache key: raise it when results change

_STACK_SIDE = 2048  # longest side of weights worth stacking on an accelerator
_STACK_NUMEL = 2**25  # elements in a stack at most


class DecompositionError(DynaloraError, ValueError):
    """A weight cannot be decomposed as asked."""


@dataclass(frozen=True)
class Triplets:
    """Some singular triplets of a matrix W (or of each of a batch), in descending order of their singular values.

    `up @ diag(values) @ down` is the part of W that they make up.

    Attributes:
        up: Left singular vectors, (..., out, k), orthonormal columns.
        values: Singular values, (..., k), descending.
        down: Right singular vectors, (..., k, in), orthonormal rows.
    """

    up: Tensor
    values: Tensor
    down: Tensor


def smallest_triplets(weight: Tensor, k: int) -> Triplets:
    """The k smallest singular triplets.

    Among equal singular values any orthonormal basis may come out; for zero ones too the vectors are orthonormal.
    The same weight gives the same triplets, and no global random state is read or changed.

    Args:
        weight: (out, in) or (batch, out, in), any floating dtype.
        k: How many, from 1 to min(out, in); the latter gives the whole thin decomposition.

    Returns:
        Triplets on the weight's device, in float32, or in float64 for a float64 weight.

    Raises:
        DecompositionError: The weight is not such a matrix or not finite, or k is out of range.
    """
    return _triplets(weight, k, "smallest")


def largest_triplets(weight: Tensor, k: int) -> Triplets:
    """The k largest singular triplets; everything else is as for `smallest_triplets`.

    Args:
        weight: (out, in) or (batch, out, in), any floating dtype.
        k: How many, from 1 to min(out, in).

    Returns:
        Triplets on the weight's device, in float32, or in float64 for a float64 weight.

    Raises:
        DecompositionError: The weight is not such a matrix or not finite, or k is out of range.
    """
    return _triplets(weight, k, "largest")


def decompose_each(
    weights: Sequence[Callable[[], Tensor]],
    ranks: Sequence[int],
    *,
    which: Which = "smallest",
    cache: bool = True,
    describe: str = "Decomposing weights",
) -> Iterator[tuple[int, Triplets]]:
    """Singular triplets of many weights, kept on disk so that the next run with the same weights has them at once.

    Weights are made one after the other and let go when done, and so are their triplets, unless the caller keeps them.
    Small weights of equal shape and rank are stacked on an accelerator. A job of more than two seconds shows a progress
    bar on standard error.

    Args:
        weights: For each weight a function that returns it, (out, in).
        ranks: For each weight how many triplets.
        which: The `"smallest"` or the `"largest"` singular values.
        cache: Whether to look in dynalora's cache folder and keep results there.
        describe: What the progress bar says.

    Yields:
        The place of a weight among `weights`, and its triplets on its device. Stacked ones come later than their turn.

    Raises:
        DecompositionError: A weight is not a finite matrix, its rank is out of range, or there are not as many ranks
            as weights.
        ConfigError: The environment sets a size of the disk cache that is no number.
    """
    if len(weights) != len(ranks):
        raise DecompositionError(f"every weight needs a rank, got {len(weights)} weights and {len(ranks)} ranks")
    if which not in get_args(Which):
        raise DecompositionError(f"which must be 'smallest' or 'largest', got {which!r}")
    store = open_cache() if cache else None
    done = 0
    waiting: dict[_Kind, list[_Job]] = {}
    with late_progress() as progress:

        def finished(jobs: list[_Job], triplets: list[Triplets]) -> Iterator[tuple[int, Triplets]]:
            nonlocal done
            done += len(jobs)
            progress(describe, done, len(weights))
            indices = [job.index for job in jobs]
            jobs.clear()  # with their weights
            while triplets:
                yield indices.pop(), triplets.pop()

        for index, (make, k) in enumerate(zip(weights, ranks, strict=True)):
            weight = make().detach()
            _check(weight, k, ndims=(2,))
            job = _Job(index, weight, _cache_key(weight, k, which) if store is not None else "")
            cached = None if store is None else _read(store, job.key, weight, k)
            if cached is not None:
                yield from finished([job], [cached])
            elif weight.device.type == "cpu" or max(weight.shape) > _STACK_SIDE:
                yield from finished([job], _compute([job], k, which, store))
            else:
                waiting.setdefault((weight.shape, k, weight.dtype, weight.device), []).append(job)
                sizes = {kind: sum(job.weight.numel() for job in jobs) for kind, jobs in waiting.items()}
                if sum(sizes.values()) >= _STACK_NUMEL:  # the largest group makes the most room
                    largest = max(sizes, key=lambda kind: sizes[kind])
                    jobs = waiting.pop(largest)
                    yield from finished(jobs, _compute(jobs, largest[1], which, store))
        for kind, jobs in waiting.items():
            yield from finished(jobs, _compute(jobs, kind[1], which, store))


@dataclass(frozen=True)
class _Job:
    """A weight to decompose, (out, in), its place in the results, and its key in the cache."""

    index: int
    weight: Tensor
    key: str


_Kind = tuple[torch.Size, int, torch.dtype, torch.device]  # of weights that can be stacked: shape, rank, dtype, device


def _compute(jobs: Sequence[_Job], k: int, which: Which, store: DecompositionCache | None) -> list[Triplets]:
    """Decompose weights of equal shape and dtype together, and keep the results in the cache."""
    if len(jobs) == 1:
        results = [_triplets(jobs[0].weight, k, which)]
    else:
        stacked = _triplets(torch.stack([job.weight for job in jobs]), k, which)
        parts = zip(stacked.up, stacked.values, stacked.down, strict=True)
        results = [Triplets(up.clone(), values.clone(), down.clone()) for up, values, down in parts]
    if store is not None:
        for job, triplets in zip(jobs, results, strict=True):
            store.write(job.key, {"up": triplets.up, "values": triplets.values, "down": triplets.down})
    return results


def _check(weight: Tensor, k: int, ndims: tuple[int, ...] = (2, 3)) -> None:
    if weight.ndim not in ndims or not weight.is_floating_point() or 0 in weight.shape:
        raise DecompositionError(
            f"a weight must be a floating-point matrix, got shape {tuple(weight.shape)} of {weight.dtype}; "
            "dequantise packed weights first"
        )
    if weight.device.type == "meta":
        raise DecompositionError("a weight on the meta device has no values; load the model's weights first")
    most = min(weight.shape[-2:])
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= most:
        raise DecompositionError(
            f"k must be a whole number from 1 to {most} for a weight of {weight.shape[-2]} × {weight.shape[-1]}, "
            f"got {k!r}"
        )


@torch.no_grad()
def _triplets(weight: Tensor, k: int, which: Which) -> Triplets:
    """What the public functions do, without the cache."""
    _check(weight, k)
    weight = weight.detach()
    if weight.device.type == "mps":  # no float64 there
        done = _triplets(weight.cpu(), k, which)
        return Triplets(*(part.to(weight.device) for part in (done.up, done.values, done.down)))
    low, high = (weight.flatten(-2).aminmax(dim=-1)) if weight.ndim == 3 else weight.aminmax()
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise DecompositionError(
            "a weight holds values that are not finite, so it has no singular values; load intact weights"
        )
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if weight.dtype not in (torch.float32, torch.float64):
        weight = weight.float()
    if weight.ndim == 3 and weight.device.type == "cpu":
        # LAPACK takes one matrix at a time, and what an item comes to then does not depend on its neighbours.
        parts = [of_one(item, k, which, dtype) for item in weight]
        return Triplets(*(torch.stack(part) for part in zip(*parts, strict=True)))
    return Triplets(*of_one(weight, k, which, dtype))


def _cache_key(weight: Tensor, k: int, which: Which) -> str:
    """Everything that the result depends on."""
    raw = weight.cpu().contiguous().flatten().view(torch.uint8).numpy()
    digest = hashlib.sha256(raw.data)
    digest.update(repr((tuple(weight.shape), str(weight.dtype), k, which, ALGORITHM_VERSION)).encode())
    return digest.hexdigest()


def _read(store: DecompositionCache, key: str, weight: Tensor, k: int) -> Triplets | None:
    """What the cache has, if it is what it should be."""
    tensors = store.read(key)
    if tensors is None or set(tensors) != {"up", "values", "down"}:
        return None
    out, width = weight.shape
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    shapes = {"up": (out, k), "values": (k,), "down": (k, width)}
    if any(tuple(tensors[name].shape) != shape for name, shape in shapes.items()):
        return None
    if any(tensor.dtype != dtype for tensor in tensors.values()):
        return None
    up, values, down = (tensors[name] for name in ("up", "values", "down"))
    eye = torch.eye(k, dtype=torch.float64)
    for gram in (up.double().mT @ up.double(), down.double() @ down.double().mT):
        if not bool((gram - eye).abs().max() < 1e-4):  # not-a-number is no either
            return None
    if not bool((values >= 0).all()) or not bool((values[:-1] >= values[1:]).all()):
        return None
    up, values, down = (part.to(weight.device) for part in (up, values, down))
    # Last, whether they are this weight's: a product with k columns, which is nothing next to decomposing.
    exact = torch.float32 if weight.device.type == "mps" else torch.float64
    misfit = weight.new_zeros(k, dtype=exact)
    norm = misfit.sum()
    for start in range(0, out, ROWS):
        rows = weight[start : start + ROWS].to(exact)
        difference = rows @ down.mT.to(exact) - (up[start : start + ROWS] * values).to(exact)
        misfit = misfit + difference.square().sum(0)
        norm = norm + rows.square().sum()
    if not bool(misfit.amax().sqrt() <= 1e-5 * norm.sqrt()):
        return None
    return Triplets(up, values, down)
