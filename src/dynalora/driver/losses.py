"""Reading the task loss, whatever computes it.

A method may weigh its regulariser against the task loss, whose value an optimizer never sees. It is computed by the
model in one trainer, by the trainer in another, by a line of the user's in a third; what they have in common is that
they call ``backward`` on it. So that is where it is read: ``torch.autograd.backward``, which every ``loss.backward()``
goes through, is wrapped the first time that an adapter needs the loss, and notes which adapters' gradients the call
made. The micro-batches of one optimizer step add up, as their gradients do.

Only values are read, and no device is waited for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_listeners: list[Callable[[torch.Tensor], None]] = []
_running = False


def listen(listener: Callable[[torch.Tensor], None]) -> None:
    """Have a function called with every scalar that ``backward`` was called on, after its gradients are there."""
    if not _listeners:
        _wrap_backward()
    _listeners.append(listener)


def _wrap_backward() -> None:
    backward = torch.autograd.backward

    @functools.wraps(backward)
    def and_tell(*args: Any, **kwargs: Any) -> None:
        global _running
        if _running:  # gradient checkpointing calls backward on parts of the graph, from within
            backward(*args, **kwargs)
            return
        _running = True
        try:
            backward(*args, **kwargs)
        finally:
            _running = False
        tensors = args[0] if args else kwargs.get("tensors")
        loss = tensors if isinstance(tensors, torch.Tensor) else next(iter(tensors or ()), None)
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            for listener in _listeners:
                listener(loss.detach())

    torch.autograd.backward = and_tell


def made_gradients(layers: list[Any], adapter: str) -> tuple[bool, bool]:
    """Whether gradients of an adapter's weights were made since the last call, and whether they were begun anew.

    Args:
        layers: The adapter's layers.
        adapter: Its name.

    Returns:
        Whether any gradient is new or was added to; and whether none of them is the continuation of one seen before.
    """
    made, anew = False, True
    for layer in layers:
        gradient = _some_gradient(layer.adapter_parameters(adapter))
        if gradient is None:
            continue
        # A tensor that was written to has another version; one made since has no mark.
        seen = getattr(gradient, "_dynalora_seen", None)
        if seen is not None:
            anew = False
        if seen != gradient._version:
            made = True
            gradient._dynalora_seen = gradient._version  # type: ignore[attr-defined]
    return made, anew


def _some_gradient(parameters: dict[str, nn.Parameter]) -> torch.Tensor | None:
    return next((p.grad for p in parameters.values() if p.grad is not None), None)
