"""Penalties that keep the rows of `down` and the columns of `up` orthonormal, for the methods that have one.

With D = down·downᵀ − I or D = upᵀ·up − I, two for each of the N adapted matrices:

    "sum":        Σ ‖D‖_F²                     gradient 4·D·down, and 4·up·D            (PE-DyRA, eq. 2)
    "mean_norm":  1/(2N) Σ ‖D‖_F               gradient D·down / (N·‖D‖_F), …           (AdaLoRA's code, SORSA)

The gradient is added right before the optimizer's step; only r × r matrices are formed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch

from dynalora.adapter.layer import AdapterLayer
from dynalora.adapter.ranks import fit, in_use
from dynalora.common.private import foreach_add_
from dynalora.common.processes import spread_as, whole
from dynalora.driver import Moment

Reduction = Literal["sum", "mean_norm"]


def add_orthogonality(
    moment: Moment,
    weight: float,
    reduction: Reduction = "sum",
    roles: tuple[str, str] = ("down", "up"),
    most: float | None = None,
) -> None:
    """Add a penalty's gradient, layers of equal shape together.

    Args:
        moment: The moment before the step.
        weight: The penalty's weight.
        reduction: How the penalty adds up its terms.
        roles: The two parameters of a layer: one of rows (r, in), and one of columns (out, r).
        most: The largest norm of what is added to a factor's gradient, as a share of that gradient's; None: no limit.
    """
    groups: dict[Any, list[AdapterLayer]] = {}
    for layer in moment.layers:
        for dim, role in enumerate(roles):
            parameter = layer.parameter(role, moment.adapter)
            if moment.awaits(parameter):
                count = layer.rank(moment.adapter) if role in layer.rank_dims else parameter.shape[dim]
                shape = count, parameter.shape[1 - dim]
                groups.setdefault((role, shape, parameter.dtype, parameter.device), []).append(layer)
    for (role, (rank, _), _, _), layers in groups.items():
        dim = roles.index(role)
        rows = _rows(layers, role, dim, moment.adapter)  # (L, r, features)
        deviation = _deviation(rows)
        # A new component is orthonormal to rounding and may have no other gradient: Adam, which knows no size, would
        # make full steps of what rounding left.
        deviation = deviation.masked_fill(deviation.abs() < 32 * torch.finfo(rows.dtype).eps, 0.0)
        rate = 4 * weight * moment.grad_scale
        if reduction == "mean_norm":
            norms = torch.linalg.vector_norm(deviation, dim=(1, 2), keepdim=True)
            deviation = deviation / torch.where(norms > 0, norms, 1.0)
            rate = weight * moment.grad_scale / len(moment.all_layers)
        addition = torch.bmm(deviation, rows) * rate
        if most is not None:
            addition *= _limits(addition, [layer.parameter(role, moment.adapter).grad for layer in layers], most)
        if dim == 1:
            addition = addition.mT
        _add(layers, role, dim, moment.adapter, addition, rank)


@torch.no_grad()
def orthogonality(layers: Iterable[AdapterLayer], adapter: str, reduction: Reduction = "sum") -> float:
    """The penalty itself, without its weight.

    Args:
        layers: All layers of the adapter.
        adapter: Its name.
        reduction: How the penalty adds up its terms.
    """
    terms = []
    for layer in layers:
        for dim, role in enumerate(("down", "up")):
            norm = float(torch.linalg.vector_norm(_deviation(_rows([layer], role, dim, adapter))))
            terms.append(norm**2 if reduction == "sum" else norm)
    return sum(terms) if reduction == "sum" else sum(terms) / len(terms)


def _rows(layers: Iterable[AdapterLayer], role: str, dim: int, adapter: str) -> torch.Tensor:
    """(L, r, features) with rows that are to be orthonormal; the parameter's components lie along `dim`."""
    parts = [in_use(layer, role, adapter, layer.parameter(role, adapter).detach()) for layer in layers]
    factors = torch.stack(parts)
    return factors if dim == 0 else factors.mT


def _deviation(rows: torch.Tensor) -> torch.Tensor:
    """D, (L, r, r)."""
    gram = rows @ rows.mT
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return gram


def _limits(additions: torch.Tensor, gradients: Sequence[torch.Tensor | None], most: float) -> torch.Tensor:
    """Factors (L, 1, 1), 1 at most, that leave additions (L, …) no longer than a share of the gradients."""
    zero = additions.new_zeros(())
    lengths = [zero if g is None else whole(torch.linalg.vector_norm(g)).to(zero) for g in gradients]
    norms = torch.linalg.vector_norm(additions, dim=(1, 2))
    limits: torch.Tensor = most * torch.stack(lengths) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    return limits.clamp_max(1.0)[:, None, None]


def _add(layers: Iterable[AdapterLayer], role: str, dim: int, adapter: str, additions: torch.Tensor, rank: int) -> None:
    """Add (L, …) to the gradients of one role's parameters; one that had none gets one."""
    targets, shares = [], []
    for layer, share in zip(layers, additions.unbind(), strict=True):
        parameter = layer.parameter(role, adapter)
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if hasattr(parameter, "full_tensor"):
            parameter.grad.add_(spread_as(parameter, fit(share, dim, parameter.shape[dim])))
        else:
            targets.append(parameter.grad.narrow(dim, 0, rank))
            shares.append(share)
    if targets:
        foreach_add_(targets, shares)
