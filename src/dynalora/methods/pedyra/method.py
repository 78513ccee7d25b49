"""What PE-DyRA does around optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dynalora.adapter.layer import AdapterLayer
from dynalora.adapter.matching import LORA_STEP
from dynalora.adapter.method import Method, Panel
from dynalora.adapter.orthogonality import add_orthogonality
from dynalora.adapter.register import register
from dynalora.common.processes import grouped, process_count
from dynalora.driver import Moment, OptimizerOverride, drivers_of
from dynalora.errors import ConfigError, ScheduleError, UnsupportedError
from dynalora.methods.pedyra.adjustment import adjust
from dynalora.methods.pedyra.diagnostics import diagnostics, note_gradients
from dynalora.methods.pedyra.layer import PedyraLayer
from dynalora.methods.pedyra.record import Adjustment, read_record
from dynalora.methods.pedyra.scores import shared_with_all, triple_scores, update_averages
from dynalora.methods.pedyra.settings import AdjustmentPlan, PedyraConfig
from dynalora.spectral.decomposition import decompose_each

# With match_step: e's steps as a multiple of LoRA's (found in experiments/compare).
_E_STEPS = 2.0
# With match_step: the largest norm of the penalty's gradient of a factor, as a share of the task's.
_PENALTY_SHARE = 0.3


@dataclass
class StepScores:
    """What the optimizers that share a training step have in common.

    Attributes:
        taken: Whether the first of them has been here, while all gradients were the task's.
        scores: Every triple's score, a tensor (r) per layer, where ranks are adjusted after this step.
    """

    taken: bool = False
    scores: list[torch.Tensor] | None = None


@register
class Pedyra(Method):
    """PE-DyRA's part in training: the orthogonality gradient, the scores, and the adjustments."""

    name = "pedyra"
    title = "PE-DyRA"
    config_class = PedyraConfig
    layer_class = PedyraLayer
    shared_class = StepScores
    panels = (
        Panel("smallest and largest rank", ("pedyra_rank_min", "pedyra_rank_max")),
        Panel("effective rank", ("pedyra_effective_rank",)),
        Panel("utilisation", ("pedyra_utilisation",)),
        Panel("orthogonality term", ("pedyra_ortho_loss",), log=True),
        Panel("gradient norms", ("pedyra_gradient_down", "pedyra_gradient_e", "pedyra_gradient_up"), log=True),
    )

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
        triplets = decompose_each(
            [layer.base_matrix for layer in fresh],
            [layer.rank(adapter) for layer in fresh],
            which="largest",
            describe="Decomposing the base weights",
        )
        for index, largest in triplets:
            fresh[index].start_from(adapter, largest)

    def optimizer_overrides(  # type: ignore[override]
        self, config: PedyraConfig, layer: PedyraLayer, adapter: str
    ) -> dict[str, OptimizerOverride]:
        """Rates that match LoRA's steps, or hold e; no weight decay on DoRA's magnitudes, which start at the base's.

        An optimizer such as Adam moves every entry by about the learning rate, η. A component of LoRA's function
        (alpha = 2r) then moves by 2·η·√out / √3 in a step, in any direction of the output. Here a triple with
        directions of length 1 moves by s·η through e, in one direction, and by s·|e|·η·√out through up, in all others.
        So e's rate is a multiple of 2·√out / (√3·s), since it has a single direction to make up for all of LoRA's,
        and up's is 2 / (√3·s·ρ), with ρ the size of e, times the gates if there are any, as it is measured in the run
        (`PedyraConfig.matched_steps`). The two belong together: e moves along directions that the task did not choose,
        up turns them to where it wants to go.
        """
        rules: dict[str, OptimizerOverride] = {}
        if config.use_dora:
            rules["magnitude"] = OptimizerOverride(weight_decay=0.0)
        if config.mode == "static":
            rules["e"] = OptimizerOverride(lr_multiplier=0.0, weight_decay=0.0)
        elif config.match_step:
            multiple = _E_STEPS * LORA_STEP * math.sqrt(layer.out_features) / layer.scaling[adapter] / layer.length
            # Powers of two, so that matrices of like size step in one group.
            rules["e"] = OptimizerOverride(lr_multiplier=2.0 ** round(math.log2(multiple)))
        return rules

    def needs_whole_steps(self, config: PedyraConfig) -> bool:
        """Triples of all layers are compared, and parameters change their size."""
        return True

    def gathers(self, config: PedyraConfig) -> bool:
        """The inputs' squares."""
        return config.uses_inputs

    def exchanges(self, config: PedyraConfig) -> bool:
        """All processes move the same ranks at the same step."""
        return True

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

    def before_step(self, moment: Moment[StepScores]) -> None:
        """Learn from the task's gradients, score the triples if it is time, then add the orthogonality gradient."""
        if not moment.shared.taken:
            # By the first of several optimizers, while all gradients are the task's.
            moment.shared.taken = True
            if moment.config.diagnostics:
                note_gradients(moment, moment.training_layers)
            self._score(moment)
        if moment.config.ortho_weight and moment.config.mode != "static":
            most = _PENALTY_SHARE if moment.config.match_step else None
            add_orthogonality(moment, moment.config.ortho_weight, moment.config.ortho_reduction, most=most)

    def _score(self, moment: Moment[StepScores]) -> None:
        config: PedyraConfig = moment.config
        plan, step = AdjustmentPlan.of(config, moment.total_steps), moment.step + 1
        layers = moment.training_layers
        if not moment.driver.optimizer_steps:
            read_record(moment)  # one from a file that cannot be read is refused before any work is done
        _refuse_still_ranks(moment, plan, layers)
        _refuse_missing_room(moment, plan, layers)
        _warn_of_limits(moment, plan, layers)
        if not moment.skipped:
            if plan.matters(step):
                update_averages(moment, layers, fresh=not plan.matters(step - 1))
            if plan.due(step):
                device = layers[0].parameter("e", moment.adapter).device
                moment.shared.scores = shared_with_all(triple_scores(moment, layers, step), device)
        for layer in layers:
            layer.take_gathered(moment.adapter)
            layer.gathering[moment.adapter] = config.uses_inputs and (plan.matters(step) or plan.matters(step + 1))

    def after_step(self, moment: Moment[StepScores]) -> None:
        """Adjust the ranks if it is time."""
        if moment.shared.scores is None:
            return
        layers = moment.training_layers
        moment.driver.require_finite(moment.all_layers)  # ranks are not moved by NaN
        adjust(moment, layers, moment.shared.scores)
        moment.shared.scores = None
        if not AdjustmentPlan.of(moment.config, moment.total_steps).matters(moment.step + 2):
            for layer in layers:
                for role in layer.buffer_roles:
                    if role.startswith(("sensitivity", "uncertainty", "inputs")):
                        layer.set_running(role, moment.adapter, None)

    def metrics(self, moment: Moment) -> dict[str, float]:
        """The smallest and the largest rank, and diagnostics where they are wanted."""
        ranks = [layer.rank(moment.adapter) for layer in moment.layers]
        more = diagnostics(moment) if moment.config.diagnostics else {}
        return {"pedyra_rank_min": float(min(ranks)), "pedyra_rank_max": float(max(ranks)), **more}

    def report(self, moment: Moment) -> dict[str, Any]:
        """The schedule in steps, the adjustments done, and the next."""
        done = len(read_record(moment))
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
            return read_record(driver.moment(layers))
    return []


def _prunable(moment: Moment, layers: list[PedyraLayer]) -> int:
    """How many ranks could go at most, since every layer keeps one."""
    return sum(layer.rank(moment.adapter) - 1 for layer in layers)


def _refuse_still_ranks(moment: Moment, plan: AdjustmentPlan, layers: list[PedyraLayer]) -> None:
    """Refuse, before the first step, what would keep ranks from ever moving.

    Raises:
        ScheduleError: Not a single adjustment could take place.
    """
    config: PedyraConfig = moment.config
    total = moment.total_steps
    last = plan.end if total is None else min(plan.end, total)
    if plan.start > last:
        run = "" if total is None else f" in a run of {total} optimizer steps"
        raise ScheduleError(
            f"PedyraConfig(adjust_start={config.adjust_start}, adjust_end={config.adjust_end}) leaves no time for a "
            f"single adjustment{run} (it would be from step {plan.start} to {last}), so ranks would never move; lower "
            "adjust_start, raise adjust_end, or train longer."
        )
    if config.mode in ("both", "prune", "mask") and moment.step < plan.start and not _prunable(moment, layers):
        raise ScheduleError(
            f"PedyraConfig(r={config.r}) leaves no rank that could be pruned, since every layer keeps one; set r to "
            "2 or more."
        )


def _refuse_missing_room(moment: Moment, plan: AdjustmentPlan, layers: list[PedyraLayer]) -> None:
    """Refuse, before the first step, ranks that would move where several processes hold the parameters' shapes.

    Raises:
        UnsupportedError: The adapter was made before it was known that several processes train it.
    """
    if not (grouped() and process_count() > 1) or moment.step >= plan.end:
        return
    without = next((layer for layer in layers if not layer.reserved[moment.adapter]), None)
    if without is not None:
        raise UnsupportedError(
            f"adapter {moment.adapter!r} was made before its {process_count()} processes joined their group, so no "
            f"room is reserved for ranks that grow (first in {without.name!r}); call init_process_group before the "
            "adapter is made, set the environment variable WORLD_SIZE as torchrun does, or give max_rank."
        )


def _warn_of_limits(moment: Moment, plan: AdjustmentPlan, layers: list[PedyraLayer]) -> None:
    """Warn, before the first step, of settings that will not have their full effect."""
    config: PedyraConfig = moment.config
    total, tell = moment.total_steps, moment.driver.tell
    if total is not None and plan.end > total:
        tell(
            "adjust_end",
            f"PedyraConfig(adjust_end={config.adjust_end}) is after the end of training: there are {total} optimizer "
            f"steps, and adjustments planned for later do not take place; set it to {total} or less.",
        )
    if config.mode == "both" and len(layers) == 1:
        tell(
            "one layer",
            f"only one layer ({layers[0].name!r}) is adapted, so PE-DyRA has nowhere to move its ranks to; adapt more "
            "layers with target_modules.",
        )
    if moment.step >= plan.start:
        return
    possible = {
        "prune": (_prunable(moment, layers), "ranks can be pruned, since every layer keeps one"),
        "expand": (len(layers), "layers are adapted, and each gets one rank at most"),
    }
    for mode, (most, why) in possible.items():
        if config.mode in (mode, "both") and config.adjust_size > most > 0:
            tell(
                "adjust_size",
                f"PedyraConfig(adjust_size={config.adjust_size}) is more than can move at an adjustment: only {most} "
                f"{why}; that many move. Set adjust_size to at most {most}.",
            )
