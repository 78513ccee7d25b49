"""The shared form: y = W0·x + s · up(d ⊙ down(x)).

    x (…, in) ──┬── W0 ─────────────────────────────┐
                └── [down; …] ── h (…, r) ── ⊙ d ── up ── · s ── + ── y (…, out)

A method subclasses `AdapterLayer` and says what the diagonal `d` is, which further parameters there are and
how they start. Forward, merge, export and spectra are written once, here and over these factors.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils.quantization_utils import (
    ForwardOnlyQuantizationBackend,
    QuantizationBackend,
    TorchaoBackend,
    resolve_quantization_backend,
)
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from dynalora.adapter.config import AdapterConfig
from dynalora.adapter.kernel import add_low_rank, apart, may_overwrite, project
from dynalora.adapter.ranks import fit, shared_rank
from dynalora.driver import Driver, carry_state, invalidate, track
from dynalora.errors import ConfigError, UnsupportedError

_order = itertools.count()


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A linear layer with adapters of one method.

    Parameters live in one `nn.ParameterDict` per role, named by method and role (`dira_down`) and keyed by
    adapter, so that a checkpoint key names its owner.

    Attributes:
        base_layer: The adapted layer, left as it is.
        in_features, out_features: Its sizes.
        scaling: The factor `s` by adapter.
        scaling_ranks: The rank that `s` refers to: the one the adapter started with in this layer.
        ranks: The rank by adapter.
        reserved: Components that there is room for without a change of shape, by adapter; 0 where parameters have
            exactly the size they need.
        name: The layer's name in the model.
        drivers: The driver by adapter; one object per adapter, shared by its layers.
    """

    #: The method's name, first part of all parameter names. Set by each method's layer.
    method_name: ClassVar[str]
    #: Roles of the parameters, the first two being the factors.
    roles: ClassVar[tuple[str, ...]] = ("down", "up")
    #: Roles of tensors that are saved with the adapter and never train; ``frozen_down`` (k, in) and ``frozen_up``
    #: (out, k), where there are any, are further components of the update, after the trained ones.
    frozen_roles: ClassVar[tuple[str, ...]] = ()
    #: Roles of tensors of the adapter as a whole, carried by its first layer: its clock, and what a method adds.
    lead_roles: ClassVar[tuple[str, ...]] = ("progress",)
    #: The dimension of each parameter along which the rank-1 components lie; what `resize` cuts and extends.
    rank_dims: ClassVar[Mapping[str, int]] = {"down": 0, "up": 1}
    #: Buffers that come and go during training (averages, records), saved with the adapter while they are there.
    running_roles: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "method_name"):
            cls.adapter_layer_names = tuple(f"{cls.method_name}_{role}" for role in cls.roles)
            buffers = (*cls.frozen_roles, *cls.lead_roles, "rank", *cls.running_roles)
            cls.other_param_names = (
                *("scaling", "scaling_ranks", "ranks", "reserved", "drivers", "adapter_dropout"),
                *(f"{cls.method_name}_{role}" for role in buffers),
            )

    def __init__(self, base_layer: nn.Module, quantization: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        for role in (*self.frozen_roles, *self.lead_roles, "rank", *self.running_roles):
            setattr(self, f"{self.method_name}_{role}", BufferDict(persistent=True))
        self.name = ""
        self.scaling: dict[str, float] = {}
        self.scaling_ranks: dict[str, int] = {}
        self.ranks: dict[str, int] = {}
        self.reserved: dict[str, int] = {}
        self.drivers: dict[str, Driver] = {}
        self.adapter_dropout: dict[str, float] = {}
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        base = self.get_base_layer()
        self.quantization_backend = quantization_of(base, quantization)
        self.in_features, self.out_features = cast("tuple[int, int]", _get_in_out_features(base))
        self.order = next(_order)
        track(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        track(self)  # a copy is as much to be driven as the original

    @staticmethod
    def supports(base_layer: nn.Module) -> bool:
        """Whether a module is a linear layer that can be adapted: linear, GPT-2's `Conv1D`, or quantised."""
        if isinstance(base_layer, NonDynamicallyQuantizableLinear):
            return False  # nn.MultiheadAttention reads its weight and never calls it
        if isinstance(base_layer, (nn.Linear, Conv1D)):
            return True
        backend = quantization_of(base_layer)
        return backend is not None and backend.layer_type == "linear"

    # Parameters ------------------------------------------------------------------------------------------------

    def parameter(self, role: str, adapter: str) -> nn.Parameter:
        """The parameter of a role (`"down"`, `"up"`, …) of an adapter."""
        container = self._modules[f"{self.method_name}_{role}"]
        assert container is not None
        # Attributes of modules take microseconds, of which generation would notice several per layer and token.
        parameter = container._parameters.get(adapter)
        return cast(nn.Parameter, getattr(container, adapter) if parameter is None else parameter)

    def used(self, role: str, adapter: str) -> torch.Tensor:
        """The part of a parameter that its components fill: all of it, unless room is reserved.

        Compiled code gets all of it, so that a change of rank compiles nothing anew: the places not in use are zero
        and have zero gradients.
        """
        parameter = self.parameter(role, adapter)
        dim = self.rank_dims.get(role)
        # Asked first, so that compiled code does not depend on the rank.
        if torch.compiler.is_compiling() or dim is None or parameter.shape[dim] == self.ranks[adapter]:
            return parameter
        return parameter.narrow(dim, 0, self.ranks[adapter])

    def has_parameter(self, role: str, adapter: str) -> bool:
        """Whether an adapter has a parameter of this role."""
        container = cast(nn.ParameterDict, self._modules[f"{self.method_name}_{role}"])
        return adapter in container

    def adapter_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """All parameters of an adapter by role; empty if it does not adapt this layer."""
        found = {}
        for role in self.roles:
            container = getattr(self, f"{self.method_name}_{role}")
            if adapter in container:
                found[role] = container[adapter]
        return found

    def buffer(self, role: str, adapter: str) -> torch.Tensor:
        """The frozen tensor of a role of an adapter."""
        return cast(torch.Tensor, self._buffers_of(role)[adapter])

    def has_buffer(self, role: str, adapter: str) -> bool:
        """Whether an adapter has a frozen tensor of this role."""
        return adapter in self._buffers_of(role)

    def saved_tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        """All tensors of an adapter in this layer by role, trained and frozen, without those of the lead."""
        frozen = {
            role: self.buffer(role, adapter) for role in self.frozen_roles if self.has_buffer(role, adapter)
        }
        return {**self.adapter_parameters(adapter), **frozen}

    def progress(self, adapter: str) -> torch.Tensor | None:
        """The adapter's saved clock, int64 `[step, total_steps]`, if this layer carries it."""
        return self.running("progress", adapter)

    def become_lead(self, adapter: str) -> None:
        """Let this layer carry what belongs to the adapter as a whole."""
        for role, tensor in self.start_lead().items():
            getattr(self, f"{self.method_name}_{role}")[adapter] = tensor

    def start_lead(self) -> dict[str, torch.Tensor]:
        """Tensors of the adapter as a whole, by role."""
        return {"progress": torch.zeros(2, dtype=torch.int64)}

    def _buffers_of(self, role: str) -> BufferDict:
        return cast(BufferDict, getattr(self, f"{self.method_name}_{role}"))

    def running(self, role: str, adapter: str) -> torch.Tensor | None:
        """A buffer of an adapter that is not always there (`running_roles`, `lead_roles`), or None."""
        buffers = self._buffers_of(role)
        return cast(torch.Tensor, buffers[adapter]) if adapter in buffers else None

    def set_running(self, role: str, adapter: str, value: torch.Tensor | None) -> None:
        """Put a buffer of `running_roles` in place, or take it away with None."""
        buffers = self._buffers_of(role)
        if value is not None:
            buffers[adapter] = value
        elif adapter in buffers:
            del buffers[adapter]

    def has_adapter(self, adapter: str) -> bool:
        """Whether the adapter adapts this layer."""
        return adapter in self.scaling

    def rank(self, adapter: str) -> int:
        """Rank of an adapter in this layer."""
        return self.ranks[adapter]

    def update_layer(
        self,
        adapter: str,
        config: AdapterConfig,
        r: int,
        alpha: float,
        driver: Driver,
        inference_mode: bool,
        scaling_rank: int | None = None,
    ) -> None:
        """Add an adapter to this layer.

        Args:
            adapter: Its name.
            config: Its configuration.
            r: Its rank in this layer.
            alpha: Its alpha in this layer.
            driver: Its driver.
            inference_mode: True makes it without gradients.
            scaling_rank: The rank that the scaling refers to, where that is not `r`.
        """
        self.ranks[adapter] = r
        self.reserved[adapter] = self.reserve(config, r)
        for role, tensor in self.start(config, r).items():
            if role in self.rank_dims and self.reserved[adapter]:
                tensor = fit(tensor, self.rank_dims[role], self.reserved[adapter])
            getattr(self, f"{self.method_name}_{role}")[adapter] = (
                tensor if role in self.frozen_roles else nn.Parameter(tensor)
            )
        if self.reserved[adapter]:
            self._buffers_of("rank")[adapter] = torch.tensor(r)
        self.scaling_ranks[adapter] = scaling_rank or r
        self.scaling[adapter] = config.scaling(self.scaling_ranks[adapter], alpha)
        self.adapter_dropout[adapter] = config.dropout
        self.drivers[adapter] = driver
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)
        track(self)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from this layer."""
        super().delete_adapter(adapter_name)
        invalidate()

    # Ranks that move ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def resize(
        self, adapter: str, keep: Sequence[int], new: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Keep some components of an adapter, in the given order, and put new ones after them.

        The parameters stay the same objects. Gradients and the state of every optimizer that has stepped them follow:
        survivors keep theirs, new components begin with zeros.

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
        self.take_rank(adapter, rank)

    def take_rank(self, adapter: str, rank: int) -> None:
        """Note the rank that an adapter's parameters have been given."""
        self.ranks[adapter] = rank
        if self.reserved[adapter]:
            self._buffers_of("rank")[adapter] = torch.tensor(rank)

    def expect(self, adapter: str, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Take on the ranks, and make the buffers, of weights that are about to be loaded.

        Args:
            adapter: The adapter they are for.
            found: Tensors by their name in this layer, without the adapter's (`"dira_down"`).

        Returns:
            Those that have to be loaded in another shape than found, because room is reserved.
        """
        prefix = f"{self.method_name}_"
        dims = {role: d for role, d in self.rank_dims.items() if self.has_parameter(role, adapter)}
        saved = shared_rank({role: found.get(prefix + role) for role in dims}, dims)
        if saved is None:  # nothing of this adapter, or nothing that fits together: loading will say so
            return {}
        rank = int(found[f"{prefix}rank"]) if f"{prefix}rank" in found else saved
        size = max(rank, self.reserved[adapter])
        fitted = {}
        for role, dim in dims.items():
            parameter = self.parameter(role, adapter)
            if parameter.shape[dim] != size:
                carry_state(parameter, dim, (), None, 0, size)
            value = found[prefix + role]
            if value.shape[dim] != size:
                fitted[prefix + role] = fit(value.narrow(dim, 0, rank), dim, size)
        if self.reserved[adapter]:
            fitted[f"{prefix}rank"] = torch.tensor(rank)
        self.take_rank(adapter, rank)
        device = self.parameter("up", adapter).device
        for role in self.running_roles:
            value_or_none = found.get(prefix + role)
            self.set_running(
                role,
                adapter,
                None if value_or_none is None else torch.zeros_like(value_or_none, device=device),
            )
        return fitted

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Every way to load weights comes by here, before the containers of the parameters load theirs.
        for adapter in self.scaling:
            tail = f".{adapter}"
            found = {
                key.removeprefix(prefix).removesuffix(tail): tensor
                for key, tensor in state_dict.items()
                if key.startswith(f"{prefix}{self.method_name}_") and key.endswith(tail)
            }
            for name, tensor in self.expect(adapter, found).items():
                state_dict[f"{prefix}{name}{tail}"] = tensor
            if not self.reserved[adapter]:
                state_dict.pop(f"{prefix}{self.method_name}_rank{tail}", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    # What a method says ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def zero_update(self, adapter: str) -> None:
        """Make the update zero and leave the adapter able to train again: `up` becomes zero, as at LoRA's start.

        Args:
            adapter: The adapter.
        """
        self.parameter("up", adapter).zero_()

    def reserve(self, config: Any, r: int) -> int:
        """Components to keep room for, so that no shape ever changes; 0 gives parameters the size they need.

        Methods whose ranks move reserve room where shapes are fixed from outside, as in distributed training.
        """
        return 0

    def start(self, config: Any, r: int) -> dict[str, torch.Tensor]:
        """Tensors of a new adapter by role: LoRA's start, `down` Kaiming-uniform(√5) and `up` zero."""
        down = kaiming(r, self.in_features)
        up = torch.zeros(self.out_features, r)
        if not config.init_weights:
            up = kaiming(self.out_features, r)
        return {"down": down, "up": up}

    def projections(self, adapter: str) -> Sequence[torch.Tensor]:
        """Matrices (·, in) that meet the input: `down` first, then what the diagonal needs. One GEMM does all."""
        return (self.used("down", adapter),)

    def diagonal(self, adapter: str, projected: torch.Tensor | None) -> torch.Tensor | None:
        """The diagonal `d`.

        Args:
            adapter: The adapter.
            projected: Input times all projections but the first, (…, ·); None when asked for a static diagonal.

        Returns:
            (…, r + k), or (r + k) if static, or None for all ones; the k frozen components, if any, come last.
        """
        return None

    # The shared form -------------------------------------------------------------------------------------------

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """`W0·x + s·up(d ⊙ down(x))` for every active adapter; x (…, in) → (…, out).

        Args:
            x: The input, (…, in).
            *args: Passed on to the base layer.
            adapter_names: For mixed batches, the adapter of every row of `x` (its first dimension), `"__base__"`
                for none; None applies the active adapters to all rows.
            **kwargs: Passed on to the base layer.

        Raises:
            ConfigError: `adapter_names` of another length than `x`, or while an adapter is merged.
        """
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return cast(torch.Tensor, self.base_layer(x, *args, **kwargs))
        if adapter_names is not None:
            self._check_mixed_batch(x, adapter_names)
        base_layer = self.base_layer
        result: torch.Tensor = base_layer(x, *args, **kwargs)
        if self.merged_adapters:
            return result
        in_place = may_overwrite(base_layer)
        if adapter_names is not None:
            return self._add_by_row(result if in_place else result.clone(), x, adapter_names)
        for adapter in self.active_adapters:
            if adapter not in self.scaling:
                continue
            result = self.add_update(result, x, adapter, in_place)
            if self.training and not torch.compiler.is_compiling():
                driver = self.drivers[adapter]
                if driver.watching:
                    driver.watch(self, result)
        return result

    def add_update(
        self, result: torch.Tensor, x: torch.Tensor, adapter: str, in_place: bool = False
    ) -> torch.Tensor:
        """Add an adapter's update to the base layer's result.

        Args:
            result: What the base layer made of `x`, (…, out).
            x: The layer's input, (…, in).
            adapter: The adapter.
            in_place: Whether `result` may be overwritten.

        Returns:
            `result + s·up(d ⊙ down(x))`, (…, out).
        """
        m, up = self.narrow(x, adapter), self.used("up", adapter)
        frozen = self._frozen("frozen_up", adapter)
        return add_low_rank(result, m, up, self.scaling[adapter], in_place, frozen)

    def _check_mixed_batch(self, x: torch.Tensor, adapter_names: Sequence[str]) -> None:
        if len(x) != len(adapter_names):
            raise ConfigError(
                f"adapter_names has {len(adapter_names)} names for a batch of {len(x)} rows in {self.name!r}; "
                "give one for each row, '__base__' for the base model."
            )
        if self.merged_adapters:
            raise ConfigError(
                f"adapter_names cannot be used while {', '.join(self.merged_adapters)} is merged; "
                "call unmerge_adapter() first."
            )

    def _add_by_row(
        self, result: torch.Tensor, x: torch.Tensor, adapter_names: Sequence[str]
    ) -> torch.Tensor:
        """Add to every row of a mixed batch the update of its own adapter; `result` is overwritten."""
        for adapter in dict.fromkeys(adapter_names):
            if adapter in self.scaling:  # it may be the base model, or adapt other layers only
                rows = [row for row, name in enumerate(adapter_names) if name == adapter]
                result[rows] = self.add_update(result[rows], x[rows], adapter, in_place=True)
        return result

    def narrow(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """The narrow activations `d ⊙ down(x)`: x (…, in) → (…, r + k), in the adapter's dtype."""
        down, *rest = self.projections(adapter)
        frozen = self._frozen("frozen_down", adapter)
        if x.dtype != down.dtype and not torch.is_autocast_enabled(x.device.type):
            x = self._cast_input_dtype(x, down.dtype)
        p = self.adapter_dropout[adapter] if self.training else 0.0
        if p:
            # Dropout is on what the update is made of; what chooses it (gates) sees the input as it is.
            h = project(nn.functional.dropout(x, p), down, frozen)
            projected = nn.functional.linear(x, torch.cat(rest)) if rest else None
        elif rest and not apart(x, sum(matrix.shape[0] for matrix in rest) + down.shape[0]):
            z = project(x, torch.cat([*rest, down]), frozen)
            # split, not two slices: its backward is one concatenation
            width = sum(matrix.shape[0] for matrix in rest)
            projected, h = z.split([width, z.shape[-1] - width], dim=-1)
        else:
            h = project(x, down, frozen)
            parts = [nn.functional.linear(x, matrix) for matrix in rest]
            projected = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0] if parts else None
        d = self.diagonal(adapter, projected)
        return h if d is None else h * d

    def _frozen(self, role: str, adapter: str) -> torch.Tensor | None:
        known = role in self.frozen_roles or role in self.running_roles
        return self.running(role, adapter) if known else None

    def get_base_weight(self) -> torch.Tensor:
        """The base layer's weight in its own layout, dequantised if need be.

        Raises:
            UnsupportedError: The layer's quantisation does not give its weights back.
        """
        base = self.get_base_layer()
        if isinstance(self.quantization_backend, ForwardOnlyQuantizationBackend):
            raise UnsupportedError(
                f"{self.name or 'the layer'}: the values of {self.quantization_backend.backend_name} weights cannot "
                f"be read, which {self.method_name} needs with these settings; load the base model with "
                "bitsandbytes, torchao or without quantisation, or choose another method or start (init_weights)."
            )
        state = getattr(getattr(base, "weight", None), "quant_state", None)
        if not getattr(state, "packing_format_for_cpu", False):
            return super().get_base_weight()
        # For the CPU, bitsandbytes packs 4-bit weights anew at their first call, in an order that its dequantisation
        # does not know: it would return wrong numbers. What the layer makes of unit vectors is right in any order.
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            columns: torch.Tensor = base(torch.eye(self.in_features))
            bias = getattr(base, "bias", None)
            return (columns if bias is None else columns - bias.to(columns)).t().contiguous()

    def base_matrix(self) -> torch.Tensor:
        """The base layer's weight as a matrix (out, in), dequantised if need be."""
        weight = self.get_base_weight().detach()
        return weight.t() if isinstance(self.get_base_layer(), Conv1D) else weight

    def static_factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of the update, `ΔW = up @ down` without `s`: (out, k) and (k, in), in the adapter's dtype.

        Raises:
            UnsupportedError: The update depends on the input, so there is no ΔW.
        """
        if self.depends_on_input(adapter):
            raise UnsupportedError(
                f"{self.method_name.upper()}'s update depends on the input (its gates are computed for "
                "every token), so there is "
                "no fixed ΔW to merge or export; keep the adapter attached, or export a snapshot with held gates "
                "(export_lora(gates=record_gates(...)), dynalora export --calibrate)."
            )
        up, down = self.used("up", adapter), self.projections(adapter)[0]
        if (frozen := self._frozen("frozen_up", adapter)) is not None:
            up, down = torch.cat([up, frozen], dim=1), torch.cat([down, self.buffer("frozen_down", adapter)])
        d = self.diagonal(adapter, None)
        return (up if d is None else up * d), down

    def depends_on_input(self, adapter: str) -> bool:
        """Whether an adapter's diagonal depends on the input, so that it has no fixed ΔW."""
        return False

    def open_factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of the most that the update can be: `static_factors`, or those with all gates open."""
        if self.depends_on_input(adapter):
            return self.used("up", adapter), self.used("down", adapter)
        return self.static_factors(adapter)

    def plain(self, adapter: str) -> bool:
        """Whether the update is `s·up·down` and nothing else, so that other factors of it would do as well."""
        carriers = self.adapter_parameters(adapter).keys() & self.rank_dims.keys()
        return (
            carriers == {"down", "up"}
            and not self.depends_on_input(adapter)
            and self._frozen("frozen_up", adapter) is None
            and self.diagonal(adapter, None) is None
        )

    def plain_extras(self, adapter: str) -> dict[str, torch.Tensor]:
        """What a plain LoRA of the factors needs besides them, by the name that PEFT gives it."""
        return {}

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The update `s·ΔW`, (out, in) whatever the base layer's layout, float32 or the adapter's wider dtype.

        Raises:
            UnsupportedError: The update depends on the input.
        """
        up, down = self.static_factors(adapter)
        dtype = torch.promote_types(up.dtype, torch.float32)
        return self.scaling[adapter] * (up.to(dtype) @ down.to(dtype))

    # Merging ---------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add updates into the base weight.

        Args:
            safe_merge: Check the merged weight for NaN before it is put in place.
            adapter_names: Adapters to merge; None merges the active ones.

        Raises:
            UnsupportedError: The update depends on the input, or the base layer's quantisation cannot be merged into.
            ValueError: `safe_merge` found NaN.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if not self.has_adapter(adapter):
                continue
            self._add_to_base(adapter, 1.0, safe_merge)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take merged updates out of the base weight again, within rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if self.has_adapter(adapter):
                self._add_to_base(adapter, -1.0, False)

    def check_mergeable(self) -> None:
        """Raise `UnsupportedError` if updates cannot be merged into the base layer, whatever they are."""
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            with_config = " with transformers' TorchAoConfig" if isinstance(backend, TorchaoBackend) else ""
            raise UnsupportedError(
                f"cannot merge into a {backend.backend_name} layer, which cannot be quantised again; keep the "
                f"adapter attached, or load the base model{with_config} or without quantisation to merge."
            )

    @torch.no_grad()
    def _add_to_base(self, adapter: str, sign: float, check: bool) -> None:
        self.check_mergeable()
        delta = self.get_delta_weight(adapter)
        weight = self.get_base_weight()
        if isinstance(self.get_base_layer(), Conv1D):
            delta = delta.t()
        if check or self.quantization_backend is not None:
            merged = (weight.to(delta.dtype) + sign * delta.to(weight.device)).to(weight.dtype)
            if check and not torch.isfinite(merged).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken"
                )
            self._put_base_weight(merged)
        else:
            weight.copy_(weight.to(delta.dtype) + sign * delta.to(weight.device))

    def _put_base_weight(self, weight: torch.Tensor) -> None:
        """Put a weight in the base layer's place, quantised as the one before.

        Raises:
            UnsupportedError: Torchao did not quantise it; the layer is as it was.
        """
        base: Any = self.get_base_layer()
        before = getattr(base, "weight", None)
        refused: ValueError | None = None
        try:
            self.set_base_weight(weight)
        except ValueError as error:  # settings by module name (FqnToConfig), which fit no layer alone
            if not isinstance(self.quantization_backend, TorchaoBackend):
                raise
            refused = error
        if isinstance(self.quantization_backend, TorchaoBackend) and type(base.weight) is not type(before):
            del base.weight
            base.weight = before
            raise UnsupportedError(
                f"cannot merge into {self.name or 'the layer'}: the model's TorchAoConfig does not say how to quantise "
                "this layer by itself; keep the adapter attached, or load the base model without quantisation to merge."
            ) from refused

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may convert the update to a LoRA."""
        return not self.depends_on_input(adapter_name)

    def extra_repr(self) -> str:
        """Method, ranks and quantisation, for `print(model)`."""
        ranks = ", ".join(f"{name}: {self.rank(name)}" for name in self.scaling)
        quantised = (
            f", quantization_backend={self.quantization_backend.backend_name!r}"
            if self.quantization_backend
            else ""
        )
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"method={self.method_name}, {sizes}, r={{{ranks}}}{quantised}"


def quantization_of(
    base_layer: nn.Module, settings: Mapping[str, Any] | None = None
) -> QuantizationBackend | None:
    """PEFT's way to read and write a quantised layer's weight; None if the layer is not quantised.

    Args:
        base_layer: The layer.
        settings: What the model tells of its quantisation (`peft.utils.quantization_utils.get_quantization_kwargs`).
            Without it, torchao's layers can do everything but merge.
    """
    settings = {"get_apply_tensor_subclass": None, **(settings or {})}
    known = settings["get_apply_tensor_subclass"] is not None
    if not known:  # PEFT refuses such a layer as a whole, for what merging alone needs
        settings["get_apply_tensor_subclass"] = _unknown_quantization
    backend: QuantizationBackend | None = resolve_quantization_backend(base_layer, **settings)
    if isinstance(backend, TorchaoBackend) and not known:
        backend.supports_merge = False
    return backend


def _unknown_quantization() -> None:
    raise UnsupportedError(
        "torchao was not told how to quantise this layer."
    )  # not merged into: never called


def kaiming(rows: int, columns: int) -> torch.Tensor:
    """A matrix drawn as `nn.Linear` draws its weight: Kaiming-uniform with a = √5."""
    matrix = torch.empty(rows, columns)
    nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
    return matrix
