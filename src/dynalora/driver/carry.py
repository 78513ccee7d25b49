"""Changing the size of a parameter in the middle of a run, with all that optimizers remember of it.

When the rank of a layer changes, its factors lose or gain rows or columns while training goes on. An optimizer knows a
parameter by the object, and keeps for it arrays of the same shape: momentum, second moments. If the parameter were
replaced by a new one, the optimizer would go on stepping the old one; if only its data were resized, the next step
would fail on arrays of another shape.

So the object stays. Its storage, its gradient and every array that an optimizer keeps in its shape are cut and extended
alike: entries that stay keep their values in all of them, and state of new ones starts at zero. There are two ways:
`carry_state` keeps some rows and adds others; `mix_state` replaces rows by linear combinations of the old ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import nn

from dynalora.common.processes import spread_as, whole
from dynalora.driver.fitting import FACTORED
from dynalora.driver.hooks import known_optimizers

# State that is no array of the parameter's entries: bitsandbytes' tables (its 8-bit arrays are handled with theirs).
_TABLES = frozenset(("qmap1", "qmap2", "absmax1", "absmax2", "unorm_vec"))

# State that is a copy of the weights, or an average of them: schedule-free's z, ASGD's ax, Prodigy's p0.
_WEIGHTS = frozenset(("z", "ax", "p0"))

# State in the parameter's shape that is a sum of gradients (1) or of their squares (2).
_MOMENTS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "square_avg": 2}


def carry_state(
    parameter: nn.Parameter, dim: int, keep: Sequence[int], new: torch.Tensor | None, count: int, size: int
) -> None:
    """Keep some slices of a parameter, put new ones after them, and let its gradient and optimizer state follow.

    In optimizer state the new slices are zero, as those of a parameter that was never stepped, but in copies and
    averages of the weights, where they have their own values; where the new slices are a parameter themselves, they
    bring their state along. The count of steps, which is one number for the whole parameter, stays. An optimizer whose
    state cannot be taken apart starts anew with this parameter, with a warning.

    Args:
        parameter: The parameter.
        dim: The dimension along which the slices lie.
        keep: Indices of the slices that stay, in their new order.
        new: Values of the new slices, in the parameter's shape but for `dim`; None makes them zero.
        count: How many new slices there are.
        size: Size of the dimension afterwards, at least `len(keep) + count`; what is left over is zero.
    """

    def resized(tensor: torch.Tensor, dim: int = dim, values: torch.Tensor | None = None) -> torch.Tensor:
        if hasattr(tensor, "full_tensor"):  # sharded by FSDP2
            return spread_as(tensor, resized(tensor.full_tensor(), dim, values))
        parts = [tensor.index_select(dim, torch.tensor(list(keep), dtype=torch.int64, device=tensor.device))]
        left = size - len(keep)
        if values is not None:
            parts.append(whole(values).to(tensor.device, tensor.dtype))
            left -= count
        if left:
            shape = list(tensor.shape)
            shape[dim] = left
            parts.append(tensor.new_zeros(shape))
        return torch.cat(parts, dim)

    with torch.no_grad():
        shape = parameter.shape
        gradient = None if parameter.grad is None else resized(parameter.grad)
        _put(parameter, resized(parameter.detach(), values=new), gradient)
        for optimizer in known_optimizers():
            if parameter in optimizer.state:
                _carry(optimizer, parameter, shape, dim, resized, new)


def mix_state(parameter: nn.Parameter, dim: int, value: torch.Tensor, mix: torch.Tensor, size: int) -> None:
    """Replace a parameter's slices by others, whose gradients are `mix` times those of the old ones.

    The gradient and the optimizers' first moments, which are sums of gradients, follow exactly. Second moments follow
    by the squares of `mix`, as if the entries of a gradient were uncorrelated. What is kept in any other form starts
    anew, with a warning.

    Args:
        parameter: The parameter.
        dim: The dimension along which the slices lie.
        value: The new slices, k of them along `dim`.
        mix: Coefficients of the old slices that are in use, (k, old slices).
        size: Size of the dimension afterwards, at least k; what is left over is zero.
    """

    def mixed(tensor: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        slices = tensor.narrow(dim, 0, mix.shape[1]).movedim(dim, 0)
        product = torch.tensordot(by, slices.to(by.dtype), dims=1).movedim(0, dim)
        return fitted(product).to(tensor.dtype)

    def fitted(tensor: torch.Tensor) -> torch.Tensor:
        shape = list(tensor.shape)
        shape[dim] = size - tensor.shape[dim]
        return torch.cat([tensor, tensor.new_zeros(shape)], dim).contiguous()

    with torch.no_grad():
        shape = parameter.shape
        gradient = None if parameter.grad is None else mixed(parameter.grad, mix)
        _put(parameter, fitted(value.to(parameter.device, parameter.dtype)), gradient)
        for optimizer in known_optimizers():
            state: MutableMapping[str, Any] = optimizer.state.get(parameter, {})
            arrays = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.numel() > 1}
            odd = [key for key, array in arrays.items() if key not in _MOMENTS or array.shape != shape]
            if odd:
                _start_anew(optimizer, parameter, odd[0], arrays[odd[0]].shape, shape)
                continue
            for key, array in arrays.items():
                state[key] = mixed(array, mix if _MOMENTS[key] == 1 else mix.square())


def _put(parameter: nn.Parameter, value: torch.Tensor, gradient: torch.Tensor | None) -> None:
    """Give a parameter another value and gradient, of any shape; the object stays."""
    if value.shape == parameter.shape:
        parameter.copy_(value)
        if parameter.grad is not None and gradient is not None:
            parameter.grad.copy_(gradient)
        return
    parameter.grad = None
    # A graph that is still alive (a loss somebody holds on to) keeps autograd's note of the old shape alive
    # with it; only a change of dtype makes autograd drop that note.
    other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = value
    parameter.grad = gradient


def _carry(
    optimizer: torch.optim.Optimizer,
    parameter: nn.Parameter,
    shape: torch.Size,
    dim: int,
    resized: Callable[..., torch.Tensor],
    new: torch.Tensor | None,
) -> None:
    state: MutableMapping[str, Any] = optimizer.state[parameter]
    for key, value in list(state.items()):
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or key in _TABLES:
            continue
        if key in FACTORED and len(shape) == 2:
            if FACTORED[key] == dim:
                # Either the factor alone, or with a dimension of size 1 for the other.
                state[key] = resized(value, dim if value.ndim == 2 else 0)
        elif value.shape == shape:
            number = key.removeprefix("state")
            if value.dtype == torch.uint8 and f"absmax{number}" in state:
                _carry_8bit(state, number, resized)
            else:
                state[key] = resized(value, values=new if key in _WEIGHTS else _brought(optimizer, new, key))
        elif value.shape == (shape.numel(),):  # Prodigy's flat arrays
            state[key] = resized(value.view(shape), values=new if key in _WEIGHTS else None).flatten()
        elif value.numel() > 1:
            _start_anew(optimizer, parameter, key, value.shape, shape)
            return


def _brought(optimizer: torch.optim.Optimizer, new: torch.Tensor | None, key: str) -> torch.Tensor | None:
    """State that new slices have as a parameter of the same optimizer; None if there is none."""
    state = optimizer.state.get(new, {}) if isinstance(new, nn.Parameter) else {}
    value = state.get(key)
    return value if isinstance(value, torch.Tensor) and new is not None and value.shape == new.shape else None


def _start_anew(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, key: str, state: torch.Size, shape: torch.Size
) -> None:
    del optimizer.state[parameter]
    warnings.warn(
        f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(state)} for a parameter of shape "
        f"{tuple(shape)}, which cannot follow a change of rank; it starts anew with that parameter at every "
        "adjustment. Use AdamW, SGD, Adafactor or bitsandbytes' optimizers to keep its state.",
        stacklevel=3,
    )


def _carry_8bit(state: MutableMapping[str, Any], number: str, resized: Callable[..., torch.Tensor]) -> None:
    """Let blockwise 8-bit state follow: blocks run across slices, so it is unpacked and packed again."""
    from bitsandbytes import functional

    packed, absmax, code = (state[f"{name}{number}"] for name in ("state", "absmax", "qmap"))
    block = next(size for size in (256, 2048, 4096) if -(-packed.numel() // size) == absmax.numel())
    values = functional.dequantize_blockwise(packed, absmax=absmax, code=code, blocksize=block)
    packed, how = functional.quantize_blockwise(resized(values).contiguous(), code=code, blocksize=block)
    state[f"state{number}"], state[f"absmax{number}"] = packed, how.absmax
