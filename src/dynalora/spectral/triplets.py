"""Some singular triplets of one matrix, or of a stack, without decomposing the whole where that can be avoided.

For A = W or Wᵀ, whichever is tall (m × n, m ≥ n), with singular values σ and G = AᵀA:

1. G is formed in float64. Products of float32 numbers are exact there, and G's rounding error, about 1e-16 σ_max²,
   is below what float32 resolves in σ.
2. `lanczos` finds the eigenvectors of G that belong to the smallest or the largest σ.
3. The singular value decomposition of A·Q, with Q these vectors, gives σ to the accuracy of A rather than of G, and
   the left vectors.
4. `certificates` checks the result.

Matrices that fail a check, and those too small for this to pay, are decomposed in full by `torch.linalg.svd`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dynalora.spectral.blocks import ROWS, chunks, gram_matrix, solve
from dynalora.spectral.certificates import certified, small_residuals
from dynalora.spectral.lanczos import largest_edge, smallest_edge

Which = Literal["smallest", "largest"]

# Short sides up to here: all eigenvectors of G, which takes less time than iterating.
_DENSE_SIDE = 640
_DENSE_SIDE_ON_DEVICES = 2048
_TINY = 1e-8  # relative size of singular values that leave A·v without direction


def of_one(weight: Tensor, k: int, which: Which, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Triplets of one matrix, or of a stack on an accelerator: the fast way, and the full one where that fails.

    Args:
        weight: (…, out, in), float32 or float64.
        k: How many triplets.
        which: The smallest or the largest.
        dtype: Of the result.

    Returns:
        Left vectors (…, out, k), values (…, k), descending, and right vectors (…, k, in).
    """
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


def _fast(tall: Tensor, k: int, which: Which) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Triplets in float64 with right vectors as columns, and for each matrix whether they passed the checks."""
    *batch, m, n = tall.shape
    block = k + max(8, k // 4)
    dense_side = _DENSE_SIDE if tall.device.type == "cpu" else _DENSE_SIDE_ON_DEVICES
    if tall.dtype == torch.float64 or k == n or (n > dense_side and 8 * block > n):
        # Float64 asks for more digits than G has; and most of the spectrum is the full decomposition's job.
        return _nothing(tall, k)
    if m <= ROWS:
        tall = tall.double()  # once and for all
    gram = gram_matrix(tall)
    norm = torch.linalg.matrix_norm(gram)  # Frobenius
    nonzero = norm > 0
    if not bool(nonzero.any()):
        return (
            torch.eye(m, k, dtype=gram.dtype, device=gram.device).expand(*batch, m, k),
            gram.new_zeros(*batch, k),
            torch.eye(n, k, dtype=gram.dtype, device=gram.device).expand(*batch, n, k),
            ~nonzero,
        )
    if n <= dense_side:
        right = torch.linalg.eigh(gram).eigenvectors
        right = right[..., :k] if which == "smallest" else right[..., -k:]
        left, values, right = _rayleigh_ritz(tall, right, k, which)
        return left, values, right, nonzero & small_residuals(tall, left, values, right)
    edge = smallest_edge(gram, norm, k, block) if which == "smallest" else largest_edge(gram, k, block)
    left, values, right = _rayleigh_ritz(tall, edge.vectors, k, which)
    if edge.factor is not None and bool((values[..., -k:] < _TINY * norm.sqrt()[..., None]).any()):
        left, values, right = _with_left_kernel(tall, edge.factor, norm, left, values, right)
    ok = nonzero & edge.converged & small_residuals(tall, left, values, right)
    if bool(ok.any()):
        ok = ok & certified(gram, norm, values, right, which == "smallest")
    return left, values, right, ok


def _nothing(tall: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What stands for triplets that the fast way does not give."""
    *batch, m, n = tall.shape
    nothing = tall.new_zeros((), dtype=torch.float64)
    missed = torch.zeros(batch, dtype=torch.bool, device=tall.device)
    return nothing.expand(*batch, m, k), nothing.expand(*batch, k), nothing.expand(*batch, n, k), missed


def _rayleigh_ritz(tall: Tensor, basis: Tensor, k: int, which: Which) -> tuple[Tensor, Tensor, Tensor]:
    """The k triplets at one end within the basis: (…, m, k), (…, k), (…, n, k), float64."""
    image = torch.cat([rows @ basis for _, rows in chunks(tall)], dim=-2)
    left, values, mixing_t = torch.linalg.svd(image, full_matrices=False)
    part = slice(-k, None) if which == "smallest" else slice(0, k)
    return left[..., part], values[..., part], basis @ mixing_t.mT[..., part]


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
        for part, rows in chunks(tall):
            back = back + rows.mT @ kernel[..., part, :]
        solved = solve(factor, back)
        kernel = kernel - torch.cat([rows @ solved for _, rows in chunks(tall)], dim=-2)
        # Not orthonormalised yet: each column shall converge on its own to a vector of the kernel.
        kernel = torch.nn.functional.normalize(kernel, dim=-2)
    # The tiny values are the last: the columns before them stay as they are, up to signs, which the core sees.
    left = torch.linalg.qr(torch.where(tiny[..., None, :], kernel, left)).Q
    core = torch.zeros_like(values)[..., None, :] * values[..., :, None]
    for part, rows in chunks(tall):
        core = core + left[..., part, :].mT @ (rows @ right)
    turn_left, values, turn_right = torch.linalg.svd(core)
    return left @ turn_left, values, right @ turn_right.mT
