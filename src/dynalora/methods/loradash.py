"""LoRA-Dash: find the directions of the base weight that the task needs, then move along them ("dash").

    y = W0·x + s · up·down·x + s · Σ_i δ_i u_i v_iᵀ·x

`up` and `down` start and train as LoRA's. After t optimizer steps (the pre-launch phase), once, the singular pairs
(u_i, σ_i, v_i) of W0 with the largest rate of change |u_iᵀ ΔW v_i| / σ_i become task-specific directions, with
ΔW = s·up·down as it is then. They are frozen, and their changes of singular value δ_i train from 0.

Unleashing the Power of Task-Specific Directions in Parameter Efficient Fine-tuning (Si et al., ICLR 2025).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from dynalora.adapter.config import AdapterConfig, is_whole
from dynalora.adapter.directions import DIRECTION_ROLES, DirectedLayer, DirectedMethod
from dynalora.adapter.layer import AdapterLayer, Gates
from dynalora.adapter.register import register
from dynalora.adapter.storage import Role
from dynalora.driver import Moment


@dataclass
class LoraDashConfig(AdapterConfig):
    """Configuration of LoRA-Dash. The shared settings are those of `dynalora.adapter.config.AdapterConfig`.

    `alpha` defaults to `2r`.

    Args:
        warmup_steps: t, the optimizer steps before the directions are chosen.
        tsd_count: Number of task-specific directions per matrix.
    """

    warmup_steps: int = field(
        default=100, metadata={"help": "Train for this many optimizer steps before the directions are chosen."}
    )
    tsd_count: int = field(default=8, metadata={"help": "Choose this many task-specific directions per matrix."})

    method: ClassVar[str] = "loradash"
    default_alpha_per_rank: ClassVar[float] = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("warmup_steps", "tsd_count"):
            value = getattr(self, name)
            self._require(is_whole(value) and value > 0, name, "a positive integer")

    def warmup(self, total_steps: int | None) -> int:
        """Optimizer steps before the directions are chosen."""
        return self.warmup_steps


class LoraDashLayer(DirectedLayer):
    """LoRA's layer, and frozen directions with weights δ, zero vectors until they are chosen."""

    method_name = "loradash"
    takes_factors = False  # its directions are those of a training
    roles = (*AdapterLayer.roles, Role("frozen_down", trains=False), Role("frozen_up", trains=False), *DIRECTION_ROLES)

    def diagonal(self, adapter: str, projected: torch.Tensor | Gates) -> torch.Tensor:
        """(1, …, 1, δ), (r + tsd_count)."""
        weights = self.parameter("tsd_weight", adapter)
        return torch.cat([weights.new_ones(self.used("up", adapter).shape[1]), weights])

    def moved(self, adapter: str, config: LoraDashConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """ΔW."""
        return self.scaling[adapter] * self.used("up", adapter), self.used("down", adapter)

    def zero_update(self, adapter: str) -> None:
        """Make the update zero: `up` is, and the directions' weights."""
        super().zero_update(adapter)
        self.zero_directions(adapter)


@register
class LoraDash(DirectedMethod):
    """LoRA-Dash's part in training: the choice of directions."""

    name = "loradash"
    title = "LoRA-Dash"
    config_class = LoraDashConfig
    layer_class = LoraDashLayer

    def prepare(self, layers: Any, adapter: str, config: LoraDashConfig) -> None:
        """Find out now, and not after the warm-up, whether the base weights can be read."""
        for layer in layers.values():
            layer.check_readable()

    def before_step(self, moment: Moment) -> None:
        """Keep δ still until there are directions."""
        self.hold_back(moment)

    def needs_whole_steps(self, config: LoraDashConfig) -> bool:
        """The directions are written in all layers at once."""
        return True
