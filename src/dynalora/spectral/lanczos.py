"""Eigenvectors at one end of a Gram matrix's spectrum, by block Lanczos.

The largest eigenvalues of G are found by applying G itself. The smallest are the largest of (G + shift)⁻¹, which is
applied through a Cholesky factorisation (shift and invert). The block of columns is wider than the number of
eigenvalues asked for, so that clustered and repeated ones do not stop the iteration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dynalora.spectral.blocks import cholesky, shifted, solve

_MAX_STEPS = 40  # block Lanczos steps
_RESTARTS = 3  # of the iteration for the largest, which has no shift that would bring it closer
_LOOK_STEPS = 5  # those before the shift is chosen
_LOOKS = {0, 1, 2, 4, 7, 10}  # first steps after which to look for convergence; looking costs more each time
_TOLERANCE = 1e-9  # of Ritz residuals, relative to the Ritz value


@dataclass(frozen=True)
class Edge:
    """One end of G's spectrum."""

    vectors: Tensor  # (..., n, block): orthonormal, leading Ritz vectors
    ritz: Tensor  # (..., block): their values for the operator, ascending
    converged: Tensor  # (...): whether the k at the end are eigenvectors
    factor: Tensor | None = None  # (..., n, n): Cholesky factor of G plus a little


def largest_edge(gram: Tensor, k: int, block: int) -> Edge:
    """The end of the k largest eigenvalues of G, (…, n, n), from blocks of so many columns."""
    edge = _lanczos(lambda x: gram @ x, _start(gram, block), k)
    for _ in range(_RESTARTS):
        if bool(edge.converged.all()):
            break
        edge = _lanczos(lambda x: gram @ x, edge.vectors, k)
    return edge


def smallest_edge(gram: Tensor, norm: Tensor, k: int, block: int) -> Edge:
    """The end of the k smallest eigenvalues of G, (…, n, n) with Frobenius norm (…), from blocks of so many columns.

    Shift and invert: a few steps show where the spectrum begins, and the shift moves there if that pays.
    """
    # G may be singular, or rounding may have made it indefinite.
    noise = 4 * torch.finfo(torch.float64).eps * norm
    plain, good = cholesky(shifted(gram, noise))
    if not bool(good.all()):
        noise = torch.where(good, noise, 1000 * noise)
        plain, good = cholesky(shifted(gram, noise))
    factor = plain

    def better_shift(ritz: Tensor) -> Tensor:
        first, last = 1 / ritz[..., -1] - noise, 1 / ritz[..., -k] - noise
        # Where the spectrum begins far from zero its first values differ little as seen from there; where it begins
        # much closer to zero than its k-th value, rounding of the first drowns the k-th.
        apart = torch.where(first < 1e-6 * last, last / 100, noise)
        return torch.where(last < 2 * first, (last - first) / 2 - first, apart)

    def should_move(ritz: Tensor) -> bool:
        return bool((better_shift(ritz) != noise).any())

    edge = _lanczos(lambda x: solve(plain, x), _start(gram, block), k, stop=should_move)
    # Drowned ones only seem to have converged.
    if should_move(edge.ritz) and not bool((edge.converged & (edge.ritz[..., -1] < 1e6 * edge.ritz[..., -k])).all()):
        moved, definite = cholesky(shifted(gram, better_shift(edge.ritz)))
        factor = torch.where(definite[..., None, None], moved, plain)
        edge = _lanczos(lambda x: solve(factor, x), edge.vectors, k)
    # What is left along large singular values would count most in A·v: one more application takes it out.
    vectors = torch.linalg.qr(solve(factor, edge.vectors)).Q
    return Edge(vectors, edge.ritz, edge.converged & good, plain)


def _start(gram: Tensor, columns: int) -> Tensor:
    """Random columns, (…, n, columns): the same every time, and without touching the global generators."""
    n = gram.shape[-1]
    generator = torch.Generator(device="cpu").manual_seed(0)
    drawn = torch.randn(n, columns, dtype=torch.float64, device="cpu", generator=generator)
    return drawn.to(gram.device).expand(*gram.shape[:-2], n, columns)


def _lanczos(
    apply: Callable[[Tensor], Tensor], start: Tensor, k: int, stop: Callable[[Tensor], bool] | None = None
) -> Edge:
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
    return Edge(so_far @ mixing[..., -block:], ritz[..., -block:], converged)
