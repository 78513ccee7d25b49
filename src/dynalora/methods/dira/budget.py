"""A budget of ranks: the penalty's weight as a dual variable of Σ_l c_l · rank_l ≤ budget.

c_l is what a component of matrix l costs: 1 for an average rank, its number of parameters for a share of them. The
budget comes down on a straight line from what the adapter begins with, after a tenth of the run, to the target, after
six tenths; the rest of the run trains what is left, without a penalty. On the way, after every step:

1. Components that may live on are chosen: the largest of every matrix, and then the largest p_i / c_l of all, as far as
   the line allows (or one more, if that is nearer to it), p_i being ‖up_i‖·‖down_i‖. They are left as they are: a
   penalty on them too would take most of what they have learned (they, not those that die, hold nearly all of the
   norm), and decide nothing.
2. The others are shrunk by η·λ·c_l / mean(c), where η is the learning rate, and die when they reach zero. One that
   grows faster than it is shrunk can be among the chosen at a later step.
3. With e the excess over the line, in units of a twentieth of all that is to go, less 1, the weight is updated:
   λ ← λ · exp(gain · clip(e, −1, 1)), within 1/1000 to 1000 of where it began. It begins where it would bring half of
   all components to zero by the end of the line, at the present rate.
4. At the end of the line λ takes the least value that meets the budget: all but the components that may live on die.

So a run ends within a component's cost of its budget, whatever the model, the optimizer and the learning rate, and a
component dies only because the budget has no room for it. With the penalty in the gradient (`penalty_mode="gradient"`)
the weight begins at `penalty_weight` and follows the line alike, and components die at its end only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dynalora.adapter.layer import AdapterLayer
from dynalora.driver import Moment
from dynalora.errors import ConfigError
from dynalora.methods.dira.components import Components, remove, shrink
from dynalora.methods.dira.proximal import rates, shrunk
from dynalora.methods.dira.settings import DiraConfig

START, END = 0.1, 0.6
"""Parts of the run after which the budget begins to come down, and has come down."""
_BAND = 0.05  # excess that leaves the weight as it is, as a part of all that is to go
_GAIN = 10.0  # of the logarithm of the weight over the whole line
_LEAST_GAIN, _MOST_GAIN = 0.02, 0.5  # of a step
_RANGE = 1000.0  # of the weight, both ways

DUAL = "dual"
"""Role of the buffer that holds the weight, its first value and the cost at the start of the run, (3)."""
# Its entries.
_WEIGHT, _FIRST, _FULL = range(3)


@dataclass(frozen=True)
class Line:
    """How the budget comes down.

    Attributes:
        start: Optimizer steps after which it begins to.
        end: Optimizer steps after which it has reached the target.
        full: Cost at the start.
        target: Cost at the end.
    """

    start: int
    end: int
    full: float
    target: float

    @staticmethod
    def steps(total_steps: int) -> tuple[int, int]:
        """The numbers of optimizer steps of start and end in a run."""
        end = max(1, round(END * total_steps))
        return min(end, max(1, math.ceil(START * total_steps))), end

    def allowed(self, done: int) -> float:
        """The cost that is allowed after so many steps."""
        if done >= self.end:
            return self.target
        if done <= self.start:
            return self.full
        part = (done - self.start) / (self.end - self.start)
        return self.full + part * (self.target - self.full)

    @property
    def gain(self) -> float:
        """Of the weight's logarithm at a step."""
        return min(_MOST_GAIN, max(_LEAST_GAIN, _GAIN / (self.end - self.start + 1)))


def costs(layers: Sequence[AdapterLayer], adapter: str, config: DiraConfig) -> list[int]:
    """What one component costs in every layer: 1, or its number of parameters."""
    if config.target_rank is None or config.target_rank >= 1:
        return [1] * len(layers)
    return [
        sum(
            parameter.numel() // parameter.shape[layer.rank_dims[role]]
            for role, parameter in layer.adapter_parameters(adapter).items()
            if role in layer.rank_dims
        )
        for layer in layers
    ]


def budget(layers: Sequence[AdapterLayer], adapter: str, config: DiraConfig) -> float:
    """The cost that the run is to end with.

    Raises:
        ConfigError: It is not less than the adapter begins with, or less than one component for every matrix.
    """
    target = config.target_rank
    assert target is not None
    each = costs(layers, adapter, config)
    ranks = [layer.scaling_ranks[adapter] for layer in layers]
    if target >= 1:
        average = sum(ranks) / len(ranks)
        if target >= average:
            raise ConfigError(
                f"DiraConfig: target_rank={target:g} must be below the average rank that the adapter begins with, "
                f"{average:g}; lower it, or raise r."
            )
        return float(round(target * len(layers)))
    whole = sum(cost * rank for cost, rank in zip(each, ranks, strict=True))
    if target * whole < sum(each):
        raise ConfigError(
            f"DiraConfig: target_rank={target:g} is a share of the adapter's {whole:,} parameters, and one component "
            f"for each of the {len(layers)} matrices takes {sum(each) / whole:.3g} of them; give more, or raise r."
        )
    return target * whole


def select(scores: Sequence[float], owners: Sequence[int], prices: Sequence[float], limit: float) -> list[bool]:
    """Which components may live on: the best of every owner, then the best of all that fit into the limit.

    One more than fits may, where this comes nearer to the limit: with few components a single one is much of a budget.

    Args:
        scores: What a component is worth for its price, (n); negative for one that is dead.
        owners: The number of its matrix, (n).
        prices: What it costs, (n).
        limit: What all of them together may cost.
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i])  # stable: equal ones by their place
    keep = [False] * len(scores)
    served: set[int] = set()
    spent = 0.0
    for i in order:
        if owners[i] not in served:
            served.add(owners[i])
            keep[i], spent = True, spent + prices[i]
    for i in order:
        if not keep[i] and scores[i] >= 0 and spent + prices[i] <= limit * (1 + 1e-12):
            keep[i], spent = True, spent + prices[i]
    room = limit - spent
    for i in order:
        if not keep[i] and scores[i] >= 0 and prices[i] - room < room * (1 - 1e-12):
            keep[i] = True
            break
    return keep


def next_weight(weight: float, first: float, excess: float, line: Line) -> float:
    """The dual update of the weight.

    Args:
        weight: λ.
        first: λ as it began.
        excess: Present cost less the allowed one.
        line: How the budget comes down.
    """
    error = excess / (_BAND * (line.full - line.target)) - 1
    moved = weight * math.exp(line.gain * min(1.0, max(-1.0, error)))
    return min(first * _RANGE, max(first / _RANGE, moved))


def first_weight(sizes: torch.Tensor, rate: float, steps: int) -> float:
    """The weight that brings the median of some products of norms, (n), to zero in so many steps; 0 if unknown."""
    grown = sizes[sizes > 0]
    if not len(grown) or not rate > 0:
        return 0.0
    return float(grown.median()) / (rate * steps)


def budgeted_step(moment: Moment) -> None:
    """What the budget does after an optimizer step."""
    assert moment.total_steps is not None  # the driver has raised otherwise
    done = moment.step + 1
    start, end = Line.steps(moment.total_steps)
    if not start <= done <= end:
        return
    config: DiraConfig = moment.config
    components = Components.of(moment)
    layers = list(components.layers)
    if not layers:
        return
    prices = _per_component(costs(layers, moment.adapter, config), components, moment)
    alive, sizes = components.alive, components.sizes
    cost = float(prices[alive].sum())
    target = budget(layers, moment.adapter, config)
    state = _state(moment)
    if not float(state[_FULL]):
        state[_FULL] = cost
    line = Line(start, end, max(float(state[_FULL]), target + 1), target)
    owners = _per_component(range(len(layers)), components, moment)
    scores = torch.where(alive, sizes / prices, -1.0)

    def chosen(limit: float) -> torch.Tensor:
        return torch.tensor(select(scores.tolist(), owners.tolist(), prices.tolist(), limit)) & alive

    weight = _dual(state, moment, components, line, cost)
    if done == end:
        keep = chosen(target)
        dying = alive & ~keep
        state[_WEIGHT] = 0.0
    elif config.proximal:
        allowed = line.allowed(done)
        keep = chosen(allowed)
        if allowed - target < 2 * float(prices.max()):
            # What fills the line's last room best need not contain what fills the target's.
            keep |= chosen(target)
        smaller = shrunk(sizes, weight * rates(components, moment) * prices / prices.mean())
        smaller = torch.where(keep, sizes, smaller)
        shrink(components, smaller, moment.adapter)
        dying = alive & ~keep & (smaller == 0)
    else:
        return
    remove(components, dying, moment, cut=config.compact_every is None)


def weight_now(moment: Moment) -> float:
    """The weight of the penalty under a budget, for the coming step; 0 before and after the line."""
    state = None if moment.lead is None else moment.lead.running(DUAL, moment.adapter)
    return 0.0 if state is None else float(state[_WEIGHT])


def _state(moment: Moment) -> torch.Tensor:
    lead = moment.lead
    state: torch.Tensor | None = lead.running(DUAL, moment.adapter)
    if state is None or not moment.step:  # a run that begins anew
        place = lead.parameter("up", moment.adapter).device
        state = torch.zeros(3, dtype=None if place.type == "mps" else torch.float64, device=place)
        lead.set_running(DUAL, moment.adapter, state)
    return state


def _dual(state: torch.Tensor, moment: Moment, components: Components, line: Line, cost: float) -> float:
    """The weight for this step; the state is brought up to date."""
    config, done = moment.config, moment.step + 1
    weight, first = float(state[_WEIGHT]), float(state[_FIRST])
    if not first:
        rate = float(rates(components, moment).mean())
        steps = line.end - line.start + 1
        first = first_weight(components.sizes, rate, steps) if config.proximal else config.penalty_weight
        weight = first
    else:
        weight = next_weight(weight, first, cost - line.allowed(done), line)
    state[_WEIGHT], state[_FIRST] = weight, first
    return weight


def _per_component(values: Sequence[float], components: Components, moment: Moment) -> torch.Tensor:
    """A value of each layer for all of its components, (n), float64."""
    counts = torch.tensor([layer.rank(moment.adapter) for layer in components.layers], dtype=torch.int64)
    return torch.tensor(list(values), dtype=torch.float64).repeat_interleave(counts)
