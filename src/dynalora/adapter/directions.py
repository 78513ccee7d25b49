"""Task-specific directions: the base weight's own singular pairs that the task has begun to move (LoRA-Dash, DisLoRA).

After a warm-up, once, every matrix gets the pairs (u_i, v_i) of W0 with the largest rate of change

    δ_i = |u_iᵀ M v_i| / σ_i

of a method's own matrix M. They are frozen components u_i v_iᵀ of the update from then on, each with a trained weight.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dynalora.adapter.layer import AdapterLayer
from dynalora.adapter.method import Method
from dynalora.adapter.storage import Role
from dynalora.common.private import version
from dynalora.common.processes import spread_as, whole
from dynalora.common.progress import late_progress
from dynalora.driver import Moment
from dynalora.spectral.decomposition import Triplets, decompose_each, smallest_triplets
from dynalora.spectral.spectrum import factor_spectrum

logger = logging.getLogger(__name__)

#: What a layer has of them besides `frozen_down` and `frozen_up`, whose last components they are.
DIRECTION_ROLES = (
    Role("tsd_weight"),
    Role("tsd_index", trains=False),  # its place among the singular values; -1: not chosen yet
    Role("tsd_sigma", trains=False),
    Role("tsd_rate", trains=False),  # δ; no name may end in "score", which PEFT takes for a classifier
)


@dataclass(frozen=True)
class Directions:
    """Task-specific directions of one matrix, the one of the highest score first.

    Attributes:
        index: Their places among the singular values of W0 in descending order, from 0, (count).
        score: Their rates of change δ, (count).
        pairs: Their u_i, σ_i and v_iᵀ.
    """

    index: torch.Tensor
    score: torch.Tensor
    pairs: Triplets


class DirectedLayer(AdapterLayer):
    """A layer with room for directions: the last of its frozen components, zero until they are chosen.

    A method's layer has `DIRECTION_ROLES` among its roles, and `tsd_weight` at the end of its diagonal.
    """

    def __init__(self, base_layer: nn.Module, quantization: dict[str, Any] | None = None) -> None:
        super().__init__(base_layer, quantization)
        # By adapter: the buffer `tsd_index` as it was read last, its version then, and whether directions were chosen.
        self._read: dict[str, tuple[torch.Tensor, int, bool]] = {}

    def start(self, config: Any, r: int) -> dict[str, torch.Tensor]:
        """What the method's layer starts with, and `config.tsd_count` components and weights that are zero."""
        tensors = super().start(config, r)
        count = min(config.tsd_count, self.in_features, self.out_features)
        down, up = torch.zeros(count, self.in_features), torch.zeros(self.out_features, count)
        before = tensors.get("frozen_down"), tensors.get("frozen_up")
        tensors["frozen_down"] = down if before[0] is None else torch.cat([before[0], down])
        tensors["frozen_up"] = up if before[1] is None else torch.cat([before[1], up], dim=1)
        if count:
            tensors |= {
                "tsd_weight": torch.zeros(count),
                "tsd_index": torch.full((count,), -1),
                "tsd_sigma": torch.zeros(count),
                "tsd_rate": torch.zeros(count),
            }
        return tensors

    def moved(self, adapter: str, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors (out, k) and (k, in) of the matrix M whose directions are scored."""
        raise NotImplementedError

    def first_weights(self, config: Any, directions: Directions) -> torch.Tensor:
        """Where the directions' weights start, (count): at 0, so that nothing jumps."""
        return torch.zeros_like(directions.pairs.values)

    def zero_directions(self, adapter: str) -> None:
        """Take the directions out of the update, to be trained again."""
        if self.has_parameter("tsd_weight", adapter):
            self.parameter("tsd_weight", adapter).detach().zero_()

    def has_directions(self, adapter: str) -> bool:
        """Whether the directions have been chosen."""
        if not self.has_buffer("tsd_index", adapter):
            return False
        index = self.buffer("tsd_index", adapter)
        read, written, chosen = self._read.get(adapter, (None, 0, False))
        if read is not index or written != version(index):
            # Only where it has changed, since reading waits for the device.
            chosen = bool((index >= 0).any())
            self._read[adapter] = index, version(index), chosen
        return chosen

    def point(self, adapter: str, directions: Directions, weights: torch.Tensor) -> None:
        """Switch the directions on, with weights (count)."""
        count = self.parameter("tsd_weight", adapter).shape[0]
        self.buffer("frozen_up", adapter)[:, -count:] = directions.pairs.up
        self.buffer("frozen_down", adapter)[-count:] = directions.pairs.down
        self.buffer("tsd_index", adapter).copy_(directions.index)
        self.buffer("tsd_sigma", adapter).copy_(directions.pairs.values)
        self.buffer("tsd_rate", adapter).copy_(directions.score)
        parameter = self.parameter("tsd_weight", adapter)
        parameter.copy_(spread_as(parameter, weights.to(parameter.dtype)))


class DirectedMethod(Method):
    """What methods do that choose directions. Their configuration has `tsd_count` and `warmup(total_steps)`."""

    def takes_largest(self, config: Any) -> bool:
        """Whether the pairs of the largest rate of change are chosen, and not those of the smallest."""
        return True

    def hold_back(self, moment: Moment) -> None:
        """Before a step: keep the directions' weights still until there are directions."""
        warmup = moment.config.warmup(moment.total_steps)
        if warmup is None or moment.step >= warmup:
            return
        if moment.step == 0 and moment.total_steps is not None and warmup >= moment.total_steps:
            warnings.warn(
                f"{type(moment.config).__name__}(warmup_steps={warmup}): the run has only {moment.total_steps} "
                "optimizer steps, so no task-specific directions will be chosen; lower warmup_steps.",
                stacklevel=2,
            )
        if not moment.all_layers[0].has_directions(moment.adapter):  # all layers get theirs at the same time
            for weight in (layer.parameter("tsd_weight", moment.adapter) for layer in moment.layers):
                # There is nothing to weigh yet. Zero gradients would leave the optimizer with wrong averages.
                if moment.awaits(weight):
                    weight.grad = None

    def after_step(self, moment: Moment) -> None:
        """Choose the directions at the end of the warm-up, once."""
        config = moment.config
        if moment.step + 1 != config.warmup(moment.total_steps):
            return
        moment.driver.require_finite(moment.all_layers)
        layers = [layer for layer in moment.all_layers if not layer.has_directions(moment.adapter)]
        chosen = choose_directions(layers, moment.adapter, config, largest=self.takes_largest(config))
        for layer, directions in zip(layers, chosen, strict=True):
            layer.point(moment.adapter, directions, layer.first_weights(config, directions))
        if layers:
            rates = torch.cat([layer.buffer("tsd_rate", moment.adapter).cpu() for layer in layers])
            logger.info(
                "adapter %r: %d task-specific directions chosen in %d matrices after %d optimizer steps, with change "
                "rates of %.3g to %.3g",
                *(moment.adapter, len(rates), len(layers), moment.step + 1, float(rates.min()), float(rates.max())),
            )

    def decided(self, layers: Mapping[str, AdapterLayer], adapter: str) -> list[dict[str, Any]]:
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
            if isinstance(layer, DirectedLayer) and layer.has_directions(adapter)
            for index, sigma, rate, weight in zip(
                *(layer.buffer(role, adapter).tolist() for role in ("tsd_index", "tsd_sigma", "tsd_rate")),
                layer.parameter("tsd_weight", adapter).tolist(),
                strict=True,
            )
        ]

    def report(self, moment: Moment) -> dict[str, Any]:
        """How many directions were chosen."""
        chosen = sum(
            layer.parameter("tsd_weight", moment.adapter).numel()
            for layer in moment.layers
            if layer.has_directions(moment.adapter)
        )
        return {"task_specific_directions": chosen}


def choose_directions(
    layers: Sequence[DirectedLayer], adapter: str, config: Any, *, largest: bool = True
) -> list[Directions]:
    """The directions of every layer: the largest δ among all singular pairs of W0, or the smallest.

    For the largest, few pairs need to be looked at. δ_i is at most ‖M‖₂ / σ_i, so once the smallest pairs are known,
    and σ of the next one is so large that this bound is below the `tsd_count`-th best score, no other can be among the
    best. The smallest need all.

    Args:
        layers: The layers.
        adapter: The adapter.
        config: Its configuration.
        largest: Whether the largest are chosen.
    """
    results = []
    with late_progress() as progress:
        progress("Choosing directions", 0, len(layers))
        for done, layer in enumerate(layers, start=1):  # one at a time: nobody has room for all pairs of all layers
            weight = layer.base_matrix()
            up, down = (whole(factor) for factor in layer.moved(adapter, config))
            count, sides = layer.parameter("tsd_weight", adapter).shape[0], min(weight.shape)
            size, floor = float(factor_spectrum(up, down)[0]), _floor(weight)
            pairs = next(smallest_pairs([layer], adapter))[1] if largest else smallest_triplets(weight, sides)
            chosen, enough = _best(pairs, up, down, count, sides, size, floor, largest)
            while not enough:
                pairs = smallest_triplets(weight, min(4 * pairs.values.shape[0], sides))
                chosen, enough = _best(pairs, up, down, count, sides, size, floor, largest)
            results.append(chosen)
            progress("Choosing directions", done, len(layers))
    return results


def _best(
    pairs: Triplets,
    up: torch.Tensor,
    down: torch.Tensor,
    count: int,
    sides: int,
    size: float,
    floor: float,
    largest: bool,
) -> tuple[Directions, bool]:
    """The best directions among some pairs, and whether no other pair can be among the best; `size` is ‖M‖₂."""
    u, values, v = (tensor.to(up) for tensor in (pairs.up, pairs.values, pairs.down))
    available = values.shape[0]
    # u_iᵀ M v_i for all i at once
    projections = ((u.t() @ up) * (v @ down.t())).sum(dim=1)
    score = projections.abs() / values.clamp_min(floor)
    best = torch.topk(score, min(count, available), largest=largest)
    index = best.indices
    chosen = Directions(index + (sides - available), best.values, Triplets(u[:, index], values[index], v[index]))
    enough = available == sides or float(best.values[-1]) >= size / max(float(values[0]), floor)
    return chosen, enough


def _floor(weight: torch.Tensor) -> float:
    """What singular values are clamped to in a rate of change: rounding error of the weight's own size."""
    norm = torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    return max(1e-7 * float(norm), torch.finfo(torch.float32).tiny)


def smallest_pairs(layers: Sequence[AdapterLayer], adapter: str) -> Iterator[tuple[int, Triplets]]:
    """The smallest singular triplets of each base weight: as many as a start and mostly the directions need.

    Each comes with the place of its layer.
    The same number in both places, so that the second finds what the first has left on the disk.
    """
    ranks = [
        min(layer.rank(adapter) + layer.buffer("frozen_down", adapter).shape[0], layer.in_features, layer.out_features)
        for layer in layers
    ]
    return decompose_each([layer.base_matrix for layer in layers], ranks, describe="Decomposing the base weights")
