"""Small helpers for tensors that carry the rank along one of their dimensions."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def fit(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """A tensor brought to a size along one dimension: cut, or filled up with zeros behind.

    Args:
        tensor: The tensor.
        dim: The dimension.
        size: Its new size.
    """
    have = tensor.shape[dim]
    if have >= size:
        return tensor.narrow(dim, 0, size)
    shape = list(tensor.shape)
    shape[dim] = size - have
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def shared_rank(tensors: Mapping[str, torch.Tensor | None], dims: Mapping[str, int]) -> int | None:
    """The rank that tensors agree on, or None if one is missing or they differ.

    Args:
        tensors: Tensors by role.
        dims: The dimension that carries the rank, by role.
    """
    sizes = {
        tensor.shape[dims[role]] if tensor is not None and tensor.ndim > dims[role] else None
        for role, tensor in tensors.items()
    }
    return sizes.pop() if len(sizes) == 1 else None
