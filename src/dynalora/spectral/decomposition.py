"""The smallest and the largest singular triplets of weights, much faster than by a full decomposition.

For A = W or Wᵀ, whichever is tall (m × n, m ≥ n), with singular values σ and G = AᵀA:

1. G is formed in float64. Products of float32 numbers are exact there, and G's rounding error, about 1e-16 σ_max²,
   is in terms of σ what float32 resolves anyway.
2. Block Lanczos with full reorthogonalisation finds the eigenvectors at the wanted end of G's spectrum: of (G − τ)⁻¹
   for the smallest, through a Cholesky factorisation; of G itself for the largest. The block is wider than k, so
   clustered and repeated values do not stop it.
3. The singular value decomposition of A·Q, Q being the leading Ritz vectors, gives σ to the accuracy of A rather
   than of G, and the left vectors.
4. The result is checked: residuals ‖Av − σu‖ and ‖Aᵀu − σv‖, and that no other singular value lies beyond the k-th.
   By Sylvester's law of inertia a rank-k lift removes at most k eigenvalues from below τ, so if
   G + c·VVᵀ − τ (τ just below σ_k², c large) has a Cholesky factorisation, then G has at most k eigenvalues below τ.

Whatever fails a check, and whatever is too small for this to pay, goes to `torch.linalg.svd`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dynalora.common.progress import late_progress
from dynalora.errors import DynaloraError
from dynalora.spectral.cache import DecompositionCache, open_cache

Which = Literal["smallest", "largest"]

ALGORITHM_VERSION = 1  # part of the cache key: raise it when results change

_DENSE_SIDE = 640  # short sides up to here: all eigenvectors of G, which takes less time than iterating
_MAX_STEPS = 40  # block Lanczos steps
_RESTARTS = 3  # of the iteration for the largest, which has no shift that would bring it closer
_LOOK_STEPS = 5  # those before the shift is chosen
_LOOKS = {0, 1, 2, 4, 7, 10}  # first steps after which to look for convergence; looking costs more each time
_TINY = 1e-8  # relative size of singular values that leave A·v without direction
_ROWS = 4096  # rows of a weight that are held in float64 at a time
_TOLERANCE = 1e-9  # of Ritz residuals, relative to the Ritz value
_SLACK = 1e-6  # how much, relatively, σ² of a triplet left out may be beyond that of one returned
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


def decompose(
    weights: Sequence[Callable[[], Tensor]],
    ranks: Sequence[int],
    *,
    which: Which = "smallest",
    cache: bool = True,
    describe: str = "Decomposing weights",
) -> list[Triplets]:
    """Singular triplets of many weights, kept on disk so that the next run with the same weights has them at once.

    Weights are made one after the other and let go when done. Small ones of equal shape and rank are stacked
    on an accelerator. A job of more than two seconds shows a progress bar on standard error.

    Args:
        weights: For each weight a function that returns it, (out, in).
        ranks: For each weight how many triplets.
        which: The `"smallest"` or the `"largest"` singular values.
        cache: Whether to look in dynalora's cache folder and keep results there.
        describe: What the progress bar says.

    Returns:
        One for each weight, in order, on the weight's device.

    Raises:
        DecompositionError: A weight is not a finite matrix, its rank is out of range, or there are not as many ranks
            as weights.
        ConfigError: The environment sets a size of the disk cache that is no number.
    """
    if len(weights) != len(ranks):
        raise DecompositionError(
            f"every weight needs a rank, got {len(weights)} weights and {len(ranks)} ranks"
        )
    if which not in get_args(Which):
        raise DecompositionError(f"which must be 'smallest' or 'largest', got {which!r}")
    store = open_cache() if cache else None
    results: list[Triplets | None] = [None] * len(weights)
    waiting: dict[tuple[torch.Size, int, torch.dtype, torch.device], list[tuple[int, Tensor, str]]] = {}
    done = 0
    with late_progress() as progress:

        def advance() -> None:
            nonlocal done
            done += 1
            progress(describe, done, len(weights))

        def finish(group: list[tuple[int, Tensor, str]], k: int) -> None:
            """Decompose weights of equal shape and dtype, and keep the results."""
            if len(group) == 1:
                made = [_triplets(group[0][1], k, which)]
            else:
                stacked = _triplets(torch.stack([weight for _, weight, _ in group]), k, which)
                made = [
                    Triplets(up.clone(), values.clone(), down.clone())
                    for up, values, down in zip(stacked.up, stacked.values, stacked.down, strict=True)
                ]
            for (index, _, key), triplets in zip(group, made, strict=True):
                results[index] = triplets
                if store is not None:
                    store.write(key, {"up": triplets.up, "values": triplets.values, "down": triplets.down})
                advance()

        for index, (make, k) in enumerate(zip(weights, ranks, strict=True)):
            weight = make().detach()
            _check(weight, k, ndims=(2,))
            key = ""
            if store is not None:
                key = _cache_key(weight, k, which)
                kept = _kept(store, key, weight, k)
                if kept is not None:
                    results[index] = kept
                    advance()
                    continue
            entry = (index, weight, key)
            if weight.device.type == "cpu" or max(weight.shape) > _STACK_SIDE:
                finish([entry], k)
                continue
            kind = (weight.shape, k, weight.dtype, weight.device)
            group = waiting.setdefault(kind, [])
            group.append(entry)
            if sum(w.numel() for held in waiting.values() for _, w, _ in held) >= _STACK_NUMEL:
                # Whatever is largest makes the most room.
                fullest = max(waiting, key=lambda kind: sum(w.numel() for _, w, _ in waiting[kind]))
                finish(waiting.pop(fullest), fullest[1])
        for kind, group in waiting.items():
            finish(group, kind[1])
    return [triplets for triplets in results if triplets is not None]


# ---------------------------------------------------------------------------------------------- checks and dispatch


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
        parts = [_of_one(item, k, which, dtype) for item in weight]
        return Triplets(*(torch.stack(part) for part in zip(*parts, strict=True)))
    return Triplets(*_of_one(weight, k, which, dtype))


def _of_one(weight: Tensor, k: int, which: Which, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """One matrix, or a stack on an accelerator: the fast way, and the full one for what that does not do."""
    transposed = weight.shape[-2] < weight.shape[-1]
    tall = weight.mT if transposed else weight
    # Powers of two change no digit, and keep squares of float64 numbers in range.
    largest = tall.abs().amax(dim=(-2, -1), keepdim=True) if dtype == torch.float64 else None
    unit = None if largest is None else torch.exp2(torch.where(largest > 0, largest, 1).log2().floor())
    scaled = tall if unit is None else tall / unit
    try:
        left, values, right, ok = _fast(scaled, k, which)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        left, values, right, ok = _nothing(scaled, k)
    if not bool(ok.all()):
        full_left, full_values, full_right = _full(scaled, k, which)
        chosen = ok[..., None]
        values = torch.where(chosen, values, full_values.double())
        left = torch.where(chosen[..., None], left, full_left.double())
        right = torch.where(chosen[..., None], right, full_right.double())
    if unit is not None:
        values = values * unit[..., 0]
    left, values, right = _with_signs(left.to(dtype), values.to(dtype), right.to(dtype))
    if transposed:
        left, right = right, left
    return left.contiguous(), values.contiguous(), right.mT.contiguous()


def _with_signs(left: Tensor, values: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make each right vector's largest entry positive, so that signs do not depend on the way there."""
    at = right.abs().argmax(dim=-2, keepdim=True)
    sign = torch.where(right.gather(-2, at) < 0, -1.0, 1.0).to(right.dtype)
    return left * sign, values, right * sign


def _full(tall: Tensor, k: int, which: Which) -> tuple[Tensor, Tensor, Tensor]:
    """By the full decomposition: (…, m, k), (…, k), (…, n, k)."""
    try:
        left, values, right_t = torch.linalg.svd(tall, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # float32 iterations that do not converge; rare
        left, values, right_t = torch.linalg.svd(tall.double(), full_matrices=False)
    part = slice(-k, None) if which == "smallest" else slice(0, k)
    return left[..., part], values[..., part], right_t.mT[..., part]


# ---------------------------------------------------------------------------------------------------- the fast way


def _fast(tall: Tensor, k: int, which: Which) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Triplets in float64 with right vectors as columns, and for each matrix whether they passed the checks."""
    *batch, m, n = tall.shape
    block = k + max(8, k // 4)
    if tall.dtype == torch.float64 or k == n or (n > _DENSE_SIDE and 8 * block > n):
        # Float64 asks for more digits than G has; and most of the spectrum is the full decomposition's job.
        return _nothing(tall, k)
    if m <= _ROWS:
        tall = tall.double()  # once and for all
    gram = _gram(tall)
    norm = torch.linalg.matrix_norm(gram)  # Frobenius
    nonzero = norm > 0
    if not bool(nonzero.any()):
        return (
            torch.eye(m, k, dtype=gram.dtype, device=gram.device).expand(*batch, m, k),
            gram.new_zeros(*batch, k),
            torch.eye(n, k, dtype=gram.dtype, device=gram.device).expand(*batch, n, k),
            ~nonzero,
        )
    if n <= _DENSE_SIDE:
        right = torch.linalg.eigh(gram).eigenvectors
        right = right[..., :k] if which == "smallest" else right[..., -k:]
        left, values, right = _rayleigh_ritz(tall, right, k, which)
        return left, values, right, nonzero & _small_residuals(tall, left, values, right)
    edge = _smallest_edge(gram, norm, k, block) if which == "smallest" else _largest_edge(gram, k, block)
    left, values, right = _rayleigh_ritz(tall, edge.vectors, k, which)
    if edge.factor is not None and bool((values[..., -k:] < _TINY * norm.sqrt()[..., None]).any()):
        left, values, right = _with_left_kernel(tall, edge.factor, norm, left, values, right)
    ok = nonzero & edge.converged & _small_residuals(tall, left, values, right)
    if bool(ok.any()):
        ok = ok & _certified(gram, norm, values, right, which)
    return left, values, right, ok


def _nothing(tall: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What stands for triplets that the fast way does not give."""
    *batch, m, n = tall.shape
    nothing = tall.new_zeros((), dtype=torch.float64)
    missed = torch.zeros(batch, dtype=torch.bool, device=tall.device)
    return nothing.expand(*batch, m, k), nothing.expand(*batch, k), nothing.expand(*batch, n, k), missed


def _chunks(tall: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows in float64, some at a time: weights can be several times as large as G."""
    for start in range(0, tall.shape[-2], _ROWS):
        rows = slice(start, min(start + _ROWS, tall.shape[-2]))
        yield rows, tall[..., rows, :].double()


def _gram(tall: Tensor) -> Tensor:
    """AᵀA in float64, (…, n, n)."""
    n = tall.shape[-1]
    gram = tall.new_zeros(*tall.shape[:-2], n, n, dtype=torch.float64)
    width = 512 if n > 1024 else n
    for _, rows in _chunks(tall):
        for start in range(0, n, width):  # the lower half only
            stop = min(start + width, n)
            gram[..., start:stop, :stop] += rows[..., start:stop].mT @ rows[..., :stop]
    for start in range(0, n, width):
        stop = min(start + width, n)
        gram[..., :start, start:stop] = gram[..., start:stop, :start].mT
    return gram


def _cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factor and, for each matrix, whether there is one; the factor is the identity where there is none."""
    n = matrix.shape[-1]
    good = torch.ones(matrix.shape[:-2], dtype=torch.bool, device=matrix.device)
    if matrix.device.type != "cpu" or n <= 512:
        factor, info = torch.linalg.cholesky_ex(matrix)
        good = info == 0
    else:
        # In blocks, so that nearly all of it is matrix products: a tenth to a third faster than LAPACK's.
        width = 256
        factor = torch.zeros_like(matrix)
        for start in range(0, n, width):
            stop = min(start + width, n)
            panel = matrix[..., start:, start:stop]
            if start:
                panel = panel - factor[..., start:, :start] @ factor[..., start:stop, :start].mT
            corner, info = torch.linalg.cholesky_ex(panel[..., : stop - start, :])
            if bool((info != 0).any()):
                good = info == 0
                break
            factor[..., start:stop, start:stop] = corner
            if stop < n:
                factor[..., stop:, start:stop] = torch.linalg.solve_triangular(
                    corner.mT, panel[..., stop - start :, :], upper=True, left=False
                )
    good = good & factor.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    if not bool(good.all()):
        identity = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
        factor = torch.where(good[..., None, None], factor, identity)
    return factor, good


def _start(gram: Tensor, columns: int) -> Tensor:
    """Random columns, (…, n, columns): the same every time, and without touching the global generators."""
    n = gram.shape[-1]
    generator = torch.Generator(device="cpu").manual_seed(0)
    drawn = torch.randn(n, columns, dtype=torch.float64, device="cpu", generator=generator)
    return drawn.to(gram.device).expand(*gram.shape[:-2], n, columns)


@dataclass(frozen=True)
class _Edge:
    """One end of G's spectrum."""

    vectors: Tensor  # (..., n, block): orthonormal, leading Ritz vectors
    ritz: Tensor  # (..., block): their values for the operator, ascending
    converged: Tensor  # (...): whether the k at the end are eigenvectors
    factor: Tensor | None = None  # (..., n, n): Cholesky factor of G plus a little


def _largest_edge(gram: Tensor, k: int, block: int) -> _Edge:
    edge = _lanczos(lambda x: gram @ x, _start(gram, block), k)
    for _ in range(_RESTARTS):
        if bool(edge.converged.all()):
            break
        edge = _lanczos(lambda x: gram @ x, edge.vectors, k)
    return edge


def _smallest_edge(gram: Tensor, norm: Tensor, k: int, block: int) -> _Edge:
    """Shift and invert: a few steps show where the spectrum begins, and the shift moves there if that pays."""
    # G may be singular, or rounding may have made it indefinite.
    noise = 4 * torch.finfo(torch.float64).eps * norm
    plain, good = _cholesky(_shifted(gram, noise))
    if not bool(good.all()):
        noise = torch.where(good, noise, 1000 * noise)
        plain, good = _cholesky(_shifted(gram, noise))
    factor = plain

    def better_shift(ritz: Tensor) -> Tensor:
        first, last = 1 / ritz[..., -1] - noise, 1 / ritz[..., -k] - noise
        # Where the spectrum begins far from zero its first values differ little as seen from there; where it begins
        # much closer to zero than its k-th value, rounding of the first drowns the k-th.
        apart = torch.where(first < 1e-6 * last, last / 100, noise)
        return torch.where(last < 2 * first, (last - first) / 2 - first, apart)

    def should_move(ritz: Tensor) -> bool:
        return bool((better_shift(ritz) != noise).any())

    edge = _lanczos(lambda x: _solve(plain, x), _start(gram, block), k, stop=should_move)
    # Drowned ones only seem to have converged.
    if should_move(edge.ritz) and not bool(
        (edge.converged & (edge.ritz[..., -1] < 1e6 * edge.ritz[..., -k])).all()
    ):
        moved, definite = _cholesky(_shifted(gram, better_shift(edge.ritz)))
        factor = torch.where(definite[..., None, None], moved, plain)
        edge = _lanczos(lambda x: _solve(factor, x), edge.vectors, k)
    # What is left along large singular values would count most in A·v: one more application takes it out.
    vectors = torch.linalg.qr(_solve(factor, edge.vectors)).Q
    return _Edge(vectors, edge.ritz, edge.converged & good, plain)


def _shifted(matrix: Tensor, shift: Tensor) -> Tensor:
    """Matrix + shift·I."""
    shifted = matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(shift[..., None])
    return shifted


def _solve(factor: Tensor, x: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ x. Two triangular solves: several times faster for few columns than `cholesky_solve`."""
    half: Tensor = torch.linalg.solve_triangular(factor, x, upper=False)
    whole: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return whole


def _lanczos(
    apply: Callable[[Tensor], Tensor],
    start: Tensor,
    k: int,
    stop: Callable[[Tensor], bool] | None = None,
) -> _Edge:
    """Block Lanczos with full reorthogonalisation: the largest eigenvalues of a symmetric positive operator.

    Args:
        apply: The operator, on (…, n, block).
        start: Columns to start from, (…, n, block).
        k: How many eigenvalues have to converge.
        stop: Asked once, after `_LOOK_STEPS` steps, with the Ritz values so far, whether to stop there.
    """
    *batch, n, block = start.shape
    max_steps = min(_MAX_STEPS, n // block)
    basis = start.new_zeros(*batch, n, block * max_steps)
    projected = start.new_zeros(*batch, block * max_steps, block * max_steps)
    basis[..., :block] = torch.linalg.qr(start).Q
    for step in range(max_steps):
        low, high = step * block, (step + 1) * block
        so_far = basis[..., :high]
        image = apply(basis[..., low:high])
        coefficients = so_far.mT @ image
        image = image - so_far @ coefficients
        again = so_far.mT @ image  # once is not enough after cancellation
        image = image - so_far @ again
        coefficients = coefficients + again
        projected[..., :high, low:high] = coefficients
        projected[..., low:high, :high] = coefficients.mT
        last = step + 1 == max_steps
        if last or step in _LOOKS or (step > 10 and step % 3 == 1):
            ritz, mixing = torch.linalg.eigh(projected[..., :high, :high])
            residual = torch.linalg.vector_norm(image @ mixing[..., low:high, -k:], dim=-2)
            # Rounding makes residuals of the size of the largest value's last digits.
            allowed = _TOLERANCE * ritz[..., -k:] + 64 * torch.finfo(ritz.dtype).eps * ritz[..., -1:]
            converged = (residual <= allowed).all(-1)
            if last or bool(converged.all()):
                break
            if stop is not None and step + 1 == _LOOK_STEPS and stop(ritz):
                break
        following = torch.linalg.qr(image).Q
        # Where the image vanished its directions are arbitrary, and may lie in the basis.
        following = torch.linalg.qr(following - so_far @ (so_far.mT @ following)).Q
        basis[..., high : high + block] = following
    return _Edge(so_far @ mixing[..., -block:], ritz[..., -block:], converged)


def _rayleigh_ritz(tall: Tensor, basis: Tensor, k: int, which: Which) -> tuple[Tensor, Tensor, Tensor]:
    """The k triplets at one end within the basis: (…, m, k), (…, k), (…, n, k), float64."""
    image = torch.cat([rows @ basis for _, rows in _chunks(tall)], dim=-2)
    left, values, mixing_t = torch.linalg.svd(image, full_matrices=False)
    part = slice(-k, None) if which == "smallest" else slice(0, k)
    return left[..., part], values[..., part], basis @ mixing_t.mT[..., part]


def _small_residuals(tall: Tensor, left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    """Whether ‖Av − σu‖ and ‖Aᵀu − σv‖ are small against ‖A‖ for all of them, (…)."""
    forward = values.new_zeros(values.shape)
    norm = values.new_zeros(values.shape[:-1])
    back = -right * values[..., None, :]
    for part, rows in _chunks(tall):
        misfit = rows @ right - left[..., part, :] * values[..., None, :]
        forward = forward + misfit.square().sum(-2)
        back = back + rows.mT @ left[..., part, :]
        norm = torch.maximum(norm, torch.linalg.vector_norm(rows, dim=-1).amax(-1))
    worst = torch.maximum(forward.sqrt(), torch.linalg.vector_norm(back, dim=-2)).amax(-1)
    # The longest row is at most ‖A‖, so this is the stricter reading.
    return worst <= 1e-6 * norm


def _with_left_kernel(
    tall: Tensor, factor: Tensor, norm: Tensor, left: Tensor, values: Tensor, right: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors of vanishing singular values, which A·v does not give, and all triplets with them.

    (A Aᵀ + μ)⁻¹ μ x = x − A (G + μ)⁻¹ Aᵀ x removes from x what belongs to σ² ≫ μ.
    """
    tiny = values < _TINY * norm.sqrt()[..., None]
    generator = torch.Generator(device="cpu").manual_seed(1)
    drawn = torch.randn(left.shape[-2:], dtype=torch.float64, device="cpu", generator=generator)
    kernel = drawn.to(left.device).expand_as(left)
    for _ in range(3):
        back = torch.zeros_like(right)
        for part, rows in _chunks(tall):
            back = back + rows.mT @ kernel[..., part, :]
        solved = _solve(factor, back)
        kernel = kernel - torch.cat([rows @ solved for _, rows in _chunks(tall)], dim=-2)
        # Not orthonormalised yet: each column shall converge on its own to a vector of the kernel.
        kernel = torch.nn.functional.normalize(kernel, dim=-2)
    # The tiny values are the last: the columns before them stay as they are, up to signs, which the core sees.
    left = torch.linalg.qr(torch.where(tiny[..., None, :], kernel, left)).Q
    core = torch.zeros_like(values)[..., None, :] * values[..., :, None]
    for part, rows in _chunks(tall):
        core = core + left[..., part, :].mT @ (rows @ right)
    turn_left, values, turn_right = torch.linalg.svd(core)
    return left @ turn_left, values, right @ turn_right.mT


def _certified(gram: Tensor, norm: Tensor, values: Tensor, right: Tensor, which: Which) -> Tensor:
    """Whether no singular value outside the given ones lies beyond them, (…); see the top of this file.

    Consumes `gram`.
    """
    eps = torch.finfo(torch.float64).eps
    if which == "smallest":
        edge = values[..., 0].square()
        level = edge * (1 - _SLACK) - 32 * eps * norm
    else:
        gram = gram.neg_()
        edge = values[..., -1].square()
        level = -(edge * (1 + _SLACK) + 32 * eps * norm)
    gram += (right * norm[..., None, None]) @ right.mT
    gram.diagonal(dim1=-2, dim2=-1).sub_(level[..., None])
    return _cholesky(gram)[1]


# ------------------------------------------------------------------------------------------------ cache and progress


def _cache_key(weight: Tensor, k: int, which: Which) -> str:
    """Everything that the result depends on."""
    raw = weight.cpu().contiguous().flatten().view(torch.uint8).numpy()
    digest = hashlib.sha256(raw.data)
    digest.update(repr((tuple(weight.shape), str(weight.dtype), k, which, ALGORITHM_VERSION)).encode())
    return digest.hexdigest()


def _kept(store: DecompositionCache, key: str, weight: Tensor, k: int) -> Triplets | None:
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
    for start in range(0, out, _ROWS):
        rows = weight[start : start + _ROWS].to(exact)
        difference = rows @ down.mT.to(exact) - (up[start : start + _ROWS] * values).to(exact)
        misfit = misfit + difference.square().sum(0)
        norm = norm + rows.square().sum()
    if not bool(misfit.amax().sqrt() <= 1e-5 * norm.sqrt()):
        return None
    return Triplets(up, values, down)
