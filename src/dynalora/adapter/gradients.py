"""Penalties in closed form: matrices of a shape are computed together, and added to gradients before the step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import nn

from dynalora.adapter.ranks import fit
from dynalora.common.devices import in_turn
from dynalora.common.private import foreach_add_
from dynalora.common.processes import spread_as

T = TypeVar("T")


def stackable(
    items: Iterable[T],
    tensors: Callable[[T], Sequence[torch.Tensor]],
    apart: Callable[[T], Hashable] = lambda item: None,
) -> list[Sequence[T]]:
    """Items whose tensors can be stacked, as many together as are computed together on their device.

    Args:
        items: What is to be computed.
        tensors: The tensors of an item, in an order that is the same for all.
        apart: What else keeps items apart.
    """
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        kinds = ((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors(item))
        groups.setdefault((apart(item), *kinds), []).append(item)
    parts: list[Sequence[T]] = []
    for group in groups.values():
        each = tensors(group[0])
        parts += in_turn(group, len(group) * sum(tensor.numel() for tensor in each), each[0].device)
    return parts


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
