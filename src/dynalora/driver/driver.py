"""One driver per adapter of a model: its clock, its view of the optimizer step, its complaints.

A driver is the Python-side companion of the dynamic state that is saved with the adapter. It holds no reference to
the model or its layers (they hold it), so deleting a model frees it at once, and copying a model copies its drivers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dynalora.common.devices import Reading
from dynalora.common.private import in_backward, version
from dynalora.common.processes import grouped, process_count
from dynalora.driver.finite import first_bad, first_bad_of, some_bad
from dynalora.driver.losses import Passes
from dynalora.driver.moment import DrivenLayer, DrivenMethod, Moment, OptimizerOverride
from dynalora.driver.part import Part
from dynalora.errors import ScheduleError, TrainingError, UnsupportedError

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(eq=False)
class Driver:
    """Drives one adapter of one model.

    Attributes:
        method: The method, stateless.
        config: The adapter's configuration; `config.total_steps`, where given, is what counts.
        adapter: The adapter's name.
        parts: What acts at every step besides the method, for adapters of any method.
        thread: The thread in which the last training forward pass ran.
        joining: Whether that pass belonged to processes of which some may have fewer batches (DDP's `join()`).
        in_trainer: Whether a trainer is at work, which says when the run has ended.
        optimizer_steps: Calls of `optimizer.step()` seen in this process, skipped ones included.
    """

    method: DrivenMethod
    config: PeftConfig
    adapter: str
    parts: Sequence[Part] = ()
    thread: int | None = None
    joining: bool = False
    in_trainer: bool = False
    optimizer_steps: int = 0
    accepted_undriven: bool = False
    _step: int = 0
    _total_steps: int = 0
    _gradients_seen: bool = False
    _baselines: dict[int, tuple[float, ...]] = field(default_factory=dict)
    _warned: set[str] = field(default_factory=set)
    # Of the current training step: its number, ids of the parameters done, what the optimizers that make it share, and
    # its task loss.
    _current: int = 0
    _done: set[int] = field(default_factory=set)
    _shared: Any = None
    _task_loss: torch.Tensor | None = None
    # The task loss of the coming step: the sum over its micro-batches so far, with the scale of the gradients.
    _loss: torch.Tensor | None = None
    # Whether the user said it; then nothing else counts.
    _loss_reported: bool = False
    # The backward passes since the last step, where the layers gather something in them.
    _passes: Passes | None = None
    # Whether the gradients of a step were no numbers, with its number, where the device has not been waited for yet.
    _unread: tuple[Reading, int] | None = None
    # Identity and version of the saved clock as this object last saw it, to notice a loaded checkpoint without
    # reading the tensor (which would stall an accelerator at every step).
    _seen: tuple[int, int] | None = None

    @property
    def acting(self) -> tuple[DrivenMethod | Part, ...]:
        """What acts at every step, in this order: the method, and then the parts."""
        return (self.method, *self.parts)

    @property
    def needs_task_loss(self) -> bool:
        """Whether the method acts on the value of the task loss."""
        return self.method.needs_task_loss(self.config)

    @property
    def gathers(self) -> bool:
        """Whether the layers gather something in the passes of a step."""
        return any(acting.gathers(self.config) for acting in self.acting)

    @property
    def clips_penalty(self) -> bool:
        """Whether gradients are clipped with what the method and the parts add to them."""
        return bool(getattr(self.config, "clip_penalty", False))

    @property
    def has_loss(self) -> bool:
        """Whether a loss was seen that no step has taken yet."""
        return self._loss is not None

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
            # One by one, since copying a tensor to a device waits for the device.
            for place, value in enumerate((self._step, self._total_steps)):
                saved.select(0, place).fill_(value)
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
        configured = getattr(self.config, "total_steps", None)
        if configured and total_steps and configured != total_steps:
            warnings.warn(
                f"{type(self.config).__name__}(total_steps={configured}) is used for the schedule, but the trainer "
                f"will make {total_steps} optimizer steps; leave total_steps out to follow the trainer.",
                stacklevel=2,
            )
        if total_steps:
            self._total_steps = total_steps
        if fresh:
            self._step = 0
            self._warned.discard("over")
        self.write(lead)

    # Around a step ---------------------------------------------------------------------------------------------

    def moment(self, layers: Sequence[Any], all_layers: Sequence[Any] = (), **details: Any) -> Moment:
        """The current moment for the method's own hooks.

        Args:
            layers: The layers that it is about.
            all_layers: All layers of the adapter, if these are only a part of them.
            **details: Further fields of the moment.
        """
        if self._shared is None:
            self._shared = self.method.shared_class()
        return Moment(self, layers, all_layers or layers, self._step, self._shared, **details)

    def act(self, moment: Moment, parameters: Sequence[torch.Tensor]) -> bool:
        """Let the method add to the gradients of the parameters that an optimizer is about to step.

        A training step may be made by several optimizers, each with a part of the adapter, or by one around another.
        What tells them apart are the gradients: one that nothing was added to since it was computed awaits its
        addition, and new gradients of parameters that have had theirs begin the next training step.

        Args:
            moment: What the method will see; what depends on the training step is filled in.
            parameters: Those that the optimizer is about to step.

        Returns:
            Whether a new training step began, which the clock will count.
        """
        without = [p for p in parameters if p.grad is None]
        fresh = [p for p in parameters if p.grad is not None and not is_marked(p.grad)]
        if not fresh and (len(without) < len(parameters) or not parameters):
            return False  # a further step with the same gradients
        awaiting = frozenset(map(id, (*fresh, *without)))
        self._require_whole_step()
        self._require_known_sharding(moment.layers)
        self._require_all_processes()
        if not self.optimizer_steps:
            self._require_memory_of_its_own(parameters)
        if moment.found_inf is None:  # else a scaler looks, and skips the step
            self._look(moment, parameters)
        self._passes = None
        first = not self._done or not self._done.isdisjoint(awaiting)
        if first:
            self._done.clear()
            self._shared = self.method.shared_class()
            self._current = self._step
            self.require_schedule()
            self._warn_of_half(parameters)
            self._task_loss = self._take_loss(moment.loss_scale) if self.needs_task_loss else None
        moment.step = self._current  # the clock has moved on if the first optimizer has stepped
        moment.shared, moment.awaiting, moment.task_loss = self._shared, awaiting, self._task_loss
        moment.others = [p for p in moment.others if p.grad is not None and not is_marked(p.grad)]
        for acting in self.acting:
            acting.before_step(moment)
        for layer in moment.all_layers if self.gathers else ():
            # What acting itself had the layers compute belongs to no step.
            layer.end_passes(self.adapter)
            layer.forget_passes(self.adapter)
        self._done |= awaiting
        for parameter in (*parameters, *moment.others):
            if parameter.grad is not None:
                mark(parameter.grad)
        return first

    def finish(self, moment: Moment) -> None:
        """Let the method and the parts act after a training step that was taken, and count it."""
        for acting in self.acting:
            acting.after_step(moment)
        self.advance(moment.lead)

    def optimizer_overrides(self, layer: DrivenLayer) -> dict[str, OptimizerOverride]:
        """How the optimizer must treat the layer's parameters, by role; a part's rule goes before the method's."""
        rules: dict[str, OptimizerOverride] = {}
        for acting in self.acting:
            rules |= acting.optimizer_overrides(self.config, layer, self.adapter)
        return rules

    def _require_known_sharding(self, layers: Sequence[Any]) -> None:
        """Refuse weights that are spread over processes in a way that the method's rules do not know.

        Raises:
            UnsupportedError: They are.
        """
        way = self._sharding(layers)
        for acting in self.acting:
            if way is None or way in acting.sharding:
                continue
            known = " or ".join([*(name for name in acting.sharding if "FSDP" in name), "DistributedDataParallel"])
            flat = "as pieces of flat vectors" if way == "FSDP1" else "in shards"
            with_part = "" if acting is self.method else f" with {acting.name}"
            raise UnsupportedError(
                f"{type(self.config).__name__} (adapter {self.adapter!r}){with_part} does not train under {way}, which "
                f"keeps its factors {flat}, so that norms and products of whole factors cannot be taken; train it "
                f"under {known}."
            )

    def _sharding(self, layers: Sequence[Any]) -> str | None:
        """How the weights are spread over processes; None: each process has them in full."""
        down = layers[0].adapter_parameters(self.adapter).get("down")
        if down is None:
            return None
        return "FSDP1" if down.ndim != 2 else "FSDP2" if hasattr(down, "full_tensor") else None

    def step_of_copies(self, groups_follow: bool) -> None:
        """Count a step of an optimizer that has copies of the adapter's parameters, or refuse it.

        Args:
            groups_follow: Whether the optimizer's groups follow the adapter's rules, as those of `param_groups` do.

        Raises:
            UnsupportedError: The method acts on gradients and weights at its steps, which are not those of the copies.
        """
        needed = [acting for acting in self.acting if acting.needs_driving(self.config)]
        if needed and not self.accepted_undriven:
            by_groups = all("ZeRO" in acting.sharding for acting in needed)
            if not (by_groups and groups_follow):
                remedy = (
                    "give it the groups of dynalora.param_groups(model, lr)"
                    if by_groups
                    else "train in float32 or bfloat16 under DistributedDataParallel or FSDP2"
                )
                raise UnsupportedError(
                    f"{type(self.config).__name__} (adapter {self.adapter!r}) would train as a plain low-rank adapter: "
                    "the optimizer steps copies of its weights, as DeepSpeed's ZeRO and wrappers for mixed precision "
                    f"have them, so the method's part at optimizer steps cannot take place; {remedy}."
                )
        self.optimizer_steps += 1

    def _require_all_processes(self) -> None:
        """Refuse DDP's `join()` where a process without batches would be missed at the others' steps."""
        if self.joining and any(actor.exchanges(self.config) for actor in self.acting):
            raise UnsupportedError(
                f"{type(self.config).__name__} (adapter {self.adapter!r}) does not train within DDP's join(): at its "
                "steps all processes exchange losses, scores, ranks or what was forgotten, and one that has run out of "
                "batches takes no part; give all processes equally many (drop_last=True, or Accelerate's and Trainer's "
                "even batches)."
            )

    def _require_memory_of_its_own(self, parameters: Sequence[torch.Tensor]) -> None:
        """Refuse weights that lie in one memory for all processes, each of which would step them once more.

        Raises:
            UnsupportedError: They do.
        """
        if process_count() > 1 and grouped() and any(p.device.type == "cpu" and p.is_shared() for p in parameters):
            raise UnsupportedError(
                f"adapter {self.adapter!r} lies in memory that its {process_count()} processes share, as "
                "torch.multiprocessing hands models over, so that every process would step the same weights once more; "
                "make the model in each process, or copy it there with copy.deepcopy(model)."
            )

    def _look(self, moment: Moment, parameters: Sequence[torch.Tensor]) -> None:
        """Refuse gradients that are no numbers, those of what is trained besides included.

        On an accelerator those of the step before are refused.
        """
        bad = some_bad([p.grad for p in (*parameters, *moment.others) if p.grad is not None])
        if self._sharding(moment.layers) is not None and grouped():
            # Each process has another part, perhaps none of the adapter, and all must end alike.
            if bad is None:
                bad = torch.zeros((), dtype=torch.bool, device=parameters[0].device)
            count = bad.to(torch.int32)
            torch.distributed.all_reduce(count)
            bad = count > 0
        if bad is None:
            return
        self.require_finite(moment.layers)
        if bad.device.type == "cpu":
            if bool(bad):
                found = self._first_bad(moment.layers, gradients=True) or first_bad_of(
                    (f"a parameter of shape {tuple(p.shape)} beside the adapter's", p.grad)
                    for p in moment.others
                    if p.grad is not None
                )
                self._raise_not_finite(found, self._step + 1)
        else:
            self._unread = Reading(bad), self._step + 1

    def require_finite(self, layers: Sequence[Any]) -> None:
        """Make sure that the last gradients were numbers, before anything is decided from them.

        Args:
            layers: The adapter's layers.

        Raises:
            TrainingError: They were not; names the step and the first layer.
        """
        if self._unread is None:
            return
        (bad, step), self._unread = self._unread, None
        if bool(bad.get()):
            found = self._first_bad(layers, gradients=True) or self._first_bad(layers, gradients=False)
            self._raise_not_finite(found, step)

    def _first_bad(self, layers: Sequence[Any], *, gradients: bool) -> tuple[str, str] | None:
        found = first_bad(layers, self.adapter, gradients=gradients)
        return None if found is None else (repr(found[0]), found[1])

    def _raise_not_finite(self, found: tuple[str, str] | None, step: int) -> None:
        where = "beside the adapter's weights, or on another process"
        if found is not None:
            where = f"in {found[0]} ({found[1]})"
        error = TrainingError(
            f"training of adapter {self.adapter!r} met NaN or infinite gradients at optimizer step {step}, first "
            f"{where}; go on from the last checkpoint with a lower learning rate, with float32 or bfloat16 in place of "
            "float16, or without the data of that step."
        )
        error.of_gradients = True
        raise error

    def saw_loss(self, loss: torch.Tensor, anew: bool) -> None:
        """Note a loss whose gradients were added to the adapter's.

        Args:
            loss: Its value, a scalar.
            anew: Whether these gradients are the first of their step; then what was noted before is of a step that
                was never taken.
        """
        if self._loss_reported:
            return
        loss = loss.reshape(()).to(torch.promote_types(loss.dtype, torch.float32))
        self._loss = loss if anew or self._loss is None else self._loss + loss

    def before_backward(self, layers: Sequence[DrivenLayer]) -> None:
        """Have the layers forget what belongs to gradients that were thrown away without a step."""
        if self._passes is not None and self._passes.dropped(layers, self.adapter):
            for layer in layers:
                layer.forget_passes(self.adapter)

    def after_backward(self, layers: Sequence[DrivenLayer]) -> None:
        """Have the layers count what they gathered as belonging to the gradients that are there now."""
        if self._passes is None:
            self._passes = Passes()
        if self._passes.ended(layers, self.adapter):
            for layer in layers:
                layer.end_passes(self.adapter)

    def report_loss(self, loss: torch.Tensor | float) -> None:
        """Take the user's word for the task loss of the coming step, a scalar."""
        value = loss.detach() if isinstance(loss, torch.Tensor) else torch.tensor(float(loss))
        self._loss, self._loss_reported = value.reshape(()), True

    def _take_loss(self, scale: torch.Tensor | float) -> torch.Tensor:
        loss, reported = self._loss, self._loss_reported
        self._loss, self._loss_reported = None, False
        if loss is None:
            raise TrainingError(
                f"{type(self.config).__name__} (adapter {self.adapter!r}) weighs its regulariser against the task "
                "loss, but saw no loss in this step, since the gradients were not made by backward() on a scalar; "
                "call dynalora.report_task_loss(model, loss) before each optimizer.step(), or set a fixed weight."
            )
        if not reported:
            loss = loss / scale
        if grouped():
            # The processes' gradients are averaged, so the loss is; and all must weigh alike.
            loss = loss.clone()
            torch.distributed.all_reduce(loss)
            loss /= torch.distributed.get_world_size()
        return loss

    def _require_whole_step(self) -> None:
        """Refuse a step within a backward pass, where the method or a part needs the gradients of all layers."""
        if in_backward() and any(acting.needs_whole_steps(self.config) for acting in self.acting):
            raise TrainingError(
                f"an optimizer steps within backward(), before the gradients of all layers are there, while "
                f"{type(self.config).__name__} (adapter {self.adapter!r}) acts on a training step as a whole; step "
                "after backward(), with one optimizer for all parameters (none of Trainer's 'layerwise' ones)."
            )

    def _warn_of_half(self, parameters: Sequence[torch.Tensor]) -> None:
        """Warn, once, of gates, magnitudes and the like in half precision, which a usual step would not move."""
        if "half" not in self._warned and any(
            p.ndim == 1 and p.dtype in (torch.bfloat16, torch.float16) for p in parameters
        ):
            self.tell(
                "half",
                f"adapter {self.adapter!r} has vectors (gates' biases, diagonals or magnitudes) in half precision, in "
                "which steps of less than about 0.4 % of a value are lost; keep the adapter in float32 (PEFT's "
                "autocast_adapter_dtype=True, and no cast of trained parameters after it).",
            )

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
                f"{kind} (adapter {self.adapter!r}) has a schedule over the whole run, but the number of optimizer "
                f"steps is unknown: pass {kind}(total_steps=...), or train with transformers' Trainer, which tells it."
            )
        if self._step >= self.total_steps:
            self.tell(
                "over",
                f"the schedule of adapter {self.adapter!r} ended after {self.total_steps} optimizer steps, and "
                "training goes on without its effect; to start it anew call dynalora.restart_schedule(model, "
                "total_steps=...).",
            )

    def tell(self, topic: str, message: str) -> None:
        """Warn, once per adapter and topic."""
        if topic not in self._warned:
            self._warned.add(topic)
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
        if not self.in_trainer and self.optimizer_steps:
            for acting in self.acting:
                acting.check_finished(self.moment(layers), when)
        if self.optimizer_steps or self.accepted_undriven or not self._gradients_seen:
            return
        if not any(acting.needs_driving(self.config) for acting in self.acting):
            return
        if all(_fingerprint(layer, self.adapter) == self._baselines.get(layer.order) for layer in layers):
            return
        raise ScheduleError(
            f"{when}: adapter {self.adapter!r} was trained, but no torch.optim.Optimizer that owns its parameters made "
            f"a step, so what {self.method.name} does around optimizer steps never happened and the result is a plain "
            "low-rank adapter; step the adapter's own parameters with a torch optimizer, or keep the result as it is "
            "by calling dynalora.accept_undriven(model) first."
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickled model has parameters of its own, with which nothing has happened yet.
        passing: dict[str, Any] = {
            "_done": set(),
            "_shared": None,
            "_task_loss": None,
            "_seen": None,
            "_baselines": {},
            "_gradients_seen": False,
            "_loss": None,
            "_loss_reported": False,
            "_unread": None,
            "_passes": None,
            "in_trainer": False,
        }
        return {**self.__dict__, **passing, "optimizer_steps": 0, "_warned": set(self._warned)}


def _fingerprint(layer: DrivenLayer, adapter: str) -> tuple[float, ...]:
    values = [p.detach().double() for p in layer.adapter_parameters(adapter).values() if not p.is_meta]
    return tuple(float(number) for value in values for number in (value.sum(), value.square().sum()))


# A mark on a gradient holds as long as that very tensor is not written to: gradients that are recomputed are either
# new tensors, without marks, or written in place, which changes their version.


def mark(gradient: torch.Tensor) -> None:
    """Note that a gradient has had its addition."""
    gradient._dynalora_version = version(gradient)  # type: ignore[attr-defined]


def is_marked(gradient: torch.Tensor) -> bool:
    """Whether a gradient has had its addition, and is as it was then."""
    return getattr(gradient, "_dynalora_version", None) == version(gradient)


@contextmanager
def keeping_mark(gradient: torch.Tensor) -> Iterator[None]:
    """Inside, a gradient may be changed without awaiting its addition once more."""
    marked = is_marked(gradient)
    yield
    if marked:
        mark(gradient)
