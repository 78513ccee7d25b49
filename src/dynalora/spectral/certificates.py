"""Checks of computed triplets: that they are singular triplets, and that no other lies beyond them.

The second uses Sylvester's law of inertia: adding a matrix of rank k lifts at most k eigenvalues of G over a level. Let
the level lie just below σ_k², the largest of the k smallest, and let V hold their right vectors. If G + c·VVᵀ minus the
level, with c large, has a Cholesky factorisation, then G has at most k eigenvalues below the level, and these k are all
there are. For the largest, the same is done with −G.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynalora.spectral.blocks import cholesky, chunks

_SLACK = 1e-6  # how much, relatively, σ² of a triplet left out may be beyond that of one returned


def small_residuals(tall: Tensor, left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    """Whether ‖Av − σu‖ and ‖Aᵀu − σv‖ are small against ‖A‖ for all of them, (…)."""
    forward = values.new_zeros(values.shape)
    norm = values.new_zeros(values.shape[:-1])
    back = -right * values[..., None, :]
    for part, rows in chunks(tall):
        misfit = rows @ right - left[..., part, :] * values[..., None, :]
        forward = forward + misfit.square().sum(-2)
        back = back + rows.mT @ left[..., part, :]
        norm = torch.maximum(norm, torch.linalg.vector_norm(rows, dim=-1).amax(-1))
    worst = torch.maximum(forward.sqrt(), torch.linalg.vector_norm(back, dim=-2)).amax(-1)
    # The longest row is at most ‖A‖, so this is the stricter reading.
    return worst <= 1e-6 * norm


def certified(gram: Tensor, norm: Tensor, values: Tensor, right: Tensor, smallest: bool) -> Tensor:
    """Whether no singular value outside the given ones lies beyond them, (…).

    Args:
        gram: G, (…, n, n); overwritten.
        norm: Its Frobenius norm, (…).
        values: Singular values, (…, k), descending.
        right: Their right vectors, (…, n, k).
        smallest: Whether they are to be the smallest, or else the largest.
    """
    eps = torch.finfo(torch.float64).eps
    if smallest:
        edge = values[..., 0].square()
        level = edge * (1 - _SLACK) - 32 * eps * norm
    else:
        gram = gram.neg_()
        edge = values[..., -1].square()
        level = -(edge * (1 + _SLACK) + 32 * eps * norm)
    gram += (right * norm[..., None, None]) @ right.mT
    gram.diagonal(dim1=-2, dim2=-1).sub_(level[..., None])
    return cholesky(gram)[1]
