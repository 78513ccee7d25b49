"""What DiRA does around optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dynalora.adapter.compaction import compact_layers, require_free_shapes
from dynalora.adapter.gates import GatedLayer
from dynalora.adapter.gradients import add_to_gradients, stackable
from dynalora.adapter.layer import AdapterLayer
from dynalora.adapter.method import Method, Panel
from dynalora.adapter.register import register
from dynalora.adapter.storage import Role
from dynalora.common.processes import process_count
from dynalora.driver import Moment
from dynalora.driver.schedule import scheduled
from dynalora.errors import UnsupportedError
from dynalora.methods.dira.budget import DUAL, Line, budget, budgeted_step, weight_now
from dynalora.methods.dira.components import Components, component_norms, remove
from dynalora.methods.dira.proximal import proximal_step
from dynalora.methods.dira.settings import DiraConfig


class DiraLayer(GatedLayer):
    """LoRA's layer: the diagonal is all ones, or gates; what DiRA adds happens around optimizer steps."""

    method_name = "dira"
    roles = (*GatedLayer.roles, Role(DUAL, trains=False, saved="present"))  # kept by the first layer

    def reserve(self, config: DiraConfig, r: int) -> int:
        """Room for the rank at the start, where components go while shapes must stay as they are."""
        return r if config.target_rank is not None and not config.inference_mode and process_count() > 1 else 0


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
    panels = (Panel("weight of the penalty", ("dira_penalty_weight",)), Panel("mean rank", ("dira_mean_rank",)))

    def prepare(self, layers: Mapping[str, AdapterLayer], adapter: str, config: DiraConfig) -> None:
        """Refuse a budget that these layers cannot have."""
        if config.target_rank is not None:
            budget(list(layers.values()), adapter, config)

    def needs_total_steps(self, config: DiraConfig) -> bool:
        """A decaying weight and a budget need the length of the run."""
        decays = config.penalty_weight > 0 and config.penalty_schedule != "constant"
        return decays or config.target_rank is not None

    def needs_driving(self, config: DiraConfig) -> bool:
        """Without the penalty and compaction DiRA is a plain LoRA."""
        return config.penalty_weight > 0 or config.compact_every is not None

    def needs_whole_steps(self, config: DiraConfig) -> bool:
        """What acts after the step compares the components of all layers."""
        return config.proximal or config.target_rank is not None

    def exchanges(self, config: DiraConfig) -> bool:
        """With a budget the same components die in all processes, at the same step."""
        return config.target_rank is not None

    def penalty_weight(self, moment: Moment) -> float:
        """λ at this step."""
        config: DiraConfig = moment.config
        if config.target_rank is not None:
            return weight_now(moment)
        if not config.penalty_weight:
            return 0.0
        return scheduled(config.penalty_weight, config.penalty_schedule, moment.step, moment.total_steps)

    def before_step(self, moment: Moment) -> None:
        """Add the penalty's gradient."""
        config: DiraConfig = moment.config
        if self.needs_whole_steps(config):
            _require_whole_factors(moment)
        if config.compact_every and config.target_rank is None:
            require_free_shapes(moment.all_layers, moment.adapter)
        weight = 0.0 if config.proximal else self.penalty_weight(moment)
        if not weight:
            return
        for layers in _by_shape(moment):
            if config.penalty == "product":
                _add_product_gradient(moment, layers, weight)
            else:
                _add_variational_gradient(moment, layers, weight)

    def after_step(self, moment: Moment) -> None:
        """Shrink and let die what the penalty or the budget asks for, and remove the dead if it is time."""
        config: DiraConfig = moment.config
        if config.target_rank is not None:
            budgeted_step(moment)
        elif config.proximal and (weight := self.penalty_weight(moment)):
            proximal_step(moment, weight)
        every, done = config.compact_every, moment.step + 1
        # A run with a budget ends without what has died.
        last = config.target_rank is not None and done == moment.total_steps
        if not every or (done % every and not last):
            return
        if config.target_rank is None:
            moment.driver.require_finite(moment.all_layers)
            compact_layers(moment.driver, moment.all_layers, config.compact_threshold, rewrite=False)
        else:
            components = Components.of(moment)
            remove(components, ~components.alive, moment, cut=True)

    def check_finished(self, moment: Moment, when: str) -> None:
        """Warn, once, of a run that ended before its budget was met."""
        total, config = moment.total_steps, moment.config
        if config.target_rank is None or total is None:
            return
        _, end = Line.steps(total)
        if moment.step < end:
            ranks = [layer.rank(moment.adapter) for layer in moment.all_layers]
            moment.driver.tell(
                "budget",
                f"{when}: adapter {moment.adapter!r} is above its budget, target_rank={config.target_rank:g}, with an "
                f"average rank of {sum(ranks) / len(ranks):.3g}: the budget is met at step {end} of a run of {total} "
                f"optimizer steps, and this is step {moment.step}. Train it on to there, or with a total_steps that "
                "counts optimizer steps (not batches), and let early stopping and the choice of a best checkpoint "
                "begin after it. Checkpoints on the way are as they should be.",
            )

    def metrics(self, moment: Moment) -> dict[str, float]:
        """λ and the mean rank, for the trainer's log."""
        ranks = [layer.rank(moment.adapter) for layer in moment.layers]
        mean = {"dira_mean_rank": sum(ranks) / len(ranks)}
        try:
            return {"dira_penalty_weight": self.penalty_weight(moment), **mean}
        except ValueError:  # length of the run unknown; the next step says so
            return mean

    def report(self, moment: Moment) -> dict[str, Any]:
        """λ, the penalty itself, Σ ‖up_i‖‖down_i‖ over all layers, and what a budget is to leave."""
        penalty = 0.0
        for layer in moment.layers:
            up, down = layer.parameter("up", moment.adapter), layer.parameter("down", moment.adapter)
            penalty += float((up.double().norm(dim=0) * down.double().norm(dim=1)).sum())
        target = moment.config.target_rank
        aim = {} if target is None else {"target_rank": target}
        return {**self.metrics(moment), "nuclear_norm_bound": penalty, **aim}


def _require_whole_factors(moment: Moment) -> None:
    """Refuse factors that are spread over processes, of which single components cannot be taken."""
    if any(hasattr(layer.parameter("down", moment.adapter), "full_tensor") for layer in moment.all_layers):
        raise UnsupportedError(
            f"DiraConfig (adapter {moment.adapter!r}): target_rank and penalty_mode='proximal' do not train under "
            "FSDP2, which keeps factors in shards; train under DistributedDataParallel, or leave them out."
        )


def _by_shape(moment: Moment) -> Sequence[Sequence[AdapterLayer]]:
    """Layers with factors to add to, grouped by shape so that each group is a few stacked operations."""
    layers = (layer for layer in moment.layers if any(map(moment.awaits, _factors(layer, moment))))
    return stackable(layers, lambda layer: _factors(layer, moment))


def _factors(layer: AdapterLayer, moment: Moment) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    return layer.parameter("down", moment.adapter), layer.parameter("up", moment.adapter)


def _add_product_gradient(moment: Moment[StepNorms], layers: Sequence[AdapterLayer], weight: float) -> None:
    factors = [_factors(layer, moment) for layer in layers]
    down = torch.stack([down for down, _ in factors])  # (L, r, in)
    up = torch.stack([up for _, up in factors])  # (L, out, r)
    known = moment.shared.by_layer
    if all(layer in known for layer in layers):
        down_norm, up_norm = (torch.stack(norms) for norms in zip(*(known[layer] for layer in layers), strict=True))
    else:
        down_norm, up_norm = component_norms(down, dim=2), component_norms(up, dim=1)  # (L, r)
        if not all(moment.awaits(parameter) for pair in factors for parameter in pair):
            # Another optimizer has the other factors, and will see these ones changed.
            known.update(zip(layers, zip(down_norm, up_norm, strict=True), strict=True))
    rate = weight * moment.grad_scale
    _add(moment, [pair[0] for pair in factors], _rescale(down, down_norm[:, :, None], rate * up_norm[:, :, None]))
    _add(moment, [pair[1] for pair in factors], _rescale(up, up_norm[:, None, :], rate * down_norm[:, None, :]))


def _rescale(factors: torch.Tensor, norm: torch.Tensor, new_norm: torch.Tensor) -> torch.Tensor:
    """Give components a new norm, in place; components of norm 0, where the subgradient is 0, stay as they are."""
    # Two factors, since their quotient can be too large for float32 where each of them is not.
    unit = torch.where(norm > 0, norm, 1.0).to(factors.dtype)
    return factors.div_(unit.clamp_min_(torch.finfo(factors.dtype).tiny)).mul_(new_norm.to(factors.dtype))


def _add_variational_gradient(moment: Moment, layers: Sequence[AdapterLayer], weight: float) -> None:
    for factors in zip(*(_factors(layer, moment) for layer in layers), strict=True):
        _add(moment, list(factors), torch.stack(factors).mul_(weight * moment.grad_scale))


def _add(moment: Moment, parameters: list[torch.nn.Parameter], additions: torch.Tensor) -> None:
    """Add (L, …) to the gradients of those of L parameters that await it."""
    awaiting = [number for number, parameter in enumerate(parameters) if moment.awaits(parameter)]
    if len(awaiting) < len(parameters):
        additions = additions[awaiting]
    add_to_gradients([parameters[number] for number in awaiting], additions)
