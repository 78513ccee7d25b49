"""Steps of gates, and of `up` behind a diagonal that changes: a part of every adapter with one, whatever its method.

With `match_step` steps of `up` stay as long as LoRA's, however far the diagonal is open.

An optimizer such as Adam moves every entry of `up` by about the learning rate, and the model's function by that times
what the diagonal lets through. What it lets through is measured in the training forward passes of a step, layer by
layer, as the root mean square of the narrow activations h = down(x) behind the diagonal over that before it:

    ρ = √( Σ (d ⊙ h)² / Σ h² )        over all tokens, components, micro-batches and processes of the step

and `up` steps with 1 / ρ times the learning rate. Gates begin almost closed (ρ ≈ 0.05) and open in the run, so ρ is
measured at the steps 1 to 8, and then four times from each power of two to the next. The rate of a step is that of its
own forward passes where they are measured, and the last measured one elsewhere. Each measurement waits for the device
once. The mean of the gates would not do in the place of ρ: gates open where h is large.

A diagonal without gates is the same for all tokens, and its own root mean square stands for ρ, as if all components
had activations of one size: nothing is measured in forward passes.

1 / ρ is kept as a power of √2, a whole number per layer that is saved with the adapter. So a resumed run has exactly
the rates of the uninterrupted one, casts of the model do not change them, and matrices of like openness step together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from dynalora.adapter.passes import PassSum
from dynalora.adapter.storage import Role
from dynalora.common.devices import sent
from dynalora.common.private import foreach_norm, version
from dynalora.common.processes import grouped
from dynalora.driver import Moment, OptimizerOverride, Part

if TYPE_CHECKING:
    from dynalora.adapter.gates import GatedLayer

LORA_STEP = 2 / math.sqrt(3)
"""How far a component of LoRA (alpha = 2r) moves in a step of Adam, in learning rates times √out.

Every entry of `up` moves by the learning rate, s is 2, and a row of `down` has length 1 / √3 at the start.
"""
FASTEST = 32.0
"""The largest 1 / ρ, that of gates with a bias of −3.5.

Gates that begin further closed open on the way, and steps matched while they were closed are then too long.
"""
ROLE = Role("up_step", trains=False, saved="present")
"""The buffer of a layer that holds the power of √2, int64 (1)."""
MOST = round(2 * math.log2(FASTEST))
"""The largest such power, and with a minus the smallest."""
_EVERY_STEP = 8  # up to which every step is measured


def due(step: int) -> bool:
    """Whether a step, counted from 1, is measured: 1 to 8, 10, 12, 14, 16, 20, 24, 28, 32, 40 and so on."""
    return step <= _EVERY_STEP or step % (1 << (step.bit_length() - 3)) == 0


def power(passed: float, whole: float) -> int | None:
    """The power of √2 next to 1 / ρ, within the bounds; None where there is nothing to measure.

    Args:
        passed: Σ (d ⊙ h)².
        whole: Σ h².
    """
    if not (0 <= passed < math.inf and 0 < whole < math.inf):
        return None
    if passed == 0:
        return MOST
    return max(-MOST, min(MOST, round(math.log2(whole / passed))))


class MatchedSteps:
    """What a layer knows of the matched steps of one adapter, besides the power that is saved.

    Attributes:
        measuring: Whether the forward passes of the coming step are to be measured.
        rule: The rule for `up`, one object that optimizers' plans hold, so that a change has effect at once.
        scale: The multiple of the learning rate where ρ = 1.
        unmeasured: The multiple while nothing has been measured.
        least: The smallest multiple.
        sums: Σ (d ⊙ h)² and Σ h² of the forward passes since the last step, (2).
    """

    def __init__(self, scale: float, unmeasured: float, least: float = 0.0) -> None:
        self.measuring = True  # until the first step says which one it is
        self.scale, self.unmeasured, self.least = scale, unmeasured, least
        self.rule = OptimizerOverride(unmeasured, begins=unmeasured)
        self.sums = PassSum()
        self._seen: tuple[int, int] | None = None

    def note(self, h: torch.Tensor, m: torch.Tensor) -> None:
        """Add the narrow activations of a forward pass, (…, r), before and behind the diagonal."""
        self.sums.add(torch.stack([square(m.detach()), square(h.detach())]), m)

    def read(self, saved: torch.Tensor | None) -> None:
        """Bring the rule up to date with the saved power, (1), which waits for the device only if it was changed."""
        if saved is None:
            self._seen, self.rule.lr_multiplier = None, self.unmeasured
        elif not saved.is_meta and (id(saved), version(saved)) != self._seen:
            self.take(int(saved), saved)

    def take(self, value: int, saved: torch.Tensor) -> None:
        """Follow a power that is known, and that `saved` holds."""
        self.rule.lr_multiplier = max(self.least, self.scale * 2.0 ** (value / 2))
        self._seen = (id(saved), version(saved))


class MatchedRates(Part):
    """The learning rates of gates, and those of `up` that follow the diagonal; no weight decay on gates."""

    name = "rates"
    sharding = ("FSDP2", "FSDP1", "ZeRO")  # nothing is added to gradients, and ρ comes from what is whole in a layer

    def gathers(self, config: Any) -> bool:
        """What gates let through."""
        return bool(config.gated and config.matched_steps(1.0) is not None)

    def optimizer_overrides(self, config: Any, layer: GatedLayer, adapter: str) -> dict[str, OptimizerOverride]:
        """The gates' own rules, and the one of `up` where its steps are matched."""
        return {**config.gate_overrides(), **layer.matched_rules(adapter)}

    def before_step(self, moment: Moment) -> None:
        """Measure ρ, if it is time, and let `up`'s rates follow it."""
        _match(moment)

    def after_step(self, moment: Moment) -> None:
        """Have the next step's forward passes measured, if it is time."""
        for layer in moment.all_layers:
            if (steps := layer.matched.get(moment.adapter)) is not None:
                steps.measuring = due(moment.step + 2)


def _match(moment: Moment) -> None:
    adapter = moment.adapter
    pairs = [(layer, steps) for layer in moment.all_layers if (steps := layer.matched.get(adapter)) is not None]
    if not pairs:
        return
    if moment.skipped:
        for _, steps in pairs:
            steps.sums.take()
        return
    for layer, steps in pairs:
        steps.read(layer.running(ROLE.name, adapter))
    first = pairs[0][1].measuring  # of several optimizers that share the step, and of the calls of a closure
    began = not moment.step or any(layer.running(ROLE.name, adapter) is not None for layer, _ in pairs)
    # Within DDP's join() a process may have run out of batches, and would be missed.
    measured = first and due(moment.step + 1) and began and not moment.driver.joining
    sums = let_through([layer for layer, _ in pairs], adapter) if measured else []
    for _, steps in pairs:
        steps.measuring = False
        steps.sums.take()
    if not measured:
        return
    for (layer, steps), (passed, whole) in zip(pairs, _totals(sums, pairs[0][0], adapter), strict=True):
        value = power(passed, whole)
        if value is not None:
            place = layer.parameter("up", adapter).device
            saved = torch.full((1,), value, dtype=torch.int64, device=place)
            layer.set_running(ROLE.name, adapter, saved)
            steps.take(value, saved)


def let_through(layers: Sequence[GatedLayer], adapter: str) -> list[torch.Tensor | None]:
    """Take what ρ is made of, Σ (d ⊙ h)² and Σ h² of every layer, (2) each; None for a layer that was not called.

    Without gates, where nothing is measured, the sums are those of the diagonal and of as many ones.

    Args:
        layers: Layers whose steps are matched.
        adapter: The adapter.
    """
    rows = [layer.matched[adapter].sums.take() for layer in layers]
    fixed = {number: d for number, layer in enumerate(layers) if (d := layer.ungated_diagonal(adapter)) is not None}
    if fixed:
        wide = [d.to(torch.promote_types(d.dtype, torch.float32)) for d in fixed.values()]
        norms = torch.stack([norm.to(wide[0].device) for norm in foreach_norm(wide)])
        counts = sent(torch.tensor([len(d) for d in fixed.values()], dtype=norms.dtype), norms.device)
        for number, row in zip(fixed, torch.stack([norms.square(), counts], dim=1).unbind(), strict=True):
            rows[number] = row
    return rows


def _totals(sums: Sequence[torch.Tensor | None], layer: GatedLayer, adapter: str) -> list[list[float]]:
    """The sums of every layer, (2) each, over all processes; zeros where a layer was not called."""
    place = layer.parameter("up", adapter).device
    rows = [torch.zeros(2, device=place) if row is None else row.to(place, torch.float32) for row in sums]
    together = torch.stack(rows)
    if grouped() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(together)
    totals: list[list[float]] = together.tolist()
    return totals


def square(values: torch.Tensor) -> torch.Tensor:
    """The sum of squares, at least in float32."""
    dtype: Any = torch.promote_types(values.dtype, torch.float32)
    norm: torch.Tensor = torch.linalg.vector_norm(values, dtype=dtype)
    return norm.square()
