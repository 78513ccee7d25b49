"""DoRA (Liu et al., 2024): the norms of the adapted weight's rows, trained apart from their directions.

    y = g ⊙ (W0·x + s·ΔW·x) + b,      g = magnitude / ‖W0 + s·ΔW‖ row by row

The norms in `g` are taken as constants, so no gradient runs through them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dynalora.adapter.gates import GatedLayer
from dynalora.adapter.update import Update
from dynalora.errors import UnsupportedError


class DoraLayer(GatedLayer):
    """A layer whose adapters may have a trained magnitude, (out), under the role `magnitude`."""

    def __init__(self, base_layer: nn.Module, quantization: dict[str, Any] | None = None) -> None:
        super().__init__(base_layer, quantization)
        # ‖W0‖² of every row, and by how much a merged adapter has scaled the rows.
        self.base_squares: torch.Tensor | None = None
        self.merged_gains: dict[str, torch.Tensor] = {}

    @classmethod
    def check_base_layer(cls, base_layer: nn.Module, name: str, config: Any, r: int) -> None:
        """Check that a module can be adapted, with `use_dora` that it is a plain product."""
        super().check_base_layer(base_layer, name, config, r)
        if config.use_dora and not cls.multiplies(base_layer):
            raise UnsupportedError(
                f"module {name!r} is a {type(base_layer).__name__}, and use_dora=True knows the norms of linear layers "
                "only; leave it out with exclude_modules, or set use_dora=False."
            )

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from this layer."""
        super().delete_adapter(adapter_name)
        self.merged_gains.pop(adapter_name, None)

    @torch.no_grad()
    def zero_update(self, adapter: str) -> None:
        """Make the update zero; the rows get back the norms of the base weight."""
        super().zero_update(adapter)
        if self.has_parameter("magnitude", adapter):
            self.parameter("magnitude", adapter).copy_(self._base_squares().sqrt())

    @torch.no_grad()
    def scale_update(self, adapter: str, factor: float) -> None:
        """Multiply the update by a factor.

        Row by row, W0 + f·(g(W0 + sΔW) − W0) = (1 − f + fg)·(W0 + c·f·sΔW) with c = g / (1 − f + fg): the update's
        rows are scaled by c, and the magnitude becomes (1 − f + fg) times the norm of the new rows.
        """
        if not self.has_parameter("magnitude", adapter):
            super().scale_update(adapter, factor)
            return
        gain = self._gain(adapter)
        blend = 1 - factor + factor * gain
        super().scale_update(adapter, factor)
        for role in ("up", "frozen_up"):
            part = self.parameter(role, adapter) if role == "up" else self._frozen(role, adapter)
            if part is not None:
                part.mul_((gain / blend)[:, None].to(part.dtype))
        magnitude = self.parameter("magnitude", adapter)
        magnitude.copy_(blend * magnitude / self._gain(adapter))  # magnitude / gain: the norm of the new rows

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The shared form, x (…, in) → (…, out); an adapter with `use_dora` must act on an input alone."""
        if kwargs.get("adapter_names") is None and len(self.active_adapters) > 1:
            self._check_alone()
        return super().forward(x, *args, **kwargs)

    def _check_alone(self) -> None:
        if self.disable_adapters or self.merged:
            return
        for adapter in self.active_adapters:
            if self.has_parameter("magnitude", adapter):
                raise UnsupportedError(
                    f"adapter {adapter!r} has use_dora=True, which scales the whole weight, and cannot be active "
                    f"together with others ({', '.join(self.active_adapters)}); activate one at a time."
                )

    def few(self, x: torch.Tensor, adapter: str) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """As without DoRA; None with it, since it acts on the result."""
        return None if self.has_parameter("magnitude", adapter) else super().few(x, adapter)

    def plain_update(self, adapter: str) -> Update | None:
        """As without DoRA; None with it, since it acts on the result."""
        return None if self.has_parameter("magnitude", adapter) else super().plain_update(adapter)

    def add_update(
        self,
        result: torch.Tensor,
        x: torch.Tensor,
        adapter: str,
        in_place: bool = False,
        products: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Add an adapter's update, x (…, in) to (…, out); with `use_dora` the rows are given their trained norms."""
        result = super().add_update(result, x, adapter, in_place, products)
        if not self.has_parameter("magnitude", adapter):
            return result
        bias = getattr(self.get_base_layer(), "bias", None)
        more = (self._gain(adapter) - 1).to(result.dtype)
        return result + more * (result if bias is None else result - bias.to(result.dtype))

    def _gain(self, adapter: str) -> torch.Tensor:
        """`g`, (out). The norms come from the factors: ‖W0 + U·D‖² = ‖W0‖² + 2⟨W0·Dᵀ, U⟩ + ‖U·D‖², row by row."""
        with torch.no_grad():
            up, down = self.factors(adapter)
            up = self.scaling[adapter] * up
            # The rows of D take the way of an input, so that quantised weights need not be unpacked.
            base: Any = self.get_base_layer()
            rows = down.to(base.weight.dtype) if base.weight.is_floating_point() else down
            with torch.autocast(rows.device.type, enabled=False):
                cross = base(rows)
            bias = getattr(base, "bias", None)
            cross = (cross if bias is None else cross - bias).to(up.dtype)  # (r, out)
            update = ((up @ (down @ down.t())) * up).sum(1)
            squares = self._base_squares().to(up.device, up.dtype)
            norm = (squares + 2 * (cross.t() * up).sum(1) + update).clamp_min_(torch.finfo(up.dtype).tiny).sqrt_()
        gain: torch.Tensor = self.parameter("magnitude", adapter) / norm
        return gain

    def _base_squares(self) -> torch.Tensor:
        if self.base_squares is None or self.base_squares.is_meta:  # made before the weights were there
            weight = self.get_base_weight().detach()
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            # transformers' Conv1D holds its weight as (in, out).
            self.base_squares = wide.square().sum(0 if isinstance(self.get_base_layer(), Conv1D) else 1)
        return self.base_squares

    def delta_matrix(self, adapter: str) -> torch.Tensor:
        """The update (out, in); with `use_dora`, by what the whole weight changes."""
        update = super().delta_matrix(adapter)
        if not self.has_parameter("magnitude", adapter):
            return update
        weight = self.get_base_weight().detach()
        weight = (weight.t() if isinstance(self.get_base_layer(), Conv1D) else weight).to(update)
        if adapter in self.merged_gains:  # the weight is g (W0 + s·ΔW) already
            return weight - (weight / self.merged_gains[adapter][:, None] - update)
        return self._gain(adapter)[:, None] * (weight + update) - weight

    def _add_to_base(self, adapter: str, sign: float, check: bool) -> None:
        if not self.has_parameter("magnitude", adapter):
            super()._add_to_base(adapter, sign, check)
        elif sign > 0:
            if self.merged_adapters:
                raise UnsupportedError(
                    f"adapter {adapter!r} has use_dora=True, which scales the whole weight, and cannot be merged "
                    f"where {', '.join(self.merged_adapters)} already is; merge one at a time."
                )
            gain = self._gain(adapter).detach()
            super()._add_to_base(adapter, sign, check)
            self.merged_gains[adapter] = gain
        else:
            super()._add_to_base(adapter, sign, check)
            del self.merged_gains[adapter]

    def plain_extras(self, adapter: str) -> dict[str, torch.Tensor]:
        """DoRA's magnitude, (out), under the name that PEFT gives it."""
        if not self.has_parameter("magnitude", adapter):
            return {}
        return {"lora_magnitude_vector": self.parameter("magnitude", adapter)}
