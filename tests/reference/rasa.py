"""RaSA in float64: the pool as one list of components, and every layer's update as a sum over it."""

from __future__ import annotations

import torch
from torch import Tensor


def updates(downs: list[Tensor], ups: list[Tensor], mixes: list[Tensor], k: int, s: float) -> list[Tensor]:
    """s·ΔW of layers of one kind, whose last k components (or all, if they have fewer) are pooled."""
    pool = []
    for down, up in zip(downs, ups, strict=True):
        pool += [(down[i], up[:, i]) for i in range(max(0, len(down) - k), len(down))]
    found = []
    for down, up, mix in zip(downs, ups, mixes, strict=True):
        own = [(down[i], up[:, i]) for i in range(max(0, len(down) - k))]
        whole = torch.zeros(len(up), down.shape[1], dtype=down.dtype)
        for weight, (row, column) in zip(mix, own + pool, strict=True):
            whole = whole + s * weight * torch.outer(column, row)
        found.append(whole)
    return found


def start(rank: int, pooled: int, k: int, alpha: float, s: float) -> list[float]:
    """m at the start: half of alpha over the private components, half over the pooled ones, as multiples of s."""
    own = max(0, rank - k)
    return [alpha / 2 / own / s for _ in range(own)] + [alpha / 2 / pooled / s] * pooled
