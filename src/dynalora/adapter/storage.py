"""The tensors of an adapter in one layer: which there are, where they are kept, how they are reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import nn

from dynalora.common.private import BufferDict


@dataclass(frozen=True)
class Role:
    """A kind of tensor that an adapter has in a layer: one row of the table `Storage.roles`.

    Attributes:
        name: Its name. The layer's attribute, and with it the checkpoint's key, is the method's name and this one
            (`dira_down`).
        trains: Whether it is a parameter; otherwise it is a buffer, which is saved and never trains.
        rank_dim: The dimension along which the rank-1 components lie, which `resize` cuts and extends; several where
            it is a matrix between the factors; None if there is none.
        saved: Where a buffer is, and is saved with the adapter: `"always"` in every layer; `"first"` in the
            adapter's first layer only, for what belongs to the adapter as a whole; `"present"` wherever training has
            put it, until training takes it away (moving averages, records).
    """

    name: str
    trains: bool = True
    rank_dim: int | tuple[int, ...] | None = None
    saved: Literal["always", "first", "present"] = "always"

    @property
    def rank_axes(self) -> tuple[int, ...]:
        """The dimensions along which the components lie; empty if there is none."""
        if self.rank_dim is None:
            return ()
        return self.rank_dim if isinstance(self.rank_dim, tuple) else (self.rank_dim,)


#: The two factors of the update, (r, in) and (out, r), with which every method's table begins.
FACTORS = (Role("down", rank_dim=0), Role("up", rank_dim=1))
#: The adapter's clock, int64 `[step, total_steps]`.
CLOCK = Role("progress", trains=False, saved="first")
#: What an adapter with a budget of forgetting remembers; see `adapter.budget`.
BUDGET = Role("budget", trains=False, saved="present")
#: The rank in use, for layers with room for more.
RANK = "rank"


class Storage(nn.Module):
    """A layer's tensors by role and adapter.

    Parameters live in one `nn.ParameterDict` per role, buffers in one `BufferDict`; both are named by method and role
    (`dira_down`) and keyed by adapter, so that a checkpoint key names its owner.

    Attributes:
        ranks: The rank by adapter.
        reserved: Components that there is room for without a change of shape, by adapter; 0 where parameters have
            exactly the size they need.
    """

    #: The method's name, first part of all names. Set by each method's layer.
    method_name: ClassVar[str]
    #: The table of tensors, the first two rows being the factors. Buffers `frozen_down` (k, in) and `frozen_up`
    #: (out, k), where a method has them, are further components of the update, after the trained ones.
    roles: ClassVar[tuple[Role, ...]] = FACTORS

    # Read off the table, for each method's layer:
    parameter_roles: ClassVar[tuple[str, ...]]
    buffer_roles: ClassVar[dict[str, Role]]
    #: The dimension that carries the rank, by role of the parameters that have one; the first where there are several.
    rank_dims: ClassVar[Mapping[str, int]]
    #: All of them.
    rank_axes: ClassVar[Mapping[str, tuple[int, ...]]]
    adapter_layer_names: tuple[str, ...]
    other_param_names: tuple[str, ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "method_name"):
            return
        parameters = [role for role in cls.roles if role.trains]
        cls.parameter_roles = tuple(role.name for role in parameters)
        cls.rank_axes = {role.name: axes for role in parameters if (axes := role.rank_axes)}
        cls.rank_dims = {role: axes[0] for role, axes in cls.rank_axes.items()}
        cls.buffer_roles = {role.name: role for role in (CLOCK, BUDGET, *cls.roles) if not role.trains}
        cls.adapter_layer_names = tuple(f"{cls.method_name}_{role}" for role in cls.parameter_roles)
        cls.other_param_names = (
            *("scaling", "scaling_ranks", "unscaled", "ranks", "reserved", "drivers", "adapter_dropout"),
            *(f"{cls.method_name}_{role}" for role in (*cls.buffer_roles, RANK)),
        )

    def make_containers(self) -> None:
        """Make the containers of all roles, for adapters to come."""
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        for role in (*self.buffer_roles, RANK):
            setattr(self, f"{self.method_name}_{role}", BufferDict(persistent=True))
        self.ranks: dict[str, int] = {}
        self.reserved: dict[str, int] = {}

    # Parameters ------------------------------------------------------------------------------------------------

    def parameter(self, role: str, adapter: str) -> nn.Parameter:
        """The parameter of a role (`"down"`, `"up"`, …) of an adapter."""
        container = self._modules[f"{self.method_name}_{role}"]
        assert container is not None
        # Attributes of modules take microseconds, of which generation would notice several per layer and token.
        parameter = container._parameters.get(adapter)
        return cast(nn.Parameter, getattr(container, adapter) if parameter is None else parameter)

    def container(self, role: str) -> nn.Module:
        """What holds the parameters of a role, by adapter."""
        container = self._modules[f"{self.method_name}_{role}"]
        assert container is not None
        return container

    def used(self, role: str, adapter: str) -> torch.Tensor:
        """The part of a parameter that its components fill: all of it, unless room is reserved.

        Compiled code gets all of it, so that a change of rank compiles nothing anew: the places not in use are zero
        and have zero gradients.
        """
        parameter = self.parameter(role, adapter)
        axes = self.rank_axes.get(role)
        # Compiled code asks nothing that changes with the rank.
        if axes is None or not self.reserved[adapter] or torch.compiler.is_compiling():
            return parameter
        if parameter.shape[axes[0]] == self.ranks[adapter]:
            return parameter
        part: torch.Tensor = parameter
        for dim in axes:
            part = part.narrow(dim, 0, self.ranks[adapter])
        return part

    def has_parameter(self, role: str, adapter: str) -> bool:
        """Whether an adapter has a parameter of this role."""
        container = cast(nn.ParameterDict, self._modules[f"{self.method_name}_{role}"])
        return adapter in container

    def adapter_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """All parameters of an adapter by role; empty if it does not adapt this layer."""
        parameters = {}
        for role, name in zip(self.parameter_roles, self.adapter_layer_names, strict=True):
            # Past the ways of nn.Module, which every step would notice that asks all layers.
            container = cast(nn.ParameterDict, self._modules[name])
            parameter = container._parameters.get(adapter)
            if parameter is not None:
                parameters[role] = parameter
            elif adapter in container:
                parameters[role] = getattr(container, adapter)
        return parameters

    # Buffers ---------------------------------------------------------------------------------------------------

    def _buffers_of(self, role: str) -> BufferDict:
        return cast(BufferDict, self._modules[f"{self.method_name}_{role}"])

    def buffer(self, role: str, adapter: str) -> torch.Tensor:
        """The buffer of a role of an adapter, of any shape."""
        return cast(torch.Tensor, self._buffers_of(role)[adapter])

    def has_buffer(self, role: str, adapter: str) -> bool:
        """Whether an adapter has a buffer of this role."""
        return adapter in self._buffers_of(role)

    def running(self, role: str, adapter: str) -> torch.Tensor | None:
        """A buffer of any shape that need not be there, or None."""
        return self._buffers_of(role)._buffers.get(adapter)

    def set_running(self, role: str, adapter: str, value: torch.Tensor | None) -> None:
        """Put a buffer that is saved where present in place, or take it away with None."""
        buffers = self._buffers_of(role)
        if value is not None:
            buffers[adapter] = value
        elif adapter in buffers:
            del buffers[adapter]

    def progress(self, adapter: str) -> torch.Tensor | None:
        """The adapter's saved clock, int64 `[step, total_steps]`, if this layer carries it."""
        return self.running(CLOCK.name, adapter)

    def become_lead(self, adapter: str) -> None:
        """Let this layer, the adapter's first, carry what belongs to the adapter as a whole."""
        for role, tensor in self.start_lead().items():
            self._buffers_of(role)[adapter] = tensor

    def start_lead(self) -> dict[str, torch.Tensor]:
        """Tensors of the adapter as a whole by role: the clock, (2)."""
        return {CLOCK.name: torch.zeros(2, dtype=torch.int64)}

    # Both ------------------------------------------------------------------------------------------------------

    def put(self, role: str, adapter: str, tensor: torch.Tensor) -> None:
        """Put a new tensor in its place, as a parameter or a buffer."""
        container = getattr(self, f"{self.method_name}_{role}")
        container[adapter] = tensor if role in self.buffer_roles else nn.Parameter(tensor)

    def saved_tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        """The tensors by role that every saved layer of an adapter has: parameters, and buffers saved always."""
        buffers = {
            name: self.buffer(name, adapter)
            for name, role in self.buffer_roles.items()
            if role.saved == "always" and self.has_buffer(name, adapter)
        }
        return {**self.adapter_parameters(adapter), **buffers}
