"""The weight below an adapter: reading it, merging updates into it and taking them out, quantised weights included."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import (
    ForwardOnlyQuantizationBackend,
    QuantizationBackend,
    TorchaoBackend,
    resolve_quantization_backend,
)
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from dynalora.adapter.attention import TakingPart
from dynalora.adapter.layer_kinds import kind_of
from dynalora.adapter.parts import PartMatrix
from dynalora.common.devices import offloaded_weights
from dynalora.common.private import features, in_pieces_of_zero
from dynalora.common.processes import whole
from dynalora.errors import UnsupportedError

IN_PIECES = (
    "DeepSpeed's ZeRO stage 3 keeps weights in pieces on several processes and puts them together for its own kinds of "
    "modules only, so no adapter of dynalora can be made or called there; use stage 1 or 2, FSDP2 or "
    "DistributedDataParallel."
)

#: Parameters that torch.nn.utils computes a weight from, before every call of a layer.
_COMPUTED_FROM = frozenset({"weight_orig", "weight_g", "weight_v"})


class BaseWeight(BaseTunerLayer):
    """What a layer does with the weight of the layer it adapts.

    Attributes:
        base_layer: The adapted layer, left as it is.
        layer_kind: What it is if it is no plain product with its weight: a convolution, an embedding; else None.
        in_features, out_features: The sizes of its matrix.
        name: The layer's name in the model.
        read_by_owner: Whether the module that it is in may compute with its weight without calling it.
        quantization_backend: PEFT's way to read and write the weight; None if it is not quantised.
        merged_adapters: The adapters whose updates are in the weight now.
    """

    method_name: ClassVar[str]
    name: str
    base_layer: nn.Module

    def take_base_layer(self, base_layer: nn.Module, quantization: dict[str, Any] | None) -> None:
        """Put this layer around another.

        Args:
            base_layer: The layer to adapt.
            quantization: What the model tells of its quantisation; see `quantization_of`.
        """
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self.read_by_owner = False
        base = self.get_base_layer()
        self.quantization_backend = quantization_of(base, quantization)
        self.layer_kind = kind_of(base)
        self.in_features, self.out_features = sizes(base)
        for name in () if self.layer_kind is None else self.layer_kind.told:
            setattr(self, name, getattr(base, name))

    @property
    def weight(self) -> Any:
        """The base layer's weight.

        `nn.TransformerEncoderLayer` gets one that it does not compute with while an adapter acts; see `TakingPart`.
        """
        if self.read_by_owner:
            self.take_back_if_disabled()
        weight = super().weight
        merged = bool(self.merged_adapters) or self.disable_adapters
        if not self.read_by_owner or merged or not any(map(self.has_adapter, self.active_adapters)):
            return weight
        return weight.as_subclass(TakingPart)

    def take_back_if_disabled(self) -> None:
        """Take merged updates out of the weight where adapters are switched off, before anything computes with it."""
        if self.disable_adapters and self.merged:
            self.unmerge()

    @staticmethod
    def multiplies(base_layer: nn.Module) -> bool:
        """Whether a module is a linear layer that can be adapted: linear, GPT-2's `Conv1D`, or quantised."""
        if isinstance(base_layer, NonDynamicallyQuantizableLinear):
            return False  # its owner, a kind of nn.MultiheadAttention, reads its weight and never calls it
        if "router" in type(base_layer).__name__.lower() and type(base_layer).forward is not nn.Linear.forward:
            return False  # a mixture's, which gives scores beside its product (Llama 4, PhiMoE)
        if isinstance(base_layer, (nn.Linear, Conv1D, PartMatrix)):
            return True
        backend = quantization_of(base_layer)
        return backend is not None and backend.layer_type == "linear"

    @staticmethod
    def supports(base_layer: nn.Module) -> bool:
        """Whether a module can be adapted: a linear layer, a convolution or an embedding."""
        return BaseWeight.multiplies(base_layer) or kind_of(base_layer) is not None

    @property
    def length(self) -> float:
        """Length of a vector that the matrix multiplies, next to one of as many numbers around 1."""
        return 1.0 if self.layer_kind is None else self.layer_kind.length

    @staticmethod
    def check_whole(base_layer: nn.Module, name: str) -> None:
        """Check, before any layer is replaced, that a layer's weight is there as a whole.

        An adapter beside a part of a weight would be another one on each process, and nobody would average its
        gradients.

        Raises:
            UnsupportedError: The weight is spread over processes.
        """
        weight = getattr(base_layer, "weight", None)
        if in_pieces_of_zero(weight):
            raise UnsupportedError(f"module {name!r}: {IN_PIECES}")
        if hasattr(weight, "full_tensor"):
            raise UnsupportedError(
                f"module {name!r} has its weight spread over processes, by tensor parallelism (tp_plan) or FSDP2; load "
                "the base model without tp_plan, and add the adapter before fully_shard()."
            )

    @property
    def transposed(self) -> bool:
        """Whether the base layer holds its weight as (in, out), as transformers' `Conv1D` does."""
        return isinstance(self.get_base_layer(), Conv1D)

    def get_base_weight(self) -> torch.Tensor:
        """The base layer's weight in its own layout, (out, in) or (in, out), dequantised if need be.

        Raises:
            UnsupportedError: The layer's quantisation does not give its weights back.
        """
        base = self.get_base_layer()
        self.check_readable()
        if self._is_offloaded():
            return offloaded_weights(base)["weight"]
        state = getattr(getattr(base, "weight", None), "quant_state", None)
        if not getattr(state, "packing_format_for_cpu", False):
            return super().get_base_weight()
        # For the CPU, bitsandbytes packs 4-bit weights anew at their first call, in an order that its dequantisation
        # does not know: it would return wrong numbers. What the layer makes of unit vectors is right in any order.
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            columns: torch.Tensor = base(torch.eye(self.in_features))
            bias = getattr(base, "bias", None)
            return (columns if bias is None else columns - bias.to(columns)).t().contiguous()

    def check_readable(self) -> None:
        """Raise `UnsupportedError` if the layer's quantisation does not give its weights back."""
        if isinstance(self.quantization_backend, ForwardOnlyQuantizationBackend):
            raise UnsupportedError(
                f"{self.name or 'the layer'}: the values of {self.quantization_backend.backend_name} weights cannot "
                f"be read, which {self.method_name} needs with these settings; load the base model with "
                "bitsandbytes, torchao or without quantisation, or choose another method or start (init_weights)."
            )
        if self.quantization_backend is not None and self._is_offloaded():
            raise UnsupportedError(
                f"{self.name or 'the layer'}: its quantised weight is offloaded, where it cannot be read, which "
                f"{self.method_name} needs with these settings; load the base model without offloading, or without "
                "quantisation, or choose another method or start (init_weights)."
            )

    def _is_offloaded(self) -> bool:
        """Whether the weight is elsewhere just now; while PEFT merges, it is there."""
        base = self.get_base_layer()
        weight = getattr(base, "weight", None)
        return weight is not None and weight.is_meta and "weight" in offloaded_weights(base)

    def base_matrix(self) -> torch.Tensor:
        """The base layer's weight as a matrix (out, in), dequantised if need be."""
        weight = whole(self.get_base_weight().detach())
        if self.layer_kind is not None:
            return self.layer_kind.matrix(weight)
        return weight.t() if self.transposed else weight

    # Merging ---------------------------------------------------------------------------------------------------

    def has_adapter(self, adapter: str) -> bool:
        """Whether the adapter adapts this layer."""
        raise NotImplementedError

    def delta_matrix(self, adapter: str) -> torch.Tensor:
        """The update that is merged, (out, in) whatever the base layer's layout."""
        raise NotImplementedError

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The update that is merged, as the base layer holds its weight, which PEFT expects of its methods.

        Raises:
            UnsupportedError: The update depends on the input.
        """
        delta = self.delta_matrix(adapter)
        if self.layer_kind is not None:
            return self.layer_kind.weight(delta)
        return delta.t() if self.transposed else delta

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
        base = self.get_base_layer()
        if nn.utils.parametrize.is_parametrized(base) or not _COMPUTED_FROM.isdisjoint(base._parameters):
            raise UnsupportedError(
                f"cannot merge into {self.name or 'the layer'}, which computes its weight anew at every call (weight "
                "norm, spectral norm, pruning, another parametrization); keep the adapter attached, or make the weight "
                "a plain one first (torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove)."
            )

    @torch.no_grad()
    def _add_to_base(self, adapter: str, sign: float, check: bool) -> None:
        self.check_mergeable()
        delta = self.get_delta_weight(adapter)
        weight = self.get_base_weight()
        if check or self.quantization_backend is not None:
            merged = (weight.to(delta.dtype) + sign * delta.to(weight.device)).to(weight.dtype)
            if check and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            if self.quantization_backend is None:
                weight.copy_(merged)
            else:
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


def sizes(base_layer: nn.Module) -> tuple[int, int]:
    """The numbers of columns and rows of a layer's matrix (out, in)."""
    kind = kind_of(base_layer)
    return features(base_layer) if kind is None else (kind.in_features, kind.out_features)


def quantization_of(base_layer: nn.Module, settings: Mapping[str, Any] | None = None) -> QuantizationBackend | None:
    """PEFT's way to read and write a quantised layer's weight; None if the layer is not quantised.

    Args:
        base_layer: The layer.
        settings: What the model tells of its quantisation (`peft.utils.quantization_utils.get_quantization_kwargs`).
            Without it, torchao's layers can do everything but merge.
    """
    settings = {"get_apply_tensor_subclass": None, **(settings or {})}
    mergeable = settings["get_apply_tensor_subclass"] is not None
    if not mergeable:  # PEFT refuses such a layer as a whole, for what merging alone needs
        settings["get_apply_tensor_subclass"] = _unknown_quantization
    backend: QuantizationBackend | None = resolve_quantization_backend(base_layer, **settings)
    if isinstance(backend, TorchaoBackend) and not mergeable:
        backend.supports_merge = False
    return backend


def _unknown_quantization() -> None:
    """Stand in for torchao's way to quantise; never called, since such layers are not merged into."""
    raise UnsupportedError("torchao was not told how to quantise this layer.")
