"""DiRA: a nuclear-norm penalty decides how much rank each layer gets.

    L = L_task + λ(t) Σ_l Σ_i ‖up_:,i‖₂ ‖down_i,:‖₂                                 (eq. 5, `penalty="product"`)
    L = L_task + λ(t)/2 Σ_l (‖up‖_F² + ‖down‖_F²)                              (App. B.2, `penalty="variational"`)

The sum is over the rank-1 components i of every adapted layer l, without the factor s. λ decays from
`penalty_weight` over the run. The penalty's gradient has a closed form in the factors,

    ∂/∂down_i = λ (‖up_i‖ / ‖down_i‖) down_i,     ∂/∂up_i = λ (‖down_i‖ / ‖up_i‖) up_i,

(λ·down and λ·up for the variational form), and is added right before the optimizer's step: the logged loss is the
task loss, and gradient accumulation or data parallelism cannot count the penalty twice.

DiRA: Nuclear Norm Dynamic Rank Adaptation for Large Language Models (anonymous, under review or
withdrawn).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch

from dynalora.adapter.compaction import THRESHOLD, compact_layers, require_free_shapes
from dynalora.adapter.gates import GatedConfig, GatedLayer
from dynalora.adapter.layer import AdapterLayer
from dynalora.adapter.method import Method
from dynalora.adapter.register import register
from dynalora.driver import Moment, OptimizerOverride
from dynalora.driver.schedule import SCHEDULES, Schedule, scheduled

Penalty = Literal["product", "variational"]


@dataclass
class DiraConfig(GatedConfig):
    """Configuration of DiRA. The shared settings are those of `dynalora.adapter.config.AdapterConfig`, and with
    `gates=True` those of `dynalora.adapter.gates.GatedConfig`; the penalty is on the factors, gates left out.

    `alpha` defaults to `r`, so that ΔW = up·down as the paper writes it.

    Args:
        penalty: `"product"` (eq. 5) or `"variational"` (App. B.2).
        penalty_weight: λ at the first step. 0 makes DiRA a plain LoRA.
        penalty_schedule: How λ decays to 0 over the run: `"linear"` (the paper's), `"cosine"` or `"constant"`.
        compact_every: Remove dead components after every so many optimizer steps, so that later steps are faster; None
            leaves them where they are (see `dynalora.compact`). On one process only.
        compact_threshold: What is removed then: components of at most this share of the adapter's largest singular
            value, in [0, 1).
    """

    penalty: Penalty = field(default="product", metadata={"help": "Form of the penalty: product or variational."})
    penalty_weight: float = field(default=1e-4, metadata={"help": "Weight of the penalty at the first step."})
    penalty_schedule: Schedule = field(default="linear", metadata={"help": "linear, cosine or constant."})

    compact_every: int | None = field(
        default=None, metadata={"help": "Remove dead components after every so many steps."}
    )
    compact_threshold: float = field(
        default=THRESHOLD, metadata={"help": "Components of at most this share of the largest singular value are dead."}
    )

    method: ClassVar[str] = "dira"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.penalty in get_args(Penalty), "penalty", f"one of {', '.join(map(repr, get_args(Penalty)))}")
        number = isinstance(self.penalty_weight, (int, float)) and 0 <= self.penalty_weight < float("inf")
        self._require(number, "penalty_weight", "a number of at least 0")
        self._require(
            self.penalty_schedule in SCHEDULES, "penalty_schedule", f"one of {', '.join(map(repr, SCHEDULES))}"
        )
        every = self.compact_every
        counted = every is None or (isinstance(every, int) and not isinstance(every, bool) and every > 0)
        self._require(counted, "compact_every", "a positive number of steps, or None")
        share = isinstance(self.compact_threshold, (int, float)) and 0 <= self.compact_threshold < 1
        self._require(share, "compact_threshold", "in [0, 1)")


class DiraLayer(GatedLayer):
    """LoRA's layer: the diagonal is all ones, or gates; what DiRA adds happens in the gradient."""

    method_name = "dira"


@dataclass
class StepNorms:
    """Norms of the factors as they were when a training step began, where several optimizers share it.

    Attributes:
        by_layer: Norms of the rows of `down` and of the columns of `up`, (r) each.
    """

    by_layer: dict[AdapterLayer, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


@register
class Dira(Method):
    """DiRA's part in training: the penalty's gradient, with a decaying weight."""

    name = "dira"
    title = "DiRA"
    config_class = DiraConfig
    layer_class = DiraLayer
    shared_class = StepNorms

    def optimizer_overrides(
        self, config: DiraConfig, layer: AdapterLayer, adapter: str
    ) -> dict[str, OptimizerOverride]:
        """The gates' own rules, where there are any."""
        return config.gate_overrides()

    def needs_total_steps(self, config: DiraConfig) -> bool:
        """A decaying weight needs the length of the run."""
        return config.penalty_weight > 0 and config.penalty_schedule != "constant"

    def needs_driving(self, config: DiraConfig) -> bool:
        """Without the penalty and compaction DiRA is a plain LoRA."""
        return config.penalty_weight > 0 or config.compact_every is not None

    def penalty_weight(self, moment: Moment) -> float:
        """λ at this step."""
        config: DiraConfig = moment.config
        if not config.penalty_weight:
            return 0.0
        return scheduled(config.penalty_weight, config.penalty_schedule, moment.step, moment.total_steps)

    def before_step(self, moment: Moment) -> None:
        """Add the penalty's gradient."""
        if moment.config.compact_every:
            require_free_shapes(moment.all_layers, moment.adapter)
        weight = self.penalty_weight(moment)
        if not weight:
            return
        for layers in _by_shape(moment):
            if moment.config.penalty == "product":
                _add_product_gradient(moment, layers, weight)
            else:
                _add_variational_gradient(moment, layers, weight)

    def after_step(self, moment: Moment) -> None:
        """Remove dead components if it is time; the others stay exactly what they are."""
        every, threshold = moment.config.compact_every, moment.config.compact_threshold
        if every and (moment.step + 1) % every == 0:
            moment.driver.require_finite(moment.all_layers)
            compact_layers(moment.driver, moment.all_layers, threshold, rewrite=False)

    def metrics(self, moment: Moment) -> dict[str, float]:
        """λ, for the trainer's log."""
        try:
            return {"dira_penalty_weight": self.penalty_weight(moment)}
        except ValueError:  # length of the run unknown; the next step says so
            return {}

    def report(self, moment: Moment) -> dict[str, Any]:
        """λ and the penalty itself, Σ ‖up_i‖‖down_i‖ over all layers."""
        penalty = 0.0
        for layer in moment.layers:
            up, down = layer.parameter("up", moment.adapter), layer.parameter("down", moment.adapter)
            penalty += float((up.double().norm(dim=0) * down.double().norm(dim=1)).sum())
        return {**self.metrics(moment), "nuclear_norm_bound": penalty}


def _by_shape(moment: Moment) -> list[list[AdapterLayer]]:
    """Layers with factors to add to, grouped by shape so that each group is a few stacked operations."""
    groups: dict[Any, list[AdapterLayer]] = {}
    for layer in moment.layers:
        down, up = _factors(layer, moment)
        if moment.awaits(down) or moment.awaits(up):
            groups.setdefault((down.shape, up.shape, down.dtype, up.dtype, down.device), []).append(layer)
    return list(groups.values())


def _factors(layer: AdapterLayer, moment: Moment) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    return layer.parameter("down", moment.adapter), layer.parameter("up", moment.adapter)


def _add_product_gradient(moment: Moment[StepNorms], layers: list[AdapterLayer], weight: float) -> None:
    factors = [_factors(layer, moment) for layer in layers]
    down = torch.stack([down for down, _ in factors])  # (L, r, in)
    up = torch.stack([up for _, up in factors])  # (L, out, r)
    known = moment.shared.by_layer
    if all(layer in known for layer in layers):
        down_norm, up_norm = (torch.stack(norms) for norms in zip(*(known[layer] for layer in layers), strict=True))
    else:
        down_norm, up_norm = _norms(down, dim=2), _norms(up, dim=1)  # (L, r)
        if not all(moment.awaits(parameter) for pair in factors for parameter in pair):
            # Another optimizer has the other factors, and will see these ones changed.
            known.update(zip(layers, zip(down_norm, up_norm, strict=True), strict=True))
    rate = weight * moment.grad_scale
    _add(moment, [pair[0] for pair in factors], _rescale(down, down_norm[:, :, None], rate * up_norm[:, :, None]))
    _add(moment, [pair[1] for pair in factors], _rescale(up, up_norm[:, None, :], rate * down_norm[:, None, :]))


def _norms(factors: torch.Tensor, dim: int) -> torch.Tensor:
    # Squares of tiny entries vanish in float32; the penalty makes entries tiny.
    dtype = torch.float64 if factors.device.type != "mps" else None
    norms: torch.Tensor = torch.linalg.vector_norm(factors, dim=dim, dtype=dtype)
    return norms


def _rescale(factors: torch.Tensor, norm: torch.Tensor, new_norm: torch.Tensor) -> torch.Tensor:
    """Give components a new norm, in place; components of norm 0, where the subgradient is 0, stay as they are."""
    # Two factors, since their quotient can be too large for float32 where each of them is not.
    unit = torch.where(norm > 0, norm, 1.0).to(factors.dtype)
    return factors.div_(unit.clamp_min_(torch.finfo(factors.dtype).tiny)).mul_(new_norm.to(factors.dtype))


def _add_variational_gradient(moment: Moment, layers: list[AdapterLayer], weight: float) -> None:
    for factors in zip(*(_factors(layer, moment) for layer in layers), strict=True):
        _add(moment, list(factors), torch.stack(factors).mul_(weight * moment.grad_scale))


def _add(moment: Moment, parameters: list[torch.nn.Parameter], additions: torch.Tensor) -> None:
    """Add (L, …) to the gradients of L parameters; one that had none (an unused layer) gets one."""
    for parameter, addition in zip(parameters, additions.unbind(), strict=True):
        if not moment.awaits(parameter):
            continue
        if parameter.grad is None:
            parameter.grad = addition.clone()
        else:
            parameter.grad.add_(addition)
