"""Optimizer state that was saved where parameters had another size, because another number of processes trained them.

Where shapes must not change, room is reserved for ranks to come ([`carry`][dynalora.driver.carry]); an adapter's file
does not contain it, but an optimizer's state has the parameters' shape, room included. Places not in use are zero in
both, so the state is cut or filled up behind. Fused optimizers do not compare the shapes: without this they would read
past the end, or go on with moments that belong to other entries.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch.optim import Optimizer

from dynalora.driver.registry import all_drivers

#: State of factored second moments (Adafactor's, CAME's), by the dimension of a matrix that it runs along.
FACTORED = {
    "exp_avg_sq_row": 0,
    "exp_avg_res_row": 0,
    "row_var": 0,
    "exp_avg_sq_col": 1,
    "exp_avg_res_col": 1,
    "col_var": 1,
}


def fit_states(optimizer: Optimizer) -> None:
    """Bring an optimizer's state of adapters to their parameters' shapes, where they differ in the rank only."""
    if not optimizer.state:
        return
    for driver, layers in all_drivers():
        for layer in layers:
            for role, parameter in layer.adapter_parameters(driver.adapter).items():
                axes = layer.rank_axes.get(role)
                if axes is not None and parameter in optimizer.state and not hasattr(parameter, "to_local"):
                    _fit_state(optimizer, parameter, axes)


def _fit_state(optimizer: Optimizer, parameter: torch.Tensor, axes: tuple[int, ...]) -> None:
    state: MutableMapping[str, Any] = optimizer.state[parameter]
    shape = list(parameter.shape)
    if any(isinstance(value, torch.Tensor) and value.shape == parameter.shape for value in state.values()):
        return  # it fits; what has fewer entries is of another kind (Prodigy's samples of a vector)
    for key, value in list(state.items()):
        if type(value) is not torch.Tensor or value.is_sparse:
            continue
        if key in FACTORED and len(shape) == 2:
            if FACTORED[key] not in axes or value.ndim == 0:
                continue
            # Either the factor alone, or with a dimension of size 1 for the other.
            sizes = {FACTORED[key] if value.ndim == 2 else 0: shape[FACTORED[key]]}
        elif value.ndim != len(shape) or value.dtype == torch.uint8:
            continue  # of another kind: counts, or numbers in blocks
        elif any(value.shape[at] != size for at, size in enumerate(shape) if at not in axes):
            continue
        else:
            sizes = {along: shape[along] for along in axes}
        beyond = [
            value.narrow(along, size, value.shape[along] - size)
            for along, size in sizes.items()
            if value.shape[along] > size
        ]
        if any(bool(part.any()) for part in beyond):
            del optimizer.state[parameter]
            warnings.warn(
                f"{type(optimizer).__name__} was given state of shape {tuple(value.shape)} for a parameter of shape "
                f"{tuple(shape)}, of another adapter; it starts anew with that parameter.",
                stacklevel=2,
            )
            return
        if any(value.shape[along] != size for along, size in sizes.items()):
            state[key] = _fitted(value, sizes)


def begin_momentum(optimizer: Optimizer) -> None:
    """Give parameters of torch's fused SGD the momentum of 0 that they lack, where others of their group have theirs.

    It fails on parameters that get their first gradient later than others, as weights of directions do that are chosen
    in the course of training.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if not (group.get("fused") and group.get("momentum")):
            continue
        stepping = [parameter for parameter in group["params"] if parameter.grad is not None]
        lacking = [p for p in stepping if optimizer.state[p].get("momentum_buffer") is None]
        if len(lacking) < len(stepping):
            for parameter in lacking:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _fitted(value: torch.Tensor, sizes: Mapping[int, int]) -> torch.Tensor:
    """A tensor cut, or filled up with zeros, to sizes by dimension."""
    wanted = [sizes.get(at, size) for at, size in enumerate(value.shape)]
    fitted = value.new_zeros(wanted)
    both = tuple(slice(0, min(have, size)) for have, size in zip(value.shape, wanted, strict=True))
    fitted[both] = value[both]
    return fitted
