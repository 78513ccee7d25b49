"""Products and factorisations of weights and of their Gram matrices, in float64 and block by block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 4096  # rows of a weight that are held in float64 at a time


def chunks(tall: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of (…, m, n) in float64, some at a time: weights can be several times as large as G."""
    for start in range(0, tall.shape[-2], ROWS):
        rows = slice(start, min(start + ROWS, tall.shape[-2]))
        yield rows, tall[..., rows, :].double()


def gram_matrix(tall: Tensor) -> Tensor:
    """AᵀA in float64, (…, m, n) → (…, n, n)."""
    n = tall.shape[-1]
    gram = tall.new_zeros(*tall.shape[:-2], n, n, dtype=torch.float64)
    width = 512 if n > 1024 else n
    for _, rows in chunks(tall):
        for start in range(0, n, width):  # the lower half only
            stop = min(start + width, n)
            gram[..., start:stop, :stop] += rows[..., start:stop].mT @ rows[..., :stop]
    for start in range(0, n, width):
        stop = min(start + width, n)
        gram[..., :start, start:stop] = gram[..., start:stop, :start].mT
    return gram


def cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factorisation of symmetric matrices.

    Args:
        matrix: (…, n, n).

    Returns:
        The lower factor, (…, n, n), and for each matrix whether there is one, (…); the identity where there is none.
    """
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


def shifted(matrix: Tensor, shift: Tensor) -> Tensor:
    """Matrix + shift·I, (…, n, n) and (…) → (…, n, n)."""
    shifted = matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(shift[..., None])
    return shifted


def solve(factor: Tensor, x: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ x, (…, n, n) and (…, n, c) → (…, n, c).

    Two triangular solves are several times faster for few columns than `torch.cholesky_solve`.
    """
    half: Tensor = torch.linalg.solve_triangular(factor, x, upper=False)
    whole: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return whole
