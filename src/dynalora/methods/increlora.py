"""IncreLoRA: begin with small ranks, and give components to the matrices whose update matters most to the loss.

    y = W0·x + s · up·diag(e)·down·x + s · ε · up₊·down₊·x
    S = Ī · Ū,      I = Σ |ΔW ∘ ∂L/∂W| / √(out · in),      ΔW the whole update of a matrix
    Ī ← β1·Ī + (1 − β1)·I,      Ū ← β2·Ū + (1 − β2)·|I − Ī|

`up` and `down` start from N(0, 0.02²) and e at 0. At every growth the h matrices with the highest S get k components
each, until the budget is reached. up₊ and down₊ are the k components that a matrix would get next ("advance
learning"): with ε = 1e-5 they hardly act, but their directions train, so that they have found theirs by the time that
they join, with e = ε. Then new ones take their place; when the budget is reached there are none.

A penalty keeps the rows of `down` and the columns of `up` orthonormal, in the form of AdaLoRA's code:

    L = L_task + γ · mean of ‖down·downᵀ − I‖_F and ‖upᵀ·up − I‖_F over the matrices

and down₊ and up₊ by themselves likewise. ∂L/∂W is computed in those steps only that a coming growth remembers.

IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning (Zhang et al., 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import distributed

from dynalora.adapter.growth import GrowingLayer, GrowingMethod, GrowthConfig, budget, growth_panels, missing_components
from dynalora.adapter.layer import Gates, kaiming
from dynalora.adapter.orthogonality import add_orthogonality, orthogonality
from dynalora.adapter.ranks import in_use
from dynalora.adapter.register import register
from dynalora.adapter.storage import FACTORS, Role
from dynalora.common.processes import grouped, process_count
from dynalora.driver import Moment, carry_state
from dynalora.driver.schedule import memory_of

#: ε, the diagonal of components that train ahead.
AHEAD = 1e-5


@dataclass
class IncreloraConfig(GrowthConfig):
    """Configuration of IncreLoRA. Further settings are those of `dynalora.adapter.growth.GrowthConfig`.

    Args:
        grow_matrices: h, the matrices that grow at once; None: as many as reach the budget in ten growths.
        advance_learning: Whether the components to come train their directions ahead.
        ortho_weight: γ, weight of the orthogonality penalty.
        beta1: β1, decay of the scores' moving averages.
        beta2: β2, decay of the moving averages of their uncertainty.
    """

    grow_matrices: int | None = field(
        default=None,
        metadata={
            "help": "Let this many matrices grow at once; None: so many that the budget is reached in ten growths."
        },
    )
    advance_learning: bool = field(
        default=True, metadata={"help": "Train the directions of components ahead of the time at which they come."}
    )
    ortho_weight: float = field(
        default=0.1, metadata={"help": "Weigh the penalty that keeps directions orthogonal with this number."}
    )
    beta1: float = field(
        default=0.85,
        metadata={
            "help": "Average scores over steps with this decay: the nearer to 1, the longer they are remembered."
        },
    )
    beta2: float = field(default=0.85, metadata={"help": "Average the scores' uncertainty over steps with this decay."})

    method: ClassVar[str] = "increlora"

    def __post_init__(self) -> None:
        super().__post_init__()
        count = self.grow_matrices
        whole = isinstance(count, int) and not isinstance(count, bool) and count > 0
        self._require(count is None or whole, "grow_matrices", "a positive integer, or None")
        self._require(isinstance(self.advance_learning, bool), "advance_learning", "True or False")
        for name, top in (("ortho_weight", math.inf), ("beta1", 1), ("beta2", 1)):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < top
            self._require(number, name, "a number of at least 0" if top == math.inf else "in [0, 1)")

    @property
    def ahead(self) -> int:
        """Components of a matrix that train ahead."""
        return self.grow_rank if self.advance_learning and self.target > self.r else 0


class IncreloraLayer(GrowingLayer):
    """The shared form with a trained diagonal, and with components that train ahead."""

    method_name = "increlora"
    any_kind = False  # its scores read the gradient of a matrix that multiplies the input
    roles = (
        *FACTORS,
        Role("e", rank_dim=0),
        Role("ahead_down"),  # (k, in)
        Role("ahead_up"),  # (out, k)
        Role("ahead_e", trains=False, saved="present"),  # (k): ε, as long as ranks grow
        Role("importance", trains=False, saved="present"),  # Ī and Ū, (2)
    )

    def start(self, config: IncreloraConfig, r: int) -> dict[str, torch.Tensor]:
        """Factors from N(0, 0.02²), e = 0, and the components that train ahead."""
        if config.init_weights:
            tensors = {**_drawn(self, r), "e": torch.zeros(r)}
        else:
            tensors = {"down": kaiming(r, self.in_features), "up": kaiming(self.out_features, r), "e": torch.ones(r)}
        if config.ahead:
            ahead = _drawn(self, config.ahead)
            tensors |= {"ahead_down": ahead["down"], "ahead_up": ahead["up"]}
            tensors["ahead_e"] = torch.full((config.ahead,), AHEAD)
        return tensors

    def update_layer(self, adapter: str, config: Any, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; see `AdapterLayer.update_layer`."""
        super().update_layer(adapter, config, *args, **kwargs)
        if not config.inference_mode and config.target > config.r:
            self.want_weight_gradient(adapter)  # until the first step says what the schedule is

    def _ahead_diagonal(self, adapter: str) -> torch.Tensor | None:
        """The diagonal of the components that train ahead, (k), or None without any."""
        diagonal = self.running("ahead_e", adapter)
        if diagonal is None and self.has_parameter("ahead_up", adapter):
            up = self.parameter("ahead_up", adapter)
            if up.requires_grad and torch.is_grad_enabled() and process_count() > 1:
                return up.new_zeros(up.shape[1])  # data parallelism waits for a gradient of every parameter
        return None if diagonal is None else diagonal.to(self.parameter("e", adapter).dtype)

    def projections(self, adapter: str) -> Sequence[torch.Tensor]:
        """`down`, and what trains ahead after it."""
        down = self.used("down", adapter)
        if self._ahead_diagonal(adapter) is None:
            return (down,)
        return (torch.cat([down, self.parameter("ahead_down", adapter)]),)

    def columns(self, adapter: str) -> torch.Tensor:
        """`up`, and what trains ahead after it."""
        up = self.used("up", adapter)
        if self._ahead_diagonal(adapter) is None:
            return up
        return torch.cat([up, self.parameter("ahead_up", adapter)], dim=1)

    def diagonal(self, adapter: str, projected: torch.Tensor | Gates) -> torch.Tensor:
        """(e, ε, …, ε), (r + k)."""
        e, ahead = self.used("e", adapter), self._ahead_diagonal(adapter)
        return e if ahead is None else torch.cat([e, ahead])

    def zero_update(self, adapter: str) -> None:
        """Make the update zero: e is, and what trains ahead ends; `up` stays, since without it e could not train."""
        self.parameter("e", adapter).detach().zero_()
        self.set_running("ahead_e", adapter, None)

    def present_shape(
        self, role: str, adapter: str, tensor: torch.Tensor, rank: int | None
    ) -> tuple[Sequence[int], bool]:
        """What a buffer must be where a file has it; see `RankedStorage.present_shape`."""
        if role == "importance":
            return (2,), True
        if role == "ahead_e":
            has = self.has_parameter("ahead_up", adapter)
            return (self.parameter("ahead_up", adapter).shape[1] if has else 0,), True
        return super().present_shape(role, adapter, tensor, rank)

    def new_components(
        self, config: IncreloraConfig, adapter: str, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Those that trained ahead, with the state of their optimizer; or new ones."""
        diagonal = self.running("ahead_e", adapter)
        if diagonal is None:
            return {**_drawn(self, config.grow_rank, generator), "e": torch.zeros(config.grow_rank)}
        down, up = self.parameter("ahead_down", adapter), self.parameter("ahead_up", adapter)
        return {"down": down, "up": up, "e": diagonal}

    @torch.no_grad()
    def grow(self, config: Any, adapter: str, generator: torch.Generator) -> None:
        """Add components, and draw others to train ahead."""
        super().grow(config, adapter, generator)
        if self.running("ahead_e", adapter) is not None:
            for layer in (self, *self.followers()):
                for role, value in _drawn(self, config.grow_rank, generator).items():
                    parameter = layer.parameter(f"ahead_{role}", adapter)
                    carry_state(parameter, self.rank_dims[role], (), value, config.grow_rank, config.grow_rank)

    def _whole(self, role: str, adapter: str, dtype: torch.dtype) -> torch.Tensor:
        return in_use(self, role, adapter, self.parameter(role, adapter).detach()).to(dtype)

    def gradient_score(self, adapter: str, loss_scale: torch.Tensor | float) -> torch.Tensor | None:
        """I, a scalar, from what backward passes have gathered since the last step; None if there was nothing."""
        gradient = self.take_weight_gradient(adapter)
        if process_count() > 1 and grouped():
            # A layer may have seen no input here, as experts do, and all processes must take part.
            up = self.parameter("up", adapter)
            if gradient is None:
                gradient = torch.zeros(self.out_features, self.in_features, device=up.device)
            distributed.all_reduce(gradient)
            gradient /= process_count()
        if gradient is None:
            return None
        dtype = gradient.dtype
        update = (self._whole("up", adapter, dtype) * self._whole("e", adapter, dtype)) @ self._whole(
            "down", adapter, dtype
        )
        if (ahead := self.running("ahead_e", adapter)) is not None:
            columns = self._whole("ahead_up", adapter, dtype) * ahead.to(dtype)
            update.addmm_(columns, self._whole("ahead_down", adapter, dtype))
        size: torch.Tensor = update.mul_(gradient).abs_().sum() * (self.scaling[adapter] / math.sqrt(update.numel()))
        return size / loss_scale


def _drawn(layer: IncreloraLayer, count: int, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
    """Factors of some components, from N(0, 0.02²)."""
    return {
        "down": 0.02 * torch.randn(count, layer.in_features, generator=generator),
        "up": 0.02 * torch.randn(layer.out_features, count, generator=generator),
    }


@register
class Increlora(GrowingMethod):
    """IncreLoRA's part in training: scores, growth, and the orthogonality penalty."""

    name = "increlora"
    title = "IncreLoRA"
    config_class = IncreloraConfig
    layer_class = IncreloraLayer
    panels = growth_panels("increlora")

    def gathers(self, config: IncreloraConfig) -> bool:
        """The gradients of whole weights."""
        return config.target > config.r

    def before_step(self, moment: Moment[Any]) -> None:
        """Learn from the task's gradients, then add the penalty's."""
        first = not moment.shared.taken
        super().before_step(moment)
        if first:
            self._learn(moment)
        weight = moment.config.ortho_weight
        if weight:
            add_orthogonality(moment, weight, "mean_norm")
            if moment.config.ahead and moment.all_layers[0].running("ahead_e", moment.adapter) is not None:
                add_orthogonality(moment, weight, "mean_norm", roles=("ahead_down", "ahead_up"))

    def _learn(self, moment: Moment[Any]) -> None:
        """Take this step's part in the moving averages, and say whether the next one's is wanted."""
        config, adapter, step = moment.config, moment.adapter, moment.step + 1
        layers = moment.training_layers
        occasions = config.occasions(moment.total_steps, memory_of(max(config.beta1, config.beta2)))
        growing = missing_components(moment, layers) >= config.grow_rank
        for layer in layers:
            if moment.skipped and adapter in layer.probes:
                layer.want_weight_gradient(adapter)  # of the step that is made in the place of this one
                continue
            score = layer.gradient_score(adapter, moment.loss_scale)
            if not (growing and occasions.matters(step)):
                continue
            averages = layer.running("importance", adapter)
            if averages is None or not occasions.matters(step - 1):
                e = layer.parameter("e", adapter)
                averages = torch.zeros(2, dtype=torch.promote_types(e.dtype, torch.float32), device=e.device)
                layer.set_running("importance", adapter, averages)
            if score is not None and bool(score.isfinite()):
                averages[0] = config.beta1 * averages[0] + (1 - config.beta1) * score
                averages[1] = config.beta2 * averages[1] + (1 - config.beta2) * (score - averages[0]).abs()

    def scores(self, moment: Moment, layers: Sequence[Any]) -> list[float]:
        """S of every matrix."""
        averages = [layer.running("importance", moment.adapter) for layer in layers]
        return [0.0 if pair is None else float(pair[0].double() * pair[1].double()) for pair in averages]

    def how_many(self, moment: Moment, layers: Sequence[Any], missing: int) -> int:
        """h."""
        config: IncreloraConfig = moment.config
        if config.grow_matrices is not None:
            return config.grow_matrices
        begun: list[int] = [layer.scaling_ranks[moment.adapter] for layer in layers]
        return math.ceil((budget(moment, layers) - sum(begun)) / (10 * config.grow_rank))

    def after_step(self, moment: Moment[Any]) -> None:
        """Let matrices grow if it is time, and gather gradients for the next step if a growth will remember it."""
        super().after_step(moment)
        config, layers = moment.config, moment.training_layers
        occasions = config.occasions(moment.total_steps, memory_of(max(config.beta1, config.beta2)))
        if missing_components(moment, layers) >= config.grow_rank and occasions.matters(moment.step + 2):
            for layer in layers:
                layer.want_weight_gradient(moment.adapter)

    def grown(self, moment: Moment, layers: Sequence[Any]) -> None:
        """End what trains ahead, and the averages."""
        for layer in layers:
            for role in ("ahead_e", "importance"):
                layer.set_running(role, moment.adapter, None)

    def report(self, moment: Moment) -> dict[str, Any]:
        """As of all that grow, and the penalty itself, without γ."""
        return {**super().report(moment), "ortho_loss_now": orthogonality(moment.layers, moment.adapter, "mean_norm")}
