"""One process or several: what code that runs under torchrun or Accelerate asks."""

from __future__ import annotations

import os
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")


def grouped() -> bool:
    """Whether this process has joined a group, so that collective calls work; a group of one counts."""
    return distributed.is_available() and distributed.is_initialized()


def process_count() -> int:
    """How many processes work together: the group's size, or before there is a group, what the launcher says."""
    if grouped():
        return distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE") or 1)  # set by torchrun and accelerate


def first_process() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return not grouped() or distributed.get_rank() == 0


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in full, where FSDP2 has spread it over processes, all of which must ask; else the tensor itself."""
    gather = getattr(tensor, "full_tensor", None)
    full: torch.Tensor = tensor if gather is None else gather()
    return full


def spread_as(like: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """A whole tensor, spread over processes as FSDP2 has spread another; itself where that one is not spread.

    Args:
        like: The other tensor.
        full: The tensor, of any shape, equal on all processes.
    """
    if not hasattr(like, "full_tensor"):
        return full
    from torch.distributed.tensor import distribute_tensor

    spread: torch.Tensor = distribute_tensor(full.contiguous(), like.device_mesh, like.placements)  # type: ignore[attr-defined]
    return spread


def from_first(value: T) -> T:
    """The first process's value, on all of them."""
    if not grouped() or distributed.get_world_size() == 1:
        return value
    shared = [value]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]
