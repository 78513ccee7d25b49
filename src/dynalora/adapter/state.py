"""What the adapters of a model are doing now."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dynalora.adapter.method import Method
from dynalora.common.names import plain_name
from dynalora.common.notebook import Shown
from dynalora.driver import drivers_of


@dataclass(frozen=True)
class StateReport(Shown):
    """The state of one adapter.

    Attributes:
        adapter: Its name.
        method: Its method.
        step: Optimizer steps done in this run (steps skipped by a gradient scaler do not count).
        total_steps: Steps of the run, None when unknown.
        ranks: Rank of each adapted matrix by module name.
        trainable_parameters: Numbers of the adapter that train.
        details: What the method and `retain` say of themselves (weights of penalties, how open gates are, …).
    """

    adapter: str
    method: str
    step: int
    total_steps: int | None
    ranks: dict[str, int]
    trainable_parameters: int
    details: dict[str, Any] = field(default_factory=dict)


class StateReports(list[StateReport], Shown):
    """The states of a model's adapters, which a notebook shows as tables."""


@torch.no_grad()
def state_report(model: nn.Module) -> StateReports:
    """What the adapters of a model are doing now: step, schedule, ranks, weights of the losses.

    Args:
        model: A model with adapters of dynalora.

    Returns:
        One report per adapter; empty if there is none. A notebook shows them as tables.
    """
    names = {id(module): plain_name(name) for name, module in model.named_modules()}
    reports = StateReports()
    for driver, layers in drivers_of(model):
        method = driver.method
        assert isinstance(method, Method)
        moment = driver.moment(layers)
        details = method.report(moment)
        for part in driver.parts:
            details = {**details, **part.report(moment)}
        parameters = [p for layer in layers for p in layer.adapter_parameters(driver.adapter).values()]
        reports.append(
            StateReport(
                adapter=driver.adapter,
                method=method.name,
                step=driver.step,
                total_steps=driver.total_steps,
                ranks={names[id(layer)]: layer.rank(driver.adapter) for layer in layers},
                trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
                details=details,
            )
        )
    return reports
