"""The optimizer hooks: how adapters notice training steps under any trainer.

torch lets one register hooks that run before and after `step()` of *every* optimizer. Two such hooks, registered
once at import, look up which adapters an optimizer owns and let their methods act:

* before the step: check the schedule, add the regulariser's closed-form gradient, and let parameters with rules of
  their own (a larger learning rate, no weight decay) step in a group of their own;
* after the step: put the optimizer's groups back as they were, and count the step unless a gradient scaler skipped it.

Nothing here keeps a model or an optimizer alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from dynalora.common.private import gradient_scale, steps_around, watch_states
from dynalora.driver.clipping import redo, undo
from dynalora.driver.copies import has_copies
from dynalora.driver.driver import Driver
from dynalora.driver.fitting import begin_momentum, fit_states
from dynalora.driver.groups import GROUP_MARK, StepGroups
from dynalora.driver.moment import OptimizerOverride
from dynalora.driver.registry import all_drivers, any_layers, generation

_plans: weakref.WeakKeyDictionary[Optimizer, _Plan] = weakref.WeakKeyDictionary()


@dataclass(eq=False)
class _Binding:
    """The part of one adapter that one optimizer owns; everything but the driver is held weakly.

    Attributes:
        driver: The adapter's driver.
        layers: Layers with parameters that the optimizer owns, in model order.
        all_layers: All layers of the adapter, likewise.
        parameters: The parameters that it owns.
        others: Parameters of the optimizer that belong to no adapter.
        first: Whether this optimizer is the first of those that share the current training step.
    """

    driver: Driver
    layers: list[weakref.ref[nn.Module]]
    all_layers: list[weakref.ref[nn.Module]]
    parameters: list[weakref.ref[torch.Tensor]]
    others: list[weakref.ref[torch.Tensor]]
    first: bool = False

    def live_parameters(self) -> list[torch.Tensor]:
        return _alive(self.parameters)

    def ready(self) -> bool:
        """Whether there is anything to drive: an optimizer may outlive its model.

        Where FSDP1 has left a process nothing of the adapter, its parameters are empty and never have gradients; it
        takes part, since the others exchange numbers with it.
        """
        parameters = self.live_parameters()
        empty = bool(parameters) and not any(p.numel() for p in parameters)
        return (empty or any(p.grad is not None for p in parameters)) and bool(_alive(self.layers))

    def moment(self, **details: Any) -> Any:
        return self.driver.moment(_alive(self.layers), _alive(self.all_layers), **details)


def _refs(things: Iterable[Any]) -> list[weakref.ref[Any]]:
    return [weakref.ref(thing) for thing in things]


def _alive(references: Iterable[weakref.ref[Any]]) -> list[Any]:
    return [thing for reference in references if (thing := reference()) is not None]


@dataclass
class _Plan:
    """What to do at the steps of one optimizer; remade when its parameters or any adapter changed."""

    stamp: object
    bindings: list[_Binding]
    groups: StepGroups
    copied: list[Driver]  # those of adapters of whose parameters the optimizer has copies
    acting: list[_Binding] = field(default_factory=list)
    around: list[_Plan] = field(default_factory=list)

    def untouched(self, binding: _Binding) -> list[torch.Tensor]:
        """Parameters that no optimizer around this one has already seen to, whatever it did to their gradients."""
        seen = {
            id(parameter)
            for outer in self.around
            for acted in outer.acting
            if acted.driver is binding.driver
            for parameter in acted.live_parameters()
        }
        return [parameter for parameter in binding.live_parameters() if id(parameter) not in seen]


def _stamp(optimizer: Optimizer) -> object:
    """Changes whenever the optimizer's parameters may have changed; cheap enough for every step."""
    shape = []
    for group in optimizer.param_groups:
        params = group["params"]
        ends = (id(params[0]), id(params[-1])) if params else ()
        shape.append((len(params), ends, GROUP_MARK in group))
    return generation(), tuple(shape)


def _make_plan(optimizer: Optimizer, stamp: object) -> _Plan:
    owned: dict[int, torch.Tensor] = {}
    marked: dict[int, Any] = {}  # parameters of groups that already follow the adapter's rules, with the group's mark
    for group in optimizer.param_groups:
        owned.update((id(parameter), parameter) for parameter in group["params"])
        if GROUP_MARK in group:
            marked.update(dict.fromkeys(map(id, group["params"]), group[GROUP_MARK]))
    drivers = all_drivers()
    others = dict(owned)
    for driver, layers in drivers:
        for layer in layers:
            for parameter in layer.adapter_parameters(driver.adapter).values():
                others.pop(id(parameter), None)
    bindings: list[_Binding] = []
    overrides: dict[int, OptimizerOverride] = {}
    for driver, layers in drivers:
        binding = _Binding(driver, [], _refs(layers), [], _refs(others.values()))
        for layer in layers:
            roles = {
                role: parameter
                for role, parameter in layer.adapter_parameters(driver.adapter).items()
                if id(parameter) in owned
            }
            if not roles:
                continue
            binding.layers.append(weakref.ref(layer))
            binding.parameters.extend(_refs(roles.values()))
            for role, override in driver.optimizer_overrides(layer).items():
                mark = marked.get(id(roles[role])) if role in roles else True
                if mark is None or (override.begins is not None and mark is not True):
                    overrides[id(roles[role])] = override
        if binding.layers:
            bindings.append(binding)
    bound = [binding.driver for binding in bindings]
    copied = [
        driver
        for driver, layers in drivers
        if driver not in bound
        and has_copies(
            list(owned.values()), [p for layer in layers for p in layer.adapter_parameters(driver.adapter).values()]
        )
    ]
    return _Plan(stamp, bindings, StepGroups(overrides), copied)


def _plan_for(optimizer: Optimizer) -> _Plan:
    plan = _plans.get(optimizer)
    if plan is None:
        watch_states(optimizer, saving=_restore_groups, loaded=fit_states)
        fit_states(optimizer)  # loaded before its first step
    else:
        plan.groups.restore(optimizer)  # if the last step raised between the hooks
    stamp = _stamp(optimizer)
    if plan is None or plan.stamp != stamp:
        plan = _plans[optimizer] = _make_plan(optimizer, stamp)
    return plan


def _restore_groups(optimizer: Optimizer) -> None:
    if (plan := _plans.get(optimizer)) is not None:
        plan.groups.restore(optimizer)


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not any_layers():
        return None
    around = steps_around()
    if any(outer is optimizer for outer in around):
        return None
    plan = _plan_for(optimizer)
    for driver in plan.copied:
        driver.step_of_copies(all(GROUP_MARK in group for group in optimizer.param_groups))
    if not plan.bindings:
        return None
    plan.acting = []
    if _only_makes_state(optimizer):
        return None
    plan.around = [outer_plan for outer in around if (outer_plan := _plans.get(outer)) is not None]
    # One around another (ZeroRedundancyOptimizer, PostLocalSGDOptimizer, lookahead) has the other's groups, or as many,
    # and the other gets them apart when it steps.
    around_another = any(isinstance(value, Optimizer) for value in vars(optimizer).values())
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):  # a few optimizers take something else first
        _act_before(optimizer, plan)
        if not around_another:
            plan.groups.apply(optimizer)
        return None

    # The gradients come to be inside the step: act each time the closure has made them.
    def then_act(*inner: Any, **named: Any) -> Any:
        try:
            loss = closure(*inner, **named)
            _act_before(optimizer, plan)
        except BaseException:
            plan.groups.restore(optimizer)
            raise
        return loss

    if not around_another:
        plan.groups.apply(optimizer)
    if "closure" in kwargs:
        return args, {**kwargs, "closure": then_act}
    return (args[0], then_act, *args[2:]), kwargs


def _only_makes_state(optimizer: Optimizer) -> bool:
    """Whether this step is none of training: nothing moves, and no gradient is other than zero.

    `torch.distributed.checkpoint` (FSDP, Accelerate) takes such a step to have an optimizer make its state, into
    which it then loads the saved one. A schedule that begins at a learning rate of 0 has gradients.
    """
    # None: the optimizer finds its rate itself, as Adafactor with a relative step.
    rates = [group.get("lr", 1.0) for group in optimizer.param_groups]
    if optimizer.state or any(rate is None or float(rate) != 0 for rate in rates):
        return False
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    local = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in gradients]
    return not any(bool(grad.any()) for grad in local)


def _act_before(optimizer: Optimizer, plan: _Plan) -> None:
    # Set by GradScaler for optimizers that unscale in their kernel.
    scale = getattr(optimizer, "grad_scale", None)
    again, plan.acting = plan.acting, [binding for binding in plan.bindings if binding.ready()]
    with torch.no_grad():
        clipped = [p for b in plan.acting if b.driver.clips_penalty for p in plan.untouched(b)]
        undone = undo(clipped) if clipped else []
    for binding in plan.acting:
        driver = binding.driver
        moment = binding.moment(
            grad_scale=1.0 if scale is None else scale,
            others=_alive(binding.others),
            found_inf=getattr(optimizer, "found_inf", None),
        )
        if moment.lead is not None:
            driver.read(moment.lead)
        with torch.no_grad():
            moment.loss_scale = gradient_scale(optimizer)
            first = driver.act(moment, plan.untouched(binding))
        # A closure may be evaluated several times within one step.
        binding.first = first or (binding in again and binding.first)
    with torch.no_grad():
        redo(undone)
    begin_momentum(optimizer)


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    plan = _plans.get(optimizer)
    if plan is None or not plan.bindings or any(outer is optimizer for outer in steps_around()):
        return
    plan.groups.restore(optimizer)
    acting, plan.acting, plan.around = plan.acting, [], []
    found_inf = getattr(optimizer, "found_inf", None)  # the fused counterpart of a step not taken
    skipped = found_inf is not None and bool(found_inf.item())
    for binding in acting:
        binding.driver.optimizer_steps += 1
        if skipped or not binding.first:
            continue
        moment = binding.moment(optimizer=optimizer)
        with torch.no_grad():
            binding.driver.finish(moment)


def known_optimizers() -> list[Optimizer]:
    """The living optimizers that have stepped since import."""
    return list(_plans)


def install() -> Callable[[], None]:
    """Register the hooks with torch, once; called at import.

    Returns:
        A function that takes them out again.
    """
    handles = [register_optimizer_step_pre_hook(_before_step), register_optimizer_step_post_hook(_after_step)]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove
