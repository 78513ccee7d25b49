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
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dynalora.common.devices import sent
from dynalora.common.private import forget_history, note_new_slices
from dynalora.common.processes import spread_as, whole
from dynalora.driver.driver import is_marked, mark
from dynalora.driver.fitting import FACTORED
from dynalora.driver.hooks import known_optimizers
from dynalora.errors import UnsupportedError

States = MutableMapping[Any, MutableMapping[str, Any]]

# State that is no array of the parameter's entries: bitsandbytes' tables (its 8-bit arrays are handled with theirs).
_TABLES = frozenset(("qmap1", "qmap2", "absmax1", "absmax2", "unorm_vec"))

# State that is a copy of the weights from which the coming steps go on: schedule-free's z, lookahead's slow weights.
_STEPPED = frozenset(("z", "slow_param", "slow_params", "slow_buffer", "la_param"))

# State that is any copy of the weights: those, ASGD's average ax, and where D-Adaptation and Prodigy began.
_WEIGHTS = _STEPPED | {"ax", "p0", "x0"}

# State that is never one number for the whole parameter, though it may have one entry: what Prodigy samples.
_SAMPLES = frozenset(("p0", "s"))

# State that an optimizer's constructor makes, and that it does not make anew: of APOLLO, the seed of a projection.
_OF_CONSTRUCTOR = frozenset(("seed",))

# State in the parameter's shape that is a sum of gradients (1) or of their squares (2).
_MOMENTS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "square_avg": 2}


def carry_state(
    parameter: nn.Parameter, dim: int, keep: Sequence[int], new: torch.Tensor | None, count: int, size: int
) -> None:
    """Keep some slices of a parameter, put new ones after them, and let its gradient and optimizer state follow.

    In optimizer state the new slices are what those of a parameter that was never stepped would be, which is mostly
    zero, but in copies and averages of the weights they have their own values; where the new slices are a parameter
    themselves, they bring their state along. The count of steps, which is one number for the whole parameter, stays. An
    optimizer whose state cannot be taken apart starts anew with this parameter, with a warning.

    Args:
        parameter: The parameter.
        dim: The dimension along which the slices lie.
        keep: Indices of the slices that stay, in their new order.
        new: Values of the new slices, in the parameter's shape but for `dim`; None makes them zero.
        count: How many new slices there are.
        size: Size of the dimension afterwards, at least `len(keep) + count`; what is left over is zero.
    """
    kept = torch.tensor(list(keep), dtype=torch.int64)

    def resized(tensor: torch.Tensor, dim: int = dim, values: torch.Tensor | None = None) -> torch.Tensor:
        if hasattr(tensor, "full_tensor"):  # sharded by FSDP2
            return spread_as(tensor, resized(tensor.full_tensor(), dim, values))
        parts = [tensor.index_select(dim, sent(kept, tensor.device))]
        left = size - len(keep)
        if values is not None:
            parts.append(sent(whole(values).to(tensor.dtype), tensor.device))
            left -= count
        if left:
            shape = list(tensor.shape)
            shape[dim] = left
            parts.append(tensor.new_zeros(shape))
        return torch.cat(parts, dim)

    if size != parameter.shape[dim] or list(keep) != list(range(parameter.shape[dim])):
        note_new_slices(parameter, _refuse_to_average)
    with torch.no_grad():
        shape = parameter.shape
        gradient = None if parameter.grad is None else resized(parameter.grad)
        _put(parameter, resized(parameter.detach(), values=new), gradient)
        for optimizer, states in _states(parameter):
            _carry(optimizer, states, parameter, shape, resized, _NewSlices(dim, count, new))


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

    note_new_slices(parameter, _refuse_to_average)
    with torch.no_grad():
        shape = parameter.shape
        gradient = None if parameter.grad is None else mixed(parameter.grad, mix)
        _put(parameter, fitted(value.to(parameter.device, parameter.dtype)), gradient)
        for optimizer, states in _states(parameter):
            state = states[parameter]
            tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
            arrays = {key: value for key, value in tensors.items() if value.numel() > 1 or key in _SAMPLES}
            odd = [key for key, array in arrays.items() if key not in _MOMENTS or array.shape != shape]
            odd += [key for key, value in state.items() if _holds_tensors(value)]
            if odd:
                _start_anew(optimizer, states, parameter, odd[0], shape)
                continue
            for key, array in arrays.items():
                state[key] = mixed(array, mix if _MOMENTS[key] == 1 else mix.square())


def scale_copies(parameter: nn.Parameter, dim: int, by: torch.Tensor) -> None:
    """Multiply the copies of a parameter's values from which optimizers go on, as the parameter itself was multiplied.

    Args:
        parameter: The parameter.
        dim: The dimension along which its slices lie.
        by: Factors of the first slices, (n).
    """
    for _, states in _states(parameter):
        for key in _STEPPED & states[parameter].keys():
            copy = states[parameter][key]
            if copy.shape == parameter.shape:
                slices = copy.narrow(dim, 0, len(by)).movedim(dim, -1)
                slices.mul_(by.to(copy.device, copy.dtype))


def _states(parameter: nn.Parameter) -> list[tuple[torch.optim.Optimizer, States]]:
    """The optimizers that remember something of a parameter, each with where it keeps its state by parameter.

    That is the optimizer's `state`, but for some (GrokAdamW) a dictionary in one of its groups. What is kept for all
    parameters as one vector (LBFGS) is forgotten.
    """
    places: dict[int, tuple[torch.optim.Optimizer, States]] = {}
    for optimizer in known_optimizers():
        forget_history(optimizer, parameter)
        within = [group.get("state") for group in optimizer.param_groups]
        for states in (optimizer.state, *within):
            if isinstance(states, MutableMapping) and parameter in states:
                places[id(states[parameter])] = optimizer, states  # a wrapper may show another's state as its own
    return list(places.values())


def _refuse_to_average() -> None:
    raise UnsupportedError(
        "diffusers' EMAModel keeps averages as a list of tensors, which cannot follow ranks that move, and ranks have "
        "moved since it was made; average with torch.optim.swa_utils.AveragedModel(model), or make the EMAModel when "
        "ranks move no more."
    )


def _put(parameter: nn.Parameter, value: torch.Tensor, gradient: torch.Tensor | None) -> None:
    """Give a parameter another value and gradient, of any shape; the object stays, and the gradient's mark."""
    marked = parameter.grad is not None and is_marked(parameter.grad)
    _replace(parameter, value, gradient)
    if marked and parameter.grad is not None:
        mark(parameter.grad)


def _replace(parameter: nn.Parameter, value: torch.Tensor, gradient: torch.Tensor | None) -> None:
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


@dataclass(frozen=True)
class _NewSlices:
    """Slices that are put after those that stay.

    Attributes:
        dim: The dimension along which they lie.
        count: How many there are.
        values: Their values; None makes them zero.
    """

    dim: int
    count: int
    values: torch.Tensor | None

    def state(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter, key: str) -> torch.Tensor | None:
        """What an optimizer would have for them in a state of the parameter's shape; None: zeros."""
        if key in _WEIGHTS:
            return self.values
        brought = optimizer.state.get(self.values, {}) if isinstance(self.values, nn.Parameter) else {}
        value = brought.get(key)
        if isinstance(value, torch.Tensor) and self.values is not None and value.shape == self.values.shape:
            return value
        start = _first_value(optimizer, parameter, key)
        if not start:
            return None
        shape = list(parameter.shape)
        shape[self.dim] = self.count
        return parameter.new_full(shape, start)


def _first_value(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, key: str) -> float:
    """What an optimizer begins a state of the parameter's shape with, where that is not zero."""
    if key == "alphak":  # of D-Adaptation's Adagrad
        return 1e-6
    setting = {"step_size": "lr", "sum": "initial_accumulator_value"}.get(key)  # Rprop's and Adagrad's
    groups = (group for group in optimizer.param_groups if any(member is parameter for member in group["params"]))
    return float(next(groups, {}).get(setting) or 0.0) if setting else 0.0


def _carry(
    optimizer: torch.optim.Optimizer,
    states: States,
    parameter: nn.Parameter,
    shape: torch.Size,
    resized: Callable[..., torch.Tensor],
    new: _NewSlices,
) -> None:
    state = states[parameter]
    for key, value in list(state.items()):
        if _holds_tensors(value):
            _start_anew(optimizer, states, parameter, key, shape)
            return
        if key == "p0" and value.ndim == 0 and new.values is not None:
            value = value.expand(shape.numel())  # Prodigy's, of a parameter that began with zeros
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or key in _TABLES:
            continue
        if key in FACTORED and len(shape) == 2:
            if FACTORED[key] == new.dim:
                # Either the factor alone, or with a dimension of size 1 for the other.
                state[key] = resized(value, new.dim if value.ndim == 2 else 0)
        elif value.dtype == torch.bool and value.shape == shape:  # SPAM's mask of what is stepped: new slices are
            state[key] = ~resized(~value)
        elif value.shape == shape:
            number = key.removeprefix("state")
            if value.dtype == torch.uint8 and f"absmax{number}" in state:
                _carry_8bit(state, number, resized)
            else:
                state[key] = resized(value, values=new.state(optimizer, parameter, key))
        elif value.shape == (shape.numel(),):  # Prodigy's flat arrays
            state[key] = resized(value.view(shape), values=new.state(optimizer, parameter, key)).flatten()
        elif value.shape[1:] == shape and value.dtype != torch.uint8:  # AdEMAMix's two averages
            state[key] = torch.stack([resized(part) for part in value])
        elif value.numel() > 1 or key in _SAMPLES:
            _start_anew(optimizer, states, parameter, key, shape)
            return


def _holds_tensors(value: Any) -> bool:
    """Whether a state that is no plain tensor has tensors in it, of whatever shapes.

    Such are GaLore's and APOLLO's projections, lists of preconditioners (SOAP, Shampoo), and torchao's packed numbers.
    """
    if isinstance(value, torch.Tensor):
        return type(value) not in (torch.Tensor, nn.Parameter) and not hasattr(value, "full_tensor")
    if isinstance(value, list | tuple | dict):
        return any(isinstance(part, torch.Tensor) or _holds_tensors(part) for part in _parts(value))
    return not isinstance(value, type) and any(
        isinstance(part, torch.Tensor) for part in getattr(value, "__dict__", {}).values()
    )


def _parts(value: list[Any] | tuple[Any, ...] | dict[Any, Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _start_anew(
    optimizer: torch.optim.Optimizer, states: States, parameter: nn.Parameter, key: str, shape: torch.Size
) -> None:
    state = states.pop(parameter)
    of_constructor = {name: state[name] for name in _OF_CONSTRUCTOR & state.keys()}
    if of_constructor:
        states[parameter] = of_constructor
    form = f" of shape {tuple(state[key].shape)}" if isinstance(state[key], torch.Tensor) else ""
    warnings.warn(
        f"{type(optimizer).__name__} keeps {key!r}{form} for a parameter of shape "
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
