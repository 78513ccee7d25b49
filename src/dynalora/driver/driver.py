"""One driver per adapter of a model: its clock, its view of the optimizer step, its complaints.

A driver is the Python-side companion of the dynamic state that is saved with the adapter. It holds no reference to
the model or its layers (they hold it), so deleting a model frees it at once, and copying a model copies its drivers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from dynalora.common.private import version
from dynalora.common.processes import grouped
from dynalora.errors import ScheduleError, TrainingError

if TYPE_CHECKING:
    from peft import PeftConfig


class DrivenLayer(Protocol):
    """What the driver needs of an adapted layer."""

    drivers: dict[str, Driver]
    order: int

    def adapter_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """Trainable tensors of one adapter in this layer, by their role (`"down"`, `"up"`, …)."""

    def progress(self, adapter: str) -> torch.Tensor | None:
        """Saved clock, int64 `[step, total_steps]`, on the one layer of the adapter that carries it."""


@dataclass
class OptimizerOverride:
    """How the optimizer treats a kind of parameter differently from the user's settings."""

    lr_multiplier: float = 1.0
    weight_decay: float | None = None


@dataclass
class Moment:
    """What a method sees when it acts around an optimizer step.

    Attributes:
        layers: The adapted layers, in model order, that the stepping optimizer owns.
        adapter: Name of the adapter.
        config: Its configuration.
        step: Optimizer steps done before this one (0 at the first).
        total_steps: Optimizer steps of the run, None when unknown.
        grad_scale: Factor that the gradients still carry (1 unless a fused optimizer unscales inside its kernel);
            whatever is added to a gradient must carry it too.
        awaiting: Ids of the parameters that are about to step and whose gradients nothing was added to yet; None
            means all.
        shared: Lives for one training step, for what must be computed from the weights as they were at its start
            although several optimizers step one after the other.
        all_layers: All layers of the adapter, also those that other optimizers own.
        task_loss: Value of the task loss in this step, over all its micro-batches and processes, without gradient
            scaling; None unless the method asks for it.
        others: Further parameters of the stepping optimizer, which belong to no adapter (a classifier's head), and
            whose gradients nothing was done to yet.
        found_inf: Set by a gradient scaler for optimizers that unscale in their kernel: whether the step will be
            skipped, because a gradient is not finite.
    """

    layers: Sequence[Any]
    adapter: str
    config: Any
    step: int
    total_steps: int | None
    grad_scale: torch.Tensor | float = 1.0
    awaiting: frozenset[int] | None = None
    shared: dict[Any, Any] = field(default_factory=dict)
    all_layers: Sequence[Any] = ()
    task_loss: torch.Tensor | None = None
    others: Sequence[torch.Tensor] = ()
    found_inf: torch.Tensor | None = None

    @property
    def skipped(self) -> bool:
        """Whether the step will be skipped, so that nothing may be learnt from its gradients."""
        return self.found_inf is not None and bool(self.found_inf.item())

    def awaits(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter's gradient is to be added to now."""
        return parameter.requires_grad and (self.awaiting is None or id(parameter) in self.awaiting)


class DrivenMethod(Protocol):
    """What a method may do around optimizer steps. See `dynalora.adapter.method.Method`."""

    @property
    def name(self) -> str: ...

    def prepare(self, layers: Mapping[str, Any], adapter: str, config: Any) -> None: ...

    def needs_total_steps(self, config: Any) -> bool: ...

    def needs_driving(self, config: Any) -> bool: ...

    def needs_task_loss(self, config: Any) -> bool: ...

    def optimizer_overrides(self, config: Any, layer: Any, adapter: str) -> dict[str, OptimizerOverride]: ...

    def before_step(self, moment: Moment) -> None: ...

    def after_step(self, moment: Moment) -> None: ...

    def metrics(self, moment: Moment) -> dict[str, float]: ...


@dataclass(eq=False)
class Driver:
    """Drives one adapter of one model.

    Attributes:
        method: The method, stateless.
        config: The adapter's configuration; `config.total_steps`, where given, is what counts.
        adapter: The adapter's name.
        optimizer_steps: Calls of `optimizer.step()` seen in this process, skipped ones included.
    """

    method: DrivenMethod
    config: PeftConfig
    adapter: str
    optimizer_steps: int = 0
    accepted_undriven: bool = False
    _step: int = 0
    _total_steps: int = 0
    _gradients_seen: bool = False
    _baselines: dict[int, tuple[float, ...]] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)
    # Of the current training step: its number, ids of the parameters done, and what the optimizers that make it share.
    _current: int = 0
    _done: set[int] = field(default_factory=set)
    _shared: dict[Any, Any] = field(default_factory=dict)
    # The task loss of the coming step: the sum over its micro-batches so far, with the scale of the gradients.
    _loss: torch.Tensor | None = None
    # Whether the user said it; then nothing else counts.
    _loss_given: bool = False
    # Identity and version of the saved clock as this object last saw it, to notice a loaded checkpoint without
    # reading the tensor (which would stall an accelerator at every step).
    _seen: tuple[int, int] | None = None

    @property
    def needs_task_loss(self) -> bool:
        """Whether the method acts on the value of the task loss."""
        return self.method.needs_task_loss(self.config)

    # The clock -------------------------------------------------------------------------------------------------

    def read(self, layer: DrivenLayer) -> None:
        """Take the clock over from the layer that carries it, if it was changed from outside (loading)."""
        saved = layer.progress(self.adapter)
        if saved is None or saved.is_meta or (id(saved), version(saved)) == self._seen:
            return
        self._step, self._total_steps = (int(value) for value in saved.tolist())
        self._seen = (id(saved), version(saved))

    def write(self, layer: DrivenLayer) -> None:
        """Store the clock in the layer that carries it."""
        saved = layer.progress(self.adapter)
        if saved is None:
            return
        with torch.no_grad():
            saved.copy_(torch.tensor([self._step, self._total_steps]))
        self._seen = (id(saved), version(saved))

    @property
    def step(self) -> int:
        """Optimizer steps done in this run (skipped ones do not count)."""
        return self._step

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the run: the configuration's, else the trainer's, else None."""
        return getattr(self.config, "total_steps", None) or self._total_steps or None

    def begin_run(self, lead: DrivenLayer, total_steps: int | None, fresh: bool) -> None:
        """Start or continue a run.

        Args:
            lead: The layer that carries the clock.
            total_steps: Length of the run, None when unknown.
            fresh: True starts the schedule anew; False continues at the step that was loaded.
        """
        self.read(lead)
        given = getattr(self.config, "total_steps", None)
        if given and total_steps and given != total_steps:
            warnings.warn(
                f"{type(self.config).__name__}(total_steps={given}) is used for the schedule, but the "
                "trainer will make "
                f"{total_steps} optimizer steps; leave total_steps out to follow the trainer.",
                stacklevel=2,
            )
        if total_steps:
            self._total_steps = total_steps
        if fresh:
            self._step = 0
            self._told.discard("over")
        self.write(lead)

    # Around a step ---------------------------------------------------------------------------------------------

    def moment(self, layers: Sequence[Any], all_layers: Sequence[Any] = ()) -> Moment:
        """The current moment for the method's own hooks.

        Args:
            layers: The layers that it is about.
            all_layers: All layers of the adapter, if these are only a part of them.
        """
        everything = all_layers or layers
        return Moment(layers, self.adapter, self.config, self._step, self.total_steps, all_layers=everything)

    def act(
        self,
        layers: Sequence[Any],
        owned: Sequence[torch.Tensor],
        grad_scale: torch.Tensor | float,
        all_layers: Sequence[Any] = (),
        others: Sequence[torch.Tensor] = (),
        loss_scale: torch.Tensor | float = 1.0,
        found_inf: torch.Tensor | None = None,
    ) -> bool:
        """Let the method add to the gradients of the parameters that an optimizer is about to step.

        A training step may be made by several optimizers, each with a part of the adapter, or by one around another.
        What tells them apart are the gradients: one that nothing was added to since it was computed awaits its
        addition, and new gradients of parameters that have had theirs begin the next training step.

        Args:
            layers: The layers they belong to.
            owned: The parameters.
            grad_scale: Factor that their gradients still carry.
            all_layers: All layers of the adapter.
            others: Parameters of the optimizer that belong to no adapter.
            loss_scale: Factor that a gradient scaler gave the loss.
            found_inf: Whether the step will be skipped, where that is known beforehand.

        Returns:
            Whether a new training step began, which the clock will count.
        """
        awaiting = frozenset(id(p) for p in owned if p.grad is None or not _is_marked(p.grad))
        if not awaiting:
            return False
        first = not self._done or not self._done.isdisjoint(awaiting)
        if first:
            self._done.clear()
            self._shared.clear()
            self._current = self._step
            self.require_schedule()
            if self.needs_task_loss:
                self._shared["task loss"] = self._take_loss(loss_scale)
        moment = self.moment(layers, all_layers)
        moment.step = self._current  # the clock has moved on if the first optimizer has stepped
        moment.grad_scale, moment.shared, moment.awaiting = grad_scale, self._shared, awaiting
        moment.task_loss = self._shared.get("task loss")
        moment.others = [p for p in others if p.grad is not None and not _is_marked(p.grad)]
        moment.found_inf = found_inf
        self.method.before_step(moment)
        self._done |= awaiting
        for parameter in (*owned, *moment.others):
            if parameter.grad is not None:
                _mark(parameter.grad)
        return first

    def saw_loss(self, loss: torch.Tensor, anew: bool) -> None:
        """Note a loss whose gradients were added to the adapter's.

        Args:
            loss: Its value.
            anew: Whether these gradients are the first of their step; then what was noted before is of a step that
                was never taken.
        """
        if self._loss_given:
            return
        loss = loss.reshape(()).to(torch.promote_types(loss.dtype, torch.float32))
        self._loss = loss if anew or self._loss is None else self._loss + loss

    def give_loss(self, loss: torch.Tensor | float) -> None:
        """Take the user's word for the task loss of the coming step."""
        value = loss.detach() if isinstance(loss, torch.Tensor) else torch.tensor(float(loss))
        self._loss, self._loss_given = value.reshape(()), True

    def _take_loss(self, scale: torch.Tensor | float) -> torch.Tensor:
        loss, given = self._loss, self._loss_given
        self._loss, self._loss_given = None, False
        if loss is None:
            raise TrainingError(
                f"{type(self.config).__name__} (adapter {self.adapter!r}) weighs its regulariser against the task "
                "loss, but saw no loss in this step, since the gradients were not made by backward() on a scalar; "
                "call dynalora.report_task_loss(model, loss) before each optimizer.step(), or set a fixed weight."
            )
        if not given:
            loss = loss / scale
        if grouped():
            # The processes' gradients are averaged, so the loss is; and all must weigh alike.
            loss = loss.clone()
            torch.distributed.all_reduce(loss)
            loss /= torch.distributed.get_world_size()
        return loss

    def require_schedule(self) -> None:
        """Check, before a step, that the method's schedule can run.

        Raises:
            ScheduleError: The method needs the number of steps, and nobody said it.
        """
        if not self.method.needs_total_steps(self.config):
            return
        kind = type(self.config).__name__
        if self.total_steps is None:
            raise ScheduleError(
                f"{kind} (adapter {self.adapter!r}) has a schedule over the whole run, but the number of "
                "optimizer steps is "
                f"unknown: pass {kind}(total_steps=...), or train with transformers' Trainer, which tells it."
            )
        if self._step >= self.total_steps and "over" not in self._told:
            self._told.add("over")
            warnings.warn(
                f"the schedule of adapter {self.adapter!r} ended after {self.total_steps} optimizer steps, "
                "and training goes "
                "on without its effect; to start it anew call dynalora.restart_schedule(model, "
                "total_steps=...).",
                stacklevel=2,
            )

    @property
    def shared(self) -> dict[Any, Any]:
        """What lives for one training step; see `Moment`."""
        return self._shared

    def tell(self, topic: str, message: str) -> None:
        """Warn, once per adapter and topic."""
        if topic not in self._told:
            self._told.add(topic)
            warnings.warn(message, stacklevel=2)

    def advance(self, lead: DrivenLayer | None) -> None:
        """Count one optimizer step."""
        self._step += 1
        if lead is not None:
            self.write(lead)

    # Training that nobody drives -------------------------------------------------------------------------------

    def watch(self, layer: DrivenLayer, output: torch.Tensor) -> None:
        """Notice that gradients flow, until the first driven step (called in a layer's forward).

        Args:
            layer: The layer.
            output: Its result.
        """
        if layer.order not in self._baselines:
            self._baselines[layer.order] = _fingerprint(layer, self.adapter)
        if output.requires_grad:
            output.register_hook(self._saw_gradient)

    @property
    def watching(self) -> bool:
        """Whether training without the driver is still to be ruled out."""
        return not self.optimizer_steps and not self._gradients_seen

    def _saw_gradient(self, gradient: torch.Tensor) -> None:
        self._gradients_seen = True

    def check_driven(self, layers: Sequence[Any], when: str) -> None:
        """Speak up if the adapter was trained past the driver.

        Args:
            layers: The adapter's layers.
            when: What the user is doing, for the message.

        Raises:
            ScheduleError: Gradients flowed and the weights moved, but no optimizer that torch's step hooks can see
                stepped this adapter, although the method acts around optimizer steps.
        """
        if self.optimizer_steps or self.accepted_undriven or not self._gradients_seen:
            return
        if not self.method.needs_driving(self.config):
            return
        if all(_fingerprint(layer, self.adapter) == self._baselines.get(layer.order) for layer in layers):
            return
        raise ScheduleError(
            f"{when}: adapter {self.adapter!r} was trained, but no torch.optim.Optimizer that owns its "
            "parameters made a "
            f"step, so what {self.method.name} does around optimizer steps never happened and the result "
            "is a plain "
            "low-rank adapter; step the adapter's own parameters with a torch optimizer, or keep the "
            "result as it is by "
            "calling dynalora.accept_undriven(model) first."
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickled model has parameters of its own, with which nothing has happened yet.
        passing: dict[str, Any] = {
            "_done": set(),
            "_shared": {},
            "_seen": None,
            "_baselines": {},
            "_gradients_seen": False,
            "_loss": None,
            "_loss_given": False,
        }
        return {**self.__dict__, **passing, "optimizer_steps": 0, "_told": set(self._told)}


def _fingerprint(layer: DrivenLayer, adapter: str) -> tuple[float, ...]:
    values = [p.detach().double() for p in layer.adapter_parameters(adapter).values() if not p.is_meta]
    return tuple(float(number) for value in values for number in (value.sum(), value.square().sum()))


# A mark on a gradient holds as long as that very tensor is not written to: gradients that are recomputed are either
# new tensors, without marks, or written in place, which changes their version.


def _mark(gradient: torch.Tensor) -> None:
    gradient._dynalora_version = version(gradient)  # type: ignore[attr-defined]


def _is_marked(gradient: torch.Tensor) -> bool:
    return getattr(gradient, "_dynalora_version", None) == version(gradient)


def drivers_of(model: nn.Module) -> Iterator[tuple[Driver, list[Any]]]:
    """Every driver of a model with its layers, in model order; the first layer carries the clock.

    Args:
        model: A model with adapters, wrapped by PEFT or not.
    """
    found: dict[int, tuple[Driver, list[Any]]] = {}
    for module in model.modules():
        for driver in (
            getattr(module, "drivers", {}).values() if hasattr(module, "adapter_parameters") else ()
        ):
            found.setdefault(id(driver), (driver, []))[1].append(module)
    for driver, layers in found.values():
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


def report_task_loss(model: nn.Module, loss: torch.Tensor | float) -> None:
    """Say what the task loss of the coming optimizer step is, where it cannot be seen.

    It is seen wherever gradients are made by `loss.backward()`, under any trainer. A loop that makes them otherwise
    (`torch.autograd.grad`, gradients from another process) calls this before each `optimizer.step()`.

    Args:
        model: A model with adapters.
        loss: The loss of this process, over all micro-batches of the step, without gradient scaling.
    """
    for driver, _ in drivers_of(model):
        driver.give_loss(loss)


def check_driven(model: nn.Module, when: str) -> None:
    """Check every driver of a model; see `Driver.check_driven`.

    Raises:
        ScheduleError: An adapter was trained past its driver.
    """
    for driver, layers in drivers_of(model):
        driver.check_driven(layers, when)
