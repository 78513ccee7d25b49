"""The adapted layers alive in this process, which is where a step of any optimizer looks for adapters to drive.

Layers are held weakly: nothing here keeps a model alive.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
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
    if any(driver.needs_task_loss or driver.gathers for driver in cast(Any, layer).drivers.values()):
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


@dataclass(frozen=True)
class _Noted:
    """What was noted before a backward pass.

    Attributes:
        weighing: Drivers that need the task loss, with the gradients that were there.
        gathering: Drivers whose layers gather something in the passes of a step, with those layers.
    """

    weighing: list[tuple[Driver, Gradients]]
    gathering: list[tuple[Driver, list[Any]]]


def _note_gradients() -> _Noted:
    drivers = [(driver, layers) for driver, layers in all_drivers() if driver.needs_task_loss or driver.gathers]
    if any(driver.thread == threading.get_ident() for driver, _ in drivers):
        # What another thread trains is left alone: PyTorch does not expect gradients to be read while they are made.
        others = other_threads()
        drivers = [(driver, layers) for driver, layers in drivers if driver.thread not in others]
    noted = [(driver, Gradients(layers, driver.adapter)) for driver, layers in drivers if driver.needs_task_loss]
    for driver, gradients in noted:
        # A loss that no step has taken: of a micro-batch before, or of a step that a gradient scaler skipped.
        if driver.has_loss and gradients.begun:
            gradients.note_zeros()
    gathering = [(driver, layers) for driver, layers in drivers if driver.gathers]
    for driver, layers in gathering:
        driver.before_backward(layers)
    return _Noted(noted, gathering)


def _tell_drivers(loss: torch.Tensor | None, noted: _Noted, alone: bool) -> None:
    """Tell the drivers whose adapters got gradients from this loss.

    Where other threads made gradients at the same time, the thread of an adapter's last forward pass tells whose
    they are.
    """

    def concerned(driver: Driver) -> bool:
        return alone or driver.thread == threading.get_ident()

    for driver, layers in noted.gathering:
        if concerned(driver):
            driver.after_backward(layers)
    for driver, gradients in noted.weighing if loss is not None else ():
        if concerned(driver) and gradients.changed():
            assert loss is not None
            driver.saw_loss(loss, anew=not gradients.begun or gradients.all_zero)
