"""Where a model computes, weights that Accelerate loads for each call only, and transfers that nobody waits for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from dynalora.common.private import offloading_hooks

T = TypeVar("T")

_IN_CACHE = 1 << 17
"""Numbers of one array that a processor is given at once, so that several such arrays stay in its cache."""


def device_of(model: nn.Module) -> torch.device:
    """The device that a model takes its inputs on: that of its first weight which is not offloaded."""
    first = next(model.parameters()).device
    return next((weight.device for weight in model.parameters() if not weight.is_meta), first)


def offloaded_weights(module: nn.Module) -> Mapping[str, torch.Tensor]:
    """The weights and buffers of a module that are elsewhere between its calls, by name; none where all are there."""
    found: dict[str, torch.Tensor] = {}
    for hook in offloading_hooks(module):
        assert hook.weights_map is not None
        names = [name for name, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None]
        found |= {name: hook.weights_map[name] for name in names if name in hook.weights_map}
    return found


def device_of_calls(module: nn.Module) -> torch.device | None:
    """The device on which a module with offloaded weights computes; None where its weights are where it computes."""
    for hook in offloading_hooks(module):
        return torch.device(hook.execution_device)
    return None


class Reading:
    """A tensor on its way to the processor, which goes on meanwhile.

    Reading a number from a CUDA device in the usual way waits for everything that the device has been given until then.
    This waits for what it had been given when the reading began.
    """

    def __init__(self, value: torch.Tensor) -> None:
        self._value, self._event = value, None
        if value.device.type == "cuda":
            self._value = value.to("cpu", non_blocking=True)  # to memory that torch pins for it
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(value.device))

    def get(self) -> torch.Tensor:
        """The tensor, once it is there."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._value


def sent(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device, for which no CUDA device is waited."""
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def in_turn(items: Sequence[T], numbers: int, device: torch.device) -> Sequence[Sequence[T]]:
    """Parts of what is computed together, one after the other.

    On a CPU several operations on few tensors after each other are faster than each of them on all tensors, which have
    left its cache by the time of the next. Elsewhere each operation takes time to begin, and there is one part.

    Args:
        items: What is computed together.
        numbers: How many numbers all of them have.
        device: Where they are.
    """
    if device.type != "cpu" or not items:
        return (items,)
    size = max(1, len(items) * _IN_CACHE // max(numbers, 1))
    return [items[first : first + size] for first in range(0, len(items), size)]
