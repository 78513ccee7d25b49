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
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch

from dynalora.adapter.config import AdapterConfig, is_number, is_whole
from dynalora.adapter.directions import DIRECTION_ROLES, DirectedLayer, DirectedMethod, Directions, smallest_pairs
from dynalora.adapter.gradients import add_to_gradients, stackable
from dynalora.adapter.layer import Gates
from dynalora.adapter.matching import LORA_STEP
from dynalora.adapter.method import Panel
from dynalora.adapter.register import register
from dynalora.adapter.singular import SingularLayer, TwinLayer, TwinMethod
from dynalora.adapter.storage import Role
from dynalora.common.private import foreach_mul_
from dynalora.common.processes import whole
from dynalora.driver import Moment, OptimizerOverride
from dynalora.spectral.decomposition import Triplets

TsdScore = Literal["residual", "update"]
TsdInit = Literal["zero", "sigma"]

EPSILON = 1e-6  # ε of eq. 12–13

# The penalty's weight beside an unweighted task loss where the loss has no value to weigh by: that of DisLoRA*.
FIXED_WEIGHT = 5e-5

# The largest multiple of the optimizer's learning rate that `match_step` gives to U and V: where σ is tiny, no rate
# could move the function like LoRA's without turning the factors over.
FASTEST = 4.0
# With `match_step`: the length of a step, in LoRA's. Steps of equal length learn less than LoRA's at 3e-4 in a short
# run, steps half as long again learn less at 5e-3; these learn as much at both (docs/methods/dislora.md).
LENGTH = 1.25

# What the lead's buffer `balance` holds, in this order: the losses and weights of the last step, and moving averages.
BALANCE = ("task_loss", "ortho_loss", "k", "task_weight", "ortho_weight")
NOTES = len(BALANCE)


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
        tsd_choice: Which rates of change are chosen: the `"largest"`, as the paper says, or the `"smallest"`, as the
            authors' code has it, which needs a full decomposition of every weight.
        tsd_init: Where their weights start: `"zero"`, so that the model's function does not change when they are
            switched on, or `"sigma"`, at their singular values, which adds s·σ_i·u_i·v_iᵀ to the function at once.
        ortho_weight: `"adaptive"` (eq. 12–15), or a fixed weight of L_ortho beside an unweighted L_task.
        ortho_reduction: How L_ortho adds up its terms: `"squared"`, eq. 6, or `"mean_norm"`, the mean over all factors
            of norms that are not squared, as in the authors' code.
        decay_factors: Whether U, S and V decay by the optimizer's weight decay, as in the authors' code (0.01).
        match_step: Scale the learning rate of U and V, matrix by matrix, so that a step moves the model's function
            about as far as LoRA's (alpha = 2r) would with the optimizer's learning rate. False takes the optimizer's
            learning rate for all matrices, as in the paper: then choose it for this method.
        loss_smoothing: β in [0, 1) of moving averages of both losses, from which the adaptive weights are then
            computed (App. A.4); 0 takes the losses as they are.
    """

    warmup_steps: int | None = field(
        default=None,
        metadata={
            "help": "Train for this many optimizer steps before the directions are chosen; None: a fraction of the run."
        },
    )
    warmup_fraction: float = field(
        default=1 / 3, metadata={"help": "Train for this fraction of the run before the directions are chosen."}
    )
    tsd_count: int = field(
        default=8, metadata={"help": "Choose this many task-specific directions per matrix; 0: none."}
    )
    tsd_score: TsdScore = field(
        default="residual",
        metadata={"help": "Judge directions by all that is trained (residual), or by its change alone (update)."},
    )
    tsd_choice: Literal["largest", "smallest"] = field(
        default="largest",
        metadata={"help": "Choose the directions with the largest rates of change, or those with the smallest."},
    )
    tsd_init: TsdInit = field(
        default="zero", metadata={"help": "Start the weights of directions at zero, or at the singular values (sigma)."}
    )
    ortho_weight: float | str = field(
        default="adaptive",
        metadata={
            "help": "Weigh the orthogonality loss so that it follows the task's (adaptive), or with a fixed number."
        },
    )
    ortho_reduction: Literal["squared", "mean_norm"] = field(
        default="squared",
        metadata={
            "help": "Square the norms of the orthogonality loss as equation 6 does (squared), or not (mean_norm)."
        },
    )
    decay_factors: bool = field(default=False, metadata={"help": "Let weight decay act on U, S and V, too."})
    match_step: bool = field(
        default=True,
        metadata={
            "help": "Scale the learning rates of U and V so that a step changes the model as much as LoRA's would."
        },
    )
    loss_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "Average the losses that the adaptive weight follows over steps with this factor; 0: not at all."
        },
    )

    method: ClassVar[str] = "dislora"
    default_alpha_per_rank: ClassVar[float] = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = self.warmup_steps
        self._require(steps is None or (is_whole(steps) and steps > 0), "warmup_steps", "a positive integer, or None")
        fraction = self.warmup_fraction
        self._require(is_number(fraction) and 0 < fraction < 1, "warmup_fraction", "in (0, 1)")
        self._require(is_whole(self.tsd_count) and self.tsd_count >= 0, "tsd_count", "an integer of at least 0")
        for name, choices in (("tsd_score", TsdScore), ("tsd_init", TsdInit)):
            allowed = get_args(choices)
            self._require(getattr(self, name) in allowed, name, f"one of {', '.join(map(repr, allowed))}")
        for name, values in (("tsd_choice", ("largest", "smallest")), ("ortho_reduction", ("squared", "mean_norm"))):
            self._require(getattr(self, name) in values, name, f"one of {', '.join(map(repr, values))}")
        self._require(isinstance(self.decay_factors, bool), "decay_factors", "True or False")
        weight = self.ortho_weight
        if isinstance(weight, str) and weight != "adaptive":  # as it comes from a command line
            with contextlib.suppress(ValueError):
                self.ortho_weight = weight = float(weight)
        valid = weight == "adaptive" or (is_number(weight) and float(weight) >= 0)
        self._require(valid, "ortho_weight", "'adaptive', or a number of at least 0")
        smoothing = self.loss_smoothing
        self._require(is_number(smoothing) and 0 <= smoothing < 1, "loss_smoothing", "in [0, 1)")

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


class DisloraLayer(DirectedLayer, SingularLayer):
    """The shared form with a trained diagonal, and with frozen components: the start, and the directions.

    The components are, in this order: the r trained ones with diagonal S; the r of the start with −S₀; the
    `tsd_count` directions with α, zero vectors until they are chosen.
    """

    method_name = "dislora"
    roles = (*SingularLayer.roles, *DIRECTION_ROLES, Role("balance", trains=False, saved="first"))

    def start_lead(self) -> dict[str, torch.Tensor]:
        """The losses and weights of the last step, and moving averages with their count, (NOTES + 3)."""
        return {**super().start_lead(), "balance": torch.zeros(NOTES + 3, dtype=torch.float64)}

    def diagonals(self, adapter: str, projected: torch.Tensor | Gates, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """S, (r), and (−S₀, α), (r + tsd_count)."""
        sigma, start = SingularLayer.diagonals(self, adapter, projected, count)
        if self.has_parameter("tsd_weight", adapter):
            start = torch.cat([start, self.parameter("tsd_weight", adapter)])
        return sigma, start

    def zero_update(self, adapter: str) -> None:
        """Make the update zero, to rounding: the triplets go back to their start, the directions' weights to 0."""
        super().zero_update(adapter)
        self.zero_directions(adapter)

    def moved(self, adapter: str, config: DisloraConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrix M of eq. 4."""
        return self.residual(adapter, config.tsd_score)

    def residual(self, adapter: str, score: TsdScore) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors (out, k) and (k, in) of the matrix M in eq. 4."""
        up, sigma, down = (whole(self.parameter(role, adapter).detach()) for role in ("up", "sigma", "down"))
        up = up * sigma
        if score == "update":
            r = self.rank(adapter)
            start = self.buffer("frozen_up", adapter)[:, :r] * -self.buffer("start_sigma", adapter)
            up, down = (torch.cat([up, start], dim=1), torch.cat([down, self.buffer("frozen_down", adapter)[:r]]))
        return up, down

    def first_weights(self, config: DisloraConfig, directions: Directions) -> torch.Tensor:
        """Where the directions' weights start: at 0, or at their singular values."""
        values = directions.pairs.values
        return values if config.tsd_init == "sigma" else torch.zeros_like(values)


@dataclass
class StepWeights:
    """What the optimizers that share a training step have in common.

    Attributes:
        weights: Weights of the task loss and of the orthogonality loss; None before the first of them has asked.
        deviations: UᵀU − I, (r, r), of the matrices whose penalty has not been added yet, by the matrix's id.
    """

    weights: tuple[torch.Tensor | float, torch.Tensor | float] | None = None
    deviations: dict[int, torch.Tensor] = field(default_factory=dict)


@register
class Dislora(DirectedMethod, TwinMethod):
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

    def triplets(self, layers: Sequence[TwinLayer], adapter: str) -> Iterator[tuple[int, Triplets]]:
        """The r smallest, of as many as choosing the directions will begin with."""
        for index, pairs in smallest_pairs(layers, adapter):
            r = layers[index].rank(adapter)
            yield index, Triplets(pairs.up[:, -r:], pairs.values[-r:], pairs.down[-r:])

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
        Matched steps are `LENGTH` times as long as LoRA's.
        """
        rules = {} if config.decay_factors else super().optimizer_overrides(config, layer, adapter)
        decay = None if config.decay_factors else 0.0
        if config.match_step:
            sigma = float(layer.buffer("start_sigma", adapter).double().square().mean().sqrt())
            sides = layer.out_features + layer.in_features
            here = layer.scaling[adapter] * sigma * math.sqrt(sides)
            lora = LENGTH * LORA_STEP * math.sqrt(layer.out_features)
            # Powers of two, so that matrices of like size step in one group.
            multiple = 2.0 ** round(math.log2(lora / here)) if here * FASTEST > lora else FASTEST
            rules["up"] = rules["down"] = OptimizerOverride(min(multiple, FASTEST), weight_decay=decay)
        return rules

    def takes_largest(self, config: DisloraConfig) -> bool:
        """As the paper says, unless the authors' code is followed."""
        return config.tsd_choice == "largest"

    # The losses and their weights ------------------------------------------------------------------------------

    def before_step(self, moment: Moment[StepWeights]) -> None:
        """Weigh the gradients of the two losses (eq. 15)."""
        config: DisloraConfig = moment.config
        self.hold_back(moment)
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
            stacked = _stack(matrices)
            device_rate = rate.to(stacked.device) if isinstance(rate, torch.Tensor) else rate
            known = moment.shared.deviations
            deviation = torch.stack([known.pop(id(matrix)) for matrix, _ in matrices])
            if config.ortho_reduction == "mean_norm":  # 1/(2N) Σ ‖D‖_F has the gradient U·D / (N·‖D‖_F)
                norms = torch.linalg.vector_norm(deviation, dim=(1, 2), keepdim=True)
                # What rounding leaves of an orthonormal factor has no direction.
                noise = 32 * torch.finfo(stacked.dtype).eps
                deviation = torch.where(norms > noise, deviation / norms, 0.0)
            else:
                deviation = 4 * deviation
            # D is symmetric; each product lies as its matrices do.
            additions = deviation @ stacked if matrices[0][1] else stacked @ deviation
            additions *= device_rate
            add_to_gradients([matrix for matrix, _ in matrices], additions)

    def _awaiting(self, layer: DisloraLayer, moment: Moment) -> list[torch.nn.Parameter]:
        return [p for p in layer.adapter_parameters(moment.adapter).values() if moment.awaits(p)]

    def _weigh(self, moment: Moment) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """Weights of the task loss and of the orthogonality loss in this step, noted for the log."""
        config: DisloraConfig = moment.config
        known = moment.shared.deviations
        ortho = ortho_loss(moment.all_layers, moment.adapter, config.ortho_reduction, known)
        balance = _balance(moment, ortho.device)
        if not config.adaptive:
            fixed = float(config.ortho_weight)
            _note(balance, 0.0, ortho, 0.0, 1.0, fixed)
            return 1.0, fixed
        assert moment.task_loss is not None  # the driver has raised otherwise
        task, now = moment.task_loss.to(ortho), ortho
        if config.loss_smoothing and balance is not None:
            task, ortho = _smooth(balance, task, ortho, config.loss_smoothing)
        k, task_weight, ortho_weight = weights_for_training(task, ortho)
        _note(balance, moment.task_loss, now, k, task_weight, ortho_weight)
        return task_weight, ortho_weight

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

    def report(self, moment: Moment) -> dict[str, Any]:
        """The last step's losses and weights, L_ortho now, and how many directions were chosen."""
        now = float(ortho_loss(moment.layers, moment.adapter, moment.config.ortho_reduction))
        return {**self.metrics(moment), "ortho_loss_now": now, **super().report(moment)}


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


def ortho_loss(
    layers: Sequence[DisloraLayer],
    adapter: str,
    reduction: str = "squared",
    deviations: dict[int, torch.Tensor] | None = None,
) -> torch.Tensor:
    """L_ortho of eq. 6, or the mean of the norms; a float64 scalar (float32 where a device has no wider type).

    Args:
        layers: All layers of the adapter.
        adapter: Its name.
        reduction: How the terms are added up.
        deviations: Is given UᵀU − I of each matrix, (r, r), by its id.
    """
    total: torch.Tensor | None = None
    for matrices in _by_shape([p for layer in layers for p in _factors(layer, adapter)]):
        deviation = _deviation(matrices)
        if deviations is not None:
            deviations.update((id(matrix), each) for (matrix, _), each in zip(matrices, deviation, strict=True))
        squares = deviation.square().sum((1, 2), dtype=None if deviation.device.type == "mps" else torch.float64)
        loss = squares.sum() if reduction == "squared" else squares.sqrt().sum() / 2
        total = loss if total is None else total + loss.to(total.device)
    assert total is not None
    return total / len(layers)


# Orthogonality -----------------------------------------------------------------------------------------------------

_Matrix = tuple[torch.nn.Parameter, bool]  # and whether its transpose has the orthonormal columns


def _factors(layer: DisloraLayer, adapter: str) -> list[_Matrix]:
    return [(layer.parameter("up", adapter), False), (layer.parameter("down", adapter), True)]


def _by_shape(matrices: Sequence[_Matrix], moment: Moment | None = None) -> list[Sequence[_Matrix]]:
    """Matrices that can be stacked; with a moment, those that await their addition."""
    awaiting = [(matrix, down) for matrix, down in matrices if moment is None or moment.awaits(matrix)]
    return stackable(awaiting, lambda pair: pair[:1], apart=lambda pair: pair[1])


def _stack(matrices: Sequence[_Matrix]) -> torch.Tensor:
    """(L, n, r) with columns that are to be orthonormal, or (L, r, n) with such rows."""
    return torch.stack([whole(matrix.detach()) for matrix, _ in matrices])


def _deviation(matrices: Sequence[_Matrix]) -> torch.Tensor:
    """UᵀU − I, (L, r, r)."""
    stacked = _stack(matrices)
    gram = stacked @ stacked.mT if matrices[0][1] else stacked.mT @ stacked
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return gram


def _scale(gradients: Sequence[torch.Tensor], weight: torch.Tensor | float) -> None:
    by_kind: dict[Any, list[torch.Tensor]] = {}
    for gradient in (g.to_local() if hasattr(g, "to_local") else g for g in gradients):
        by_kind.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    for group in by_kind.values():
        foreach_mul_(group, weight.to(group[0]) if isinstance(weight, torch.Tensor) else weight)


def _balance(moment: Moment, device: torch.device | None = None) -> torch.Tensor | None:
    """The lead's note of the losses and their weights; on their device, so that writing them down waits for nothing."""
    if moment.lead is None:
        return None
    note: torch.Tensor | None = moment.lead.running("balance", moment.adapter)
    if note is not None and device is not None and note.device != device and device.type != "mps":
        note = note.to(device)
        moment.lead.set_running("balance", moment.adapter, note)
    return note


def _note(balance: torch.Tensor | None, *values: torch.Tensor | float) -> None:
    """Write the losses and weights of a step down; of one whose loss is no number, the step before stays."""
    if balance is None:
        return
    now = torch.stack([v.to(balance) if isinstance(v, torch.Tensor) else balance.new_full((), v) for v in values])
    balance[:NOTES] = torch.where(now.isfinite().all(), now, balance[:NOTES])


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
