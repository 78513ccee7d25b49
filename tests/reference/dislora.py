"""DisLoRA in float64, from its equations, with whole matrices and full decompositions.

W0 = U Σ Vᵀ, all pairs in descending order of σ; ``r`` of them, the last, are trained.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPSILON = 1e-6


def decompose(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, n), σ (n), Vᵀ (n, in)."""
    return torch.linalg.svd(weight.double(), full_matrices=False)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    trained: tuple[Tensor, Tensor, Tensor],
    start: tuple[Tensor, Tensor, Tensor],
    directions: list[tuple[Tensor, Tensor, Tensor]],
    s: float,
) -> Tensor:
    """y = (W0 + s(U S Vᵀ − U₀ S₀ V₀ᵀ) + s Σ α_i u_i v_iᵀ)·x + b; triples are (U, S, Vᵀ) and (α_i, u_i, v_i)."""
    whole = weight.double().clone()
    for sign, (up, sigma, down) in ((1.0, trained), (-1.0, start)):
        for i in range(len(sigma)):
            whole += sign * s * sigma[i] * torch.outer(up[:, i], down[i])
    for alpha, u, v in directions:
        whole += s * alpha * torch.outer(u, v)
    y = x.double() @ whole.t()
    return y if bias is None else y + bias


def change_rates(weight: Tensor, residual: Tensor, floor: float) -> Tensor:
    """δ_i = |u_iᵀ M v_i| / σ_i for every singular pair of W0 (eq. 4), with σ_i of at least ``floor``."""
    up, sigma, down = decompose(weight)
    return torch.stack(
        [(up[:, i] @ residual.double() @ down[i]).abs() / sigma[i].clamp_min(floor) for i in range(len(sigma))]
    )


def ortho_loss(pairs: list[tuple[Tensor, Tensor]], squared: bool = True) -> Tensor:
    """(1/N) Σ (‖UᵀU − I‖_F² + ‖VᵀV − I‖_F²), eq. 6, differentiable; pairs are (U, Vᵀ).

    Not squared, the mean over all 2N factors, as in the authors' code.
    """
    total = torch.zeros((), dtype=torch.float64)
    for up, down in pairs:
        for gram in (up.t() @ up, down @ down.t()):
            square = torch.zeros((), dtype=torch.float64)
            for i in range(gram.shape[0]):
                for j in range(gram.shape[1]):
                    square = square + (gram[i, j] - float(i == j)) ** 2
            total = total + (square if squared else square.sqrt() / 2)
    return total / len(pairs)


def weights(task: float, ortho: float) -> tuple[float, float, float]:
    """k, w_task, w_ortho of eq. 12–14, as printed; only for k that do not overflow."""
    k = ortho / (task + EPSILON)
    a, b = math.exp(-k), math.exp(-1 / k + EPSILON)
    return k, a / (a + b), 1 - a / (a + b)
