"""MiLoRA: LoRA that starts at the minor singular components of the base weight.

    W0 = U Σ Vᵀ, the r smallest singular triplets being U₀, S₀, V₀
    y = W0·x + s · (up·down − up₀·down₀)·x,      up₀ = U₀·√(S₀/s),   down₀ = √(S₀/s)·V₀ᵀ

The start up₀·down₀ stays beside the trained factors, frozen: the paper subtracts it from W0 instead, which is the same
function.

MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning (Wang et al., NAACL 2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dynalora.adapter.config import AdapterConfig
from dynalora.adapter.register import register
from dynalora.adapter.singular import TwinLayer, TwinMethod
from dynalora.spectral.decomposition import Triplets


@dataclass
class MiloraConfig(AdapterConfig):
    """Configuration of MiLoRA: the settings of `dynalora.adapter.config.AdapterConfig`.

    `alpha` defaults to `r`, as in the paper's runs.
    """

    method: ClassVar[str] = "milora"


class MiloraLayer(TwinLayer):
    """LoRA's layer beside its frozen start."""

    method_name = "milora"

    def begin(self, adapter: str, triplets: Triplets) -> dict[str, torch.Tensor]:
        """U₀·√(S₀/s) and √(S₀/s)·V₀ᵀ."""
        root = (triplets.values / self.scaling[adapter]).sqrt()
        return {"up": triplets.up * root, "down": root[:, None] * triplets.down}


@register
class Milora(TwinMethod):
    """MiLoRA is its start; nothing happens around steps."""

    name = "milora"
    title = "MiLoRA"
    config_class = MiloraConfig
    layer_class = MiloraLayer
    which = "smallest"

    def needs_driving(self, config: MiloraConfig) -> bool:
        """Nothing is lost without the driver but the exemption from weight decay."""
        return False
