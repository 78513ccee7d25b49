"""Ranks that grow in training: what IncreLoRA and TriAdaptLoRA have in common.

Every matrix begins with rank r. From `grow_start` on, every `grow_interval` steps, a method chooses matrices, and each
of them gets `grow_rank` components, until all ranks together are those of a fixed rank `target_rank`, which is never
exceeded. The scaling s = alpha / r stays what it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dynalora.adapter.config import AdapterConfig, is_number, is_whole
from dynalora.adapter.layer import AdapterLayer
from dynalora.adapter.method import Method, Panel
from dynalora.adapter.ranks import NewComponents
from dynalora.common.processes import from_first, grouped, process_count
from dynalora.driver import Moment
from dynalora.driver.schedule import Occasions, in_steps
from dynalora.errors import ScheduleError, UnsupportedError


@dataclass
class GrowthConfig(AdapterConfig):
    """Settings of methods whose ranks grow, besides those of `dynalora.adapter.config.AdapterConfig`.

    `r` is the rank that every matrix begins with.

    Args:
        target_rank: The mean rank that growth ends at, of matrices that begin with `r`; None: twice `r`. With
            `rank_pattern` the others grow in the same proportion on average.
        grow_start: First growth, as a number of optimizer steps, or as a fraction of the run if below 1.
        grow_interval: Steps between growths, likewise.
        grow_rank: k, the components that a chosen matrix gets at once.
        max_rank: The largest rank that a matrix can reach; None: the smaller of its sides. Where shapes must not change
            (distributed training, or whenever this is given) memory for it is reserved; with several processes
            and None, for four times the target rank.
        seed: Seed of the new components.
    """

    target_rank: int | None = field(
        default=None, metadata={"help": "Let ranks grow until their mean is this; None: 2 r."}
    )
    grow_start: float = field(
        default=0.1,
        metadata={
            "help": "Let ranks grow for the first time after this many steps; below 1 it is a fraction of the run."
        },
    )
    grow_interval: float = field(
        default=0.05,
        metadata={"help": "Let ranks grow again every so many steps; below 1 it is a fraction of the run."},
    )
    grow_rank: int = field(default=1, metadata={"help": "Give a chosen matrix this many components at once."})
    max_rank: int | None = field(
        default=None, metadata={"help": "Let no matrix get a higher rank than this; None: the smaller of its sides."}
    )
    seed: int = field(default=0, metadata={"help": "Draw new components from this seed."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_rank", "max_rank"):
            value = getattr(self, name)
            valid = value is None or (is_whole(value) and value >= self.r)
            self._require(valid, name, f"an integer of at least r={self.r}, or None")
        self._require(is_whole(self.grow_rank) and self.grow_rank > 0, "grow_rank", "a positive integer")
        for name in ("grow_start", "grow_interval"):
            value = getattr(self, name)
            valid = is_number(value) and (0 < value < 1 or (value >= 1 and value == int(value)))
            self._require(valid, name, "a whole number of steps, or a fraction of the run between 0 and 1")
        self._require(is_whole(self.seed), "seed", "an integer")

    @property
    def target(self) -> int:
        """The mean rank that growth ends at, of matrices that begin with `r`."""
        return 2 * self.r if self.target_rank is None else self.target_rank

    def at_largest(self) -> GrowthConfig:
        """The configuration that begins with as many components as this one ends with."""
        grown = {name: round(rank * self.target / self.r) for name, rank in self.rank_pattern.items()}
        return replace(self, r=self.target, target_rank=self.target, rank_pattern=grown, max_rank=None)

    def occasions(self, total_steps: int | None, horizon: int = 1) -> Occasions:
        """When ranks grow, as long as the budget allows it.

        Args:
            total_steps: Optimizer steps of the run, None when unknown.
            horizon: Steps before a growth that its scores remember.

        Raises:
            ValueError: A fraction is given, and the number of steps is unknown.
        """
        return Occasions(
            start=in_steps(self.grow_start, total_steps),
            interval=in_steps(self.grow_interval, total_steps),
            end=total_steps or 2**53,
            horizon=horizon,
        )


class GrowingLayer(AdapterLayer):
    """A layer whose rank can grow."""

    takes_factors = False  # further components may train ahead

    def reserve(self, config: GrowthConfig, r: int) -> int:
        """Room for what the rank can become, where shapes must stay as they are."""
        if config.inference_mode or (config.max_rank is None and not process_count() > 1):
            return 0
        return max(r, self.limit(config))

    def limit(self, config: GrowthConfig) -> int:
        """The largest rank that this matrix can reach."""
        sides = min(self.in_features, self.out_features)
        several = 4 * config.target if process_count() > 1 else sides
        return min(sides, several if config.max_rank is None else config.max_rank)

    def new_components(self, config: Any, adapter: str, generator: torch.Generator) -> NewComponents:
        """The components that the matrix gets, `config.grow_rank` of them, by role of what carries the rank."""
        raise NotImplementedError

    @torch.no_grad()
    def grow(self, config: Any, adapter: str, generator: torch.Generator) -> None:
        """Add components to those that there are."""
        self.resize(adapter, range(self.rank(adapter)), self.new_components(config, adapter, generator))


class StepGrowth:
    """What the optimizers that make one training step share.

    Attributes:
        taken: Whether the step's gradients have been read.
    """

    def __init__(self) -> None:
        self.taken = False


class GrowingMethod(Method):
    """What methods do whose layers are growing ones."""

    shared_class = StepGrowth

    def scores(self, moment: Moment, layers: Sequence[Any]) -> list[float]:
        """How much each matrix deserves to grow now."""
        raise NotImplementedError

    def how_many(self, moment: Moment, layers: Sequence[Any], missing: int) -> int:
        """How many matrices grow now.

        Args:
            moment: The moment after the step.
            layers: The layers that train.
            missing: Components that the budget still allows.
        """
        raise NotImplementedError

    def needs_whole_steps(self, config: Any) -> bool:
        """Matrices of all layers are compared, and parameters change their size."""
        return True

    def exchanges(self, config: Any) -> bool:
        """All processes move the same ranks at the same step."""
        return True

    def needs_total_steps(self, config: Any) -> bool:
        """Fractions of the run need its length."""
        return bool(min(config.grow_start, config.grow_interval) < 1)

    def keeps_components(self, moment: Moment, trains: bool) -> str:
        """While ranks grow, a new component has done nothing yet and is not dead."""
        if not trains or missing_components(moment, moment.all_layers) < moment.config.grow_rank:
            return ""
        if moment.total_steps is not None and moment.step >= moment.total_steps:
            return ""
        name = self.title or self.name
        return f"{name}'s ranks still grow at step {moment.step}; compact it when they have reached their budget."

    def before_step(self, moment: Moment[Any]) -> None:
        """Refuse, before the first step, what would keep ranks from growing."""
        if moment.shared.taken:
            return
        moment.shared.taken = True
        layers = moment.training_layers
        if missing_components(moment, layers) < moment.config.grow_rank:
            return
        config, occasions = moment.config, moment.config.occasions(moment.total_steps)
        if occasions.start > occasions.end:
            raise ScheduleError(
                f"{type(config).__name__}(grow_start={config.grow_start}) is after the end of a run of "
                f"{moment.total_steps} optimizer steps, so ranks would never grow; lower grow_start, or train longer."
            )
        without = next((layer for layer in layers if not layer.reserved[moment.adapter]), None)
        if grouped() and process_count() > 1 and without is not None:
            raise UnsupportedError(
                f"adapter {moment.adapter!r} was made before its {process_count()} processes joined their group, so no "
                f"room is reserved for ranks that grow (first in {without.name!r}); call init_process_group before the "
                "adapter is made, set the environment variable WORLD_SIZE as torchrun does, or give max_rank."
            )

    def after_step(self, moment: Moment[Any]) -> None:
        """Let the matrices with the highest scores grow, if it is time."""
        config, adapter, step = moment.config, moment.adapter, moment.step + 1
        layers = moment.training_layers
        missing = missing_components(moment, layers)
        if missing < config.grow_rank or not config.occasions(moment.total_steps).due(step):
            return
        moment.driver.require_finite(moment.all_layers)  # ranks are not moved by NaN
        # The first process's, so that no rounding can make another one decide differently.
        scores = from_first(self.scores(moment, layers))
        best = sorted(range(len(layers)), key=lambda index: (-scores[index], index))
        room = [
            index for index in best if layers[index].rank(adapter) + config.grow_rank <= _most(layers[index], adapter)
        ]
        count = min(self.how_many(moment, layers, missing), missing // config.grow_rank)
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + step) % 2**63)
        for index in sorted(room[:count]):
            layers[index].grow(config, adapter, generator)
        if missing_components(moment, layers) < config.grow_rank:
            self.grown(moment, layers)

    def grown(self, moment: Moment, layers: Sequence[Any]) -> None:
        """Act when the budget has been reached."""

    def metrics(self, moment: Moment) -> dict[str, float]:
        """The smallest and the largest rank, and the sum of all."""
        ranks = [layer.rank(moment.adapter) for layer in moment.layers]
        names = [f"{self.name}_rank_{kind}" for kind in ("min", "max", "sum")]
        return dict(zip(names, map(float, (min(ranks), max(ranks), sum(ranks))), strict=True))

    def report(self, moment: Moment) -> dict[str, Any]:
        """The sum of all ranks, and the budget."""
        return {
            "total_rank": sum(layer.rank(moment.adapter) for layer in moment.layers),
            "budget": budget(moment, moment.layers),
        }

    def decided(self, layers: Mapping[str, AdapterLayer], adapter: str) -> list[dict[str, Any]]:
        """The rank that every matrix has come to."""
        return [{"module": name, "rank": layer.rank(adapter)} for name, layer in layers.items()]


def growth_panels(name: str) -> tuple[Panel, ...]:
    """How a growing method's metrics are drawn."""
    return (Panel("smallest and largest rank", (f"{name}_rank_min", f"{name}_rank_max")),)


def budget(moment: Moment, layers: Sequence[Any]) -> int:
    """The components that layers may have together."""
    config: GrowthConfig = moment.config
    begun: list[int] = [layer.scaling_ranks[moment.adapter] for layer in layers]
    return sum(round(rank * config.target / config.r) for rank in begun)


def missing_components(moment: Moment, layers: Sequence[Any]) -> int:
    """Components that the budget still allows."""
    ranks: list[int] = [layer.rank(moment.adapter) for layer in layers]
    return budget(moment, layers) - sum(ranks)


def _most(layer: GrowingLayer, adapter: str) -> int:
    config: Any = layer.drivers[adapter].config
    sides = min(layer.in_features, layer.out_features)
    return min(sides, layer.reserved[adapter]) if layer.reserved[adapter] else layer.limit(config)
