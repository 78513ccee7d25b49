"""MiLoRA, SORSA and LoRA-Dash in float64, from their equations, with whole matrices and full decompositions."""

from __future__ import annotations

import torch
from torch import Tensor


def triplets(weight: Tensor, r: int, which: str) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), S (r) and Vᵀ (r, in): the largest or the smallest triplets of W0, in descending order."""
    up, sigma, down = torch.linalg.svd(weight.double(), full_matrices=False)
    chosen = slice(0, r) if which == "largest" else slice(len(sigma) - r, None)
    return up[:, chosen], sigma[chosen], down[chosen]


def milora_start(weight: Tensor, r: int, s: float) -> Tensor:
    """up₀·down₀ = Σ u_i (σ_i/s) v_iᵀ over the r smallest, (out, in): s times it is what is taken out of W0."""
    up, sigma, down = triplets(weight, r, "smallest")
    whole = torch.zeros_like(weight, dtype=torch.float64)
    for i in range(r):
        whole += sigma[i] / s * torch.outer(up[:, i], down[i])
    return whole


def sorsa_start(weight: Tensor, r: int) -> Tensor:
    """U₀·S₀·V₀ᵀ of the r largest, (out, in)."""
    up, sigma, down = triplets(weight, r, "largest")
    return up @ torch.diag(sigma) @ down


def sorsa_regulariser(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The mean over all matrices U and V of ‖·‖_F (not squared), differentiable; pairs are (U, Vᵀ)."""
    terms = []
    for up, down in pairs:
        for gram in (up.t() @ up, down @ down.t()):
            terms.append((gram - torch.eye(len(gram), dtype=gram.dtype)).square().sum().sqrt())
    return torch.stack(terms).mean()


def change_rates(weight: Tensor, delta: Tensor) -> Tensor:
    """|u_iᵀ ΔW v_i| / σ_i for every singular pair of W0, (min(out, in)), σ descending."""
    up, sigma, down = torch.linalg.svd(weight.double(), full_matrices=False)
    return torch.stack([(up[:, i] @ delta.double() @ down[i]).abs() / sigma[i] for i in range(len(sigma))])


def dash_update(weight: Tensor, delta: Tensor, directions: list[int], changes: Tensor, s: float) -> Tensor:
    """ΔW + s·Σ δ_i u_i v_iᵀ over the chosen pairs, (out, in)."""
    up, _, down = torch.linalg.svd(weight.double(), full_matrices=False)
    whole = delta.double().clone()
    for i, change in zip(directions, changes, strict=True):
        whole += s * change * torch.outer(up[:, i], down[i])
    return whole
