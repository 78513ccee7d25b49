"""The shared form: y = W0·x + s · up(d ⊙ down(x)).

    x (…, in) ──┬── W0 ─────────────────────────────┐
                └── [down; …] ── h (…, r) ── ⊙ d ── up ── · s ── + ── y (…, out)

A method subclasses `AdapterLayer` and says what the diagonal `d` is, which further tensors there are and how they
start. Forward and update are written once, here; the tensors are kept by `Storage`, ranks move in `RankedStorage`, and
`BaseWeight` reads the base layer's weight and merges updates into it.
"""

from __future__ import annotations

import copy
import itertools
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import nn

from dynalora.adapter.base_weight import IN_PIECES, BaseWeight
from dynalora.adapter.config import AdapterConfig
from dynalora.adapter.curvature import Curvature
from dynalora.adapter.kernel import (
    add_few,
    add_low_rank,
    apart,
    few_tokens,
    may_overwrite,
    observe_weight_gradient,
    only_multiplies,
    project,
)
from dynalora.adapter.layer_kinds import kind_of
from dynalora.adapter.parts import PartMatrix
from dynalora.adapter.ranks import RankedStorage, fit
from dynalora.adapter.shared_input import Companions, Factors, products_for
from dynalora.adapter.storage import RANK
from dynalora.adapter.update import Update
from dynalora.common.devices import device_of_calls
from dynalora.common.private import in_pieces_of_zero, inside_average, joins_uneven, transforming
from dynalora.driver import Driver, invalidate, prepare_unloaded, track
from dynalora.errors import ConfigError, UnsupportedError

#: What a diagonal that depends on the input is taken to be where there is none: all gates open, or held where they are.
Gates = Literal["open", "held"]

_order = itertools.count()


class AdapterLayer(RankedStorage, BaseWeight):
    """A linear layer with adapters of one method.

    Attributes:
        scaling: The factor `s` by adapter.
        scaling_ranks: The rank that `s` refers to: the one the adapter started with in this layer.
        unscaled: `s` as it was, of adapters whose scale is set for the moment (`set_scale`).
        name: The layer's name in the model.
        drivers: The driver by adapter; one object per adapter, shared by its layers.
        order: Number of the layer in the order in which layers were made.
        unprepared: Adapters whose weights may still come from a file, so that the method has not computed their start,
            with their `up` as it was made: weights were loaded if it is another object by the time it is needed.
        probes: A leaf per adapter that asks for the gradient of the adapted weight; see `want_weight_gradient`.
        companions: The layers that are expected to get the same input right after this one.
    """

    def __init__(self, base_layer: nn.Module, quantization: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.name = ""
        self.take_base_layer(base_layer, quantization)
        self.make_containers()
        self.scaling: dict[str, float] = {}
        self.scaling_ranks: dict[str, int] = {}
        self.unscaled: dict[str, float] = {}
        self.drivers: dict[str, Driver] = {}
        self.unprepared: dict[str, nn.Parameter] = {}
        self.adapter_dropout: dict[str, float] = {}
        self.curvatures: dict[str, Curvature] = {}
        self.probes: dict[str, torch.Tensor] = {}
        self.companions = Companions()
        self._disable_adapters = False
        self._trained_when_disabled: dict[tuple[str, str], bool] | None = None
        self.cast_input_dtype_enabled = True  # as PEFT's layers have it, for `peft.helpers.disable_input_dtype_casting`
        self._active_adapter: list[str] = []
        self.order = next(_order)
        track(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        track(self)  # a copy is as much to be driven as the original

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterLayer:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        if inside_average():
            self.add_follower(copied)
        return copied

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
        inference_mode: bool,
        scaling_rank: int | None = None,
    ) -> None:
        """Add an adapter to this layer.

        Args:
            adapter: Its name.
            config: Its configuration.
            r: Its rank in this layer.
            alpha: Its alpha in this layer.
            inference_mode: True makes it without gradients.
            scaling_rank: The rank that the scaling refers to, where that is not `r`.
        """
        self.ranks[adapter] = r
        self.reserved[adapter] = room = self.reserve(config, r)
        for role, tensor in self.start(config, r).items():
            for dim in self.rank_axes.get(role, ()) if room else ():
                tensor = fit(tensor, dim, room)
            self.put(role, adapter, tensor)
        if room:
            self._buffers_of(RANK)[adapter] = torch.tensor(r)
        self.scaling_ranks[adapter] = scaling_rank or r
        self.scaling[adapter] = config.scaling(self.scaling_ranks[adapter], alpha)
        self.adapter_dropout[adapter] = config.dropout
        self.drivers.pop(adapter, None)  # that of an earlier adapter of this name
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Where the base weight is offloaded between calls, that is no place for weights that train.
        device = device_of_calls(self.get_base_layer()) if device is None else device
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    def drive(self, adapter: str, driver: Driver) -> None:
        """Give an adapter of this layer its driver."""
        self.drivers[adapter] = driver
        track(self)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from this layer."""
        super().delete_adapter(adapter_name)
        self.unprepared.pop(adapter_name, None)
        self.curvatures.pop(adapter_name, None)
        self.probes.pop(adapter_name, None)
        invalidate()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapters, which train from now on unless `inference_mode` is set."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._trained_when_disabled = None

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off. What trained when they were switched off trains when they are on again.

        PEFT's lets all of the active adapters train then, also what was loaded or set not to.
        """
        parameters = {
            (role, adapter): parameter
            for adapter in self.scaling
            for role, parameter in self.adapter_parameters(adapter).items()
        }
        trained = self._trained_when_disabled
        if not enabled and trained is None:
            trained = {key: parameter.requires_grad for key, parameter in parameters.items()}
        super().enable_adapters(enabled)
        if enabled:
            for key, trains in (trained or {}).items():
                if key in parameters:
                    parameters[key].requires_grad_(trains)
            trained = None
        self._trained_when_disabled = trained

    def expect(self, adapter: str, saved: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Make ready for weights that are about to be loaded; see `RankedStorage.expect`."""
        if saved:
            self.unprepared.pop(adapter, None)
        return super().expect(adapter, saved)

    # What a method says ----------------------------------------------------------------------------------------

    #: Whether a new adapter's update can be that of any factors; see `take_factors`.
    takes_factors: ClassVar[bool] = True
    #: Whether the method's rules hold for convolutions and embeddings too.
    any_kind: ClassVar[bool] = True

    @classmethod
    def check_base_layer(cls, base_layer: nn.Module, name: str, config: Any, r: int) -> None:
        """Check, before any layer is replaced, that a module can be adapted.

        Args:
            base_layer: The module.
            name: Its name in the model.
            config: The adapter's configuration.
            r: The adapter's rank in this layer.

        Raises:
            UnsupportedError: It is no layer that can be adapted.
            ConfigError: The method cannot adapt it with these settings.
        """
        kind = kind_of(base_layer)
        if (kind is None and not cls.multiplies(base_layer)) or (kind is not None and not cls.any_kind):
            more = ", nn.Conv1d, nn.Conv2d, nn.Conv3d and nn.Embedding" if cls.any_kind else ""
            raise UnsupportedError(
                f"module {name!r} is a {type(base_layer).__name__}, which {cls.method_name} cannot adapt (it adapts "
                f"nn.Linear, transformers' Conv1D, quantised linear layers{more}); leave it out with exclude_modules."
            )
        if kind is not None and config.retain is not None:
            raise ConfigError(
                f"{type(config).__name__}: retain knows linear layers only, and {name!r} is a "
                f"{type(base_layer).__name__}; leave it out with exclude_modules, or set retain=None."
            )

    def start(self, config: Any, r: int) -> dict[str, torch.Tensor]:
        """Tensors of a new adapter by role: LoRA's start, `down` Kaiming-uniform(√5) and `up` zero."""
        down = self.drawn(r)
        up = torch.zeros(self.out_features, r)
        if not config.init_weights:
            up = kaiming(self.out_features, r)
        return {"down": down, "up": up}

    def drawn(self, rows: int) -> torch.Tensor:
        """A matrix (rows, in) drawn as `nn.Linear` draws its weight, for products around 1 with the layer's input."""
        return kaiming(rows, self.in_features) / self.length

    @torch.no_grad()
    def zero_update(self, adapter: str) -> None:
        """Make the update zero and leave the adapter able to train again: `up` becomes zero, as at LoRA's start."""
        self.parameter("up", adapter).zero_()

    @torch.no_grad()
    def take_factors(self, adapter: str, up: torch.Tensor, down: torch.Tensor) -> None:
        """Let the update of an adapter that has just been made be `s · up · down`, whatever its method.

        Args:
            adapter: The adapter, of which no start has been computed.
            up: (out, r), with its rank r.
            down: (r, in).
        """
        for role, value in (("up", up), ("down", down)):
            parameter = self.parameter(role, adapter)
            parameter.data = value.to(parameter.device)
        self.unprepared.pop(adapter, None)

    def scale_update(self, adapter: str, factor: float) -> None:
        """Multiply the update by a factor, from 0 (the base layer) up; what is saved as `alpha` must follow."""
        self.scaling[adapter] *= factor

    # PEFT's and diffusers' names for a scale that is for the moment and is not saved.

    def set_scale(self, adapter: str, scale: float) -> None:
        """Let an adapter act `scale` times as much as it was trained to; 1 is as it was."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.unscaled.setdefault(adapter, self.scaling[adapter])

    def scale_layer(self, scale: float) -> None:
        """Let the active adapters act `scale` times as much as they do now."""
        for adapter in filter(self.has_adapter, self.active_adapters):
            self.unscaled.setdefault(adapter, self.scaling[adapter])
            self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Take a factor of the active adapters back; None takes back all factors."""
        for adapter in filter(self.has_adapter, self.active_adapters):
            if scale is None:
                self.scaling[adapter] = self.unscaled.pop(adapter, self.scaling[adapter])
            else:
                self.scaling[adapter] /= scale

    def projections(self, adapter: str) -> Sequence[torch.Tensor]:
        """Matrices (·, in) that meet the input: `down` first, then what the diagonal needs. One GEMM does all."""
        return (self.used("down", adapter),)

    def columns(self, adapter: str) -> torch.Tensor:
        """The counterpart of `projections` at the result: `up`, and what else stands on its side, (out, ·)."""
        return self.used("up", adapter)

    def diagonal(self, adapter: str, projected: torch.Tensor | Gates) -> torch.Tensor | None:
        """The diagonal `d`.

        Args:
            adapter: The adapter.
            projected: Input times all projections but the first, (…, ·); or, where there is no such input, what a
                diagonal that depends on one is taken to be: `"open"` or `"held"`.

        Returns:
            (…, r + k), or (r + k) if it does not depend on the input, or None for all ones; the k frozen components,
            if any, come last.
        """
        return None

    def diagonals(
        self, adapter: str, projected: torch.Tensor | Gates, count: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The diagonal of the trained components and that of the frozen ones.

        Args:
            adapter: The adapter.
            projected: As for `diagonal`.
            count: The number of trained components.

        Returns:
            (…, count) and (…, k), or None for all ones.
        """
        d = self.diagonal(adapter, projected)
        if d is None or d.shape[-1] == count:
            return d, None
        return d[..., :count], d[..., count:]

    def depends_on_input(self, adapter: str) -> bool:
        """Whether an adapter's diagonal depends on the input, so that it has no fixed ΔW."""
        return False

    def plain_extras(self, adapter: str) -> dict[str, torch.Tensor]:
        """What a plain LoRA of the factors needs besides them, by the name that PEFT gives it."""
        return {}

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
            ConfigError: `adapter_names` of another length than `x`.
            UnsupportedError: DeepSpeed has spread the adapter over processes.
        """
        if adapter_names is None and not (args or kwargs or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            quick = self._quick(x)
            if quick is not None:
                return quick
        if self._disable_adapters:
            self.take_back_if_disabled()
            return cast(torch.Tensor, self.base_layer(x, *args, **kwargs))
        if self.unprepared:
            prepare_unloaded(self)
        if adapter_names is None and not (args or kwargs) and (products := products_for(self, x)) is not None:
            adapter = products.factors.adapter
            updated = products.result
            if products.factors.update is None:
                updated = self.add_update(updated, x, adapter, True, products.narrow)
            else:
                self.note_input(x, updated, adapter)
            return self._seen(updated.view(*x.shape[:-1], self.out_features), adapter)
        if not torch.compiler.is_compiling():
            self._require_whole_factors()
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
            result = self._seen(self.add_update(result, x, adapter, in_place), adapter)
        return result

    def _quick(self, x: torch.Tensor) -> torch.Tensor | None:
        """The result in as few steps as can be, for generation; None where there is more to do.

        With few tokens the time goes into numbers of operations and of Python's own steps, whatever the sizes, the more
        so as every layer's weights push the processor's caches clean of what the next layer needs of both.

        Args:
            x: The input, (…, in).
        """
        active, base_layer = self._active_adapter, self._modules["base_layer"]
        if len(active) != 1 or self._disable_adapters or self.merged_adapters or self.unprepared:
            return None
        adapter = active[0]
        scaling = self.scaling.get(adapter)
        if scaling is None or base_layer is None or not few_tokens(x, self.ranks[adapter], base_layer):
            return None
        if self.training and self.adapter_dropout[adapter]:
            return None
        try:
            parts = self.few(x.reshape(-1, x.shape[-1]), adapter)
        except RuntimeError:
            self._require_whole_factors()
            raise
        if parts is None:
            return None
        result = add_few(base_layer(x), parts, scaling)
        return self._seen(result, adapter) if self.training else result

    def _require_whole_factors(self) -> None:
        for adapter in self.active_adapters:
            if adapter in self.scaling and in_pieces_of_zero(self.parameter("up", adapter)):
                raise UnsupportedError(f"module {self.name!r}: {IN_PIECES}")

    def _seen(self, result: torch.Tensor, adapter: str) -> torch.Tensor:
        """A result as it is, of which the adapter's driver was told."""
        # Some train in eval() state, to have no dropout.
        if (self.training or torch.is_grad_enabled()) and not torch.compiler.is_compiling() and not transforming():
            driver = self.drivers[adapter]
            driver.thread, driver.joining = threading.get_ident(), joins_uneven()
            if driver.watching:
                driver.watch(self, result)
        return result

    def factors_of_input(self, x: torch.Tensor) -> Factors | None:
        """What the layer multiplies its input with, if that is all that happens to it before the diagonal.

        Args:
            x: The input, (…, in).

        Returns:
            None for base layers other than plain linear ones, with hooks, or with weights that train or are elsewhere;
            where an adapter is merged, several act or none; and with dropout.
        """
        # Attributes of modules are looked up past nn.Module's own way, of which a step of many layers would notice.
        acting = [adapter for adapter in self._active_adapter if adapter in self.scaling]
        if len(acting) != 1 or self._disable_adapters or self.merged_adapters or self.unprepared:
            return None
        adapter, base = acting[0], cast(nn.Module, self._modules["base_layer"])
        if (self.training and self.adapter_dropout[adapter]) or not only_multiplies(base, x):
            return None
        down, *rest = self.projections(adapter)
        frozen = self._frozen("frozen_down", adapter)
        matrices = (*rest, down) if frozen is None else (*rest, down, frozen)
        dtype, device = down.dtype, x.device
        if dtype != x.dtype and not self.cast_input_dtype_enabled:
            return None
        for matrix in matrices:
            if type(matrix) not in (torch.Tensor, nn.Parameter) or matrix.ndim != 2:
                return None
            if matrix.dtype != dtype or matrix.device != device:
                return None
        weights = base._parameters
        update = self.plain_update(adapter)
        if update is not None and any(tensor.dtype != dtype for tensor in update.tensors):
            update = None
        return Factors(adapter, cast(torch.Tensor, weights["weight"]), weights["bias"], matrices, update)

    def plain_update(self, adapter: str) -> Update | None:
        """How the products with the input become the update, if that is no more than the plain form.

        A layer that does more in `narrow` or `add_update` has None.
        """
        if adapter in self.probes or self.depends_on_input(adapter):
            return None
        up, frozen, d = self.columns(adapter), self._frozen("frozen_up", adapter), self.diagonal(adapter, "held")
        return Update(self.scaling[adapter], up, frozen, d)

    def note_input(self, x: torch.Tensor, made: torch.Tensor, adapter: str) -> None:
        """A forward pass has used an input, (…, in), and made something of it, to which a gradient may come back."""

    def add_update(
        self,
        result: torch.Tensor,
        x: torch.Tensor,
        adapter: str,
        in_place: bool = False,
        products: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Add an adapter's update to the base layer's result.

        Args:
            result: What the base layer made of `x`, (…, out).
            x: The layer's input, (…, in).
            adapter: The adapter.
            in_place: Whether `result` may be overwritten.
            products: The products of `x` with the adapter's matrices, (…, ·), where they are known; see `narrow`.

        Returns:
            `result + s·up(d ⊙ down(x))`, (…, out).
        """
        if self.layer_kind is not None:
            up, frozen = self.columns(adapter), self._frozen("frozen_up", adapter)
            up = up if frozen is None else torch.cat([up, frozen], dim=1)
            return self.layer_kind.add(
                self.get_base_layer(), result, self.narrow(x, adapter, products), up, self.scaling[adapter]
            )
        m, up = self.narrow(x, adapter, products), self.columns(adapter)
        frozen = self._frozen("frozen_up", adapter)
        result = add_low_rank(result, m, up, self.scaling[adapter], in_place, frozen)
        if adapter in self.probes and torch.is_grad_enabled() and not transforming():
            result = self._observed(result, x, adapter)
        return result

    def want_weight_gradient(self, adapter: str, wanted: bool = True) -> None:
        """Let backward passes from now on add up ∂L/∂W, as if the adapted weight trained; or no longer.

        It is as large as the weight, and costs as much as the weight's own gradient would.

        Args:
            adapter: The adapter that asks for it.
            wanted: Whether to begin, anew, or to end.
        """
        self.probes.pop(adapter, None)
        if wanted:
            up = self.parameter("up", adapter)
            dtype = torch.promote_types(up.dtype, torch.float32)
            # One number behind all places: only the gradient ever takes memory.
            zero = torch.zeros((), dtype=dtype, device=up.device)
            self.probes[adapter] = zero.expand(self.out_features, self.in_features).requires_grad_()

    def _observed(self, result: torch.Tensor, x: torch.Tensor, adapter: str) -> torch.Tensor:
        if not self.parameter("up", adapter).requires_grad:
            return result
        if self.probes[adapter].device != x.device:  # the layer got its tensors after the adapter was made
            self.want_weight_gradient(adapter)
        return observe_weight_gradient(result, x, self.probes[adapter])

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        moved = super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        for adapter in list(self.probes):
            self.want_weight_gradient(adapter)
        return moved

    def take_weight_gradient(self, adapter: str) -> torch.Tensor | None:
        """∂L/∂W of the backward passes since it was asked for, (out, in), and no more of it; None where there is none.

        It carries the factor of a gradient scaler. With several processes it is this process's.
        """
        probe = self.probes.pop(adapter, None)
        return None if probe is None else probe.grad

    def end_passes(self, adapter: str) -> None:
        """Gradients were made of the forward passes so far."""

    def forget_passes(self, adapter: str) -> None:
        """Those gradients were thrown away without a step, and what was gathered with them goes with them."""
        if adapter in self.probes:
            self.probes[adapter].grad = None

    def _check_mixed_batch(self, x: torch.Tensor, adapter_names: Sequence[str]) -> None:
        if len(x) != len(adapter_names):
            raise ConfigError(
                f"adapter_names has {len(adapter_names)} names for a batch of {len(x)} rows in {self.name!r}; "
                "give one for each row, '__base__' for the base model."
            )

    def _add_by_row(self, result: torch.Tensor, x: torch.Tensor, adapter_names: Sequence[str]) -> torch.Tensor:
        """Add to every row of a mixed batch the update of its own adapter; `result` is overwritten."""
        different = dict.fromkeys(adapter_names)
        for adapter in filter(self.has_adapter, different):  # it may be the base model, or adapt other layers only
            if len(different) == 1:
                result = self.add_update(result, x, adapter, in_place=True)
            else:
                rows = [row for row, name in enumerate(adapter_names) if name == adapter]
                result[rows] = self.add_update(result[rows], x[rows], adapter, in_place=True)
        return result

    def narrow(self, x: torch.Tensor, adapter: str, products: torch.Tensor | None = None) -> torch.Tensor:
        """The narrow activations `d ⊙ down(x)`, in the adapter's dtype.

        Args:
            x: The input, (…, in).
            adapter: The adapter.
            products: The products of `x` with all projections but the first, then with the first one and with the
                frozen components, (…, ·), where they are known; they may have the tokens in one row.

        Returns:
            (…, r + k).
        """
        if products is None and self.layer_kind is not None:
            products = self._products_of_kind(x, adapter)
        if products is None:
            projected, h = self._projected(x, adapter)
        elif extra := sum(matrix.shape[0] for matrix in self.projections(adapter)[1:]):
            # split, not two slices: its backward is one concatenation
            projected, h = products.split([extra, products.shape[-1] - extra], dim=-1)
        else:
            projected, h = None, products
        m = self.pass_on(h, self.diagonal(adapter, "held" if projected is None else projected), adapter)
        self.note_input(x, m, adapter)
        return m

    def pass_on(self, h: torch.Tensor, d: torch.Tensor | None, adapter: str) -> torch.Tensor:
        """`d ⊙ h`, the narrow activations behind the diagonal, (…, r + k); None is all ones."""
        return h if d is None else h * d

    def few(self, x: torch.Tensor, adapter: str) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """What `narrow` and `columns` give, for a few tokens without gradients or dropout.

        Nothing is stacked, and nothing is kept between calls that could go stale.

        Args:
            x: The input, (tokens, in).
            adapter: The adapter.

        Returns:
            Narrow activations (tokens, ·) with the columns (out, ·) that they meet, of trained components and of frozen
            ones; None where the update is more than that.
        """
        down, *rest = self.projections(adapter)
        if x.dtype != down.dtype and self.cast_input_dtype_enabled:
            x = x.to(down.dtype)
        linear = nn.functional.linear
        m, up = linear(x, down), self.columns(adapter)
        frozen_down = self._frozen("frozen_down", adapter)
        parts = [linear(x, matrix) for matrix in rest]
        projected = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1) if parts else None
        d, frozen_d = self.diagonals(adapter, "held" if projected is None else projected, m.shape[-1])
        if d is not None:
            m.mul_(d)
        if frozen_down is None:
            return [(m, up)]
        frozen = linear(x, frozen_down)
        if frozen_d is not None:
            frozen.mul_(frozen_d)
        return [(m, up), (frozen, cast(torch.Tensor, self._frozen("frozen_up", adapter)))]

    def _projected(self, x: torch.Tensor, adapter: str) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The products of the input with all projections but the first, or None, and with the others."""
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
            width = sum(matrix.shape[0] for matrix in rest)
            projected, h = z.split([width, z.shape[-1] - width], dim=-1)
        else:
            h = project(x, down, frozen)
            parts = [nn.functional.linear(x, matrix) for matrix in rest]
            projected = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0] if parts else None
        return projected, h

    def _products_of_kind(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """What `_projected` gives, side by side, of the input of a layer that is no plain product."""
        assert self.layer_kind is not None
        down, *rest = self.projections(adapter)
        frozen = self._frozen("frozen_down", adapter)
        first = [down] if frozen is None else [down, frozen]
        if not self.layer_kind.integers and x.dtype != down.dtype and not torch.is_autocast_enabled(x.device.type):
            x = self._cast_input_dtype(x, down.dtype)
        base = self.get_base_layer()
        p = self.adapter_dropout[adapter] if self.training and not self.layer_kind.integers else 0.0
        if not p:
            return self.layer_kind.multiply(base, x, [*rest, *first])
        h = self.layer_kind.multiply(base, nn.functional.dropout(x, p), first)
        return torch.cat([self.layer_kind.multiply(base, x, rest), h], dim=-1) if rest else h

    def _frozen(self, role: str, adapter: str) -> torch.Tensor | None:
        """The frozen components of one side, in the dtype of the trained ones, which a trainer may have cast."""
        frozen = self.running(role, adapter) if role in self.buffer_roles else None
        if frozen is None:
            return None
        dtype = self.parameter(role.removeprefix("frozen_"), adapter).dtype
        return frozen if frozen.dtype == dtype else frozen.to(dtype)

    # The update ------------------------------------------------------------------------------------------------

    def factors(self, adapter: str, gates: Gates = "held") -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of the update, `ΔW = up @ down` without `s`: what is merged, exported, compacted and looked at.

        Args:
            adapter: The adapter.
            gates: What a diagonal that depends on the input is taken to be: `"held"` where it is held, or `"open"`,
                with all gates open, which is the most that the update can be. Means nothing to other diagonals.

        Returns:
            (out, r + k) with the diagonal in it, and (r + k, in), in the adapter's dtype.

        Raises:
            UnsupportedError: With `"held"`: the update depends on the input and nothing is held, so there is no ΔW.
        """
        if self.unprepared:
            prepare_unloaded(self)
        if gates == "held" and self.depends_on_input(adapter):
            raise UnsupportedError(
                f"{self.method_name.upper()}'s update depends on the input (its gates are computed for every token), "
                "so there is no fixed ΔW to merge or export; keep the adapter attached, or export a snapshot with "
                "held gates (export_lora(gates=record_gates(...)), dynalora export --calibrate)."
            )
        up, down = self.sides(adapter)
        d = self.diagonal(adapter, gates)
        return (up if d is None else up * d), down

    def sides(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The components of the update without their diagonal, frozen ones last: (out, r + k) and (r + k, in)."""
        up, down = self.columns(adapter), self.projections(adapter)[0]
        if (frozen := self._frozen("frozen_up", adapter)) is not None:
            up, down = (
                torch.cat([up, frozen], dim=1),
                torch.cat([down, cast(torch.Tensor, self._frozen("frozen_down", adapter))]),
            )
        return up, down

    def delta_matrix(self, adapter: str) -> torch.Tensor:
        """The update `s·ΔW`, (out, in) whatever the base layer's layout, float32 or the adapter's wider dtype.

        Raises:
            UnsupportedError: The update depends on the input.
        """
        up, down = self.factors(adapter)
        dtype = torch.promote_types(up.dtype, torch.float32)
        return self.scaling[adapter] * (up.to(dtype) @ down.to(dtype))

    def plain(self, adapter: str) -> bool:
        """Whether the update is `s·up·down` and nothing else, so that other factors of it would do as well."""
        carriers = self.adapter_parameters(adapter).keys() & self.rank_dims.keys()
        return (
            carriers == {"down", "up"}
            and not self.depends_on_input(adapter)
            and self._frozen("frozen_up", adapter) is None
            and self.diagonal(adapter, "held") is None
        )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may convert the update to a LoRA: a fixed one, of a layer that PEFT's LoRA adapts as linear."""
        linear = self.layer_kind is None and not isinstance(self.get_base_layer(), PartMatrix)
        return linear and not self.depends_on_input(adapter_name)

    def extra_repr(self) -> str:
        """Method, ranks and quantisation, for `print(model)`."""
        ranks = ", ".join(f"{name}: {self.rank(name)}" for name in self.scaling)
        backend = self.quantization_backend
        quantised = f", quantization_backend={backend.backend_name!r}" if backend else ""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"method={self.method_name}, {sizes}, r={{{ranks}}}{quantised}"


def adapter_layers(model: nn.Module, adapter: str | None = None) -> dict[str, AdapterLayer]:
    """The adapted layers of a model by module name, in model order.

    Args:
        model: Any model.
        adapter: Only those that this adapter adapts; None takes all.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AdapterLayer) and (adapter is None or module.has_adapter(adapter))
    }


def kaiming(rows: int, columns: int) -> torch.Tensor:
    """A matrix (rows, columns) drawn as `nn.Linear` draws its weight: Kaiming-uniform with a = √5."""
    matrix = torch.empty(rows, columns)
    nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
    return matrix
