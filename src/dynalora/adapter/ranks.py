"""Ranks that move: a layer's tensors are cut and extended in training, and take on the sizes of a file when loaded."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dynalora.adapter.storage import BUDGET, CLOCK, RANK, Storage
from dynalora.common.devices import sent
from dynalora.common.processes import whole
from dynalora.driver import carry_state
from dynalora.errors import CheckpointError

_LONGEST = 2**53  # steps
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

#: Values of new components by role; two parts where a role carries the rank in two dimensions.
NewComponents = Mapping[str, torch.Tensor | tuple[torch.Tensor, ...]]


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


def _as_long(part: torch.Tensor, dim: int, axes: Sequence[int], keep: Sequence[int], shape: torch.Size) -> torch.Tensor:
    """New slices along `dim`, made as long as those that they join along the other dimensions that carry the rank.

    Dimensions before `dim` have their new size already; of those after it, the components in `keep` are kept next.
    """
    for other in axes:
        if other < dim:
            part = fit(part, other, shape[other])
        elif other > dim:
            wanted = list(part.shape)
            wanted[other] = shape[other]
            index = torch.tensor(list(keep), dtype=torch.int64, device=part.device)
            part = part.new_zeros(wanted).index_copy(other, index, part)
    return part


def shared_rank(tensors: Mapping[str, torch.Tensor | None], axes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The rank that tensors agree on, or None if one is missing or they differ.

    Args:
        tensors: Tensors by role.
        axes: The dimensions that carry the rank, by role.
    """
    sizes = {
        tensor.shape[dim] if tensor is not None and tensor.ndim > dim else None
        for role, tensor in tensors.items()
        for dim in axes[role]
    }
    return sizes.pop() if len(sizes) == 1 else None


_followers: weakref.WeakKeyDictionary[RankedStorage, weakref.WeakSet[RankedStorage]] = weakref.WeakKeyDictionary()


class RankedStorage(Storage):
    """Tensors whose number of rank-1 components may change.

    Parameters have the size they need, unless room is reserved: then they have a fixed size, of which the rank's
    first components are in use and the rest is zero.
    """

    name: str
    scaling: dict[str, float]
    scaling_ranks: dict[str, int]

    def add_follower(self, follower: RankedStorage) -> None:
        """Let the ranks of a copy of this layer, in an average of the model, follow this one's."""
        _followers.setdefault(self, weakref.WeakSet()).add(follower)

    def followers(self) -> list[RankedStorage]:
        """The living copies of this layer in averages of the model."""
        return list(_followers.get(self, ()))

    def set_running(self, role: str, adapter: str, value: torch.Tensor | None) -> None:
        """Put a buffer in place or take it away; see `Storage.set_running`. Averages pair buffers by their order."""
        super().set_running(role, adapter, value)
        for follower in self.followers():
            follower.set_running(role, adapter, None if value is None else value.clone())

    def reserve(self, config: Any, r: int) -> int:
        """Components to keep room for, so that no shape ever changes; 0 gives parameters the size they need.

        Methods whose ranks move reserve room where shapes are fixed from outside, as in distributed training.
        """
        return 0

    @torch.no_grad()
    def resize(self, adapter: str, keep: Sequence[int], new: NewComponents | None = None) -> None:
        """Keep some components of an adapter, in the given order, and put new ones after them.

        The parameters stay the same objects. Gradients and the state of every optimizer that has stepped them follow,
        and so do buffers that have a value per component: survivors keep theirs, new components begin with zeros.

        Args:
            adapter: The adapter.
            keep: Indices of the components that stay.
            new: Values of the new components by role, as many along the rank's dimension for every role; those that
                are parameters themselves bring the state of their optimizer along. Where a role carries the rank in two
                dimensions there are two: new rows (k, kept), and then new columns (kept + k, k).

        Raises:
            ValueError: Nothing would be left, or the new components do not fit the room that is reserved while the
                parameters' shapes must not change.
        """
        for follower in self.followers():
            follower.resize(adapter, keep, new)
        new = new or {}
        parts = {role: value if isinstance(value, tuple) else (value,) for role, value in new.items()}
        count = next((values[0].shape[self.rank_dims[role]] for role, values in parts.items()), 0)
        rank, room = len(keep) + count, self.reserved[adapter]
        if not rank:
            raise ValueError(f"{self.name or 'the layer'}: an adapter must keep at least one component")
        if room and rank > room:
            raise ValueError(f"{self.name or 'the layer'}: rank {rank} exceeds the {room} places reserved")
        for role, parameter in self.adapter_parameters(adapter).items():
            axes = self.rank_axes.get(role, ())
            for dim, part in zip(axes, parts.get(role, (None,) * len(axes)), strict=True):
                joining = None if part is None else _as_long(part, dim, axes, keep, parameter.shape)
                carry_state(parameter, dim, keep, joining, count, max(rank, room))
        for role, row in self.buffer_roles.items():
            buffer = self.running(role, adapter) if row.rank_axes else None
            if buffer is not None:
                index = sent(torch.tensor(list(keep), dtype=torch.int64), buffer.device)
                for dim in row.rank_axes:
                    buffer = fit(buffer.index_select(dim, index), dim, rank)
                self.set_running(role, adapter, buffer)
        self.take_rank(adapter, rank)

    def take_rank(self, adapter: str, rank: int) -> None:
        """Note the rank that an adapter's parameters have been given."""
        self.ranks[adapter] = rank
        if self.reserved[adapter]:
            self._buffers_of(RANK)[adapter] = torch.tensor(rank)

    def check(self, adapter: str, saved: Mapping[str, torch.Tensor]) -> None:
        """Refuse weights that cannot be this layer's, before anything is changed.

        Args:
            adapter: The adapter they are for.
            saved: Tensors by their name in this layer, without the adapter's (`"dira_down"`).

        Raises:
            CheckpointError: A tensor is unknown, of another shape or kind, or holds values that no training leaves.
        """
        prefix = f"{self.method_name}_"
        roles = {name.removeprefix(prefix): tensor for name, tensor in saved.items()}
        dims = {role: axes for role, axes in self.rank_axes.items() if self.has_parameter(role, adapter)}
        rank = shared_rank({role: roles.get(role) for role in dims}, dims)
        if rank is None and dims.keys() & roles.keys():
            shapes = ", ".join(f"{role} {tuple(roles[role].shape)}" for role in dims if role in roles)
            lacking = [role for role in dims if role not in roles]
            reason = f"lacks {', '.join(lacking)} and has {shapes}" if lacking else f"has {shapes}"
            raise self._refuse(reason, "tensors that do not agree on a rank")
        if RANK in roles:
            size, saved_rank = rank or 0, roles[RANK]
            if saved_rank.numel() != 1 or saved_rank.is_floating_point() or not 1 <= int(saved_rank) <= size:
                held = saved_rank.tolist() if saved_rank.numel() <= 4 else tuple(saved_rank.shape)
                raise self._refuse(f"has rank {held}", f"it must be from 1 to {size}, the size of its tensors")
            rank = int(saved_rank)
        if rank == 0:
            raise self._refuse("has rank 0", "it must be at least 1")
        for role, tensor in roles.items():
            if role != RANK:
                self._check_tensor(adapter, role, tensor, rank)

    def _check_tensor(self, adapter: str, role: str, tensor: torch.Tensor, rank: int | None) -> None:
        """Refuse a tensor, named by its role, that is not what this layer has or may have."""
        shape: Sequence[int] | None
        if role in self.parameter_roles and self.has_parameter(role, adapter):
            parameter = self.parameter(role, adapter)
            shape, floating = list(parameter.shape), True
            for dim in self.rank_axes.get(role, ()) if tensor.ndim == len(shape) else ():
                shape[dim] = tensor.shape[dim]  # all agree on it
        elif role in self.buffer_roles and self.buffer_roles[role].saved == "present":
            shape, floating = self.present_shape(role, adapter, tensor, rank)
        elif role in self.buffer_roles:
            buffer = self.running(role, adapter)
            shape = list(tensor.shape if buffer is None else buffer.shape)
            floating = tensor.is_floating_point() if buffer is None else buffer.is_floating_point()
        else:
            raise self._refuse(f"has {role!r}", "its settings or this version know no such tensor")
        if list(tensor.shape) != list(shape):
            raise self._refuse(f"has {role!r} of shape {tuple(tensor.shape)}", f"the layer's is {tuple(shape)}")
        if tensor.dtype not in (_FLOATS if floating else _WHOLE):
            raise self._refuse(f"has {role!r} in {tensor.dtype}", "that is not its kind of number")
        local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if floating and not local.is_meta and not bool(torch.isfinite(local).all()):
            raise self._refuse(f"has NaN or infinite values in {role!r}", "an adapter without them is needed")
        if role == CLOCK.name and not local.is_meta and not all(0 <= value < _LONGEST for value in local.tolist()):
            raise self._refuse(f"has the clock {local.tolist()}", "that is no number of steps")

    def present_shape(
        self, role: str, adapter: str, tensor: torch.Tensor, rank: int | None
    ) -> tuple[Sequence[int], bool]:
        """What a buffer that need not be there must be where a file has it.

        Args:
            role: Its role.
            adapter: The adapter.
            tensor: What the file has.
            rank: The rank that the file's tensors agree on; None if it has none of them.

        Returns:
            Its shape, and whether it is of floating-point numbers.

        Raises:
            CheckpointError: Its content cannot be used.
        """
        return (4,) if role == BUDGET.name else tuple(tensor.shape), True

    def _refuse(self, what: str, why: str) -> CheckpointError:
        return CheckpointError(
            f"the saved {self.method_name.upper()} adapter {what} in {self.name or 'a layer'!r}: {why}; use another "
            "copy of it, with the base model that it was made for."
        )

    def expect(self, adapter: str, saved: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Take on the ranks, and make the buffers, of weights that are about to be loaded.

        Args:
            adapter: The adapter they are for.
            saved: Tensors by their name in this layer, without the adapter's (`"dira_down"`).

        Returns:
            Those that have to be loaded in another shape than saved, because room is reserved.
        """
        prefix = f"{self.method_name}_"
        dims = {role: axes for role, axes in self.rank_axes.items() if self.has_parameter(role, adapter)}
        shared = shared_rank({role: saved.get(prefix + role) for role in dims}, dims)
        if shared is None:  # nothing of this adapter, or nothing that fits together: loading will say so
            return {}
        rank = int(saved[f"{prefix}{RANK}"]) if f"{prefix}{RANK}" in saved else shared
        size = max(rank, self.reserved[adapter])
        fitted = {}
        for role, axes in dims.items():
            parameter = self.parameter(role, adapter)
            value = saved[prefix + role]
            for dim in axes:
                if parameter.shape[dim] != size:
                    carry_state(parameter, dim, (), None, 0, size)
                if value.shape[dim] != size:
                    value = fitted[prefix + role] = fit(value.narrow(dim, 0, rank), dim, size)
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

    @torch.no_grad()
    def copy_adapter(self, source: str, target: str) -> None:
        """Give one adapter of this layer the ranks, scaling and values of another of the same settings."""
        prefix = f"{self.method_name}_"
        tensors = {role: p.detach() for role, p in self.adapter_parameters(source).items()}
        buffers = {role: self.running(role, source) for role in self.buffer_roles if role != CLOCK.name}
        tensors |= {role: buffer for role, buffer in buffers.items() if buffer is not None}
        for role, axes in self.rank_axes.items():
            for dim in axes if role in tensors else ():
                tensors[role] = fit(tensors[role], dim, self.ranks[source])
        self.expect(target, {prefix + role: tensor for role, tensor in tensors.items()})
        for role, tensor in tensors.items():
            place = self.running(role, target) if role in self.buffer_roles else self.parameter(role, target)
            if place is not None:
                for dim in self.rank_axes.get(role, ()):
                    tensor = fit(tensor, dim, place.shape[dim])
                place.copy_(tensor)
        self.scaling[target], self.scaling_ranks[target] = self.scaling[source], self.scaling_ranks[source]

    def saved_here(self, state_dict: Mapping[str, Any], prefix: str, adapter: str) -> dict[str, torch.Tensor]:
        """What a model's state dict has for an adapter of this layer, by the names that `check` takes."""
        tail = f".{adapter}"
        return {
            key.removeprefix(prefix).removesuffix(tail): tensor
            for key, tensor in state_dict.items()
            if key.startswith(f"{prefix}{self.method_name}_") and key.endswith(tail)
        }

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Every way to load weights comes by here, before the containers of the parameters load theirs.
        for adapter in self.ranks:
            tail = f".{adapter}"
            saved = self.saved_here(state_dict, prefix, adapter)
            self.check(adapter, saved)
            for name, tensor in self.expect(adapter, saved).items():
                state_dict[f"{prefix}{name}{tail}"] = tensor
            if not self.reserved[adapter]:
                state_dict.pop(f"{prefix}{self.method_name}_{RANK}{tail}", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


def in_use(layer: RankedStorage, role: str, adapter: str, tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor of a parameter's shape that its components fill, in full where FSDP2 has spread it."""
    filled = whole(tensor)
    for dim in layer.rank_axes.get(role, ()) if layer.reserved[adapter] else ():
        filled = filled.narrow(dim, 0, layer.ranks[adapter])
    return filled
