"""The gradient of the penalty that keeps both factors near orthonormal (eq. 2)."""

from __future__ import annotations

from typing import Any

import torch

from dynalora.adapter.ranks import fit
from dynalora.common.private import foreach_add_
from dynalora.driver import Moment
from dynalora.methods.pedyra.layer import PedyraLayer, in_use


def add_orthogonality(moment: Moment, weight: float) -> None:
    """Add 4γ (down·downᵀ − I) down and 4γ up (upᵀ·up − I), layers of equal shape together."""
    groups: dict[Any, list[PedyraLayer]] = {}
    for layer in moment.layers:
        for role in ("down", "up"):
            parameter = layer.parameter(role, moment.adapter)
            if moment.awaits(parameter):
                shape = layer.rank(moment.adapter), parameter.shape[1 - layer.rank_dims[role]]
                groups.setdefault((role, shape, parameter.dtype, parameter.device), []).append(layer)
    for (role, (rank, _), dtype, device), layers in groups.items():
        factors = torch.stack(
            [in_use(x, role, moment.adapter, x.parameter(role, moment.adapter).detach()) for x in layers]
        )
        rows = factors if role == "down" else factors.mT  # (L, r, features)
        identity = torch.eye(rank, dtype=dtype, device=device)
        deviation = rows @ rows.mT - identity
        # A new triple is orthonormal to rounding and, with e = 0, has no other gradient: Adam, which knows no size,
        # would make full steps of what rounding left.
        deviation = deviation.masked_fill(deviation.abs() < 32 * torch.finfo(dtype).eps, 0.0)
        addition = torch.bmm(deviation, rows) * (4 * weight * moment.grad_scale)
        if role == "up":
            addition = addition.mT
        targets, additions = [], []
        for layer, share in zip(layers, addition.unbind(), strict=True):
            parameter, dim = layer.parameter(role, moment.adapter), layer.rank_dims[role]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if hasattr(parameter, "full_tensor"):
                parameter.grad.add_(_like(parameter, fit(share, dim, parameter.shape[dim])))
            else:
                targets.append(parameter.grad.narrow(dim, 0, rank))
                additions.append(share)
        if targets:
            foreach_add_(targets, additions)


def _like(sharded: Any, whole: torch.Tensor) -> torch.Tensor:
    """A tensor spread over processes as FSDP2 has spread another."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, sharded.device_mesh, sharded.placements)
