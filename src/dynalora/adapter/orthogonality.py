"""Penalties that keep the rows of `down` and the columns of `up` orthonormal, for the methods that have one.

With D = down·downᵀ − I or D = upᵀ·up − I, two for each of the N adapted matrices:

    "sum":        Σ ‖D‖_F²                     gradient 4·D·down, and 4·up·D            (PE-DyRA, eq. 2)
    "mean_norm":  1/(2N) Σ ‖D‖_F               gradient D·down / (N·‖D‖_F), …           (AdaLoRA's code, SORSA)

The gradient is added right before the optimizer's step; only r × r matrices are formed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import nn

from dynalora.adapter.gradients import add_to_gradients, stackable
from dynalora.adapter.layer import AdapterLayer
from dynalora.adapter.ranks import in_use
from dynalora.common.private import foreach_norm
from dynalora.common.processes import whole
from dynalora.driver import Moment

Reduction = Literal["sum", "mean_norm"]


class _Factor(NamedTuple):
    """A factor of a layer's update.

    Attributes:
        layer: The layer.
        role: What the factor is called in it.
        parameter: The factor.
        dim: The dimension along which its components lie.
    """

    layer: AdapterLayer
    role: str
    parameter: nn.Parameter
    dim: int


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
    factors: list[_Factor] = []
    for layer in moment.layers:
        parameters = layer.adapter_parameters(moment.adapter)
        for dim, role in enumerate(roles):
            if moment.awaits(parameter := parameters[role]):
                factors.append(_Factor(layer, role, parameter, dim))

    def apart(factor: _Factor) -> tuple[int, int]:
        """Of those of a shape, not all need have the same rank: there may be room in reserve."""
        return factor.dim, factor.layer.rank(moment.adapter)

    for alike in stackable(factors, lambda factor: (factor.parameter,), apart):
        dim, rows = alike[0].dim, _rows(alike, moment.adapter)  # (L, r, features)
        deviation = _deviation(rows)
        # A new component is orthonormal to rounding and may have no other gradient: Adam, which knows no size, would
        # make full steps of what rounding left.
        deviation.masked_fill_(deviation.abs() < 32 * torch.finfo(rows.dtype).eps, 0.0)
        rate = 4 * weight * moment.grad_scale
        if reduction == "mean_norm":
            norms = torch.linalg.vector_norm(deviation, dim=(1, 2), keepdim=True)
            deviation = deviation / torch.where(norms > 0, norms, 1.0)
            rate = weight * moment.grad_scale / len(moment.all_layers)
        # (D·rows)ᵀ is made as rowsᵀ·D, since D is symmetric, so that it lies as the parameter does.
        addition = torch.bmm(deviation, rows) if dim == 0 else torch.bmm(rows.mT, deviation)
        addition *= rate
        if most is not None:
            addition *= _limits(addition, [factor.parameter.grad for factor in alike], most)
        add_to_gradients([factor.parameter for factor in alike], addition, dim)


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
            factor = _Factor(layer, role, layer.parameter(role, adapter), dim)
            norm = float(torch.linalg.vector_norm(_deviation(_rows([factor], adapter))))
            terms.append(norm**2 if reduction == "sum" else norm)
    return sum(terms) if reduction == "sum" else sum(terms) / len(terms)


def _rows(factors: Sequence[_Factor], adapter: str) -> torch.Tensor:
    """(L, r, features) with rows that are to be orthonormal."""
    stacked = torch.stack([in_use(layer, role, adapter, parameter.detach()) for layer, role, parameter, _ in factors])
    return stacked if factors[0].dim == 0 else stacked.mT


def _deviation(rows: torch.Tensor) -> torch.Tensor:
    """D, (L, r, r)."""
    gram = rows @ rows.mT
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return gram


def _limits(additions: torch.Tensor, gradients: Sequence[torch.Tensor | None], most: float) -> torch.Tensor:
    """Factors (L, 1, 1), 1 at most, that leave additions (L, …) no longer than a share of the gradients."""
    made = [gradient for gradient in gradients if gradient is not None]
    known, zero = iter(foreach_norm(made) if made else ()), additions.new_zeros(())
    lengths = torch.stack([zero if g is None else whole(next(known)).to(zero) for g in gradients])
    norms = torch.linalg.vector_norm(additions, dim=(1, 2))
    limits: torch.Tensor = most * lengths / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    return limits.clamp_max(1.0)[:, None, None]
