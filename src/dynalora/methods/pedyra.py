"""PE-DyRA: ranks move during training, from where they matter least to where they matter most.

    y = W0·x + s · up( e ⊙ down(x) ),      e trained, s = alpha / r with r the rank at the start

A triple is a rank-1 component G_i = (down_i, e_i, up_i). Every few steps the k triples of lowest score in the whole
model are removed, and the k layers of highest mean score get a new one each (Algorithm 2): the total never changes.
Both factors are kept near orthonormal by γ (‖down·downᵀ − I‖_F² + ‖upᵀ·up − I‖_F²) (eq. 2), whose gradient
4γ (down·downᵀ − I) down, and likewise for up, is added right before the optimizer's step.

A triple's score (Algorithm 1) mixes two parts:

* gradients, per entry w with I = |w·∂L/∂w| (eq. 3–5): Ī ← β1·Ī + (1−β1)·I, Ū ← β2·Ū + (1−β2)·|I − Ī|, S(w) = Ī·Ū;
  S_grad = ω_e S(e_i) + ω_down mean S(down_i) + ω_up mean S(up_i), ω being the gradients' shares in the layer's norms;
* inputs (eq. 6): S_inp = |e_i| · Σ_k |down_ik| m_k · ‖up_i‖, with m the moving average of the inputs' mean squares.

Where the paper leaves a choice: both parts are divided by their mean over all triples before they are mixed; scores
belong to the weights that the gradients were taken at; a layer's score (eq. 7) is the mean over the triples it had
before pruning; the inputs' average decays with β1; a new triple has e = 0 and random unit directions orthogonal to
its layer's others, so that the function does not change. Equal scores are ordered by layer and index. A layer keeps
one triple at least, and has min(in, out) at most, since there are no further orthogonal directions.

PE-DyRA: Dynamic Rank Adaptation for Parameter-Efficient Fine-Tuning via Importance-Aware Pruning and Expansion
(anonymous, under review).
"""

from __future__ import annotations

import json
import math
import weakref
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import distributed, nn
from transformers.pytorch_utils import Conv1D

from dynalora.adapter.gates import GATE_ROLES, GatedConfig, GatedLayer
from dynalora.adapter.layer import AdapterLayer, kaiming
from dynalora.adapter.method import Method, Panel
from dynalora.adapter.ranks import fit
from dynalora.adapter.register import register
from dynalora.common.processes import grouped, process_count
from dynalora.driver import Driver, drivers_of, layers_of
from dynalora.driver.driver import Moment, OptimizerOverride
from dynalora.errors import ConfigError, ScheduleError, UnsupportedError
from dynalora.spectral.decomposition import Triplets, decompose

Mode = Literal["both", "prune", "expand"]
Importance = Literal["score", "random"]

_ROLES = ("down", "e", "up")
# With match_step: e's steps as a multiple of LoRA's, and up's learning rate at s = 1 (found in experiments/compare).
_E_STEPS, _UP_RATE = 2.0, 8.0
# What an average has forgotten: older steps weigh less than this.
_FORGOTTEN = 1e-9


@dataclass
class PedyraConfig(GatedConfig):
    """Configuration of PE-DyRA. The shared settings are those of `dynalora.adapter.config.AdapterConfig`.

    With `gates=True` there are those of `dynalora.adapter.gates.GatedConfig` too: d = e ⊙ g(x), and a new
    triple brings its gate along.

    `alpha` defaults to `r`. The scaling s = alpha / r stays what it is while ranks move.

    Args:
        adjust_start: First adjustment, as a number of optimizer steps, or as a fraction of the run if below 1.
        adjust_interval: Steps between adjustments, likewise.
        adjust_end: Last step at which an adjustment may take place, likewise.
        adjust_size: k, the number of triples that move at each adjustment.
        score_mix: Share of the gradients in the score; 1 leaves out the inputs, 0 the gradients.
        beta1: β1, decay of the sensitivities' and the inputs' moving averages.
        beta2: β2, decay of the uncertainties' moving averages.
        ortho_weight: γ, weight of the orthogonality penalty.
        mode: `"both"`; `"prune"` removes without expanding; `"expand"` adds without pruning.
        importance: `"score"`, or `"random"` numbers in its place.
        gradient_weighting: Weigh the parts of S_grad by their gradients' norms; False takes their plain sum.
        normalize_scores: Divide S_grad and S_inp by their means before mixing them.
        max_rank: The largest rank that a matrix can reach; None sets no limit. Where shapes must not change
            (distributed training, or whenever this is given) memory for it is reserved.
        seed: Seed of the new directions, and of random importance.
        match_step: Multiply e's learning rate, matrix by matrix, so that a step moves the model's function about as far
            as LoRA's (alpha = 2r) would with the optimizer's learning rate. False takes the optimizer's for all, as in
            the paper, which needs many more steps.
        use_dora: Train the norms of the adapted weight's rows apart from their directions (DoRA, Liu et al., 2024).
        init_weights: All but False start as the base model: `"orthogonal"` with random orthonormal directions and
            e = 0, as new triples do; True with factors drawn from N(0, 0.02²) and e = 0, as in the paper, which the
            penalty has to bring to length 1 first; `"pissa"` with the weight's own largest singular triplets (Meng et
            al., 2024). False starts with a random update, for tests.
    """

    adjust_start: float = field(
        default=0.1, metadata={"help": "First adjustment: steps, or a fraction of the run below 1."}
    )
    adjust_interval: float = field(
        default=0.05, metadata={"help": "Between adjustments: steps, or a fraction of the run below 1."}
    )
    adjust_end: float = field(
        default=0.6, metadata={"help": "Last adjustment: steps, or a fraction of the run below 1."}
    )
    adjust_size: int = field(default=12, metadata={"help": "Triples that move at each adjustment."})
    score_mix: float = field(default=0.5, metadata={"help": "Share of the gradients in the score."})
    beta1: float = field(default=0.85, metadata={"help": "Decay of the sensitivities' moving averages."})
    beta2: float = field(default=0.85, metadata={"help": "Decay of the uncertainties' moving averages."})
    ortho_weight: float = field(default=0.1, metadata={"help": "Weight of the orthogonality penalty."})
    mode: Mode = field(default="both", metadata={"help": "both, prune or expand."})
    importance: Importance = field(default="score", metadata={"help": "score or random."})
    gradient_weighting: bool = field(
        default=True, metadata={"help": "Weigh the parts of a triple's score by their gradients' norms."}
    )
    normalize_scores: bool = field(
        default=True, metadata={"help": "Divide both scores by their means before mixing them."}
    )
    max_rank: int | None = field(default=None, metadata={"help": "Largest rank that a matrix can reach."})
    seed: int = field(default=0, metadata={"help": "Seed of the new directions."})
    match_step: bool = field(
        default=True,
        metadata={"help": "Scale e's learning rate so that a step moves the function like LoRA's."},
    )
    use_dora: bool = field(
        default=False, metadata={"help": "Train the norms of the weight's rows apart from their directions."}
    )

    init_weights: bool | Literal["orthogonal", "pissa"] = field(  # type: ignore[assignment]
        default="orthogonal",
        metadata={
            "help": "orthogonal, True (the paper's small factors), pissa (singular triplets), or False for tests."
        },
    )

    method: ClassVar[str] = "pedyra"

    def __post_init__(self) -> None:
        super().__post_init__()
        start = self.init_weights
        known = (True, False, "orthogonal", "pissa")
        self._require(start in known, "init_weights", "'orthogonal', True, 'pissa' or False")
        # Gates would not let the start cancel, and DoRA needs the norms of one fixed weight.
        self._require(
            not (self.gates and start == "pissa"),
            "init_weights",
            "'orthogonal', True or False with gates=True",
        )
        self._require(not (self.gates and self.use_dora), "use_dora", "False with gates=True")
        for name in ("adjust_start", "adjust_interval", "adjust_end"):
            value = getattr(self, name)
            valid = _is_number(value) and (0 < value < 1 or (value >= 1 and value == int(value)))
            self._require(valid, name, "a whole number of steps, or a fraction of the run between 0 and 1")
        whole = isinstance(self.adjust_size, int) and not isinstance(self.adjust_size, bool)
        self._require(whole and self.adjust_size > 0, "adjust_size", "a positive integer")
        for name, top in (("score_mix", "1]"), ("beta1", "1)"), ("beta2", "1)")):
            value = getattr(self, name)
            valid = _is_number(value) and 0 <= value <= 1 and (value < 1 or top == "1]")
            self._require(valid, name, f"in [0, {top}")
        valid = _is_number(self.ortho_weight) and 0 <= self.ortho_weight < math.inf
        self._require(valid, "ortho_weight", "a number of at least 0")
        for name, choices in (("mode", get_args(Mode)), ("importance", get_args(Importance))):
            self._require(getattr(self, name) in choices, name, f"one of {', '.join(map(repr, choices))}")
        largest = self.max_rank
        valid = largest is None or (
            isinstance(largest, int) and not isinstance(largest, bool) and largest >= self.r
        )
        self._require(valid, "max_rank", f"an integer of at least r={self.r}, or None")
        self._require(isinstance(self.seed, int), "seed", "an integer")
        if (self.adjust_start < 1) == (self.adjust_end < 1):
            self._require(
                self.adjust_end >= self.adjust_start,
                "adjust_end",
                f"at least adjust_start={self.adjust_start}",
            )

    @property
    def uses_gradients(self) -> bool:
        """Whether scores need the gradients' averages."""
        return self.importance == "score" and self.score_mix > 0

    @property
    def uses_inputs(self) -> bool:
        """Whether scores need the inputs' averages."""
        return self.importance == "score" and self.score_mix < 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class AdjustmentPlan:
    """When ranks are adjusted, in optimizer steps counted from 1.

    Attributes:
        start: The first adjustment.
        interval: Steps from one to the next.
        end: The last step at which one may take place.
        horizon: Steps before an adjustment that its scores remember.
    """

    start: int
    interval: int
    end: int
    horizon: int

    @classmethod
    def of(cls, config: PedyraConfig, total_steps: int | None) -> AdjustmentPlan:
        """The plan of a run.

        Raises:
            ValueError: A fraction is given, and the number of steps is unknown.
        """

        def steps(value: float, rounded: Any) -> int:
            if value >= 1:
                return int(value)
            if not total_steps:
                raise ValueError("a fraction of a run needs its number of steps")
            return cast(int, rounded(round(value * total_steps, 6)))  # 0.1 · 30 is a little more than 3

        decay = max(config.beta1, config.beta2)
        return cls(
            start=max(1, steps(config.adjust_start, math.ceil)),
            interval=max(1, steps(config.adjust_interval, math.ceil)),
            end=steps(config.adjust_end, math.floor),
            horizon=math.ceil(math.log(_FORGOTTEN) / math.log(decay)) if decay else 1,
        )

    def due(self, step: int) -> bool:
        """Whether ranks are adjusted after this step."""
        return self.start <= step <= self.end and (step - self.start) % self.interval == 0

    def matters(self, step: int) -> bool:
        """Whether the next adjustment's scores remember this step."""
        coming = self.start + max(0, -(-(step - self.start) // self.interval)) * self.interval
        return step >= 1 and coming <= self.end and coming - step < self.horizon

    @property
    def count(self) -> int:
        """Number of adjustments."""
        return max(0, (self.end - self.start) // self.interval + 1)


@dataclass(frozen=True)
class Adjustment:
    """One adjustment, as it is recorded with the adapter.

    Attributes:
        step: Optimizer steps done.
        ranks: Ranks afterwards, by module name.
        scores: Scores of the triples before, by module name and index.
        layer_scores: Their means.
        pruned: Module name and index (before) of what was removed, lowest score first.
        expanded: Modules that got a new triple, highest score first.
    """

    step: int
    ranks: dict[str, int]
    scores: dict[str, list[float]]
    layer_scores: dict[str, float]
    pruned: list[tuple[str, int]]
    expanded: list[str]


# The layer ---------------------------------------------------------------------------------------------------------


class PedyraLayer(GatedLayer):
    """The shared form with d = e, times gates where they are wanted."""

    method_name = "pedyra"
    # magnitude, (out): the rows' norms, with use_dora only
    roles = ("down", "up", "e", "magnitude", *GATE_ROLES)
    rank_dims: ClassVar[dict[str, int]] = {**GatedLayer.rank_dims, "e": 0}
    # Averages: Ī and Ū of each parameter, and m of the inputs. The first layer also keeps the record.
    running_roles = (
        *(f"{kind}_{role}" for kind in ("sensitivity", "uncertainty") for role in ("down", "up", "e")),
        # The triplets that training began with, with init_weights="pissa": the update is what has become of them since.
        *("frozen_down", "frozen_up"),
        *("inputs", "record"),
    )

    def __init__(self, base_layer: nn.Module, quantization: dict[str, Any] | None = None) -> None:
        super().__init__(base_layer, quantization)
        # Plain attributes: as buffers, data parallelism would overwrite them with the first process's.
        self.gathering: dict[str, bool] = {}
        self.gathered: dict[str, torch.Tensor] = {}
        # With use_dora: ‖W0‖² of every row, and by how much a merged adapter has scaled them.
        self.base_squares: torch.Tensor | None = None
        self.merged_gains: dict[str, torch.Tensor] = {}

    def start(self, config: PedyraConfig, r: int) -> dict[str, torch.Tensor]:
        """Orthonormal directions, or factors drawn from N(0, 0.02²), and e = 0."""
        more = self.start_gates(config, r)
        if config.use_dora:
            more["magnitude"] = self._base_squares().sqrt()
        if not config.init_weights:
            return {
                "down": kaiming(r, self.in_features),
                "up": kaiming(self.out_features, r),
                "e": torch.ones(r),
                **more,
            }
        if config.init_weights == "orthogonal":
            down, up = _directions(r, self.in_features), _directions(r, self.out_features).t().contiguous()
            return {"down": down, "up": up, "e": torch.zeros(r), **more}
        return {
            "down": 0.02 * torch.randn(r, self.in_features),
            "up": 0.02 * torch.randn(self.out_features, r),
            "e": torch.zeros(r),
            **more,
        }

    def reserve(self, config: PedyraConfig, r: int) -> int:
        """Room for what the rank can become, where shapes must stay as they are."""
        if config.inference_mode or (config.max_rank is None and not process_count() > 1):
            return 0
        return max(r, self.limit(config, r))

    def limit(self, config: PedyraConfig, r: int) -> int:
        """The largest rank that can come of rank `r`."""
        orthogonal = min(self.in_features, self.out_features)
        if config.max_rank is not None:
            return min(orthogonal, config.max_rank)
        if not process_count() > 1:
            return orthogonal
        try:
            growth = AdjustmentPlan.of(config, config.total_steps).count
        except ValueError:  # fractions of a run of unknown length: rounding can only make adjustments fewer
            times = (config.adjust_start, config.adjust_interval, config.adjust_end)
            if any(time >= 1 for time in times):
                growth = 3 * r
            else:
                growth = int((times[2] - times[0]) / times[1] + 1e-6) + 1
        return min(orthogonal, r + (growth if config.mode != "prune" else 0))

    def update_layer(self, adapter: str, config: Any, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; see `AdapterLayer.update_layer`."""
        super().update_layer(adapter, config, *args, **kwargs)
        # Until the first step says what its schedule is, every input may matter.
        self.gathering[adapter] = config.uses_inputs

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from this layer."""
        super().delete_adapter(adapter_name)
        self.gathering.pop(adapter_name, None)
        self.gathered.pop(adapter_name, None)
        self.merged_gains.pop(adapter_name, None)

    @torch.no_grad()
    def start_from(self, adapter: str, largest: Triplets) -> None:
        """W0's largest singular triplets become the triples, and their frozen negative cancels them at the start."""
        u, sigma, vt = largest.up, largest.values / self.scaling[adapter], largest.down
        for role, value in (("down", vt), ("up", u), ("e", sigma)):
            self.used(role, adapter).copy_(value)
        dtype = self.parameter("e", adapter).dtype
        self.set_running("frozen_down", adapter, vt.to(dtype).contiguous())
        self.set_running("frozen_up", adapter, (-u * sigma).to(dtype).contiguous())

    @torch.no_grad()
    def zero_update(self, adapter: str) -> None:
        """Make the update zero: `up` is, and what else changes the function goes back to where it changes nothing."""
        super().zero_update(adapter)
        # They cancel PiSSA's start, of which nothing is left.
        self.set_running("frozen_down", adapter, None)
        self.set_running("frozen_up", adapter, None)
        if self.has_parameter("magnitude", adapter):
            self.parameter("magnitude", adapter).copy_(self._base_squares().sqrt())

    def own_diagonal(self, adapter: str) -> torch.Tensor:
        """e, (r); with the frozen triplets of PiSSA's start (e, 1), since theirs is in their up factor."""
        e, frozen = self.used("e", adapter), self.running("frozen_up", adapter)
        return e if frozen is None else torch.cat([e, e.new_ones(frozen.shape[1])])

    def narrow(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """The narrow activations; in training the inputs' squares are added up on the way."""
        if self.training and self.gathering[adapter]:
            self._gather(x, adapter)
        return super().narrow(x, adapter)

    def resize(self, adapter: str, keep: Sequence[int], new: Any = None) -> None:
        """Keep some triples and add new ones; survivors keep their averages, newcomers have none."""
        super().resize(adapter, keep, new)
        for role in _ROLES:
            dim = self.rank_dims[role]
            for kind in ("sensitivity", "uncertainty"):
                average = self.running(f"{kind}_{role}", adapter)
                if average is not None:
                    index = torch.tensor(list(keep), dtype=torch.int64, device=average.device)
                    shape = list(average.shape)
                    shape[dim] = self.rank(adapter) - len(keep)
                    kept = average.index_select(dim, index)
                    self.set_running(
                        f"{kind}_{role}", adapter, torch.cat([kept, average.new_zeros(shape)], dim)
                    )

    # DoRA: y = g ⊙ (W0·x + s·ΔW·x) + b with g = magnitude / ‖W0 + s·ΔW‖ by rows, the norms taken as constants.

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The shared form; an adapter with `use_dora` must be the only one that acts on an input."""
        if kwargs.get("adapter_names") is None and len(self.active_adapters) > 1:
            self._check_alone()
        return super().forward(x, *args, **kwargs)

    def _check_alone(self) -> None:
        if self.disable_adapters or self.merged:
            return
        for adapter in self.active_adapters:
            if self.has_parameter("magnitude", adapter):
                raise UnsupportedError(
                    f"adapter {adapter!r} has use_dora=True, which scales the whole weight, and cannot be active "
                    f"together with others ({', '.join(self.active_adapters)}); activate one at a time."
                )

    def add_update(
        self, result: torch.Tensor, x: torch.Tensor, adapter: str, in_place: bool = False
    ) -> torch.Tensor:
        """Add an adapter's update; with `use_dora` the rows are given their trained norms."""
        result = super().add_update(result, x, adapter, in_place)
        if not self.has_parameter("magnitude", adapter):
            return result
        bias = getattr(self.get_base_layer(), "bias", None)
        more = (self._gain(adapter) - 1).to(result.dtype)
        return result + more * (result if bias is None else result - bias)

    def _gain(self, adapter: str) -> torch.Tensor:
        """`g`, (out). The norms come from the factors: ‖W0 + U·D‖² = ‖W0‖² + 2⟨W0·Dᵀ, U⟩ + ‖U·D‖², row by row."""
        with torch.no_grad():
            up, down = self.static_factors(adapter)
            up = self.scaling[adapter] * up
            # The rows of D take the way of an input, so that quantised weights need not be unpacked.
            base: Any = self.get_base_layer()
            rows = down.to(base.weight.dtype) if base.weight.is_floating_point() else down
            with torch.autocast(rows.device.type, enabled=False):
                cross = base(rows)
            bias = getattr(base, "bias", None)
            cross = (cross if bias is None else cross - bias).to(up.dtype)  # (r, out)
            own = ((up @ (down @ down.t())) * up).sum(1)
            squares = self._base_squares().to(up.device, up.dtype)
            norm = (
                (squares + 2 * (cross.t() * up).sum(1) + own).clamp_min_(torch.finfo(up.dtype).tiny).sqrt_()
            )
        gain: torch.Tensor = self.parameter("magnitude", adapter) / norm
        return gain

    def _base_squares(self) -> torch.Tensor:
        if self.base_squares is None:
            weight = self.get_base_weight().detach()
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            # transformers' Conv1D holds its weight as (in, out).
            self.base_squares = wide.square().sum(0 if isinstance(self.get_base_layer(), Conv1D) else 1)
        return self.base_squares

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The update (out, in); with `use_dora`, by what the whole weight changes."""
        update = super().get_delta_weight(adapter)
        if not self.has_parameter("magnitude", adapter):
            return update
        weight = self.get_base_weight().detach()
        weight = (weight.t() if isinstance(self.get_base_layer(), Conv1D) else weight).to(update)
        if adapter in self.merged_gains:  # the weight is g (W0 + s·ΔW) already
            return weight - (weight / self.merged_gains[adapter][:, None] - update)
        return self._gain(adapter)[:, None] * (weight + update) - weight

    def _add_to_base(self, adapter: str, sign: float, check: bool) -> None:
        if not self.has_parameter("magnitude", adapter):
            super()._add_to_base(adapter, sign, check)
        elif sign > 0:
            if self.merged_adapters:
                raise UnsupportedError(
                    f"adapter {adapter!r} has use_dora=True, which scales the whole weight, and cannot be merged "
                    f"where {', '.join(self.merged_adapters)} already is; merge one at a time."
                )
            gain = self._gain(adapter).detach()
            super()._add_to_base(adapter, sign, check)
            self.merged_gains[adapter] = gain
        else:
            super()._add_to_base(adapter, sign, check)
            del self.merged_gains[adapter]

    def plain_extras(self, adapter: str) -> dict[str, torch.Tensor]:
        """DoRA's magnitude under the name that PEFT gives it."""
        if not self.has_parameter("magnitude", adapter):
            return {}
        return {"lora_magnitude_vector": self.parameter("magnitude", adapter)}

    @torch.no_grad()
    def _gather(self, x: torch.Tensor, adapter: str) -> None:
        if not torch.compiler.is_compiling() and (
            x.is_inference()
            or not self.parameter("e", adapter).requires_grad
            # Gradient checkpointing runs the forward pass once more, within the backward pass.
            or torch._C._current_graph_task_id() != -1
        ):
            return
        squares = _squares(x)
        # Out of place, since layers with the same input share the tensor.
        sofar = self.gathered.get(adapter)
        self.gathered[adapter] = squares if sofar is None else sofar + squares.to(sofar.device)


def _directions(count: int, features: int) -> torch.Tensor:
    """Random unit rows (count, features), orthogonal to each other as long as there are no more than features."""
    rows = torch.randn(count, features)
    unit: torch.Tensor = rows / rows.norm(dim=1, keepdim=True)
    basis: torch.Tensor = torch.linalg.qr(rows.t()).Q.t()
    return unit if count > features else basis.contiguous()


# The last input and its sums: q, k and v projections, and those of a gated MLP, have theirs in common.
_last: tuple[weakref.ref[torch.Tensor], int, torch.Tensor] | None = None


def _squares(x: torch.Tensor) -> torch.Tensor:
    """Sums over all tokens of the squares of x (…, in), and the number of tokens: (in + 1)."""
    global _last
    if torch.compiler.is_compiling():
        return _sum_squares(x)
    if _last is not None and _last[0]() is x and _last[1] == x._version:
        return _last[2]
    result = _sum_squares(x)
    _last = weakref.ref(x), x._version, result
    return result


def _sum_squares(x: torch.Tensor) -> torch.Tensor:
    flat = x.detach().reshape(-1, x.shape[-1])
    dtype = torch.promote_types(x.dtype, torch.float32)
    if flat.device.type == "cpu":
        # A product with ones is the fastest sum over rows on a CPU.
        with torch.autocast("cpu", enabled=False):
            squares = (flat.new_ones(1, flat.shape[0], dtype=dtype) @ flat.to(dtype).square())[0]
    else:
        squares = torch.linalg.vector_norm(flat, dim=0, dtype=dtype).square()
    return torch.cat([squares, squares.new_full((1,), flat.shape[0])])


# The method --------------------------------------------------------------------------------------------------------


@register
class Pedyra(Method):
    """PE-DyRA's part in training: the orthogonality gradient, the scores, and the adjustments."""

    name = "pedyra"
    title = "PE-DyRA"
    config_class = PedyraConfig
    layer_class = PedyraLayer
    panels = (Panel("smallest and largest rank", ("pedyra_rank_min", "pedyra_rank_max")),)

    def prepare(self, layers: Mapping[str, PedyraLayer], adapter: str, config: PedyraConfig) -> None:  # type: ignore[override]
        """Start at the largest singular triplets of the base weights, with `init_weights="pissa"`."""
        if config.init_weights != "pissa":
            return
        for name, layer in layers.items():
            rank, sides = layer.rank(adapter), min(layer.in_features, layer.out_features)
            if rank > sides:
                raise ConfigError(
                    f"PedyraConfig: r must be at most {sides} for {name!r} of shape "
                    f"{(layer.out_features, layer.in_features)} with init_weights='pissa', got {rank}."
                )
        fresh = [layer for layer in layers.values() if not layer.parameter("up", adapter).is_meta]
        found = decompose(
            [layer.base_matrix for layer in fresh],
            [layer.rank(adapter) for layer in fresh],
            which="largest",
            describe="Decomposing the base weights",
        )
        for layer, largest in zip(fresh, found, strict=True):
            layer.start_from(adapter, largest)

    def optimizer_overrides(
        self, config: PedyraConfig, layer: AdapterLayer, adapter: str
    ) -> dict[str, OptimizerOverride]:
        """Rates that match LoRA's steps; no weight decay on DoRA's magnitudes, which start at the base's.

        An optimizer such as Adam moves every entry by about the learning rate, η. A component of LoRA's function
        (alpha = 2r) then moves by 2·η·√out / √3 in a step, in any direction of the output. Here a triple with
        directions of length 1 moves by s·η through e, in one direction, and by s·|e|·η·√out through up, in all others.
        So e's rate is a multiple of 2·√out / (√3·s), since it has a single direction to make up for all of LoRA's,
        and up's is such that its steps are as long as LoRA's once |e| is about an eighth. The two belong together: e
        moves along directions that the task did not choose, up turns them to where it wants to go.
        """
        rules = config.gate_overrides()
        if config.use_dora:
            rules["magnitude"] = OptimizerOverride(weight_decay=0.0)
        if config.match_step:
            scaling = layer.scaling[adapter]
            lora = 2 / math.sqrt(3) * math.sqrt(layer.out_features)
            # Powers of two, so that matrices of like size step in one group.
            for role, multiple in (("e", _E_STEPS * lora / scaling), ("up", _UP_RATE / scaling)):
                rules[role] = OptimizerOverride(lr_multiplier=2.0 ** round(math.log2(multiple)))
        return rules

    def needs_total_steps(self, config: PedyraConfig) -> bool:
        """Fractions of the run need its length."""
        return min(config.adjust_start, config.adjust_interval, config.adjust_end) < 1

    def keeps_components(self, moment: Moment, trains: bool) -> str:
        """While ranks still move, a new triple has e = 0 and is not dead."""
        try:
            plan = AdjustmentPlan.of(moment.config, moment.total_steps)
        except ValueError:
            return ""
        if not trains or moment.step >= plan.end:
            return ""
        return f"PE-DyRA moves its ranks until step {plan.end}, and is at step {moment.step}; compact it after that."

    def before_step(self, moment: Moment) -> None:
        """Learn from the task's gradients, score the triples if it is time, then add the orthogonality gradient."""
        config: PedyraConfig = moment.config
        driver: Driver = moment.layers[0].drivers[moment.adapter]
        plan = AdjustmentPlan.of(config, moment.total_steps)
        step = moment.step + 1
        if (
            "scored" not in moment.shared
        ):  # by the first of several optimizers, while all gradients are the task's
            moment.shared["scored"] = True
            layers = _adjustable(driver)
            _check(driver, config, plan, layers, moment)
            if not moment.skipped:
                if plan.matters(step):
                    _update_averages(moment, layers, fresh=not plan.matters(step - 1))
                if plan.due(step):
                    moment.shared["scores"] = _shared_with_all(
                        _scores(moment, layers, step), layers[0].parameter("e", moment.adapter).device
                    )
            for layer in layers:
                layer.gathered.pop(moment.adapter, None)
                layer.gathering[moment.adapter] = config.uses_inputs and (
                    plan.matters(step) or plan.matters(step + 1)
                )
        if config.ortho_weight:
            _add_orthogonality(moment, config.ortho_weight)

    def after_step(self, moment: Moment) -> None:
        """Adjust the ranks if it is time."""
        scores = moment.shared.pop("scores", None)
        if scores is None:
            return
        config: PedyraConfig = moment.config
        driver: Driver = moment.layers[0].drivers[moment.adapter]
        layers, step = _adjustable(driver), moment.step + 1
        _adjust(layers, moment.adapter, config, scores, step)
        if not AdjustmentPlan.of(config, moment.total_steps).matters(step + 1):
            for layer in layers:
                for role in layer.running_roles:
                    if role.startswith(("sensitivity", "uncertainty", "inputs")):
                        layer.set_running(role, moment.adapter, None)

    def metrics(self, moment: Moment) -> dict[str, float]:
        """The smallest and the largest rank."""
        ranks = [layer.rank(moment.adapter) for layer in moment.layers]
        return {"pedyra_rank_min": float(min(ranks)), "pedyra_rank_max": float(max(ranks))}

    def report(self, moment: Moment) -> dict[str, Any]:
        """The schedule in steps, the adjustments done, and the next."""
        done = len(_read_record(moment.layers, moment.adapter))
        try:
            plan = AdjustmentPlan.of(moment.config, moment.total_steps)
        except ValueError:
            return {"adjustments_done": done}
        ahead = range(moment.step + 1, plan.end + 1)
        return {
            "adjustments_done": done,
            "adjustments_planned": plan.count,
            "next_adjustment": next((step for step in ahead if plan.due(step)), None),
            "total_rank": sum(layer.rank(moment.adapter) for layer in moment.layers),
        }

    def decided(self, layers: Mapping[str, AdapterLayer], adapter: str) -> list[dict[str, Any]]:
        """The rank that every matrix has come to."""
        return [{"module": name, "rank": layer.rank(adapter)} for name, layer in layers.items()]


def adjustments(model: nn.Module, adapter: str = "default") -> list[Adjustment]:
    """What was decided at every adjustment so far, in this run and those it continues.

    Args:
        model: A model with a PE-DyRA adapter.
        adapter: The adapter's name.

    Returns:
        The adjustments in order; empty before the first.
    """
    for driver, layers in drivers_of(model):
        if driver.adapter == adapter and isinstance(driver.method, Pedyra):
            return _read_record(layers, adapter)
    return []


def _adjustable(driver: Driver) -> list[PedyraLayer]:
    """The adapter's layers that train, in model order."""
    layers: list[PedyraLayer] = layers_of(driver)
    trainable = [
        layer
        for layer in layers
        if any(p.requires_grad for p in layer.adapter_parameters(driver.adapter).values())
    ]
    return trainable


def _check(
    driver: Driver, config: PedyraConfig, plan: AdjustmentPlan, layers: list[PedyraLayer], moment: Moment
) -> None:
    """Say before the first step what would keep ranks from moving.

    Raises:
        ScheduleError: Not a single adjustment could take place.
    """
    total = moment.total_steps
    last = plan.end if total is None else min(plan.end, total)
    if plan.start > last:
        run = "" if total is None else f" in a run of {total} optimizer steps"
        raise ScheduleError(
            f"PedyraConfig(adjust_start={config.adjust_start}, adjust_end={config.adjust_end}) leaves no time for a "
            f"single adjustment{run} (it would be from step {plan.start} to {last}), so ranks would never move; lower "
            "adjust_start, raise adjust_end, or train longer."
        )
    ranks = [layer.rank(driver.adapter) for layer in layers]
    prunable = sum(ranks) - len(ranks)
    if config.mode != "expand" and not prunable and moment.step < plan.start:
        raise ScheduleError(
            f"PedyraConfig(r={config.r}) leaves no rank that could be pruned, since every layer keeps one; set r to "
            "2 or more."
        )
    if total is not None and plan.end > total:
        driver.tell(
            "adjust_end",
            f"PedyraConfig(adjust_end={config.adjust_end}) is after the end of training: there are {total} optimizer "
            f"steps, and adjustments planned for later do not take place; set it to {total} or less.",
        )
    if config.mode == "both" and len(layers) == 1:
        driver.tell(
            "one layer",
            f"only one layer ({layers[0].name!r}) is adapted, so PE-DyRA has nowhere to move its ranks to; adapt more "
            "layers with target_modules.",
        )
    possible = {
        "prune": (prunable, "ranks can be pruned, since every layer keeps one"),
        "expand": (len(layers), "layers are adapted, and each gets one rank at most"),
    }
    for mode, (most, why) in possible.items():
        if config.mode in (mode, "both") and config.adjust_size > most > 0 and moment.step < plan.start:
            driver.tell(
                "adjust_size",
                f"PedyraConfig(adjust_size={config.adjust_size}) is more than can move at an adjustment: only {most} "
                f"{why}; that many move. Set adjust_size to at most {most}.",
            )


# Scores ------------------------------------------------------------------------------------------------------------


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in full, where FSDP2 has spread it over processes."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else cast(torch.Tensor, full())


def _in_use(layer: PedyraLayer, role: str, adapter: str, tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor of a parameter's shape that its triples fill."""
    return _whole(tensor).narrow(layer.rank_dims[role], 0, layer.rank(adapter))


def _gradient(layer: PedyraLayer, role: str, adapter: str) -> torch.Tensor:
    """The gradient as it stands; zero for a layer that took no part in this step."""
    parameter = layer.parameter(role, adapter)
    gradient = parameter.grad
    found = torch.zeros_like(parameter) if gradient is None else gradient
    return _in_use(layer, role, adapter, found)


def _update_averages(moment: Moment, layers: list[PedyraLayer], fresh: bool) -> None:
    """Eq. 3 for all layers at once, and the inputs' mean squares."""
    config, adapter = moment.config, moment.adapter

    def average(layer: PedyraLayer, role: str, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        found = layer.running(role, adapter)
        if found is None or fresh:
            dtype = torch.promote_types(layer.parameter("e", adapter).dtype, torch.float32)
            found = torch.zeros(shape, dtype=dtype, device=device)
            layer.set_running(role, adapter, found)
        return found

    if config.uses_gradients:
        weights, gradients, sensitivity, uncertainty = [], [], [], []
        for layer in layers:
            for role in _ROLES:
                weight = _in_use(layer, role, adapter, layer.parameter(role, adapter).detach())
                mean = average(layer, f"sensitivity_{role}", weight.shape, weight.device)
                weights.append(weight.to(mean.dtype))
                gradients.append(_gradient(layer, role, adapter).to(mean.dtype))
                sensitivity.append(mean)
                uncertainty.append(average(layer, f"uncertainty_{role}", weight.shape, weight.device))
        products = list(torch._foreach_mul(weights, gradients))
        torch._foreach_abs_(products)
        if isinstance(moment.grad_scale, torch.Tensor) or moment.grad_scale != 1.0:
            torch._foreach_div_(products, cast(Any, moment.grad_scale))
        torch._foreach_lerp_(sensitivity, products, 1 - config.beta1)
        torch._foreach_sub_(products, sensitivity)
        torch._foreach_abs_(products)
        torch._foreach_lerp_(uncertainty, products, 1 - config.beta2)
    if config.uses_inputs:
        means = [
            average(layer, "inputs", (layer.in_features,), layer.parameter("e", adapter).device)
            for layer in layers
        ]
        seen = _gathered(layers, adapter, means)
        torch._foreach_lerp_(means, seen, 1 - config.beta1)


def _gathered(layers: list[PedyraLayer], adapter: str, means: list[torch.Tensor]) -> list[torch.Tensor]:
    """This step's mean squares of the inputs, over all processes; a layer without input keeps its average."""
    sums = []
    for layer, mean in zip(layers, means, strict=True):
        found = layer.gathered.get(adapter)
        sums.append(mean.new_zeros(len(mean) + 1) if found is None else found.to(mean.device, mean.dtype))
    if process_count() > 1 and grouped():
        flat = torch.cat([one.to(means[0].device) for one in sums])
        distributed.all_reduce(flat)
        sums = [
            part.to(one.device) for part, one in zip(flat.split([len(s) for s in sums]), sums, strict=True)
        ]
    result = []
    for total, mean in zip(sums, means, strict=True):
        now = total[:-1] / total[-1]
        # Not finite without input, or where a gradient scaler is about to skip a step for an overflow.
        result.append(torch.where(now.isfinite(), now, mean))
    return result


def _scores(moment: Moment, layers: list[PedyraLayer], step: int) -> list[torch.Tensor]:
    """Every triple's score (Algorithm 1), float64 on the CPU, a tensor (r) per layer."""
    config: PedyraConfig = moment.config
    if config.importance == "random":
        generator = _generator(config, step, 1)
        return [
            torch.rand(layer.rank(moment.adapter), generator=generator, dtype=torch.float64)
            for layer in layers
        ]
    parts = []
    if config.uses_gradients:
        parts.append(
            (config.score_mix, [_gradient_scores(layer, moment.adapter, config) for layer in layers])
        )
    if config.uses_inputs:
        parts.append((1 - config.score_mix, [_input_scores(layer, moment.adapter) for layer in layers]))
    total = [torch.zeros(layer.rank(moment.adapter), dtype=torch.float64) for layer in layers]
    for share, scores in parts:
        on_cpu = [score.to("cpu", torch.float64) for score in scores]
        mean = float(torch.cat(on_cpu).mean()) if config.normalize_scores else 1.0
        for sum_so_far, score in zip(total, on_cpu, strict=True):
            sum_so_far.add_(score, alpha=share / mean if mean > 0 else 0.0)
    return total


def _gradient_scores(layer: PedyraLayer, adapter: str, config: PedyraConfig) -> torch.Tensor:
    """S_grad (eq. 4–5) of a layer's triples, (r)."""
    norms = torch.stack([_gradient(layer, role, adapter).to(_wide(layer)).norm() for role in _ROLES])
    shares = norms / norms.sum().clamp_min(torch.finfo(norms.dtype).tiny)
    result = torch.zeros(layer.rank(adapter), dtype=norms.dtype, device=norms.device)
    for role, share in zip(_ROLES, shares, strict=True):
        sensitivity, uncertainty = (
            cast(torch.Tensor, layer.running(f"{kind}_{role}", adapter)).to(norms.dtype)
            for kind in ("sensitivity", "uncertainty")
        )
        score = sensitivity * uncertainty
        if score.ndim == 2:
            score = score.mean(1 - layer.rank_dims[role])
        result += score * share if config.gradient_weighting else score
    return result


def _input_scores(layer: PedyraLayer, adapter: str) -> torch.Tensor:
    """S_inp (eq. 6) of a layer's triples, (r)."""
    down, e, up = (
        _in_use(layer, role, adapter, layer.parameter(role, adapter).detach()).to(_wide(layer))
        for role in _ROLES
    )
    inputs = cast(torch.Tensor, layer.running("inputs", adapter)).to(down.dtype)
    score: torch.Tensor = e.abs() * (down.abs() @ inputs) * up.norm(dim=0)
    return score


def _wide(layer: PedyraLayer) -> torch.dtype:
    # Products of products of small numbers: in float32 they could vanish.
    return torch.float32 if next(layer.parameters()).device.type == "mps" else torch.float64


def _shared_with_all(scores: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """The first process's scores, so that no rounding can make another one decide differently."""
    if not (process_count() > 1 and grouped()):
        return scores
    flat = torch.cat(scores).to(device)
    distributed.broadcast(flat, 0)
    return list(flat.cpu().split([len(score) for score in scores]))


# Adjustments -------------------------------------------------------------------------------------------------------


def choose(
    scores: Sequence[Sequence[float]], size: int, limits: Sequence[int], mode: Mode = "both"
) -> tuple[list[tuple[int, int]], list[int]]:
    """Algorithm 2: which triples go, and which layers get a new one.

    Args:
        scores: Score of every triple, by layer.
        size: k.
        limits: Largest rank of every layer.
        mode: Whether to prune, to expand, or both.

    Returns:
        (layer, index) of the pruned triples, lowest score first, and the expanded layers, highest mean first. With
        both they are equally many: `size`, or as many as can be pruned and placed.
    """
    ranks = [len(layer) for layer in scores]
    order = sorted((s, layer, i) for layer, own in enumerate(scores) for i, s in enumerate(own))
    best = sorted(range(len(scores)), key=lambda layer: (-sum(scores[layer]) / ranks[layer], layer))
    while True:
        left = list(ranks)
        pruned: list[tuple[int, int]] = []
        for _, layer, index in order if mode != "expand" else ():
            if len(pruned) < size and left[layer] > 1:
                left[layer] -= 1
                pruned.append((layer, index))
        if mode == "prune":
            return pruned, []
        most = size if mode == "expand" else len(pruned)
        expanded = [layer for layer in best if left[layer] < limits[layer]][:most]
        if mode == "expand" or len(expanded) == len(pruned):
            return pruned, expanded
        size = len(expanded)


def _adjust(
    layers: list[PedyraLayer], adapter: str, config: PedyraConfig, scores: list[torch.Tensor], step: int
) -> None:
    numbers = [score.tolist() for score in scores]
    limits = [layer.reserved[adapter] or layer.limit(config, layer.rank(adapter)) for layer in layers]
    limits = [
        min(limit, layer.in_features, layer.out_features) for limit, layer in zip(limits, layers, strict=True)
    ]
    pruned, expanded = choose(numbers, config.adjust_size, limits, config.mode)
    generator = _generator(config, step, 0)
    gone, grown = set(pruned), set(expanded)
    for position, layer in enumerate(layers):
        keep = [i for i in range(layer.rank(adapter)) if (position, i) not in gone]
        new = _new_triple(layer, adapter, keep, generator) if position in grown else None
        if new is not None or len(keep) < layer.rank(adapter):
            layer.resize(adapter, keep, new)
    _append_record(
        layers,
        adapter,
        {
            "step": step,
            "layers": [layer.name for layer in layers],
            "ranks": [layer.rank(adapter) for layer in layers],
            "scores": numbers,
            "pruned": pruned,
            "expanded": expanded,
        },
    )


def _generator(config: PedyraConfig, step: int, purpose: int) -> torch.Generator:
    """Random numbers made of seed and step alone: the same on every process, and after resuming."""
    return torch.Generator().manual_seed(((config.seed * 1_000_003 + step) * 2 + purpose) % 2**63)


def _new_triple(
    layer: PedyraLayer, adapter: str, keep: list[int], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """E = 0, and random unit directions orthogonal to those of the triples that stay."""
    config: Any = layer.drivers[adapter].config
    new = {"e": torch.zeros(1), **layer.new_gate(config, adapter, generator)}
    for role in ("down", "up"):
        dim = layer.rank_dims[role]
        factor = _in_use(layer, role, adapter, layer.parameter(role, adapter).detach())
        rows = (factor if dim == 0 else factor.t()).to("cpu", torch.float64)[keep]  # (kept, features)
        basis = torch.linalg.qr(rows.t()).Q
        direction = torch.randn(rows.shape[1], generator=generator, dtype=torch.float64)
        for _ in range(2):  # once more for what rounding left
            direction = direction - basis @ (basis.t() @ direction)
            direction = direction / direction.norm()
        new[role] = direction[None] if dim == 0 else direction[:, None]
    return new


# The record: JSON, compressed, in a buffer of bytes, so that it is saved and resumed like everything else.


def _recorder(layers: Sequence[Any], adapter: str) -> PedyraLayer | None:
    driver = layers[0].drivers[adapter] if layers else None
    everyone: list[PedyraLayer] = layers_of(driver) if driver is not None else []
    return next((layer for layer in everyone if layer.progress(adapter) is not None), None)


def _raw_record(recorder: PedyraLayer | None, adapter: str) -> list[dict[str, Any]]:
    saved = recorder.running("record", adapter) if recorder is not None else None
    if saved is None or saved.is_meta:
        return []
    return cast("list[dict[str, Any]]", json.loads(zlib.decompress(saved.cpu().numpy().tobytes())))


def _append_record(layers: Sequence[Any], adapter: str, entry: dict[str, Any]) -> None:
    recorder = _recorder(layers, adapter)
    if recorder is None:
        return
    entries = [*_raw_record(recorder, adapter), entry]
    data = zlib.compress(json.dumps(entries, separators=(",", ":")).encode())
    device = recorder.parameter("e", adapter).device
    recorder.set_running(
        "record", adapter, torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device, copy=True)
    )


def _read_record(layers: Sequence[Any], adapter: str) -> list[Adjustment]:
    found = []
    for entry in _raw_record(_recorder(layers, adapter), adapter):
        names = entry["layers"]
        scores = dict(zip(names, entry["scores"], strict=True))
        found.append(
            Adjustment(
                step=entry["step"],
                ranks=dict(zip(names, entry["ranks"], strict=True)),
                scores=scores,
                layer_scores={name: sum(own) / len(own) for name, own in scores.items()},
                pruned=[(names[layer], index) for layer, index in entry["pruned"]],
                expanded=[names[layer] for layer in entry["expanded"]],
            )
        )
    return found


# Orthogonality -----------------------------------------------------------------------------------------------------


def _add_orthogonality(moment: Moment, weight: float) -> None:
    """Add 4γ (down·downᵀ − I) down and 4γ up (upᵀ·up − I), layers of equal shape together."""
    groups: dict[Any, list[PedyraLayer]] = {}
    for layer in moment.layers:
        for role in ("down", "up"):
            parameter = layer.parameter(role, moment.adapter)
            if moment.awaits(parameter):
                shape = layer.rank(moment.adapter), parameter.shape[1 - layer.rank_dims[role]]
                groups.setdefault((role, shape, parameter.dtype, parameter.device), []).append(layer)
    for (role, (rank, _), dtype, device), layers in groups.items():
        factors = torch.stack(
            [_in_use(x, role, moment.adapter, x.parameter(role, moment.adapter).detach()) for x in layers]
        )
        rows = factors if role == "down" else factors.mT  # (L, r, features)
        identity = torch.eye(rank, dtype=dtype, device=device)
        deviation = rows @ rows.mT - identity
        # A new triple is orthonormal to rounding and, with e = 0, has no other gradient: Adam, which knows no size,
        # would make full steps of what rounding left.
        deviation = deviation.masked_fill(deviation.abs() < 32 * torch.finfo(dtype).eps, 0.0)
        addition = torch.bmm(deviation, rows) * (4 * weight * moment.grad_scale)
        if role == "up":
            addition = addition.mT
        targets, additions = [], []
        for layer, own in zip(layers, addition.unbind(), strict=True):
            parameter, dim = layer.parameter(role, moment.adapter), layer.rank_dims[role]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if hasattr(parameter, "full_tensor"):
                parameter.grad.add_(_like(parameter, fit(own, dim, parameter.shape[dim])))
            else:
                targets.append(parameter.grad.narrow(dim, 0, rank))
                additions.append(own)
        if targets:
            torch._foreach_add_(targets, additions)


def _like(sharded: Any, whole: torch.Tensor) -> torch.Tensor:
    """A tensor spread over processes as FSDP2 has spread another."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, sharded.device_mesh, sharded.placements)
