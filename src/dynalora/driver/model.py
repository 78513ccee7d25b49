"""What can be asked of all drivers of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from dynalora.driver.driver import Driver
from dynalora.driver.registry import layers_of


def drivers_of(model: nn.Module) -> Iterator[tuple[Driver, list[Any]]]:
    """Every driver of a model with its layers, in model order; the first layer carries the clock.

    Args:
        model: A model with adapters, wrapped by PEFT or not.
    """
    drivers: dict[int, tuple[Driver, list[Any]]] = {}
    for module in model.modules():
        if hasattr(module, "adapter_parameters"):
            for driver in cast(Any, module).drivers.values():
                drivers.setdefault(id(driver), (driver, []))[1].append(module)
    for driver, layers in drivers.values():
        layers.sort(key=lambda layer: layer.progress(driver.adapter) is None)
        driver.read(layers[0])
        yield driver, layers


def restart_schedule(model: nn.Module, total_steps: int | None = None) -> None:
    """Start the schedules of a model's adapters anew, for a further run of a bare training loop.

    transformers' Trainer does this by itself.

    Args:
        model: A model with adapters.
        total_steps: Optimizer steps of the coming run; None keeps the last known number. A `total_steps` in the
            adapter's configuration is replaced by it.
    """
    for driver, layers in drivers_of(model):
        if total_steps and getattr(driver.config, "total_steps", None):
            driver.config.total_steps = total_steps  # type: ignore[attr-defined]
        driver.begin_run(layers[0], total_steps, fresh=True)


def accept_undriven(model: nn.Module) -> None:
    """Accept adapters that were trained without their method's part, so that they can be saved.

    Args:
        model: A model with adapters.
    """
    for driver, _ in drivers_of(model):
        driver.accepted_undriven = True


def fill_reference(model: nn.Module) -> None:
    """Make the adapter `ref` of TRL's preference and policy trainers a copy of the trained adapter `default`.

    TRL adds it with the configuration of `default` and copies the parameters whose names contain `.default.`, as LoRA's
    do; ours end in the adapter's name, and what an adapter is also lies in buffers and ranks. An adapter `ref` that was
    made with another configuration is somebody else's, and stays as it is.

    Args:
        model: A model, with adapters or without.
    """
    found = {driver.adapter: (driver, layers) for driver, layers in drivers_of(model)}
    if not {"default", "ref"} <= found.keys() or found["ref"][0].config is not found["default"][0].config:
        return
    for layer in found["default"][1]:
        layer.unprepared.pop("ref", None)
        layer.copy_adapter("default", "ref")


def report_task_loss(model: nn.Module, loss: torch.Tensor | float) -> None:
    """Say what the task loss of the coming optimizer step is, where it cannot be seen.

    It is seen wherever gradients are made by `loss.backward()`, under any trainer. A loop that makes them otherwise
    (`torch.autograd.grad`, gradients from another process) calls this before each `optimizer.step()`.

    Args:
        model: A model with adapters.
        loss: The loss of this process, over all micro-batches of the step, without gradient scaling.
    """
    for driver, _ in drivers_of(model):
        driver.report_loss(loss)


def check_driven(model: nn.Module, when: str) -> None:
    """Check every driver of a model; see `Driver.check_driven`.

    Raises:
        ScheduleError: An adapter was trained past its driver.
    """
    for driver, layers in drivers_of(model):
        driver.check_driven(layers, when)


def prepare_unloaded(model: nn.Module) -> None:
    """Let methods compute the start of adapters that were made as if to be loaded, and got no weights from a file.

    Args:
        model: A model with adapters, or one of its layers; then all layers of the layer's adapters are prepared.
    """
    for driver, _ in drivers_of(model):
        adapter = driver.adapter
        layers = {}
        for layer in layers_of(driver):
            # transformers loads weights by putting other parameters in place.
            if layer.unprepared.pop(adapter, None) is layer.parameter("up", adapter):
                layers[layer.name] = layer
        if layers:
            driver.method.prepare(layers, adapter, driver.config)
