"""What drivers, layers and methods know of each other: the moment of a step, and the attributes each relies on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, Protocol

import torch
from torch import nn
from typing_extensions import TypeVar

if TYPE_CHECKING:
    from dynalora.driver.driver import Driver

Shared = TypeVar("Shared", default=Any)


@dataclass
class OptimizerOverride:
    """How the optimizer treats a kind of parameter differently from the user's settings.

    Attributes:
        lr_multiplier: Its learning rate as a multiple of the group's.
        weight_decay: Its weight decay; None keeps what the group's takes off at a step, learning rate times weight
            decay, whatever the multiple.
        begins: Of a multiple that changes in the run, the one that a new adapter has; None: it does not change.
    """

    lr_multiplier: float = 1.0
    weight_decay: float | None = None
    begins: float | None = None

    def decay(self, groups: float | None, multiple: float | None = None) -> float | None:
        """The weight decay beside one's own learning rate; None: the group's.

        Args:
            groups: The group's weight decay; None: it has none.
            multiple: The learning rate as a multiple of the group's; None: `lr_multiplier`.
        """
        multiple = self.lr_multiplier if multiple is None else multiple
        if self.weight_decay is None and groups and multiple not in (0.0, 1.0):
            return groups / multiple
        return self.weight_decay


@dataclass
class Moment(Generic[Shared]):
    """What a method sees when it acts around an optimizer step.

    Attributes:
        driver: The adapter's driver.
        layers: The adapted layers, in model order, that the stepping optimizer owns.
        all_layers: All layers of the adapter, also those that other optimizers own.
        step: Optimizer steps done before this one (0 at the first).
        shared: An object of the method's own `shared_class`, made anew for every training step: for what must be
            computed from the weights as they were at its start although several optimizers step one after the other.
        grad_scale: Factor that the gradients still carry (1 unless a fused optimizer unscales inside its kernel);
            whatever is added to a gradient must carry it too.
        loss_scale: Factor that a gradient scaler gave the loss of this step, whether or not gradients still carry it.
        awaiting: Ids of the parameters that are about to step and whose gradients nothing was added to yet; None
            means all.
        task_loss: Value of the task loss in this step, over all its micro-batches and processes, without gradient
            scaling; None unless the method asks for it.
        others: Further parameters of the stepping optimizer, which belong to no adapter (a classifier's head), and
            whose gradients nothing was done to yet.
        found_inf: Set by a gradient scaler for optimizers that unscale in their kernel: whether the step will be
            skipped, because a gradient is not finite.
        optimizer: The optimizer that has just stepped; None before the step.
    """

    driver: Driver
    layers: Sequence[Any]
    all_layers: Sequence[Any]
    step: int
    shared: Shared
    grad_scale: torch.Tensor | float = 1.0
    loss_scale: torch.Tensor | float = 1.0
    awaiting: frozenset[int] | None = None
    task_loss: torch.Tensor | None = None
    others: Sequence[torch.Tensor] = ()
    found_inf: torch.Tensor | None = None
    optimizer: torch.optim.Optimizer | None = None

    @property
    def adapter(self) -> str:
        """Name of the adapter."""
        return self.driver.adapter

    @property
    def config(self) -> Any:
        """Configuration of the adapter."""
        return self.driver.config

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the run, None when unknown."""
        return self.driver.total_steps

    @property
    def lead(self) -> Any:
        """The layer that carries what belongs to the adapter as a whole; None where it is not among the layers."""
        return next((layer for layer in self.all_layers if layer.progress(self.adapter) is not None), None)

    @cached_property
    def training_layers(self) -> list[Any]:
        """The adapter's layers that train, in model order."""
        return [
            layer
            for layer in self.all_layers
            if any(parameter.requires_grad for parameter in layer.adapter_parameters(self.adapter).values())
        ]

    @property
    def skipped(self) -> bool:
        """Whether the step will be skipped, so that nothing may be learnt from its gradients."""
        return self.found_inf is not None and bool(self.found_inf.item())

    def rate(self, parameter: torch.Tensor) -> float | None:
        """The learning rate in the parameter's group, without multiples of its own, after a step.

        None where the optimizer does not have the parameter, or chooses its rates itself.
        """
        for group in () if self.optimizer is None else self.optimizer.param_groups:
            if any(other is parameter for other in group["params"]):
                rate = group.get("lr")
                return None if rate is None else float(rate)
        return None

    def awaits(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter's gradient is to be added to now."""
        return parameter.requires_grad and (self.awaiting is None or id(parameter) in self.awaiting)


class DrivenLayer(Protocol):
    """What the driver needs of an adapted layer."""

    drivers: dict[str, Driver]
    unprepared: dict[str, nn.Parameter]
    name: str
    order: int

    def parameter(self, role: str, adapter: str) -> nn.Parameter:
        """One of those tensors."""

    def adapter_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """Trainable tensors of one adapter in this layer, by their role (`"down"`, `"up"`, …)."""

    def copy_adapter(self, source: str, target: str) -> None:
        """Give one adapter of the layer the ranks and the values of another."""

    def end_passes(self, adapter: str) -> None:
        """Gradients were made of the forward passes so far."""

    def forget_passes(self, adapter: str) -> None:
        """Those gradients were thrown away without a step, and what was gathered with them goes with them."""

    def progress(self, adapter: str) -> torch.Tensor | None:
        """Saved clock, int64 `[step, total_steps]`, on the one layer of the adapter that carries it."""


class DrivenMethod(Protocol):
    """What a method may do around optimizer steps. See `dynalora.adapter.method.Method`."""

    @property
    def name(self) -> str: ...

    @property
    def shared_class(self) -> type[Any]: ...

    @property
    def sharding(self) -> tuple[str, ...]: ...

    def prepare(self, layers: Mapping[str, Any], adapter: str, config: Any) -> None: ...

    def needs_total_steps(self, config: Any) -> bool: ...

    def needs_driving(self, config: Any) -> bool: ...

    def needs_whole_steps(self, config: Any) -> bool: ...

    def needs_task_loss(self, config: Any) -> bool: ...

    def gathers(self, config: Any) -> bool: ...

    def exchanges(self, config: Any) -> bool: ...

    def optimizer_overrides(self, config: Any, layer: Any, adapter: str) -> dict[str, OptimizerOverride]: ...

    def before_step(self, moment: Moment) -> None: ...

    def after_step(self, moment: Moment) -> None: ...

    def metrics(self, moment: Moment) -> dict[str, float]: ...

    def check_finished(self, moment: Moment, when: str) -> None: ...
