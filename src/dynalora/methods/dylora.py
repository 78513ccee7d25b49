"""DyLoRA: one adapter that works at every rank up to its own.

    y = W0·x + s_b · up[:, :b] · down[:b] · x,      b drawn anew for every step,  s_b = alpha / b

Every optimizer step trains the first b components alone, with b uniform in [r_min, r], so that each prefix of the
components learns to do without those behind it. Outside of training all r components act. b follows from the seed and
the step: it is the same in all micro-batches, on all processes and after resuming, and nothing is saved for it but the
b of the step to come. In the "frozen" variant the first b components act and only the b-th one gets a gradient.

In a matrix of another rank (`rank_pattern`) b divides that rank's range in the same proportion.

DyLoRA: Parameter-Efficient Tuning of Pretrained Models using Dynamic Search-Free Low Rank Adaptation (Valipour et al.,
2023).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from dynalora.adapter.config import AdapterConfig, is_whole
from dynalora.adapter.layer import AdapterLayer, adapter_layers
from dynalora.adapter.method import Method
from dynalora.adapter.register import register
from dynalora.adapter.storage import FACTORS, Role
from dynalora.adapter.update import Update
from dynalora.common.processes import spread_as
from dynalora.driver import Moment
from dynalora.errors import ConfigError


@dataclass
class DyloraConfig(AdapterConfig):
    """Configuration of DyLoRA. The shared settings are those of `dynalora.adapter.config.AdapterConfig`.

    Args:
        min_rank: r_min, the smallest prefix that is trained.
        variant: `"full"` trains all components of the prefix; `"frozen"` only its last one.
        seed: Seed of the prefixes.
    """

    min_rank: int = field(default=1, metadata={"help": "Train no fewer components than this in any step."})
    variant: Literal["full", "frozen"] = field(
        default="full",
        metadata={
            "help": "Train the whole prefix of components that a step draws (full), or its last component alone "
            "(frozen)."
        },
    )
    seed: int = field(default=0, metadata={"help": "Draw the number of components of each step from this seed."})

    method: ClassVar[str] = "dylora"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(
            is_whole(self.min_rank) and 1 <= self.min_rank <= self.r, "min_rank", f"an integer from 1 to r={self.r}"
        )
        self._require(self.variant in ("full", "frozen"), "variant", "'full' or 'frozen'")
        self._require(is_whole(self.seed), "seed", "an integer")

    def prefix(self, step: int, rank: int) -> int:
        """The number of components b that act in a step, for a matrix of some rank.

        Args:
            step: Optimizer steps done before.
            rank: The matrix's rank.
        """
        generator = torch.Generator("cpu").manual_seed((self.seed * 1_000_003 + step) % 2**63)
        least = min(self.min_rank, rank)
        return least + int(torch.rand((), generator=generator, dtype=torch.float64, device="cpu") * (rank - least + 1))


class DyloraLayer(AdapterLayer):
    """The shared form with d = (r / b, …, r / b, 0, …, 0) in training, and 1 else."""

    method_name = "dylora"
    roles = (*FACTORS, Role("prefix", trains=False))  # b of the coming step, int64

    def start(self, config: DyloraConfig, r: int) -> dict[str, torch.Tensor]:
        """LoRA's start, and the first step's b."""
        return {**super().start(config, r), "prefix": torch.tensor(config.prefix(0, r))}

    def narrow(self, x: torch.Tensor, adapter: str, products: torch.Tensor | None = None) -> torch.Tensor:
        """The narrow activations, x (…, in) → (…, r); in training those of the first b components, times r / b."""
        h = super().narrow(x, adapter, products)
        if not self.training:
            return h
        prefix, rank = self.buffer("prefix", adapter), self.ranks[adapter]
        share = (rank / prefix).to(h.dtype)
        if self.drivers[adapter].config.use_rslora:  # type: ignore[attr-defined]
            share = share.sqrt()
        return h * torch.where(torch.arange(rank, device=h.device) < prefix, share, 0.0)

    def plain_update(self, adapter: str) -> Update | None:
        """As other layers; None in training."""
        return None if self.training else super().plain_update(adapter)

    def few(self, x: torch.Tensor, adapter: str) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """As other layers; None in training."""
        return None if self.training else super().few(x, adapter)


@register
class Dylora(Method):
    """DyLoRA's part in training: the prefix of the next step, and what the frozen variant leaves as it is."""

    name = "dylora"
    title = "DyLoRA"
    config_class = DyloraConfig
    layer_class = DyloraLayer
    #: The prefixes of this step by layer, for all optimizers that make it.
    shared_class = dict

    def before_step(self, moment: Moment[dict[str, torch.Tensor]]) -> None:
        """In the frozen variant, leave the gradient of the prefix's last component alone."""
        if moment.config.variant != "frozen":
            return
        for layer in moment.all_layers:
            moment.shared.setdefault(layer.name, layer.buffer("prefix", moment.adapter).clone())
        for layer in moment.layers:
            for role, dim in layer.rank_dims.items():
                parameter = layer.parameter(role, moment.adapter)
                if parameter.grad is None or not moment.awaits(parameter):
                    continue
                prefix = moment.shared[layer.name].to(parameter.device)
                last = torch.arange(parameter.shape[dim], device=parameter.device) == prefix - 1
                mask = last[:, None] if dim == 0 else last
                parameter.grad.mul_(spread_as(parameter, mask.expand(parameter.shape).to(parameter.dtype)))

    def after_step(self, moment: Moment[dict[str, torch.Tensor]]) -> None:
        """Draw the prefix of the next step."""
        for layer in moment.all_layers:
            prefix = moment.config.prefix(moment.step + 1, layer.rank(moment.adapter))
            layer.buffer("prefix", moment.adapter).fill_(prefix)

    def metrics(self, moment: Moment) -> dict[str, float]:
        """The prefix of the step that was made, at rank r."""
        return {"dylora_prefix": float(moment.config.prefix(max(0, moment.step - 1), moment.config.r))}


@torch.no_grad()
def cut_to_rank(model: nn.Module, rank: int, adapter: str = "default") -> None:
    """Leave the first components of a trained DyLoRA adapter, scaled as they were trained, s_b = alpha / b.

    Matrices that have no more than `rank` components stay as they are.

    Args:
        model: A model with a DyLoRA adapter.
        rank: b, the rank to keep.
        adapter: The adapter's name.

    Raises:
        ConfigError: The rank is below 1, or the model has no DyLoRA adapter of this name.
    """
    layers = [layer for layer in adapter_layers(model, adapter).values() if isinstance(layer, DyloraLayer)]
    if not layers:
        raise ConfigError(f"the model has no DyLoRA adapter named {adapter!r} to cut.")
    if rank < 1:
        raise ConfigError(f"rank={rank}: give a rank of at least 1.")
    for layer in layers:
        had, config = layer.rank(adapter), layer.drivers[adapter].config
        if had <= rank:
            continue
        layer.resize(adapter, range(rank))
        share: float = had / rank
        # Into the factor, since the scaling that is saved refers to the rank at the start.
        layer.parameter("up", adapter).mul_(share**0.5 if config.use_rslora else share)  # type: ignore[attr-defined]
        layer.buffer("prefix", adapter).clamp_(max=rank)
