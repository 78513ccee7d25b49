"""Compaction: components that contribute nothing are removed, so that a sparse adapter becomes a small one.

A component is one column of `up` with one row of `down`. What it adds to the weight is a matrix of rank 1, whose only
singular value, s·|d_i|·‖up_i‖·‖down_i‖, is called its size. A component is dead if its size is at most a given share of
the largest singular value of s·ΔW over all matrices of the adapter. There are two ways to remove what is dead:

1. Cut: dead components are left out. The others stay exactly what they are, with gradients and optimizer state.
2. Rewrite: live components may still overlap, so that fewer singular components would give the same ΔW = UΣV. Where the
   diagonal is all ones, the factors are replaced by up = U√Σ and down = √ΣV. Since the new factors are linear maps of
   the old ones, up' = up·T and down' = S·down, so are their gradients: g_up' = g_up·Sᵀ and g_down' = Tᵀ·g_down. First
   moments of optimizers, which are sums of gradients, are mapped alike. Second moments are sums of squares and are
   mapped with the squares of the entries of S and T, which would be exact if a gradient's entries were uncorrelated.

No matrix goes below one component.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from dynalora.adapter.layer import AdapterLayer, adapter_layers
from dynalora.adapter.method import Method
from dynalora.common.processes import grouped, process_count
from dynalora.driver import drivers_of, mix_state
from dynalora.errors import ConfigError, DynaloraError, UnsupportedError
from dynalora.spectral.spectrum import factor_spectrum, factor_svd

if TYPE_CHECKING:
    from dynalora.driver import Driver

#: Below half precision's rounding: what is left out is not seen where models are served.
THRESHOLD = 1e-4


class RecordedGates(Protocol):
    """What is needed of a record of gates (`dynalora.record_gates`)."""

    @property
    def module(self) -> str:
        """Module name."""

    @property
    def mean_square(self) -> torch.Tensor:
        """Mean squared gate per component, (r)."""


@dataclass(frozen=True)
class CompactedMatrix:
    """What compaction did to one matrix.

    Attributes:
        module: Its name.
        before: Rank before.
        after: Rank afterwards.
        lost: Share of the update that is gone, ‖ΔW − ΔW_after‖_F / ‖ΔW‖_F; 0 for an update that is zero.
        rewritten: Whether the factors were rewritten to singular components.
    """

    module: str
    before: int
    after: int
    lost: float
    rewritten: bool


@dataclass(frozen=True)
class Compaction:
    """What compaction did to an adapter.

    Attributes:
        matrices: One entry per adapted matrix, in model order.
        parameters_before: Numbers in the adapter's parameters before.
        parameters_after: And afterwards.
        largest: The largest singular value of s·ΔW over all matrices.
        smallest: The smallest size of a component that stayed, without those that stayed as the last of their matrix;
            0 if there is none.
    """

    matrices: tuple[CompactedMatrix, ...]
    parameters_before: int
    parameters_after: int
    largest: float
    smallest: float

    @property
    def removed(self) -> int:
        """Number of components removed."""
        return sum(matrix.before - matrix.after for matrix in self.matrices)

    @property
    def lost(self) -> float:
        """Largest share of an update that is gone."""
        return max((matrix.lost for matrix in self.matrices), default=0.0)


def compact(
    model: nn.Module,
    threshold: float = THRESHOLD,
    *,
    adapter_name: str = "default",
    rewrite: bool = True,
    gates: Iterable[RecordedGates] | None = None,
) -> Compaction:
    """Remove an adapter's dead components: fewer parameters, less memory, a faster step, the same model.

    During training too: parameters stay the same objects, and gradients and the state of every optimizer that has
    stepped them follow. Ranks are saved with the adapter, and loading takes them on. An adapter whose update is zero
    everywhere, as at its start, is left as it is.

    Args:
        model: Model with the adapter, not merged.
        threshold: What counts as dead: sizes of at most this share of the largest singular value of s·ΔW over all
            matrices. 0 removes only what is exactly zero, and changes no output by more than the order of summation.
        adapter_name: Which adapter.
        rewrite: Whether factors may be rewritten to singular components where that removes more. Only where the
            diagonal is all ones (DiRA).
        gates: For an adapter with gates, its record on text that matters (`dynalora.record_gates`): sizes are
            then multiplied by the root mean square of each component's gate, so that components that never open go.

    Returns:
        What was removed.

    Raises:
        ConfigError: `threshold` is not in [0, 1), or `gates` are not this adapter's.
        UnsupportedError: The method's components cannot be removed now, or the adapter is merged, or shapes must stay
            as they are because several processes train.
        DynaloraError: The model has no such adapter.
    """
    if not 0 <= threshold < 1:
        raise ConfigError(f"threshold={threshold}: give a share of the largest singular value in [0, 1).")
    named = [pair for pair in drivers_of(model) if pair[0].adapter == adapter_name]
    if not named:
        raise DynaloraError(f"the model has no dynalora adapter named {adapter_name!r} to compact.")
    driver = named[0][0]
    layers = list(adapter_layers(model, adapter_name).values())
    openness = None if gates is None else _openness(layers, adapter_name, gates)
    return compact_layers(driver, layers, threshold, rewrite=rewrite, openness=openness)


@torch.no_grad()
def compact_layers(
    driver: Driver,
    layers: Sequence[AdapterLayer],
    threshold: float,
    *,
    rewrite: bool = True,
    openness: Mapping[str, torch.Tensor] | None = None,
) -> Compaction:
    """Remove an adapter's dead components; `compact` for those who have its layers at hand.

    Args:
        driver: The adapter's driver.
        layers: All its layers.
        threshold: As for `compact`.
        rewrite: As for `compact`.
        openness: How far each component's gate opens, (r) by layer name.

    Raises:
        UnsupportedError: As for `compact`.
    """
    adapter = driver.adapter
    _check(driver, layers)
    before = _parameters(layers, adapter)
    largest = max(float(layer.scaling[adapter] * factor_spectrum(*_factors(layer, adapter))[0]) for layer in layers)
    if not largest:
        rows = [CompactedMatrix(x.name, x.rank(adapter), x.rank(adapter), 0.0, rewritten=False) for x in layers]
        return Compaction(tuple(rows), before, before, 0.0, 0.0)
    rows, smallest = [], []
    for layer in layers:
        sizes = _sizes(layer, adapter)
        if openness is not None:
            sizes = sizes * openness[layer.name].to(sizes)
        row, left = _compact_layer(layer, adapter, sizes, threshold * largest, rewrite)
        rows.append(row)
        smallest.extend(left)
    return Compaction(tuple(rows), before, _parameters(layers, adapter), largest, min(smallest, default=0.0))


def _check(driver: Driver, layers: Sequence[AdapterLayer]) -> None:
    adapter, method = driver.adapter, driver.method
    assert isinstance(method, Method)
    trains = any(p.requires_grad for layer in layers for p in layer.adapter_parameters(adapter).values())
    reason = method.keeps_components(driver.moment(layers), trains)
    if reason:
        raise UnsupportedError(f"adapter {adapter!r} cannot be compacted: {reason}")
    if any(adapter in layer.merged_adapters for layer in layers):
        raise UnsupportedError(
            f"adapter {adapter!r} is merged into the base weights, from which only the update that was merged can be "
            "taken out again; call unmerge_adapter() before compacting it."
        )
    if trains:
        require_free_shapes(layers, adapter)


def require_free_shapes(layers: Iterable[AdapterLayer], adapter: str) -> None:
    """Check that the parameters of an adapter in training may change their shapes.

    Raises:
        UnsupportedError: Several processes train it, and no room is reserved.
    """
    if grouped() and process_count() > 1 and not all(layer.reserved[adapter] for layer in layers):
        raise UnsupportedError(
            f"adapter {adapter!r} trains on {process_count()} processes, whose buckets hold its "
            "parameters in the shapes they began with, so no components can be removed; compact it when training is "
            "over (and leave out compact_every)."
        )


def _compact_layer(
    layer: AdapterLayer, adapter: str, sizes: torch.Tensor, least: float, rewrite: bool
) -> tuple[CompactedMatrix, list[float]]:
    """Cut one layer; also the sizes of what stayed because it is large enough."""
    rank, sizes = layer.rank(adapter), sizes.to("cpu", torch.float64)
    keep = torch.nonzero(sizes > least).flatten().tolist()
    stayed = sizes[keep].tolist()
    keep = keep or [int(sizes.argmax())]
    up, down = (factor.detach().to(torch.float64, copy=True) for factor in _factors(layer, adapter))
    parts = None
    if rewrite and layer.plain(adapter) and len(keep) > 1:
        u, values, v = factor_svd(up, down)
        # Sizes of components bound the singular values from above only.
        count = max(1, int((layer.scaling[adapter] * values > least).sum()))
        if count < len(keep):
            parts = u[:, :count], values[:count], v[:count]
    lost = 0.0
    if parts is not None:
        # Of all components, also of those that alone are too small: together they may count.
        _rewrite(layer, adapter, *parts)
        stayed = [size for size in (layer.scaling[adapter] * parts[1]).tolist() if size > least]
        new_up, new_down = (factor.detach().double() for factor in _factors(layer, adapter))
        lost = _share((torch.cat([up, -new_up], 1), torch.cat([down, new_down])), (up, down))
    elif len(keep) < rank:
        layer.resize(adapter, keep)
        gone = [i for i in range(rank) if i not in set(keep)]
        lost = _share((up[:, gone], down[gone]), (up, down))
    return CompactedMatrix(layer.name, rank, layer.rank(adapter), lost, parts is not None), stayed


def _factors(layer: AdapterLayer, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors (out, k) and (k, in) of the update, or of the most that it can be where gates move."""
    return layer.factors(adapter, gates="open" if layer.depends_on_input(adapter) else "held")


def _sizes(layer: AdapterLayer, adapter: str) -> torch.Tensor:
    """Size s·|d_i|·‖up_i‖·‖down_i‖ of every component, (r), float64."""
    up, down = (factor.detach().double() for factor in _factors(layer, adapter))
    r = layer.rank(adapter)
    sizes: torch.Tensor = layer.scaling[adapter] * up[:, :r].norm(dim=0) * down[:r].norm(dim=1)
    return sizes


def _rewrite(layer: AdapterLayer, adapter: str, u: torch.Tensor, values: torch.Tensor, v: torch.Tensor) -> None:
    """Put singular components in the place of all components, with gradients and optimizer state."""
    up, down = (layer.parameter(role, adapter) for role in ("up", "down"))
    old_up, old_down = (layer.used(role, adapter).detach().double() for role in ("up", "down"))
    root = values.sqrt()
    new_up, new_down = u * root, root[:, None] * v
    # new_up = old_up · T and new_down = S · old_down, the smallest T and S where components depend on each other, which
    # they do to the rounding of the parameters' own type.
    rounding = max(old_up.shape + old_down.shape) * torch.finfo(up.dtype).eps
    t = torch.linalg.pinv(old_up, rtol=rounding) @ new_up
    s = new_down @ torch.linalg.pinv(old_down, rtol=rounding)
    size = max(len(values), layer.reserved[adapter])
    mix_state(up, 1, new_up, s, size)
    mix_state(down, 0, new_down, t.t(), size)
    layer.take_rank(adapter, len(values))


def _share(part: tuple[torch.Tensor, torch.Tensor], whole: tuple[torch.Tensor, torch.Tensor]) -> float:
    """‖part‖_F / ‖whole‖_F of two products of factors, without forming either; 0 of a whole that is zero."""
    size = float(factor_spectrum(*whole).norm())
    return float(factor_spectrum(*part).norm()) / size if size else 0.0


def _parameters(layers: Iterable[AdapterLayer], adapter: str) -> int:
    return sum(p.numel() for layer in layers for p in layer.adapter_parameters(adapter).values())


def _openness(layers: Sequence[AdapterLayer], adapter: str, gates: Iterable[RecordedGates]) -> dict[str, torch.Tensor]:
    """Root mean squares of the gates by layer name."""
    openness = {row.module: row.mean_square.double().sqrt() for row in gates}
    for layer in layers:
        if not layer.depends_on_input(adapter):
            raise ConfigError(
                f"gates were given, but adapter {adapter!r} ({layer.method_name}) has none; leave them out."
            )
        if layer.name not in openness or len(openness[layer.name]) != layer.rank(adapter):
            held = f"{len(openness[layer.name])} gates" if layer.name in openness else "no gates"
            raise ConfigError(
                f"the record has {held} for {layer.name!r}, whose adapter {adapter!r} has {layer.rank(adapter)}; "
                "record them anew with record_gates()."
            )
    return openness
