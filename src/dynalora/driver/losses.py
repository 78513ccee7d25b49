"""Reading the task loss, whatever computes it.

A method may weigh its regulariser against the task loss, whose value an optimizer never sees. It is computed by the
model in one trainer, by the trainer in another, by a line of the user's in a third; what they have in common is that
they call `backward` on it. So that is where it is read: `torch.autograd.backward`, which every `loss.backward()`
goes through, is wrapped the first time that an adapter needs the loss, and notes which adapters' gradients the call
made. The micro-batches of one optimizer step add up, as their gradients do. What layers gather in the passes of a step
is told apart from that of a step that was never taken in the same place (`Passes`).

Only values are read, and no device is waited for.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from dynalora.common.private import in_backward, version

_watching = False
_calls: list[_Call] = []
_threads: set[int] = set()
_lock = threading.Lock()


class _Call:
    """A call of `backward` that is under way.

    Attributes:
        alone: Whether no other thread made gradients at the same time.
    """

    alone = True


def other_threads() -> set[int]:
    """The threads besides this one that have made gradients by `backward`."""
    with _lock:
        return _threads - {threading.get_ident()}


def making_gradients() -> bool:
    """Whether a call of `backward` is under way in any thread, since they are watched."""
    return bool(_calls)


def watch_backward(before: Callable[[], Any], after: Callable[[torch.Tensor | None, Any, bool], None]) -> None:
    """Have functions called around every `backward`; the first call counts, others do nothing.

    Args:
        before: Called before the gradients are made.
        after: Called when they are there, with the scalar that they are of (None where it is none), with what `before`
            returned, and with whether no other thread made gradients meanwhile.
    """
    global _watching
    if _watching:
        return
    _watching = True
    backward = torch.autograd.backward

    @functools.wraps(backward)
    def and_tell(*args: Any, **kwargs: Any) -> None:
        if in_backward():  # gradient checkpointing calls backward on parts of the graph, from within
            backward(*args, **kwargs)
            return
        call = _Call()
        with _lock:
            _calls.append(call)
            _threads.add(threading.get_ident())
            for other in _calls if len(_calls) > 1 else ():
                other.alone = False
        try:
            noted = before()
            backward(*args, **kwargs)
        finally:
            with _lock:
                _calls.remove(call)
        tensors = args[0] if args else kwargs.get("tensors")
        loss = tensors if isinstance(tensors, torch.Tensor) else next(iter(tensors or ()), None)
        scalar = loss.detach() if isinstance(loss, torch.Tensor) and loss.numel() == 1 else None
        after(scalar, noted, call.alone)

    torch.autograd.backward = and_tell


class Gradients:
    """The gradients of an adapter's weights as they stand, one of each layer, to see whether a call makes any."""

    def __init__(self, layers: Iterable[Any], adapter: str) -> None:
        self._parameters = [tuple(layer.adapter_parameters(adapter).values()) for layer in layers]
        # The tensors are held, so that no new one can be taken for one that is gone.
        self._before = [_some_gradient(layer) for layer in self._parameters]
        self._all_zero = False
        self._versions = [None if gradient is None else version(gradient) for gradient in self._before]

    def changed(self) -> bool:
        """Whether any gradient is new or was written to since."""
        now = (_some_gradient(layer) for layer in self._parameters)
        return any(
            gradient is not None and (gradient is not before or version(gradient) != written)
            for gradient, before, written in zip(now, self._before, self._versions, strict=True)
        )

    @property
    def begun(self) -> bool:
        """Whether there were gradients already, which a call would add to."""
        return any(gradient is not None for gradient in self._before)

    @property
    def all_zero(self) -> bool:
        """Whether those gradients were all zero, as `zero_grad(set_to_none=False)` leaves them."""
        return self._all_zero

    def note_zeros(self) -> None:
        """Look, before a call, whether the gradients that there are were made zero."""
        local = [g.to_local() if hasattr(g, "to_local") else g for g in self._before if g is not None]
        self._all_zero = not any(bool(gradient.any()) for gradient in local)


class Passes:
    """Whether the gradients that an adapter's next backward pass adds to are still those of its last one.

    If not, they were thrown away without a step: a gradient scaler, or the user's loop, has left the step out.

    Only one gradient is looked at, which is enough to see that they were made zero or None; the driver forgets this at
    every step. No model is kept alive.
    """

    def __init__(self) -> None:
        self._watched: tuple[weakref.ref[nn.Parameter], torch.Tensor, int] | None = None

    def ended(self, layers: Iterable[Any], adapter: str) -> bool:
        """Note that a backward pass has ended; returns whether the adapter has any gradient now."""
        for layer in layers:
            for parameter in layer.adapter_parameters(adapter).values():
                if (gradient := parameter.grad) is not None:
                    self._watched = weakref.ref(parameter), gradient, version(gradient)
                    return True
        return False

    def dropped(self, layers: Iterable[Any], adapter: str) -> bool:
        """Whether the gradients of the last backward pass are gone; then they are forgotten here, too."""
        if self._watched is None:
            return False
        (parameter, gradient, written), now = self._watched, None
        if (live := parameter()) is not None:
            now = live.grad
        if now is gradient and version(now) == written:
            return False
        if now is not None:  # clipped or unscaled, or made zero
            gradients = Gradients(layers, adapter)
            gradients.note_zeros()
            if not gradients.all_zero:
                return False
        self._watched = None
        return True


def _some_gradient(parameters: Iterable[nn.Parameter]) -> torch.Tensor | None:
    return next((p.grad for p in parameters if p.grad is not None), None)
