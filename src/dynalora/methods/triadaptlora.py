"""TriAdaptLoRA: a square core between the factors, and ranks that grow where the core does.

    y = W0·x + s · up·C·down·x,      C (r × r) = its lower triangle + its upper triangle
    score = ‖C‖_F / blocks − (‖C‖_F / blocks at the last look)

`down` starts from N(0, 0.02²), `up` at 0 and C as the identity, so that everything can move. At every look the
matrices with the highest scores get one more block: k rows below the lower triangle and k columns beside the upper
one, and k components of both factors. How many matrices grow follows the run's progress p from `grow_start` to its end,
with m components missing from the budget:

    linear: ⌊m·p⌋,      exponential: ⌊m^p⌋,      at least one

A new block changes nothing at first: its `up` is 0, its corner of C the identity and its borders 0.

TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for Parameter-Efficient Fine-Tuning (Liang et al.,
2025).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from dynalora.adapter.growth import GrowingLayer, GrowingMethod, GrowthConfig, growth_panels
from dynalora.adapter.ranks import in_use
from dynalora.adapter.register import register
from dynalora.adapter.storage import FACTORS, Role
from dynalora.driver import Moment


@dataclass
class TriAdaptLoraConfig(GrowthConfig):
    """Configuration of TriAdaptLoRA. Further settings are those of `dynalora.adapter.growth.GrowthConfig`.

    Args:
        growth: How the number of matrices that grow follows the run's progress: `"linear"` or `"exponential"`.
    """

    growth: Literal["linear", "exponential"] = field(
        default="linear",
        metadata={"help": "Let the number of matrices that grow change linearly or exponentially as the run goes on."},
    )

    method: ClassVar[str] = "triadaptlora"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.growth in ("linear", "exponential"), "growth", "'linear' or 'exponential'")


class TriAdaptLoraLayer(GrowingLayer):
    """The shared form with a core, which stands on the side of `up`."""

    method_name = "triadaptlora"
    roles = (*FACTORS, Role("core", rank_dim=(0, 1)), Role("last_norm", trains=False))

    def start(self, config: TriAdaptLoraConfig, r: int) -> dict[str, torch.Tensor]:
        """Down from N(0, 0.02²), up 0, and the core's identity, with its norm."""
        factors = super().start(config, r)
        if config.init_weights:
            factors["down"] = 0.02 * torch.randn(r, self.in_features)
        return {**factors, "core": torch.eye(r), "last_norm": torch.tensor(float(r)).sqrt()}

    def columns(self, adapter: str) -> torch.Tensor:
        """Up·C, (out, r)."""
        return self.used("up", adapter) @ self.used("core", adapter)

    def norm(self, adapter: str, k: int) -> float:
        """‖C‖_F per block, the first of which is as large as the rank at the start, and all others have `k` rows."""
        core = in_use(self, "core", adapter, self.parameter("core", adapter).detach())
        blocks = 1 + math.ceil((self.rank(adapter) - self.scaling_ranks[adapter]) / k)
        return float(torch.linalg.matrix_norm(core.double())) / max(1, blocks)

    def new_components(
        self, config: TriAdaptLoraConfig, adapter: str, generator: torch.Generator
    ) -> dict[str, torch.Tensor | tuple[torch.Tensor, ...]]:
        """A block that changes nothing at first."""
        k, rank = config.grow_rank, self.rank(adapter)
        return {
            "down": 0.02 * torch.randn(k, self.in_features, generator=generator),
            "up": torch.zeros(self.out_features, k),
            "core": (torch.zeros(k, rank), torch.cat([torch.zeros(rank, k), torch.eye(k)])),
        }


@register
class TriAdaptLora(GrowingMethod):
    """TriAdaptLoRA's part in training: scores and growth."""

    name = "triadaptlora"
    title = "TriAdaptLoRA"
    config_class = TriAdaptLoraConfig
    layer_class = TriAdaptLoraLayer
    panels = growth_panels("triadaptlora")

    def needs_total_steps(self, config: Any) -> bool:
        """How many matrices grow follows the run's progress."""
        return True

    def scores(self, moment: Moment, layers: Sequence[Any]) -> list[float]:
        """How much each core has grown, per block, since the last look, which is now."""
        scores = []
        for layer in layers:
            norm, last = layer.norm(moment.adapter, moment.config.grow_rank), layer.buffer("last_norm", moment.adapter)
            scores.append(norm - float(last))
            last.fill_(norm)
        return scores

    def how_many(self, moment: Moment, layers: Sequence[Any], missing: int) -> int:
        """As many as the run's progress allows, and at least one."""
        config: TriAdaptLoraConfig = moment.config
        start, total = config.occasions(moment.total_steps).start, moment.total_steps or 1
        progress = (moment.step + 1 - start) / max(1, total - start)
        return max(1, int(missing * progress if config.growth == "linear" else missing**progress))

    def keeps_components(self, moment: Moment, trains: bool) -> str:
        """Components act through the core, each on all others."""
        return (
            "TriAdaptLoRA's core mixes its components, so none is without effect by itself; export it with max_rank or "
            "tolerance to make it smaller."
        )
