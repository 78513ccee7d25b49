"""DisLoRA: train the directions that the base weight uses least, and those that the task turns out to need.

    W0 = U Σ Vᵀ, the r smallest singular triplets being U₀, S₀, V₀                                        (eq. 1–3)
    y = W0·x + s · (U·S·Vᵀ·x − U₀·S₀·V₀ᵀ·x) + s · Σ_i α_i u_i v_iᵀ·x                                        (eq. 5)

U (up), S (sigma) and Vᵀ (down) start at U₀, S₀, V₀ᵀ and train; the start stays beside them, frozen, so that the model
begins as the base model whatever s is, and W0 is never edited. After the warm-up, once, the singular pairs (u_i, v_i)
of W0 with the largest rate of change are chosen as task-specific directions and frozen, with trained weights α:

    δ_i = |u_iᵀ M v_i| / σ_i,     M = U·S·Vᵀ (`tsd_score="residual"`) or U·S·Vᵀ − U₀·S₀·V₀ᵀ (`"update"`)  (eq. 4)

U and V are kept near orthonormal by a penalty with weights that follow the losses' own magnitudes:

    L_ortho = 1/N Σ_l (‖UᵀU − I‖_F² + ‖VᵀV − I‖_F²)              over the N adapted matrices                  (eq. 6)
    k = L_ortho / (L_task + ε),   w_task = e^{−k} / (e^{−k} + e^{−1/k + ε}),   w_ortho = 1 − w_task        (eq. 12–14)
    total = w_task·L_task + w_ortho·L_ortho                                   both weights constants          (eq. 15)

Its gradient has a closed form, 4U(UᵀU − I)/N and likewise for V (eq. 27–28), and is added right before the optimizer's
step; only r × r matrices are formed.

Four choices are not in the paper. The learning rates of the factors are matched to LoRA's (`match_step`, see
`Dislora.optimizer_overrides`). Weight decay never acts on the factors: it would pull U·S·Vᵀ to zero, and with
it a part of the base weight. And L_task counts by its magnitude, since the losses of preference and policy optimization
can be negative. Where it is 0, the weights are fixed (see `weights_for_training`).

DisLoRA: Task-specific Low-Rank Adaptation via Orthogonal Basis from Singular Value Decomposition (She, Wei and Wang).
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch

from dynalora.adapter.config import AdapterConfig
from dynalora.adapter.layer import AdapterLayer, Gates
from dynalora.adapter.method import Method, Panel
from dynalora.adapter.register import register
from dynalora.adapter.storage import Role
from dynalora.common.private import features
from dynalora.common.progress import late_progress
from dynalora.driver import Moment, OptimizerOverride
from dynalora.errors import ConfigError
from dynalora.spectral.decomposition import Triplets, decompose, smallest_triplets
from dynalora.spectral.spectrum import factor_spectrum

TsdScore = Literal["residual", "update"]
TsdInit = Literal["zero", "sigma"]

logger = logging.getLogger(__name__)

EPSILON = 1e-6  # ε of eq. 12–13

# The penalty's weight beside an unweighted task loss where the loss has no value to weigh by: that of DisLoRA*.
FIXED_WEIGHT = 5e-5

# The largest multiple of the optimizer's learning rate that `match_step` gives to U and V: where σ is tiny, no rate
# could move the function like LoRA's without turning the factors over.
FASTEST = 4.0

# What the lead's buffer `balance` holds, in this order: the losses and weights of the last step, and moving averages.
BALANCE = ("task_loss", "ortho_loss", "k", "task_weight", "ortho_weight")
NOTES = len(BALANCE)

# Tensors that are saved and never train: the start and, once chosen, the directions.
FROZEN = ("frozen_down", "frozen_up", "start_sigma", "tsd_index", "tsd_sigma", "tsd_rate")


@dataclass
class DisloraConfig(AdapterConfig):
    """Configuration of DisLoRA. The shared settings are those of `dynalora.adapter.config.AdapterConfig`.

    `alpha` defaults to `1.5 r`, the paper's. DisLoRA* of the paper is `ortho_weight=5e-5`.

    Args:
        warmup_steps: Optimizer steps before the task-specific directions are chosen; None: a fraction of the run.
        warmup_fraction: That fraction, in (0, 1); the paper's third by default.
        tsd_count: Number of task-specific directions per matrix; 0 for none.
        tsd_score: What their rate of change is taken of: `"residual"`, all of U·S·Vᵀ (eq. 4 as printed), or
            `"update"`, its change since the start.
        tsd_init: Where their weights start: `"zero"`, so that the model's function does not change when they are
            switched on, or `"sigma"`, at their singular values, which adds s·σ_i·u_i·v_iᵀ to the function at once.
        ortho_weight: `"adaptive"` (eq. 12–15), or a fixed weight of L_ortho beside an unweighted L_task.
        match_step: Scale the learning rate of U and V, matrix by matrix, so that a step moves the model's function
            about as far as LoRA's (alpha = 2r) would with the optimizer's learning rate. False takes the optimizer's
            learning rate for all matrices, as in the paper: then choose it for this method.
        loss_smoothing: β in [0, 1) of moving averages of both losses, from which the adaptive weights are then
            computed (App. A.4); 0 takes the losses as they are.
    """

    warmup_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps before the directions are chosen; None: a fraction."}
    )
    warmup_fraction: float = field(
        default=1 / 3, metadata={"help": "Fraction of the run before the directions are chosen."}
    )
    tsd_count: int = field(default=8, metadata={"help": "Task-specific directions per matrix; 0 for none."})
    tsd_score: TsdScore = field(default="residual", metadata={"help": "residual or update."})
    tsd_init: TsdInit = field(default="zero", metadata={"help": "zero or sigma."})
    ortho_weight: float | str = field(
        default="adaptive", metadata={"help": "adaptive, or a fixed weight of the orthogonality loss."}
    )
    match_step: bool = field(
        default=True,
        metadata={"help": "Scale U's and V's learning rates so that a step moves the function like LoRA's."},
    )
    loss_smoothing: float = field(
        default=0.0, metadata={"help": "Moving-average factor of the losses that the weights follow."}
    )

    method: ClassVar[str] = "dislora"
    default_alpha_per_rank: ClassVar[float] = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = self.warmup_steps
        self._require(steps is None or (_is_int(steps) and steps > 0), "warmup_steps", "a positive integer, or None")
        fraction = self.warmup_fraction
        self._require(_is_real(fraction) and 0 < fraction < 1, "warmup_fraction", "in (0, 1)")
        self._require(_is_int(self.tsd_count) and self.tsd_count >= 0, "tsd_count", "an integer of at least 0")
        for name, choices in (("tsd_score", TsdScore), ("tsd_init", TsdInit)):
            allowed = get_args(choices)
            self._require(getattr(self, name) in allowed, name, f"one of {', '.join(map(repr, allowed))}")
        weight = self.ortho_weight
        if isinstance(weight, str) and weight != "adaptive":  # as it comes from a command line
            with contextlib.suppress(ValueError):
                self.ortho_weight = weight = float(weight)
        valid = weight == "adaptive" or (_is_real(weight) and 0 <= float(weight) < math.inf)
        self._require(valid, "ortho_weight", "'adaptive', or a number of at least 0")
        smoothing = self.loss_smoothing
        self._require(_is_real(smoothing) and 0 <= smoothing < 1, "loss_smoothing", "in [0, 1)")

    @property
    def adaptive(self) -> bool:
        """Whether the weights of the losses follow the losses."""
        return self.ortho_weight == "adaptive"

    def warmup(self, total_steps: int | None) -> int | None:
        """Optimizer steps before the directions are chosen; None if there are no directions, or no known end."""
        if not self.tsd_count:
            return None
        if self.warmup_steps is not None:
            return self.warmup_steps
        return None if total_steps is None else max(1, round(self.warmup_fraction * total_steps))


class DisloraLayer(AdapterLayer):
    """The shared form with a trained diagonal, and with frozen components: the start, and the directions.

    The components are, in this order: the r trained ones with diagonal S; the r of the start with −S₀; the
    `tsd_count` directions with α, zero vectors until they are chosen.
    """

    method_name = "dislora"
    roles = (  # without a rank's dimension, since ranks never change
        *(Role(name) for name in ("down", "up", "sigma", "tsd_weight")),
        *(Role(name, trains=False) for name in FROZEN),
        Role("balance", trains=False, saved="first"),
    )

    @classmethod
    def check_base_layer(cls, base_layer: torch.nn.Module, name: str, config: DisloraConfig, r: int) -> None:
        """Check that a module can be adapted, and has as many singular values as the adapter has components."""
        super().check_base_layer(base_layer, name, config, r)
        inputs, outputs = features(base_layer)
        if r > min(inputs, outputs):
            raise ConfigError(
                f"DisloraConfig: r={r} is more than the {min(inputs, outputs)} singular values of {name!r}, a "
                f"{outputs} × {inputs} layer; lower r, give such layers a smaller one with rank_pattern, or leave "
                "them out with exclude_modules."
            )

    def start(self, config: DisloraConfig, r: int) -> dict[str, torch.Tensor]:
        """Zeros that `Dislora.prepare` fills in: up (out, r), down (r, in), sigma (r) and the frozen ones."""
        count = min(config.tsd_count, self.in_features, self.out_features)
        up, down, sigma = torch.zeros(self.out_features, r), torch.zeros(r, self.in_features), torch.zeros(r)
        if not config.init_weights:
            up, down, sigma = (
                torch.linalg.qr(torch.randn_like(up)).Q,
                torch.linalg.qr(torch.randn_like(down).t()).Q.t().contiguous(),
                torch.ones(r),
            )
        tensors = {
            "down": down,
            "up": up,
            "sigma": sigma,
            "frozen_down": torch.zeros(r + count, self.in_features),
            "frozen_up": torch.zeros(self.out_features, r + count),
            "start_sigma": torch.zeros(r),
        }
        if count:
            tensors |= {
                "tsd_weight": torch.zeros(count),
                "tsd_index": torch.full((count,), -1),  # its place among the singular values; -1: not chosen yet
                "tsd_sigma": torch.zeros(count),
                "tsd_rate": torch.zeros(count),  # δ; no name may end in "score", which PEFT takes for a classifier
            }
        return tensors

    def start_lead(self) -> dict[str, torch.Tensor]:
        """The losses and weights of the last step, and moving averages with their count, (NOTES + 3)."""
        return {**super().start_lead(), "balance": torch.zeros(NOTES + 3, dtype=torch.float64)}

    def diagonal(self, adapter: str, projected: torch.Tensor | Gates) -> torch.Tensor:
        """(S, −S₀, α), (2r + tsd_count)."""
        sigma = self.parameter("sigma", adapter)
        parts = [sigma, -self.buffer("start_sigma", adapter).to(sigma.dtype)]
        if self.has_parameter("tsd_weight", adapter):
            parts.append(self.parameter("tsd_weight", adapter))
        return torch.cat(parts)

    @torch.no_grad()
    def begin_at(self, adapter: str, triplets: Triplets) -> None:
        """Start the factors at singular triplets of the base weight, r of them."""
        r = self.rank(adapter)
        start = (triplets.up, triplets.down, triplets.values)
        for role, value in zip(("up", "down", "sigma"), start, strict=True):
            parameter = self.parameter(role, adapter)
            # Half precision would lose the orthonormality that they stand for.
            parameter.data = value.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32)).clone()
        for role in FROZEN:
            if self.has_buffer(role, adapter) and (tensor := self.buffer(role, adapter)).is_floating_point():
                container = getattr(self, f"{self.method_name}_{role}")
                container[adapter] = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        self.buffer("frozen_up", adapter)[:, :r] = self.parameter("up", adapter)
        self.buffer("frozen_down", adapter)[:r] = self.parameter("down", adapter)
        self.buffer("start_sigma", adapter).copy_(self.parameter("sigma", adapter))

    @torch.no_grad()
    def zero_update(self, adapter: str) -> None:
        """Make the update zero, to rounding: the triplets go back to their start, the directions' weights to 0."""
        r = self.rank(adapter)
        self.parameter("up", adapter).copy_(self.buffer("frozen_up", adapter)[:, :r])
        self.parameter("down", adapter).copy_(self.buffer("frozen_down", adapter)[:r])
        self.parameter("sigma", adapter).copy_(self.buffer("start_sigma", adapter))
        if self.has_parameter("tsd_weight", adapter):
            self.parameter("tsd_weight", adapter).zero_()

    def has_directions(self, adapter: str) -> bool:
        """Whether the task-specific directions have been chosen."""
        return self.has_buffer("tsd_index", adapter) and bool((self.buffer("tsd_index", adapter) >= 0).any())

    def residual(self, adapter: str, score: TsdScore) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors (out, k) and (k, in) of the matrix M in eq. 4."""
        up = self.parameter("up", adapter) * self.parameter("sigma", adapter)
        down: torch.Tensor = self.parameter("down", adapter)
        if score == "update":
            r = self.rank(adapter)
            start = self.buffer("frozen_up", adapter)[:, :r] * -self.buffer("start_sigma", adapter)
            up, down = (torch.cat([up, start], dim=1), torch.cat([down, self.buffer("frozen_down", adapter)[:r]]))
        return up, down

    def point(self, adapter: str, directions: Directions, init: TsdInit) -> None:
        """Switch the task-specific directions on."""
        r = self.rank(adapter)
        self.buffer("frozen_up", adapter)[:, r:] = directions.pairs.up
        self.buffer("frozen_down", adapter)[r:] = directions.pairs.down
        self.buffer("tsd_index", adapter).copy_(directions.index)
        self.buffer("tsd_sigma", adapter).copy_(directions.pairs.values)
        self.buffer("tsd_rate", adapter).copy_(directions.score)
        if init == "sigma":
            self.parameter("tsd_weight", adapter).copy_(directions.pairs.values)


@dataclass(frozen=True)
class Directions:
    """Task-specific directions of one matrix, the one of the highest score first.

    Attributes:
        index: Their places among the singular values of W0 in descending order, from 0, (count).
        score: δ of eq. 4, (count).
        pairs: Their u_i, σ_i and v_iᵀ.
    """

    index: torch.Tensor
    score: torch.Tensor
    pairs: Triplets


@dataclass
class StepWeights:
    """What the optimizers that share a training step have in common.

    Attributes:
        weights: Weights of the task loss and of the orthogonality loss; None before the first of them has asked.
    """

    weights: tuple[torch.Tensor | float, torch.Tensor | float] | None = None


@register
class Dislora(Method):
    """DisLoRA's part in training: the start, the orthogonality penalty with its weights, the choice of directions."""

    name = "dislora"
    title = "DisLoRA"
    config_class = DisloraConfig
    layer_class = DisloraLayer
    shared_class = StepWeights
    panels = (
        Panel("weight of the task loss", ("dislora_task_weight",)),
        Panel("weight of the orthogonality loss", ("dislora_ortho_weight",)),
        Panel("task loss", ("dislora_task_loss",)),
        Panel("orthogonality loss", ("dislora_ortho_loss",), log=True),
        Panel("ratio k of orthogonality to task loss", ("dislora_k",), log=True),
        Panel("weighted total", ("dislora_total_loss",)),
    )

    def prepare(self, layers: Mapping[str, DisloraLayer], adapter: str, config: DisloraConfig) -> None:  # type: ignore[override]
        """Start every layer at the r smallest singular triplets of its base weight."""
        if not config.init_weights:
            return
        fresh = [layer for layer in layers.values() if not layer.parameter("up", adapter).is_meta]
        for layer, pairs in zip(fresh, _smallest_pairs(fresh, adapter), strict=True):
            layer.begin_at(adapter, _last(pairs, layer.rank(adapter)))

    def keeps_components(self, moment: Moment, trains: bool) -> str:
        """Each trained component stands beside the frozen one that it started from."""
        return (
            "DisLoRA's components start as directions of the base weight, each with a frozen counterpart to cancel "
            "it, so none is without effect; export it with max_rank or tolerance to make it smaller."
        )

    def needs_total_steps(self, config: DisloraConfig) -> bool:
        """A warm-up that is a fraction of the run needs its length."""
        return config.tsd_count > 0 and config.warmup_steps is None

    def needs_driving(self, config: DisloraConfig) -> bool:
        """Without the penalty and the directions it is a low-rank adapter with a special start."""
        return config.tsd_count > 0 or config.ortho_weight != 0

    def needs_whole_steps(self, config: DisloraConfig) -> bool:
        """The weights follow the loss of the whole step, and the directions are written in all layers at once."""
        return config.adaptive or config.tsd_count > 0

    def needs_task_loss(self, config: DisloraConfig) -> bool:
        """The adaptive weights compare the losses."""
        return config.adaptive

    def optimizer_overrides(  # type: ignore[override]
        self, config: DisloraConfig, layer: DisloraLayer, adapter: str
    ) -> dict[str, OptimizerOverride]:
        """No weight decay, which would pull on the base weight's own directions; and steps that match LoRA's.

        An optimizer such as Adam moves every entry of a factor by about the learning rate, η. For LoRA (alpha = 2r)
        a component of the function then moves by 2·η·√out·‖down_i‖, with ‖down_i‖ ≈ 1/√3; here by
        s·η·σ_i·√(out + in). So where σ_i is large, the same learning rate moves the function many times as far.
        """
        rules = dict.fromkeys(layer.parameter_roles, OptimizerOverride(weight_decay=0.0))
        if config.match_step:
            sigma = float(layer.buffer("start_sigma", adapter).double().square().mean().sqrt())
            sides = layer.out_features + layer.in_features
            here = layer.scaling[adapter] * sigma * math.sqrt(sides)
            lora = 2 / math.sqrt(3) * math.sqrt(layer.out_features)
            # Powers of two, so that matrices of like size step in one group.
            multiple = 2.0 ** round(math.log2(lora / here)) if here * FASTEST > lora else FASTEST
            rules["up"] = rules["down"] = OptimizerOverride(min(multiple, FASTEST), weight_decay=0.0)
        return rules

    # The losses and their weights ------------------------------------------------------------------------------

    def before_step(self, moment: Moment[StepWeights]) -> None:
        """Weigh the gradients of the two losses (eq. 15)."""
        config: DisloraConfig = moment.config
        warmup = config.warmup(moment.total_steps)
        if warmup is not None and moment.step < warmup:
            self._warn_of_long_warmup(moment, warmup)
            if not moment.all_layers[0].has_directions(moment.adapter):  # all layers get theirs at the same time
                for weight in (layer.parameter("tsd_weight", moment.adapter) for layer in moment.layers):
                    # There is nothing to weigh yet. Zero gradients would leave the optimizer with wrong averages.
                    if moment.awaits(weight):
                        weight.grad = None
        if config.ortho_weight == 0 or moment.skipped:
            return
        if moment.shared.weights is None:
            moment.shared.weights = self._weigh(moment)
        task_weight, ortho_weight = moment.shared.weights
        if config.adaptive:
            gradients = [p.grad for layer in moment.layers for p in self._awaiting(layer, moment) if p.grad is not None]
            _scale([*gradients, *(p.grad for p in moment.others if p.grad is not None)], task_weight)
        rate = ortho_weight * moment.grad_scale / len(moment.all_layers)
        for matrices in _by_shape([p for layer in moment.layers for p in _factors(layer, moment.adapter)], moment):
            columns = _stack(matrices)
            device_rate = rate.to(columns.device) if isinstance(rate, torch.Tensor) else rate
            additions = (columns @ _deviation(columns)).mul_(4 * device_rate)
            for (matrix, transposed), addition in zip(matrices, additions.unbind(), strict=True):
                _add(matrix, addition.t() if transposed else addition)

    def _awaiting(self, layer: DisloraLayer, moment: Moment) -> list[torch.nn.Parameter]:
        return [p for p in layer.adapter_parameters(moment.adapter).values() if moment.awaits(p)]

    def _weigh(self, moment: Moment) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """Weights of the task loss and of the orthogonality loss in this step, noted for the log."""
        config: DisloraConfig = moment.config
        ortho = ortho_loss(moment.all_layers, moment.adapter)
        balance = _balance(moment)
        if balance is not None:
            balance[:NOTES] = 0
            balance[1] = ortho
        if not config.adaptive:
            fixed = float(config.ortho_weight)
            if balance is not None:
                balance[3], balance[4] = 1, fixed
            return 1.0, fixed
        assert moment.task_loss is not None  # the driver has raised otherwise
        task = moment.task_loss.to(ortho)
        if config.loss_smoothing and balance is not None:
            task, ortho = _smooth(balance, task, ortho, config.loss_smoothing)
        k, task_weight, ortho_weight = weights_for_training(task, ortho)
        if balance is not None:
            balance[0] = moment.task_loss
            balance[2], balance[3], balance[4] = k, task_weight, ortho_weight
        return task_weight, ortho_weight

    # The directions --------------------------------------------------------------------------------------------

    def after_step(self, moment: Moment) -> None:
        """Choose the task-specific directions at the end of the warm-up, once."""
        config: DisloraConfig = moment.config
        if moment.step + 1 != config.warmup(moment.total_steps):
            return
        moment.driver.require_finite(moment.all_layers)
        layers = [layer for layer in moment.all_layers if not layer.has_directions(moment.adapter)]
        for layer, directions in zip(layers, choose_directions(layers, moment.adapter, config), strict=True):
            layer.point(moment.adapter, directions, config.tsd_init)
        if layers:
            rates = torch.cat([layer.buffer("tsd_rate", moment.adapter).cpu() for layer in layers])
            logger.info(
                "adapter %r: %d task-specific directions chosen in %d matrices after %d optimizer steps, with change "
                "rates of %.3g to %.3g",
                *(moment.adapter, len(rates), len(layers), moment.step + 1, float(rates.min()), float(rates.max())),
            )

    def _warn_of_long_warmup(self, moment: Moment, warmup: int) -> None:
        if moment.step == 0 and moment.total_steps is not None and warmup >= moment.total_steps:
            warnings.warn(
                f"DisloraConfig(warmup_steps={warmup}): the run has only {moment.total_steps} optimizer steps, so no "
                "task-specific directions will be chosen; lower warmup_steps, or leave it out for a third of the run.",
                stacklevel=2,
            )

    # What it says of itself ------------------------------------------------------------------------------------

    def metrics(self, moment: Moment) -> dict[str, float]:
        """Both losses, their weights, their ratio and the total at the last step, for Figures 3 and 4."""
        balance, config = _balance(moment), moment.config
        if balance is None or config.ortho_weight == 0:
            return {}
        task, ortho, k, task_weight, ortho_weight = balance.tolist()[:NOTES]
        values = {"dislora_ortho_loss": ortho, "dislora_ortho_weight": ortho_weight}
        if config.adaptive:
            values |= {
                "dislora_task_loss": task,
                "dislora_task_weight": task_weight,
                "dislora_k": k,
                "dislora_total_loss": task_weight * task + ortho_weight * ortho,
            }
            if k > 1:
                warnings.warn(
                    f"adapter {moment.adapter!r}: the factors have lost their orthogonality (L_ortho is {k:.2g} times "
                    "the task loss), so training now works against the penalty; lower the learning rate"
                    + ("." if config.match_step else ", or set match_step=True."),
                    stacklevel=2,
                )
        return values

    def decided(self, layers: Mapping[str, DisloraLayer], adapter: str) -> list[dict[str, Any]]:  # type: ignore[override]
        """The task-specific directions of every matrix with their scores, the highest first."""
        return [
            {
                "module": name,
                "singular_value_index": index,
                "singular_value": sigma,
                "change_rate": rate,
                "weight": weight,
            }
            for name, layer in layers.items()
            if layer.has_directions(adapter)
            for index, sigma, rate, weight in zip(
                *(layer.buffer(role, adapter).tolist() for role in ("tsd_index", "tsd_sigma", "tsd_rate")),
                layer.parameter("tsd_weight", adapter).tolist(),
                strict=True,
            )
        ]

    def report(self, moment: Moment) -> dict[str, Any]:
        """The last step's losses and weights, L_ortho now, and how many directions were chosen."""
        chosen = sum(
            layer.parameter("tsd_weight", moment.adapter).numel()
            for layer in moment.layers
            if layer.has_directions(moment.adapter)
        )
        now = float(ortho_loss(moment.layers, moment.adapter))
        return {**self.metrics(moment), "ortho_loss_now": now, "task_specific_directions": chosen}


def adaptive_weights(task: torch.Tensor, ortho: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K and the weights of the task loss and the orthogonality loss (eq. 12–14), without overflow.

    A loss that is not finite weighs as if there were no penalty: (k, 1, 0).

    Args:
        task: L_task; its magnitude counts.
        ortho: L_ortho.
    """
    k = ortho / (task.abs() + EPSILON)
    # e^{−k} / (e^{−k} + e^{−1/k + ε}) is a logistic function; 1/0 = ∞ is its limit 1.
    logit = 1 / k - k - EPSILON
    usable = torch.isfinite(task) & torch.isfinite(ortho)
    task_weight = torch.where(usable, torch.sigmoid(logit), 1.0)
    ortho_weight = torch.where(usable, torch.sigmoid(-logit), 0.0)
    return k, task_weight, ortho_weight


def weights_for_training(task: torch.Tensor, ortho: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The adaptive weights, with k; or DisLoRA*'s, (0, 1, 5e-5), where the task loss has no value to weigh by.

    A loss within ε of 0 says nothing of its gradient: policy optimization's is 0 at every step at which the policy is
    the one that sampled. Weighed by it, the task would get no weight at all.
    """
    usual = adaptive_weights(task, ortho)
    silent = task.abs() <= EPSILON
    k, task_weight, ortho_weight = (
        torch.where(silent, fixed, value) for fixed, value in zip((0.0, 1.0, FIXED_WEIGHT), usual, strict=True)
    )
    return k, task_weight, ortho_weight


def ortho_loss(layers: Sequence[DisloraLayer], adapter: str) -> torch.Tensor:
    """L_ortho of eq. 6, a float64 scalar (float32 where a device has no wider type)."""
    total: torch.Tensor | None = None
    for matrices in _by_shape([p for layer in layers for p in _factors(layer, adapter)]):
        deviation = _deviation(_stack(matrices))
        loss = deviation.square().sum(dtype=None if deviation.device.type == "mps" else torch.float64)
        total = loss if total is None else total + loss.to(total.device)
    assert total is not None
    return total / len(layers)


def choose_directions(layers: Sequence[DisloraLayer], adapter: str, config: DisloraConfig) -> list[Directions]:
    """The task-specific directions of every layer: the largest δ of eq. 4 among all singular pairs of W0.

    Few pairs need to be looked at. δ_i is at most ‖M‖₂ / σ_i, so once the smallest pairs are known, and σ of the next
    one is so large that this bound is below the `tsd_count`-th best score, no other can be among the best.
    """
    results = []
    with late_progress() as progress:
        progress("Choosing directions", 0, len(layers))
        for done, layer in enumerate(layers, start=1):  # one at a time: nobody has room for all pairs of all layers
            weight = layer.base_matrix()
            up, down = layer.residual(adapter, config.tsd_score)
            count, sides = layer.parameter("tsd_weight", adapter).shape[0], min(weight.shape)
            largest, floor = float(factor_spectrum(up, down)[0]), _floor(weight)
            pairs = _smallest_pairs([layer], adapter)[0]
            chosen, enough = _best(pairs, up, down, count, sides, largest, floor)
            while not enough:
                pairs = smallest_triplets(weight, min(4 * pairs.values.shape[0], sides))
                chosen, enough = _best(pairs, up, down, count, sides, largest, floor)
            results.append(chosen)
            progress("Choosing directions", done, len(layers))
    return results


def _best(
    pairs: Triplets, up: torch.Tensor, down: torch.Tensor, count: int, sides: int, largest: float, floor: float
) -> tuple[Directions, bool]:
    """The best directions among some pairs, and whether no other pair can be among the best."""
    u, values, v = (tensor.to(up) for tensor in (pairs.up, pairs.values, pairs.down))
    available = values.shape[0]
    # u_iᵀ M v_i for all i at once
    projections = ((u.t() @ up) * (v @ down.t())).sum(dim=1)
    score = projections.abs() / values.clamp_min(floor)
    best = torch.topk(score, min(count, available))
    index = best.indices
    chosen = Directions(index + (sides - available), best.values, Triplets(u[:, index], values[index], v[index]))
    enough = available == sides or float(best.values[-1]) >= largest / max(float(values[0]), floor)
    return chosen, enough


def _floor(weight: torch.Tensor) -> float:
    """What singular values are clamped to in eq. 4: rounding error of the weight's own size."""
    norm = torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    return max(1e-7 * float(norm), torch.finfo(torch.float32).tiny)


def _smallest_pairs(layers: Sequence[DisloraLayer], adapter: str) -> list[Triplets]:
    """The smallest singular triplets of each base weight: as many as the start and mostly the directions need.

    The same number in both places, so that the second finds what the first has left on the disk.
    """
    ranks = [
        min(layer.rank(adapter) + layer.buffer("frozen_down", adapter).shape[0], layer.in_features, layer.out_features)
        for layer in layers
    ]
    return decompose([layer.base_matrix for layer in layers], ranks, describe="Decomposing the base weights")


def _last(pairs: Triplets, r: int) -> Triplets:
    return Triplets(pairs.up[:, -r:], pairs.values[-r:], pairs.down[-r:])


# Orthogonality -----------------------------------------------------------------------------------------------------

_Matrix = tuple[torch.nn.Parameter, bool]  # and whether its transpose has the orthonormal columns


def _factors(layer: DisloraLayer, adapter: str) -> list[_Matrix]:
    return [(layer.parameter("up", adapter), False), (layer.parameter("down", adapter), True)]


def _by_shape(matrices: Sequence[_Matrix], moment: Moment | None = None) -> list[list[_Matrix]]:
    """Matrices that can be stacked; with a moment, those that await their addition."""
    groups: dict[Any, list[_Matrix]] = {}
    for matrix, transposed in matrices:
        if moment is None or moment.awaits(matrix):
            shape = tuple(matrix.t().shape) if transposed else tuple(matrix.shape)
            groups.setdefault((shape, matrix.dtype, matrix.device), []).append((matrix, transposed))
    return list(groups.values())


def _stack(matrices: Sequence[_Matrix]) -> torch.Tensor:
    """(L, n, r) with columns that are to be orthonormal."""
    return torch.stack([matrix.detach().t() if transposed else matrix.detach() for matrix, transposed in matrices])


def _deviation(columns: torch.Tensor) -> torch.Tensor:
    """UᵀU − I, (L, r, r)."""
    gram = columns.mT @ columns
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return gram


def _add(parameter: torch.nn.Parameter, addition: torch.Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = addition.clone(memory_format=torch.contiguous_format)
    else:
        parameter.grad.add_(addition)


def _scale(gradients: Sequence[torch.Tensor], weight: torch.Tensor | float) -> None:
    for gradient in gradients:
        gradient.mul_(weight.to(gradient) if isinstance(weight, torch.Tensor) else weight)


def _balance(moment: Moment) -> torch.Tensor | None:
    """The lead's note of the losses and their weights."""
    return None if moment.lead is None else moment.lead.running("balance", moment.adapter)


def _smooth(
    balance: torch.Tensor, task: torch.Tensor, ortho: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bias-corrected moving averages of the losses, kept in the lead's note; what is not finite is left out."""
    averages, count = balance[NOTES : NOTES + 2], balance[NOTES + 2]
    losses = torch.stack([task.to(balance.device), ortho.to(balance.device)])
    usable = torch.isfinite(losses).all()
    averages.copy_(torch.where(usable, beta * averages + (1 - beta) * losses, averages))
    count.add_(usable)
    corrected = averages / (1 - beta ** count.clamp_min(1))
    return corrected[0], corrected[1]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
