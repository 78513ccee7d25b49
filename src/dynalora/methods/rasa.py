"""RaSA: every layer keeps most of its components to itself, and shares the rest with all layers of its kind.

    y = W0·x + s · [up_i, U]·diag(m_i)·[down_i; D]·x
    U = [U_1, …, U_L],      D = [D_1; …; D_L]

A layer of rank r has r − k components of its own, up_i and down_i, and gives k more, U_i and D_i, to a pool of k·L that
all L layers of its kind use (q projections, say, of all blocks). m_i weighs the r − k + k·L components in layer i and
trains, so the update has that rank for about the parameters of a LoRA of rank r. The factors start as LoRA's, and m so
that private and pooled components together each weigh half as much as a LoRA's:

    s·m = alpha / (2·(r − k)) on private components, alpha / (2·k·L) on pooled ones

RaSA: Rank-Sharing Low-Rank Adaptation (He et al., ICLR 2025).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch

from dynalora.adapter.config import AdapterConfig, is_whole
from dynalora.adapter.layer import AdapterLayer, Gates
from dynalora.adapter.method import Method
from dynalora.adapter.register import register
from dynalora.adapter.sharing import SharingLayer, join
from dynalora.adapter.storage import Role
from dynalora.driver import Moment


@dataclass
class RasaConfig(AdapterConfig):
    """Configuration of RaSA. The shared settings are those of `dynalora.adapter.config.AdapterConfig`.

    `alpha` defaults to `r`.

    Args:
        shared_rank: k, the components that every layer gives to the pool of its kind; None: an eighth of `r`, at least
            1. A layer whose rank is not larger gives all that it has, and keeps none to itself.
    """

    shared_rank: int | None = field(
        default=None,
        metadata={
            "help": "Take this many components of each layer into the pool that its kind of layer shares; None: r / 8."
        },
    )

    method: ClassVar[str] = "rasa"

    def __post_init__(self) -> None:
        super().__post_init__()
        k = self.shared_rank
        valid = k is None or (is_whole(k) and k > 0)
        self._require(valid, "shared_rank", "a positive integer, or None")

    @property
    def shared(self) -> int:
        """k."""
        return max(1, self.r // 8) if self.shared_rank is None else self.shared_rank


class RasaLayer(SharingLayer):
    """LoRA's layer, whose last k components are in the pool, and weights of its own and all pooled components."""

    method_name = "rasa"
    #: Without a rank's dimension, since other layers weigh the pooled components too.
    roles = (Role("down"), Role("up"), Role("mix"))

    def start(self, config: RasaConfig, r: int) -> dict[str, torch.Tensor]:
        """LoRA's start; the weights are made in `begin`, when it is known how many layers share."""
        return {**super().start(config, r), "mix": torch.ones(r)}

    def _pool(self, role: str, adapter: str, dim: int) -> list[torch.Tensor]:
        """What the layers of this kind give to the pool, of a factor whose components lie along `dim`."""
        shared = cast(RasaConfig, self.drivers[adapter].config).shared
        pool = []
        for factor in self.peer_parameters(role, adapter):
            given = min(shared, factor.shape[dim])
            pool.append(factor.narrow(dim, factor.shape[dim] - given, given))
        return pool

    def private(self, adapter: str) -> int:
        """How many components the layer has to itself, r − k."""
        return max(0, self.rank(adapter) - cast(RasaConfig, self.drivers[adapter].config).shared)

    @torch.no_grad()
    def begin(self, adapter: str, config: RasaConfig) -> None:
        """Make the weights of the layer's own components and of the pool's, (r − k + k·L)."""
        own, pooled = self.private(adapter), sum(part.shape[0] for part in self._pool("down", adapter, 0))
        before = self.parameter("mix", adapter)
        mix = before.new_ones(own + pooled)
        if config.init_weights:
            # s·m = alpha / (2 · components); alpha / s is r, or √r with rsLoRA.
            rank = self.scaling_ranks[adapter]
            half = (rank**0.5 if config.use_rslora else rank) / 2
            mix[:own] = half / max(1, own)
            mix[own:] = half / pooled
        self.put("mix", adapter, mix)
        self.parameter("mix", adapter).requires_grad_(before.requires_grad)

    def _with_pool(self, role: str, adapter: str, dim: int) -> torch.Tensor:
        """A factor's private components and the pool's, along the dimension that carries the rank."""
        factor = self.parameter(role, adapter)
        private = factor.narrow(dim, 0, self.private(adapter))
        return torch.cat([private, *(part.to(factor) for part in self._pool(role, adapter, dim))], dim)

    def projections(self, adapter: str) -> Sequence[torch.Tensor]:
        """[down_i; D], (r − k + k·L, in)."""
        return (self._with_pool("down", adapter, 0),)

    def columns(self, adapter: str) -> torch.Tensor:
        """[up_i, U], (out, r − k + k·L)."""
        return self._with_pool("up", adapter, 1)

    def diagonal(self, adapter: str, projected: torch.Tensor | Gates) -> torch.Tensor:
        """m_i, (r − k + k·L)."""
        return self.parameter("mix", adapter)

    def zero_update(self, adapter: str) -> None:
        """Make the update zero: m is; the factors stay, since other layers use them."""
        self.parameter("mix", adapter).detach().zero_()


@register
class Rasa(Method):
    """RaSA is its form; nothing happens around steps."""

    name = "rasa"
    title = "RaSA"
    config_class = RasaConfig
    layer_class = RasaLayer
    #: A layer reads factors of others, which other wrappers hold in parts just then.
    sharding = ()

    def join(self, layers: Mapping[str, AdapterLayer], adapter: str, config: RasaConfig) -> None:
        """Let layers of a kind know each other, and make the weights that depend on how many they are."""
        sharing = [cast(RasaLayer, layer) for layer in layers.values()]
        join(sharing, adapter, ("down", "up"))
        for layer in sharing:
            layer.begin(adapter, config)

    def needs_driving(self, config: RasaConfig) -> bool:
        """Nothing happens around steps."""
        return False

    def keeps_components(self, moment: Moment, trains: bool) -> str:
        """Pooled components are used by all layers of a kind."""
        return (
            "RaSA's pooled components act in all layers of a kind, so none can be removed from one; export it with "
            "max_rank or tolerance to make it smaller."
        )
