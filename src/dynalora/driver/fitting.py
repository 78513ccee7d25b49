"""Optimizer state that was saved where parameters had another size, because another number of processes trained them.

Where shapes must not change, room is reserved for ranks to come ([`carry`][dynalora.driver.carry]); an adapter's file
does not contain it, but an optimizer's state has the parameters' shape, room included. Places not in use are zero in
both, so the state is cut or filled up behind. Fused optimizers do not compare the shapes: without this they would read
past the end, or go on with moments that belong to other entries.
"""

from __future__ import annotations

import warnings
from collections.abc import MutableMapping
from typing import Any

import torch
from torch.optim import Optimizer

from dynalora.driver.registry import all_drivers

#: State of factored second moments, by the dimension of a matrix that it runs along.
FACTORED = {"exp_avg_sq_row": 0, "row_var": 0, "exp_avg_sq_col": 1, "col_var": 1}


def fit_states(optimizer: Optimizer) -> None:
    """Bring an optimizer's state of adapters to their parameters' shapes, where they differ in the rank only."""
    if not optimizer.state:
        return
    for driver, layers in all_drivers():
        for layer in layers:
            for role, parameter in layer.adapter_parameters(driver.adapter).items():
                dim = layer.rank_dims.get(role)
                if dim is not None and parameter in optimizer.state and not hasattr(parameter, "to_local"):
                    _fit_state(optimizer, parameter, dim)


def _fit_state(optimizer: Optimizer, parameter: torch.Tensor, dim: int) -> None:
    state: MutableMapping[str, Any] = optimizer.state[parameter]
    shape = list(parameter.shape)
    for key, value in list(state.items()):
        if not isinstance(value, torch.Tensor) or value.is_sparse:
            continue
        along, size = dim, shape[dim]
        if key in FACTORED and len(shape) == 2:
            if FACTORED[key] != dim or value.ndim == 0:
                continue
            # Either the factor alone, or with a dimension of size 1 for the other.
            along = dim if value.ndim == 2 else 0
        elif value.ndim != len(shape) or value.dtype == torch.uint8:
            continue  # of another kind: counts, or numbers in blocks
        have = value.shape[along]
        others = [n for at, n in enumerate(value.shape) if at != along]
        if have == size or (key not in FACTORED and others != [n for at, n in enumerate(shape) if at != dim]):
            continue
        if have > size and bool(value.narrow(along, size, have - size).any()):
            del optimizer.state[parameter]
            warnings.warn(
                f"{type(optimizer).__name__} was given state of shape {tuple(value.shape)} for a parameter of shape "
                f"{tuple(shape)}, of another adapter; it starts anew with that parameter.",
                stacklevel=2,
            )
            return
        wanted = list(value.shape)
        wanted[along] = size
        fitted = value.new_zeros(wanted)
        both = min(have, size)
        fitted.narrow(along, 0, both).copy_(value.narrow(along, 0, both))
        state[key] = fitted
