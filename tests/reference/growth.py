"""IncreLoRA and TriAdaptLoRA in float64, one matrix at a time, with whole weights and gradients by autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

AHEAD = 1e-5


@dataclass
class Matrix:
    """One adapted weight: its components, those that train ahead, and its smoothed score."""

    weight: Tensor
    down: Tensor
    e: Tensor
    up: Tensor
    ahead_down: Tensor | None = None
    ahead_up: Tensor | None = None
    mean: float = 0.0
    uncertainty: float = 0.0
    parameters: list[Tensor] = field(default_factory=list)

    def update(self, s: float) -> Tensor:
        """ΔW, the components one by one."""
        whole = torch.zeros_like(self.weight)
        for i in range(len(self.e)):
            whole = whole + s * self.e[i] * torch.outer(self.up[:, i], self.down[i])
        if self.ahead_down is not None and self.ahead_up is not None:
            for i in range(len(self.ahead_down)):
                whole = whole + s * AHEAD * torch.outer(self.ahead_up[:, i], self.ahead_down[i])
        return whole

    def leaves(self) -> list[Tensor]:
        every = [self.down, self.e, self.up, self.ahead_down, self.ahead_up]
        return [tensor for tensor in every if tensor is not None]


def deviation(rows: Tensor) -> Tensor:
    """‖rows·rowsᵀ − I‖_F, not squared."""
    return (rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype)).square().sum().sqrt()


def penalty(matrices: list[Matrix]) -> Tensor:
    """The mean over both factors of all matrices; and the same of what trains ahead."""
    terms = [deviation(rows) for m in matrices for rows in (m.down, m.up.T)]
    total = torch.stack(terms).mean()
    ahead = [deviation(rows) for m in matrices if m.ahead_down is not None for rows in (m.ahead_down, m.ahead_up.T)]
    return total + (torch.stack(ahead).mean() if ahead else 0.0)


def step(
    matrices: list[Matrix],
    loss: Callable[[list[Tensor]], Tensor],
    s: float,
    *,
    lr: float,
    gamma: float,
    betas: tuple[float, float],
) -> None:
    """One step of plain gradient descent, and each matrix's score from ∂L/∂W of the whole weight."""
    for matrix in matrices:
        for leaf in matrix.leaves():
            leaf.requires_grad_()
    updates = [matrix.update(s) for matrix in matrices]
    wholes = [m.weight + update for m, update in zip(matrices, updates, strict=True)]
    for whole in wholes:
        whole.retain_grad()
    (task := loss(wholes)).backward(retain_graph=True)
    for matrix, update, whole in zip(matrices, updates, wholes, strict=True):
        assert whole.grad is not None
        now = float((update * whole.grad).abs().sum()) / math.sqrt(whole.numel())
        matrix.mean = betas[0] * matrix.mean + (1 - betas[0]) * now
        matrix.uncertainty = betas[1] * matrix.uncertainty + (1 - betas[1]) * abs(now - matrix.mean)
    for matrix in matrices:
        for leaf in matrix.leaves():
            leaf.grad = None
    (task + gamma * penalty(matrices)).backward()
    with torch.no_grad():
        for matrix in matrices:
            for leaf in matrix.leaves():
                leaf -= lr * (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
                leaf.grad = None
                leaf.requires_grad_(False)


def chosen(matrices: list[Matrix], h: int) -> list[int]:
    """The h matrices of the highest S = Ī·Ū."""
    scores = [matrix.mean * matrix.uncertainty for matrix in matrices]
    return sorted(range(len(matrices)), key=lambda i: (-scores[i], i))[:h]


# TriAdaptLoRA ------------------------------------------------------------------------------------------------------


def triangles(core: Tensor) -> tuple[Tensor, Tensor]:
    """The lower triangle of a core, with its diagonal, and the upper one without."""
    below = torch.arange(len(core))[:, None] >= torch.arange(len(core))
    return torch.where(below, core, 0.0), torch.where(below, 0.0, core)


def tri_update(down: Tensor, core: Tensor, up: Tensor, s: float) -> Tensor:
    """s·up·(lower + upper)·down, (out, in)."""
    lower, upper = triangles(core)
    return s * (up @ lower @ down + up @ upper @ down)


def bordered(core: Tensor, k: int) -> Tensor:
    """A core with one more block: rows below, columns beside, the identity in the corner."""
    size = len(core)
    grown = torch.zeros(size + k, size + k, dtype=core.dtype)
    grown[:size, :size] = core
    for i in range(k):
        grown[size + i, size + i] = 1
    return grown


def tri_score(core: Tensor, blocks: int, last: float) -> tuple[float, float]:
    """How much ‖C‖_F per block has grown, and what it is now."""
    now = math.sqrt(sum(float(value) ** 2 for value in core.flatten())) / blocks
    return now - last, now


def tri_count(missing: int, progress: float, exponential: bool) -> int:
    """Matrices that grow at a look."""
    return max(1, int(math.exp(progress * math.log(missing))) if exponential else int(missing * progress))
