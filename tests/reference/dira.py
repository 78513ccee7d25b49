"""DiRA in float64, term by term as the paper prints it.

Names follow the paper: ``A`` is r × in (the package's ``down``), ``B`` is out × r (``up``), ``s`` the scaling.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
    """y = W0·x + b + s·Σ_i B_:,i (A_i,:·x), one rank-1 component after the other; x is (..., in), y (..., out)."""
    y = torch.einsum("oi,...i->...o", weight, x)
    if bias is not None:
        y = y + bias
    for i in range(A.shape[0]):
        y = y + s * (x * A[i]).sum(-1, keepdim=True) * B[:, i]
    return y


def _norm(v: Tensor) -> Tensor:
    """Euclidean norm with subgradient 0 at the origin, where torch's square root would give NaN."""
    if not bool((v != 0).any()):
        return v.sum() * 0.0
    return torch.sqrt((v * v).sum())


def product_penalty(A: Tensor, B: Tensor) -> Tensor:
    """Eq. 5 without λ: Σ_i ‖B_:,i‖₂ ‖A_i,:‖₂."""
    total = A.new_zeros(())
    for i in range(A.shape[0]):
        total = total + _norm(B[:, i]) * _norm(A[i])
    return total


def variational_penalty(A: Tensor, B: Tensor) -> Tensor:
    """App. B.2 without λ: ½ (‖B‖_F² + ‖A‖_F²)."""
    return 0.5 * ((B * B).sum() + (A * A).sum())


def penalty(form: str, A: Tensor, B: Tensor) -> Tensor:
    return {"product": product_penalty, "variational": variational_penalty}[form](A, B)


def penalty_gradient(form: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """(∂/∂A, ∂/∂B) of the penalty by autograd, in float64."""
    A64 = A.detach().double().clone().requires_grad_(True)
    B64 = B.detach().double().clone().requires_grad_(True)
    grad_A, grad_B = torch.autograd.grad(penalty(form, A64, B64), (A64, B64), allow_unused=True)
    return (torch.zeros_like(A64) if grad_A is None else grad_A, torch.zeros_like(B64) if grad_B is None else grad_B)


def schedule(name: str, weight: float, step: int, total: int) -> float:
    """λ used by optimizer step number ``step`` (0 for the first) out of ``total``; 0 after the end when it decays."""
    progress = min(step / total, 1.0)
    if name == "linear":
        return weight * (1.0 - progress)
    if name == "cosine":
        return weight * 0.5 * (1.0 + math.cos(math.pi * progress))
    if name == "constant":
        return weight
    raise ValueError(name)


def spectrum(A: Tensor, B: Tensor, s: float) -> Tensor:
    """The r largest singular values of the dense ΔW = s·B·A, descending."""
    dense = s * (B.detach().double() @ A.detach().double())
    values = torch.linalg.svdvals(dense)
    rank = A.shape[0]
    if values.numel() < rank:
        values = torch.cat([values, values.new_zeros(rank - values.numel())])
    return values[:rank]


def landscape(A: Tensor, B: Tensor, s: float, tau: float) -> dict[str, float]:
    """§5.1: k(τ), the energy above τ, the nuclear norm; and exp of the entropy of the normalised singular values."""
    values = spectrum(A, B, s)
    above = [float(v) for v in values if float(v) > tau]
    energy_all = sum(float(v) ** 2 for v in values)
    nuclear = sum(float(v) for v in values)
    shares = [float(v) / nuclear for v in values if float(v) > 0] if nuclear > 0 else []
    return {
        "k": len(above),
        "energy": sum(v * v for v in above) / energy_all if energy_all > 0 else 0.0,
        "nuclear_norm": nuclear,
        "entropy_rank": math.exp(-sum(p * math.log(p) for p in shares)) if shares else 0.0,
    }


# The proximal step and the budget, one component after the other.


def proximal(A: Tensor, B: Tensor, threshold: float, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """A and B with every ‖B_:,i‖‖A_i,:‖ lowered by ``threshold``, to ``floor`` times itself at least."""
    A, B = A.detach().double().clone(), B.detach().double().clone()
    for i in range(A.shape[0]):
        size = float(_norm(A[i]) * _norm(B[:, i]))
        if size == 0:
            continue
        new = max(size - threshold, floor * size, 0.0)
        if new == 0:
            A[i], B[:, i] = 0.0, 0.0
        else:
            A[i], B[:, i] = A[i] * math.sqrt(new / size), B[:, i] * math.sqrt(new / size)
    return A, B


def survivors(sizes: list[list[float]], prices: list[float], limit: float) -> list[set[int]]:
    """By matrix, the components that a limit leaves: its largest, then greedily the largest size per price of all.

    At last one more, the next that costs less than twice of what is left.
    """
    best = [max(range(len(row)), key=lambda i: (row[i], -i)) for row in sizes]
    kept = [{i} for i in best]
    spent = sum(prices)
    rest = [(sizes[m][i] / prices[m], -m, -i) for m in range(len(sizes)) for i in range(len(sizes[m])) if i != best[m]]
    for _, m, i in sorted(rest, reverse=True):
        if spent + prices[-m] <= limit * (1 + 1e-12):
            kept[-m].add(-i)
            spent += prices[-m]
    further = [
        (m, i)
        for _, m, i in sorted(rest, reverse=True)
        if -i not in kept[-m] and prices[-m] < 2 * (limit - spent) * (1 - 1e-12)
    ]
    for m, i in further[:1]:
        kept[-m].add(-i)
    return kept


def allowed(done: int, start: int, end: int, full: float, target: float) -> float:
    """The budget's line after ``done`` steps."""
    if done >= end:
        return target
    if done <= start:
        return full
    return full - (full - target) * (done - start) / (end - start)


def dual(weight: float, first: float, cost: float, line: float, whole: float, steps: int) -> float:
    """λ after one update; ``whole`` is all the cost that is to go, over ``steps`` steps."""
    gain = min(0.5, max(0.02, 10.0 / steps))
    error = min(1.0, max(-1.0, (cost - line) / (0.05 * whole) - 1.0))
    return min(1000.0 * first, max(first / 1000.0, weight * math.exp(gain * error)))
