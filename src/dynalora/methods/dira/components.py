"""The rank-1 components of an adapter in training: their norms, and what shrinks or removes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dynalora.adapter.compaction import require_free_shapes
from dynalora.adapter.layer import AdapterLayer
from dynalora.driver import Moment, scale_copies
from dynalora.errors import UnsupportedError


@dataclass(frozen=True)
class Components:
    """The components of all layers that train, one after the other.

    Attributes:
        layers: The layers, in model order.
        sizes: Product of norms ‖up_i‖·‖down_i‖ of every component, (n), float64 on the CPU.
        alive: Whether a component is more than zeros, (n), on the CPU. One with `up` zero and `down` not, as at the
            start, is.
    """

    layers: Sequence[AdapterLayer]
    sizes: torch.Tensor
    alive: torch.Tensor

    @staticmethod
    def of(moment: Moment) -> Components:
        """The components as they are now; waits for the device once."""
        layers = trained_layers(moment)
        if not layers:
            return Components(layers, torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.bool))
        norms: dict[int, torch.Tensor] = {}
        for group in _by_shape(layers, moment.adapter):
            down = torch.stack([layers[i].used("down", moment.adapter) for i in group])  # (L, r, in)
            up = torch.stack([layers[i].used("up", moment.adapter) for i in group])  # (L, out, r)
            pairs = torch.stack([component_norms(down, dim=2), component_norms(up, dim=1)], dim=1)  # (L, 2, r)
            norms.update(zip(group, pairs.unbind(), strict=True))
        device = norms[0].device
        both = torch.cat([norms[i].to(device) for i in range(len(layers))], dim=1).to("cpu", torch.float64)
        return Components(layers, both[0] * both[1], (both > 0).any(dim=0))

    def by_layer(self, values: torch.Tensor, adapter: str) -> list[tuple[AdapterLayer, torch.Tensor]]:
        """Values of all components, (n), as one (r) per layer."""
        parts = values.split([layer.rank(adapter) for layer in self.layers])
        return list(zip(self.layers, parts, strict=True))


def trained_layers(moment: Moment) -> list[AdapterLayer]:
    """The adapter's layers with a factor that trains, in model order."""
    adapter = moment.adapter
    return [
        layer
        for layer in moment.all_layers
        if any(layer.parameter(role, adapter).requires_grad for role in ("down", "up"))
    ]


def component_norms(factors: torch.Tensor, dim: int) -> torch.Tensor:
    """Norms of rows or columns, in float64 where a device has it.

    Squares of tiny entries vanish in float32, and the penalty makes entries tiny.
    """
    dtype = torch.float64 if factors.device.type != "mps" else None
    norms: torch.Tensor = torch.linalg.vector_norm(factors, dim=dim, dtype=dtype)
    return norms


def shrink(components: Components, sizes: torch.Tensor, adapter: str) -> None:
    """Give components other products of norms, their directions as they are; a factor that does not train keeps its
    norm.

    Args:
        components: The components.
        sizes: Their new products of norms, (n); at most the old ones.
        adapter: The adapter.
    """
    ratio = torch.where(components.sizes > 0, sizes / components.sizes.clamp_min(torch.finfo(sizes.dtype).tiny), 1.0)
    for layer, part in components.by_layer(ratio, adapter):
        moving = [role for role in ("down", "up") if layer.parameter(role, adapter).requires_grad]
        if bool((part == 1).all()):
            continue
        for role in moving:
            factor = layer.used(role, adapter)
            by = part.pow(1 / len(moving)).to(factor.device, factor.dtype)
            factor.mul_(by[:, None] if role == "down" else by)
            scale_copies(layer.parameter(role, adapter), layer.rank_dims[role], by)


def remove(components: Components, dying: torch.Tensor, moment: Moment, *, cut: bool) -> None:
    """Let components die: their values, gradients and optimizer state are zero from now on, or gone.

    At zero in both factors a component's gradient is zero, so without momentum it stays there.

    Args:
        components: The components.
        dying: Which ones, (n).
        moment: The moment after the optimizer's step.
        cut: Take them out, where shapes may change and a layer keeps one.
    """
    adapter = moment.adapter
    for layer, part in components.by_layer(dying, adapter):
        count = int(part.sum())
        if not count:
            continue
        left = (~part).nonzero().flatten().tolist()
        if cut and left and shapes_free(layer, adapter):
            layer.resize(adapter, left)
        else:
            layer.resize(adapter, left, {role: _zeros(layer, role, adapter, count) for role in ("down", "up")})


def shapes_free(layer: AdapterLayer, adapter: str) -> bool:
    """Whether the layer's parameters may lose components now."""
    try:
        require_free_shapes([layer], adapter)
    except UnsupportedError:
        return False
    return True


def _zeros(layer: AdapterLayer, role: str, adapter: str, count: int) -> torch.Tensor:
    parameter, dim = layer.parameter(role, adapter), layer.rank_dims[role]
    shape = list(parameter.shape)
    shape[dim] = count
    return torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)


def _by_shape(layers: Sequence[AdapterLayer], adapter: str) -> list[list[int]]:
    groups: dict[Any, list[int]] = {}
    for place, layer in enumerate(layers):
        down, up = layer.used("down", adapter), layer.used("up", adapter)
        groups.setdefault((down.shape, up.shape, down.dtype, down.device), []).append(place)
    return list(groups.values())
