"""One adapter made of several, in the ways in which PEFT combines LoRAs (`add_weighted_adapter`).

Only updates are combined, s·up·diag(d)·down with their frozen components, so a method has no way of its own:

* `"cat"`: the weighted sum of the updates, exactly. The components stand one after the other; where they would be more
  than the matrix has rows or columns, they are written anew as its singular components.
* `"svd"`: the best approximation of that sum of a given rank, from the factors alone.
* `"linear"`: up = Σ √|w s|·up_i and down = Σ ±√|w s|·down_i, so products of different adapters' factors are in it. It
  is meant for adapters of one start.
* TIES, DARE and pruning by magnitude, by PEFT's own functions: of the factors, or, with `_svd`, of the updates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties

from dynalora.adapter.config import is_number, is_whole
from dynalora.errors import ConfigError
from dynalora.spectral.spectrum import factor_svd

if TYPE_CHECKING:
    from dynalora.adapter.layer import AdapterLayer

#: What mixes tensors, by the name of the combination, with what it is given besides their weights.
_MIXES: dict[str, tuple[Callable[..., torch.Tensor], tuple[str, ...]]] = {
    "linear": (task_arithmetic, ()),
    "ties": (ties, ("density", "majority_sign_method")),
    "dare_linear": (dare_linear, ("density",)),
    "dare_ties": (dare_ties, ("density", "majority_sign_method")),
    "magnitude_prune": (magnitude_prune, ("density",)),
}
_OF_UPDATES = tuple(f"{name}_svd" for name in _MIXES if name != "linear")
#: All combinations by name.
COMBINATIONS = ("svd", "cat", *_MIXES, *_OF_UPDATES)

_Part = tuple[float, float, torch.Tensor, torch.Tensor]  # weight, scaling, up (out, k) and down (k, in)


@dataclass(frozen=True)
class Combination:
    """How adapters are combined into one.

    Attributes:
        weights: The adapters, each with its weight, which may be negative.
        kind: One of `COMBINATIONS`.
        rank: The rank of combinations with `svd`; None: the number of components of the adapter that has most.
        density: The share of values that TIES, DARE and pruning keep, in (0, 1].
        majority_sign_method: How TIES elects signs.

    Raises:
        ConfigError: A setting is none that there is.
    """

    weights: Sequence[tuple[str, float]]
    kind: str = "svd"
    rank: int | None = None
    density: float | None = None
    majority_sign_method: Literal["total", "frequency"] = "total"

    def __post_init__(self) -> None:
        if not self.weights:
            raise ConfigError("add_weighted_adapter needs at least one adapter; adapters is empty.")
        for name, weight in self.weights:
            if not is_number(weight):
                raise ConfigError(f"add_weighted_adapter: the weight of {name!r} must be a number, got {weight!r}.")
        if self.kind not in COMBINATIONS:
            raise ConfigError(
                f"add_weighted_adapter: combination_type must be one of {', '.join(map(repr, COMBINATIONS))}, got "
                f"{self.kind!r}."
            )
        if self.rank is not None and not (is_whole(self.rank) and self.rank > 0):
            raise ConfigError(f"add_weighted_adapter: svd_rank must be a positive integer, got {self.rank!r}.")
        needed = _MIXES.get(self.kind.removesuffix("_svd"), (None, ()))[1]
        if "density" in needed and not (is_number(self.density) and 0 < float(self.density or 0) <= 1):
            raise ConfigError(
                f"add_weighted_adapter: combination_type={self.kind!r} needs density, the share of values to keep, in "
                f"(0, 1], got {self.density!r}."
            )
        if self.majority_sign_method not in ("total", "frequency"):
            raise ConfigError(
                "add_weighted_adapter: majority_sign_method must be 'total' or 'frequency', got "
                f"{self.majority_sign_method!r}."
            )

    @torch.no_grad()
    def of(self, layer: AdapterLayer) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The factors of a layer's combined update at s = 1, up (out, r) and down (r, in); None without adapters.

        Args:
            layer: The layer, which some of the adapters adapt.

        Raises:
            UnsupportedError: An update depends on the input.
            ConfigError: Factors of different ranks are to be mixed with each other.
        """
        named = [(name, weight) for name, weight in self.weights if layer.has_adapter(name)]
        if not named:
            return None
        parts: list[_Part] = [(weight, layer.scaling[name], *layer.factors(name)) for name, weight in named]
        dtype = max((up.dtype for _, _, up, _ in parts), key=lambda kind: torch.finfo(kind).bits)
        device = parts[0][2].device
        place = "cpu" if device.type == "mps" else device  # which has no float64
        parts = [(weight, s, up.to(place).double(), down.to(place).double()) for weight, s, up, down in parts]
        up, down = self._combined(layer, parts)
        return up.to(dtype).contiguous(), down.to(dtype).contiguous()

    def _combined(self, layer: AdapterLayer, parts: list[_Part]) -> tuple[torch.Tensor, torch.Tensor]:
        sides = min(layer.in_features, layer.out_features)
        rank = min(sides, self.rank or max(len(down) for *_, down in parts))
        if self.kind in _OF_UPDATES:
            update = self._mix([s * up @ down for _, s, up, down in parts], [weight for weight, *_ in parts])
            u, values, v = torch.linalg.svd(update, full_matrices=False)
            return _cut(u, values, v, rank)
        if self.kind in ("cat", "svd"):
            up = torch.cat([weight * s * up for weight, s, up, _ in parts], dim=1)
            down = torch.cat([down for *_, down in parts])
            if self.kind == "cat" and len(down) <= sides:
                return up, down
            return _cut(*factor_svd(up, down), sides if self.kind == "cat" else rank)
        ranks = [len(down) for *_, down in parts]
        if len(set(ranks)) > 1:
            raise ConfigError(
                f"add_weighted_adapter: combination_type={self.kind!r} mixes factors of one rank, but in "
                f"{layer.name!r} the adapters have {', '.join(map(str, ranks))} components; use 'cat', 'svd' or a "
                "combination whose name ends in 'svd'."
            )
        roots = [math.sqrt(abs(weight * s)) for weight, s, *_ in parts]
        signed = [math.copysign(root, weight) for root, (weight, *_) in zip(roots, parts, strict=True)]
        return self._mix([up for *_, up, _ in parts], roots), self._mix([down for *_, down in parts], signed)

    def _mix(self, tensors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
        """Tensors of one shape mixed into one."""
        mix, needed = _MIXES[self.kind.removesuffix("_svd")]
        given: dict[str, Any] = {name: getattr(self, name) for name in needed}
        return mix(tensors, torch.tensor(weights, dtype=tensors[0].dtype, device=tensors[0].device), **given)


def _cut(u: torch.Tensor, values: torch.Tensor, v: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors (out, rank) and (rank, in) of the largest singular components."""
    root = values[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]
