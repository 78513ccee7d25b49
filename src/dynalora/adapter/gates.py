"""Gates per token, as a part that any method's layer can have (DISeL's; see :mod:`dynalora.methods.disel`).

    g(x) = σ(W_g·x + b_g) ∈ (0, 1)^r,      d(x) = g(x) ⊙ d

with d the method's own diagonal. W_g meets the input in the same product as ``down``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from dynalora.adapter.layer import AdapterLayer, kaiming
from dynalora.driver import OptimizerOverride

GateWeightInit = Literal["kaiming", "zeros"]

#: gate_weight is W_g; with a bottleneck it is gate_out (r, width) · gate_in (width, in) instead.
GATE_ROLES = ("gate_weight", "gate_in", "gate_out", "gate_bias")


@dataclass(frozen=True)
class GateSettings:
    """How gates begin and train; see :class:`dynalora.methods.disel.DiselConfig`."""

    bias_init: float = -3.0
    weight_init: GateWeightInit = "kaiming"
    normalize: bool = False
    bottleneck: int | None = None
    lr_multiplier: float = 5.0

    def overrides(self) -> dict[str, OptimizerOverride]:
        """Gates step with their multiple of the learning rate and without weight decay."""
        return dict.fromkeys(
            GATE_ROLES, OptimizerOverride(lr_multiplier=self.lr_multiplier, weight_decay=0.0)
        )


class GatedLayer(AdapterLayer):
    """The shared form with gates, for the adapters whose configuration has them."""

    roles: ClassVar[tuple[str, ...]] = ("down", "up", *GATE_ROLES)
    rank_dims: ClassVar[dict[str, int]] = {
        **AdapterLayer.rank_dims,
        "gate_weight": 0,
        "gate_out": 0,
        "gate_bias": 0,
    }

    def __init__(self, base_layer: nn.Module, quantization: dict[str, Any] | None = None) -> None:
        super().__init__(base_layer, quantization)
        #: Factor of the logits by adapter.
        self.gate_scale: dict[str, float] = {}
        #: Gates that are held where they are, (r) by adapter; then the update is static.
        self.held_gates: dict[str, torch.Tensor] = {}

    def gate_settings(self, config: Any) -> GateSettings | None:
        """The gates that a configuration asks for; None for none."""
        return None

    def start(self, config: Any, r: int) -> dict[str, torch.Tensor]:
        """The method's start, and almost closed gates."""
        tensors = super().start(config, r)
        if (settings := self.gate_settings(config)) is not None:
            tensors |= self._start_gates(settings, r)
        return tensors

    def _start_gates(self, settings: GateSettings, r: int) -> dict[str, torch.Tensor]:
        draw = kaiming if settings.weight_init == "kaiming" else torch.zeros
        tensors = {}
        if settings.bottleneck is None:
            tensors["gate_weight"] = draw(r, self.in_features)
        else:
            # With zeros only the outer layer is zero, or neither would ever get a gradient.
            tensors["gate_in"] = kaiming(settings.bottleneck, self.in_features)
            tensors["gate_out"] = draw(r, settings.bottleneck)
        tensors["gate_bias"] = torch.full((r,), float(settings.bias_init))
        return tensors

    def update_layer(self, adapter: str, config: Any, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; see :meth:`AdapterLayer.update_layer`."""
        super().update_layer(adapter, config, *args, **kwargs)
        settings = self.gate_settings(config)
        self.gate_scale[adapter] = (
            self.in_features**-0.5 if settings is not None and settings.normalize else 1.0
        )

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from this layer."""
        super().delete_adapter(adapter_name)
        self.gate_scale.pop(adapter_name, None)
        self.held_gates.pop(adapter_name, None)

    def gated(self, adapter: str) -> bool:
        """Whether an adapter has gates."""
        return self.has_parameter("gate_bias", adapter)

    def depends_on_input(self, adapter: str) -> bool:
        """Whether an adapter has gates that are not held."""
        return self.gated(adapter) and adapter not in self.held_gates

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may convert the update to a LoRA."""
        return not self.depends_on_input(adapter_name)

    def projections(self, adapter: str) -> Sequence[torch.Tensor]:
        """Down and W_g (or the bottleneck's inner layer): one GEMM over the input does both."""
        if not self.depends_on_input(adapter):
            return super().projections(adapter)
        gate = "gate_in" if self.has_parameter("gate_in", adapter) else "gate_weight"
        return *super().projections(adapter), self.used(gate, adapter)

    def own_diagonal(self, adapter: str) -> torch.Tensor | None:
        """The method's own diagonal, (r + k), which gates multiply; None for all ones."""
        return None

    def diagonal(self, adapter: str, projected: torch.Tensor | None) -> torch.Tensor | None:
        """g(x) ⊙ d, (…, r + k); components that never train have no gate."""
        own = self.own_diagonal(adapter)
        if not self.gated(adapter):
            return own
        if projected is None:
            up = self.parameter("up", adapter)
            gates = self.held_gates[adapter].to(up.device, up.dtype)
        else:
            gates = self._gates(adapter, projected)
        if own is None:
            return gates
        ungated = own.shape[-1] - gates.shape[-1]
        if ungated:
            gates = torch.cat([gates, gates.new_ones((*gates.shape[:-1], ungated))], -1)
        return gates * own

    def _gates(self, adapter: str, logits: torch.Tensor) -> torch.Tensor:
        if self.has_parameter("gate_out", adapter):
            logits = nn.functional.linear(logits, self.used("gate_out", adapter).to(logits.dtype))
        if self.gate_scale[adapter] != 1.0:
            logits = logits * self.gate_scale[adapter]
        return torch.sigmoid(logits + self.used("gate_bias", adapter))

    @torch.no_grad()
    def gates(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """The gates for given inputs, without gradients: x (…, in) → (…, r) in (0, 1)."""
        gate = self.used("gate_in" if self.has_parameter("gate_in", adapter) else "gate_weight", adapter)
        return self._gates(adapter, nn.functional.linear(x.to(gate.dtype), gate))
