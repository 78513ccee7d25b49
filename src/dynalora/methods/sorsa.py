"""SORSA: train the principal singular values and vectors, and keep the vectors orthonormal.

    W0 = U Σ Vᵀ, the r largest singular triplets being U₀, S₀, V₀
    y = W0·x + s · (U·S·Vᵀ − U₀·S₀·V₀ᵀ)·x
    L = L_task + γ · 1/(2N) Σ_l (‖UᵀU − I‖_F + ‖VᵀV − I‖_F)              over the N adapted matrices; not squared

U (up), S (sigma) and Vᵀ (down) start at U₀, S₀, V₀ᵀ and train. The start stays beside them, frozen: the paper subtracts
it from W0 instead, which is the same function. The regulariser's gradient is added right before the optimizer's step.

SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language Models (Cao and Song,
2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dynalora.adapter.config import AdapterConfig
from dynalora.adapter.orthogonality import add_orthogonality, orthogonality
from dynalora.adapter.register import register
from dynalora.adapter.singular import SingularLayer, TwinMethod
from dynalora.driver import Moment


@dataclass
class SorsaConfig(AdapterConfig):
    """Configuration of SORSA. The shared settings are those of `dynalora.adapter.config.AdapterConfig`.

    `alpha` defaults to `r`, so that the update is U·S·Vᵀ as the paper writes it.

    Args:
        ortho_weight: γ, weight of the regulariser; 0 leaves it out.
    """

    ortho_weight: float = field(
        default=4e-4, metadata={"help": "Weigh the penalty that keeps directions orthonormal with this number."}
    )

    method: ClassVar[str] = "sorsa"

    def __post_init__(self) -> None:
        super().__post_init__()
        weight = self.ortho_weight
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool) and 0 <= weight < math.inf
        self._require(number, "ortho_weight", "a number of at least 0")


class SorsaLayer(SingularLayer):
    """The shared form with d = S, beside its frozen start."""

    method_name = "sorsa"


@register
class Sorsa(TwinMethod):
    """SORSA's part in training: the start, and the regulariser."""

    name = "sorsa"
    title = "SORSA"
    config_class = SorsaConfig
    layer_class = SorsaLayer
    which = "largest"

    def needs_driving(self, config: SorsaConfig) -> bool:
        """Without the regulariser it is a start."""
        return config.ortho_weight > 0

    def before_step(self, moment: Moment) -> None:
        """Add the regulariser's gradient."""
        if moment.config.ortho_weight:
            add_orthogonality(moment, moment.config.ortho_weight, "mean_norm")

    def report(self, moment: Moment) -> dict[str, Any]:
        """The regulariser itself, without γ."""
        return {"ortho_loss_now": orthogonality(moment.layers, moment.adapter, "mean_norm")}
