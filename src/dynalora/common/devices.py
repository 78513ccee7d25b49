"""Where a model computes, and weights that Accelerate loads from memory or disk for each call only."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from dynalora.common.private import offloading_hooks


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
