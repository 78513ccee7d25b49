"""Ranks that move: a layer's tensors are cut and extended in training, and take on the sizes of a file when loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dynalora.adapter.storage import RANK, Storage
from dynalora.driver import carry_state


def fit(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """A tensor brought to a size along one dimension: cut, or filled up with zeros behind.

    Args:
        tensor: The tensor, of any shape.
        dim: The dimension.
        size: Its new size.

    Returns:
        The tensor with `size` entries along `dim`.
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


class RankedStorage(Storage):
    """Tensors whose number of rank-1 components may change.

    Parameters have the size they need, unless room is reserved: then they have a fixed size, of which the rank's
    first components are in use and the rest is zero.
    """

    name: str

    def reserve(self, config: Any, r: int) -> int:
        """Components to keep room for, so that no shape ever changes; 0 gives parameters the size they need.

        Methods whose ranks move reserve room where shapes are fixed from outside, as in distributed training.
        """
        return 0

    @torch.no_grad()
    def resize(self, adapter: str, keep: Sequence[int], new: Mapping[str, torch.Tensor] | None = None) -> None:
        """Keep some components of an adapter, in the given order, and put new ones after them.

        The parameters stay the same objects. Gradients and the state of every optimizer that has stepped them follow,
        and so do buffers that have a value per component: survivors keep theirs, new components begin with zeros.

        Args:
            adapter: The adapter.
            keep: Indices of the components that stay.
            new: Values of the new components by role, as many along the rank's dimension for every role.

        Raises:
            ValueError: Nothing would be left, or the new components do not fit the room that is reserved while the
                parameters' shapes must not change.
        """
        new = new or {}
        count = next((t.shape[self.rank_dims[role]] for role, t in new.items()), 0)
        rank, room = len(keep) + count, self.reserved[adapter]
        if not rank:
            raise ValueError(f"{self.name or 'the layer'}: an adapter must keep at least one component")
        if room and rank > room:
            raise ValueError(f"{self.name or 'the layer'}: rank {rank} exceeds the {room} places reserved")
        for role, parameter in self.adapter_parameters(adapter).items():
            if role in self.rank_dims:
                carry_state(parameter, self.rank_dims[role], keep, new.get(role), count, max(rank, room))
        for role, row in self.buffer_roles.items():
            buffer = None if row.rank_dim is None else self.running(role, adapter)
            if buffer is not None and row.rank_dim is not None:
                index = torch.tensor(list(keep), dtype=torch.int64, device=buffer.device)
                survivors = buffer.index_select(row.rank_dim, index)
                self.set_running(role, adapter, fit(survivors, row.rank_dim, rank))
        self.take_rank(adapter, rank)

    def take_rank(self, adapter: str, rank: int) -> None:
        """Note the rank that an adapter's parameters have been given."""
        self.ranks[adapter] = rank
        if self.reserved[adapter]:
            self._buffers_of(RANK)[adapter] = torch.tensor(rank)

    def expect(self, adapter: str, saved: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Take on the ranks, and make the buffers, of weights that are about to be loaded.

        Args:
            adapter: The adapter they are for.
            saved: Tensors by their name in this layer, without the adapter's (`"dira_down"`).

        Returns:
            Those that have to be loaded in another shape than saved, because room is reserved.
        """
        prefix = f"{self.method_name}_"
        dims = {role: d for role, d in self.rank_dims.items() if self.has_parameter(role, adapter)}
        shared = shared_rank({role: saved.get(prefix + role) for role in dims}, dims)
        if shared is None:  # nothing of this adapter, or nothing that fits together: loading will say so
            return {}
        rank = int(saved[f"{prefix}{RANK}"]) if f"{prefix}{RANK}" in saved else shared
        size = max(rank, self.reserved[adapter])
        fitted = {}
        for role, dim in dims.items():
            parameter = self.parameter(role, adapter)
            if parameter.shape[dim] != size:
                carry_state(parameter, dim, (), None, 0, size)
            value = saved[prefix + role]
            if value.shape[dim] != size:
                fitted[prefix + role] = fit(value.narrow(dim, 0, rank), dim, size)
        if self.reserved[adapter]:
            fitted[f"{prefix}{RANK}"] = torch.tensor(rank)
        self.take_rank(adapter, rank)
        device = self.parameter("up", adapter).device
        for role, row in self.buffer_roles.items():
            if row.saved == "present":
                present = saved.get(prefix + role)
                empty = None if present is None else torch.zeros_like(present, device=device)
                self.set_running(role, adapter, empty)
        return fitted

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Every way to load weights comes by here, before the containers of the parameters load theirs.
        for adapter in self.ranks:
            tail = f".{adapter}"
            saved = {
                key.removeprefix(prefix).removesuffix(tail): tensor
                for key, tensor in state_dict.items()
                if key.startswith(f"{prefix}{self.method_name}_") and key.endswith(tail)
            }
            for name, tensor in self.expect(adapter, saved).items():
                state_dict[f"{prefix}{name}{tail}"] = tensor
            if not self.reserved[adapter]:
                state_dict.pop(f"{prefix}{self.method_name}_{RANK}{tail}", None)
        super()._load_from_state_dict(state_dict, prefix, *args)
