"""Additions to gradients before an optimizer steps: penalties in closed form, for all matrices of a shape at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dynalora.adapter.ranks import fit
from dynalora.common.private import foreach_add_
from dynalora.common.processes import spread_as


def add_to_gradients(parameters: Sequence[nn.Parameter], additions: torch.Tensor, dim: int | None = None) -> None:
    """Add to the gradients of parameters; one that has none (of a layer that was not used) gets one.

    Args:
        parameters: L parameters of one shape, `dim` aside.
        additions: (L, …), each of the parameter's shape. Where FSDP2 has spread the parameters they may be spread too.
        dim: A dimension of the parameters along which additions may be shorter: the rest is room in reserve.
    """
    gradients, shares = [], []
    for parameter, share in zip(parameters, additions.unbind(), strict=True):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradient = parameter.grad
        if hasattr(parameter, "full_tensor"):
            if not hasattr(share, "full_tensor"):
                share = spread_as(parameter, share if dim is None else fit(share, dim, parameter.shape[dim]))
            gradient.add_(share)
            continue
        if dim is not None and share.shape[dim] != gradient.shape[dim]:
            gradient = gradient.narrow(dim, 0, share.shape[dim])
        gradients.append(gradient)
        shares.append(share)
    if gradients:
        foreach_add_(gradients, shares)
