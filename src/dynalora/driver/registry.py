"""The adapted layers alive in this process, which is where a step of any optimizer looks for adapters to drive.

Layers are held weakly: nothing here keeps a model alive.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, cast

import torch
from torch import nn

from dynalora.driver import clipping
from dynalora.driver.driver import Driver
from dynalora.driver.losses import Gradients, other_threads, watch_backward

_layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_generation = 0


def track(layer: nn.Module) -> None:
    """Make an adapted layer, or a change of its adapters, known to the optimizer hooks (weakly)."""
    _layers.add(layer)
    if any(driver.needs_task_loss for driver in cast(Any, layer).drivers.values()):
        watch_backward(_note_gradients, _tell_drivers)
    if any(driver.clips_penalty for driver in cast(Any, layer).drivers.values()):
        clipping.watch()
    invalidate()


def invalidate() -> None:
    """Look all optimizers up anew at their next step, because layers, adapters or parameters have changed."""
    global _generation
    _generation += 1


def generation() -> int:
    """A number that changes whenever layers, adapters or parameters have changed."""
    return _generation


def any_layers() -> bool:
    """Whether there is any adapted layer."""
    return bool(_layers)


def all_drivers() -> list[tuple[Driver, list[Any]]]:
    """Every driver alive in this process with its layers, in model order."""
    drivers: dict[int, tuple[Driver, list[Any]]] = {}
    for layer in list(_layers):
        for driver in cast(Any, layer).drivers.values():
            drivers.setdefault(id(driver), (driver, []))[1].append(layer)
    for _, layers in drivers.values():
        # A WeakSet has no order; the layers' own numbering makes results independent of it.
        layers.sort(key=lambda layer: layer.order)
    return list(drivers.values())


def layers_of(driver: Driver) -> list[Any]:
    """All layers of an adapter in model order, whichever optimizers own their parameters."""
    return next((layers for other, layers in all_drivers() if other is driver), [])


def _note_gradients() -> list[tuple[Driver, Gradients]]:
    drivers = [(driver, layers) for driver, layers in all_drivers() if driver.needs_task_loss]
    if any(driver.thread == threading.get_ident() for driver, _ in drivers):
        # What another thread trains is left alone: PyTorch does not expect gradients to be read while they are made.
        others = other_threads()
        drivers = [(driver, layers) for driver, layers in drivers if driver.thread not in others]
    noted = [(driver, Gradients(layers, driver.adapter)) for driver, layers in drivers]
    for driver, gradients in noted:
        # A loss that no step has taken: of a micro-batch before, or of a step that a gradient scaler skipped.
        if driver.has_loss and gradients.begun:
            gradients.note_zeros()
    return noted


def _tell_drivers(loss: torch.Tensor, noted: list[tuple[Driver, Gradients]], alone: bool) -> None:
    """Tell the drivers whose adapters got gradients from this loss.

    Where other threads made gradients at the same time, the thread of an adapter's last forward pass tells whose
    they are.
    """
    for driver, gradients in noted:
        if not alone and driver.thread != threading.get_ident():
            continue
        if gradients.changed():
            driver.saw_loss(loss, anew=not gradients.begun or gradients.all_zero)
