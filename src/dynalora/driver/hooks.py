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
from typing import Any, cast

import torch
from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from dynalora.common.private import gradient_scale, steps_around
from dynalora.driver.driver import Driver, OptimizerOverride
from dynalora.driver.losses import Gradients, watch_backward

# A parameter group with this key already follows the adapter's rules (see `param_groups`), and is left as it is.
GROUP_MARK = "dynalora"

_layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_plans: weakref.WeakKeyDictionary[Optimizer, _Plan] = weakref.WeakKeyDictionary()
_generation = 0


def track(layer: nn.Module) -> None:
    """Make an adapted layer, or a change of its adapters, known to the optimizer hooks (weakly)."""
    _layers.add(layer)
    if any(driver.needs_task_loss for driver in cast(Any, layer).drivers.values()):
        watch_backward(_note_gradients, _tell_drivers)
    invalidate()


def invalidate() -> None:
    """Look all optimizers up anew at their next step, because layers, adapters or parameters have changed."""
    global _generation
    _generation += 1


def _note_gradients() -> list[tuple[Driver, Gradients]]:
    return [
        (driver, Gradients(layers, driver.adapter))
        for driver, layers in _all_drivers()
        if driver.needs_task_loss
    ]


def _tell_drivers(loss: torch.Tensor, noted: list[tuple[Driver, Gradients]]) -> None:
    """Tell the drivers whose adapters got gradients from this loss."""
    for driver, gradients in noted:
        if gradients.made():
            driver.saw_loss(loss, anew=not gradients.begun)


def _all_drivers() -> list[tuple[Driver, list[Any]]]:
    """Every driver alive in this process with its layers, in model order."""
    found: dict[int, tuple[Driver, list[Any]]] = {}
    for layer in list(_layers):
        for driver in cast(Any, layer).drivers.values():
            found.setdefault(id(driver), (driver, []))[1].append(layer)
    for _, layers in found.values():
        layers.sort(key=lambda layer: layer.order)
    return list(found.values())


@dataclass(eq=False)
class _Binding:
    """The part of one adapter that one optimizer owns."""

    driver: Driver
    layers: list[weakref.ref[nn.Module]]
    lead: weakref.ref[nn.Module] | None
    parameters: list[weakref.ref[torch.Tensor]]
    all_layers: list[weakref.ref[nn.Module]] = field(default_factory=list)
    others: list[weakref.ref[torch.Tensor]] = field(default_factory=list)
    first: bool = False  # of the optimizers that share the current training step

    def live_parameters(self) -> list[torch.Tensor]:
        return _alive(self.parameters)

    def live_layers(self) -> list[Any]:
        return _alive(self.layers)

    def has_layers(self) -> bool:
        return any(reference() is not None for reference in self.layers)

    def lead_layer(self) -> Any:
        return self.lead() if self.lead is not None else None

    def has_gradient(self) -> bool:
        return any(parameter.grad is not None for parameter in self.live_parameters())


def _alive(references: Iterable[weakref.ref[Any]]) -> list[Any]:
    return [thing for reference in references if (thing := reference()) is not None]


@dataclass
class _Plan:
    """What to do at the steps of one optimizer; remade when its parameters or any adapter changed."""

    stamp: object
    bindings: list[_Binding]
    overrides: dict[int, OptimizerOverride]
    # The user's own groups while ours are in place: each group, its own settings, and the ones it has instead.
    original: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] | None = None
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
    return _generation, tuple(shape)


def _make_plan(optimizer: Optimizer, stamp: object) -> _Plan:
    owned: dict[int, bool] = {}  # id of parameter -> whether its group is the user's plain one
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            owned[id(parameter)] = GROUP_MARK not in group
    bindings: dict[int, _Binding] = {}
    overrides: dict[int, OptimizerOverride] = {}
    for layer in list(_layers):
        for adapter, driver in cast(Any, layer).drivers.items():
            mine = {
                role: parameter
                for role, parameter in cast(Any, layer).adapter_parameters(adapter).items()
                if id(parameter) in owned
            }
            if not mine:
                continue
            binding = bindings.setdefault(id(driver), _Binding(driver, [], None, []))
            binding.layers.append(weakref.ref(layer))
            binding.parameters.extend(weakref.ref(cast(torch.Tensor, p)) for p in mine.values())
            if cast(Any, layer).progress(adapter) is not None:
                binding.lead = weakref.ref(layer)
            for role, override in driver.method.optimizer_overrides(driver.config, layer, adapter).items():
                if role in mine and owned[id(mine[role])]:
                    overrides[id(mine[role])] = override
    everyone = _all_drivers()
    of_adapters = {
        id(p)
        for _, layers in everyone
        for layer in layers
        for adapter in layer.drivers
        for p in layer.adapter_parameters(adapter).values()
    }
    others = [
        weakref.ref(p)
        for group in optimizer.param_groups
        for p in group["params"]
        if id(p) not in of_adapters
    ]
    whole = {id(driver): layers for driver, layers in everyone}
    for binding in bindings.values():
        binding.others = others
        binding.all_layers = [weakref.ref(layer) for layer in whole[id(binding.driver)]]
        # A WeakSet has no order; the layers' own numbering makes results independent of it.
        binding.layers.sort(key=lambda ref: cast(Any, ref()).order)
        if binding.lead is None:
            binding.lead = _find_lead(binding.driver)
    return _Plan(stamp, list(bindings.values()), overrides)


def _find_lead(driver: Driver) -> weakref.ref[nn.Module] | None:
    """The layer that carries an adapter's clock, when another optimizer owns its parameters."""
    carriers = (layer for layer in layers_of(driver) if layer.progress(driver.adapter) is not None)
    return next(map(weakref.ref, carriers), None)


def _plan_for(optimizer: Optimizer) -> _Plan:
    plan = _plans.get(optimizer)
    if plan is not None and plan.original is not None:  # the last step raised between the hooks
        _restore_groups(optimizer, plan)
    stamp = _stamp(optimizer)
    if plan is None or plan.stamp != stamp:
        if plan is None:
            _watch_state_dict(optimizer)
        plan = _make_plan(optimizer, stamp)
        _plans[optimizer] = plan
    return plan


def _watch_state_dict(optimizer: Optimizer) -> None:
    def restore(optimizer: Optimizer) -> None:
        plan = _plans.get(optimizer)
        if plan is not None and plan.original is not None:
            _restore_groups(optimizer, plan)

    optimizer.register_state_dict_pre_hook(restore)


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not _layers:
        return None
    around = steps_around()
    if any(outer is optimizer for outer in around):
        return None
    plan = _plan_for(optimizer)
    if not plan.bindings:
        return None
    plan.acting = []
    if _only_makes_state(optimizer):
        return None
    plan.around = [outer_plan for outer in around if (outer_plan := _plans.get(outer)) is not None]
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):  # a few optimizers take something else first
        _act_before(optimizer, plan)
        _apply_groups(optimizer, plan)
        return None

    # The gradients come to be inside the step: act each time the closure has made them.
    def then_act(*inner: Any, **named: Any) -> Any:
        try:
            loss = closure(*inner, **named)
            _act_before(optimizer, plan)
        except BaseException:
            if plan.original is not None:
                _restore_groups(optimizer, plan)
            raise
        return loss

    _apply_groups(optimizer, plan)
    if "closure" in kwargs:
        return args, {**kwargs, "closure": then_act}
    return (args[0], then_act, *args[2:]), kwargs


def _only_makes_state(optimizer: Optimizer) -> bool:
    """Whether this step is none of training: nothing moves, and no gradient is other than zero.

    `torch.distributed.checkpoint` (FSDP, Accelerate) takes such a step to have an optimizer make its state, into
    which it then loads the saved one. A schedule that begins at a learning rate of 0 has gradients.
    """
    if optimizer.state or any(float(group.get("lr", 1.0)) != 0 for group in optimizer.param_groups):
        return False
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return not any(bool((one.to_local() if hasattr(one, "to_local") else one).any()) for one in gradients)


def _act_before(optimizer: Optimizer, plan: _Plan) -> None:
    # Set by GradScaler for optimizers that unscale in their kernel.
    scale = getattr(optimizer, "grad_scale", None)
    # An optimizer may outlive its model: of layers that are gone there is nothing to drive.
    ready = [binding for binding in plan.bindings if binding.has_gradient() and binding.has_layers()]
    again, plan.acting = plan.acting, ready
    for binding in plan.acting:
        driver = binding.driver
        lead = binding.lead_layer()
        if lead is not None:
            driver.read(lead)
        with torch.no_grad():
            first = driver.act(
                binding.live_layers(),
                plan.untouched(binding),
                1.0 if scale is None else scale,
                _alive(binding.all_layers),
                _alive(binding.others),
                gradient_scale(optimizer) if driver.needs_task_loss else 1.0,
                getattr(optimizer, "found_inf", None),
            )
        # A closure may be evaluated several times within one step.
        binding.first = first or (binding in again and binding.first)


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    plan = _plans.get(optimizer)
    if plan is None or not plan.bindings or any(outer is optimizer for outer in steps_around()):
        return
    if plan.original is not None:
        _restore_groups(optimizer, plan)
    acting, plan.acting, plan.around = plan.acting, [], []
    found_inf = getattr(optimizer, "found_inf", None)  # the fused counterpart of a step not taken
    skipped = found_inf is not None and bool(found_inf.item())
    for binding in acting:
        binding.driver.optimizer_steps += 1
        if skipped or not binding.first:
            continue
        with torch.no_grad():
            moment = binding.driver.moment(binding.live_layers(), _alive(binding.all_layers))
            moment.shared = binding.driver.shared
            binding.driver.method.after_step(moment)
        binding.driver.advance(binding.lead_layer())


# Parameters with rules of their own --------------------------------------------------------------------------------
#
# Moving them to groups of their own for good would break learning-rate schedulers made before, and the user's own
# bookkeeping. So they step in extra groups that exist only during the step, made from the user's group with its
# current learning rate. Optimizer state is kept by parameter, so it does not notice.


def _apply_groups(optimizer: Optimizer, plan: _Plan) -> None:
    if not plan.overrides:
        return
    groups = optimizer.param_groups
    plan.original = []
    during: list[dict[str, Any]] = []
    for group in groups:
        apart: dict[tuple[float, float | None], list[Any]] = {}
        plain = []
        for parameter in group["params"]:
            override = plan.overrides.get(id(parameter))
            if override is None:
                plain.append(parameter)
            else:
                apart.setdefault((override.lr_multiplier, override.weight_decay), []).append(parameter)
        rules = list(apart.items())
        # The mark keeps an optimizer inside this one, stepping the same groups, from doing it again.
        # The group itself stays wherever it can, since optimizers keep notes in their groups.
        own: dict[str, Any] = {"params": plain}
        if rules and not plain:
            own = {**_overridden(group, *rules.pop(0)), GROUP_MARK: True}
        plan.original.append((group, {key: group[key] for key in own if key in group}, own))
        during.append(group)
        during.extend({**group, **_overridden(group, *rule), GROUP_MARK: True} for rule in rules)
    for group, _, own in plan.original:
        group.update(own)
    groups[:] = during


def _restore_groups(optimizer: Optimizer, plan: _Plan) -> None:
    assert plan.original is not None
    for group, theirs, ours in plan.original:
        # What the optimizer itself has changed since is its own business.
        group.update({key: value for key, value in theirs.items() if group.get(key) is ours[key]})
        for key in ours.keys() - theirs.keys():
            del group[key]
    optimizer.param_groups[:] = [group for group, _, _ in plan.original]
    plan.original = None


def _overridden(
    group: dict[str, Any], rule: tuple[float, float | None], parameters: list[Any]
) -> dict[str, Any]:
    """The settings with which some parameters of a group step."""
    lr_multiplier, weight_decay = rule
    settings: dict[str, Any] = {"params": parameters}
    # lr is None for optimizers that choose it themselves (Adafactor's relative step): theirs stays.
    if lr_multiplier != 1.0 and group.get("lr") is not None:
        settings["lr"] = group["lr"] * lr_multiplier
    if weight_decay is not None and "weight_decay" in group:
        settings["weight_decay"] = weight_decay
    return settings


def param_groups(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Parameter groups for hand-written loops and custom optimizers.

    For an adapter, training with these groups equals training with `model.parameters()`, where the same rules are
    applied during each step; groups make them visible and let a scheduler treat them apart. Biases and other
    one-dimensional parameters of the model itself, such as those of a trained head, get no weight decay.

    Args:
        model: A model with adapters.
        lr: Learning rate of the adapter's factors; parameters with a multiplier (DISeL's gates) get a multiple.
        weight_decay: Weight decay of the adapter, and of other parameters of two dimensions.

    Returns:
        Groups with `params`, `lr` and `weight_decay`, for any `torch.optim` optimizer. Frozen parameters
        are left out; no group is empty.
    """
    prepare_unloaded(model)
    rules: dict[int, OptimizerOverride] = {}
    ours: set[int] = set()
    for module in model.modules():
        if not hasattr(module, "adapter_parameters"):
            continue
        layer = cast(Any, module)
        for adapter, driver in layer.drivers.items():
            overrides = driver.method.optimizer_overrides(driver.config, layer, adapter)
            for role, parameter in layer.adapter_parameters(adapter).items():
                ours.add(id(parameter))
                if role in overrides:
                    rules[id(parameter)] = overrides[role]
    sorted_out: dict[tuple[float, float], list[torch.Tensor]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        rule = rules.get(id(parameter), OptimizerOverride())
        decay = weight_decay if parameter.ndim > 1 or id(parameter) in ours else 0.0
        if rule.weight_decay is not None:
            decay = rule.weight_decay
        sorted_out.setdefault((lr * rule.lr_multiplier, decay), []).append(parameter)
    return [
        {"params": params, "lr": rate, "weight_decay": decay, GROUP_MARK: True}
        for (rate, decay), params in sorted_out.items()
    ]


def layers_of(driver: Driver) -> list[Any]:
    """All layers of an adapter in model order, whichever optimizers own their parameters."""
    return next((layers for other, layers in _all_drivers() if other is driver), [])


def prepare_unloaded(model: nn.Module) -> None:
    """Let methods compute the start of adapters that were made as if to be loaded, and got no weights from a file.

    Args:
        model: A model with adapters, or one of its layers; then all layers of the layer's adapters are prepared.
    """
    waiting = {
        id(driver): driver
        for module in model.modules()
        if hasattr(module, "adapter_parameters")
        for adapter, driver in cast(Any, module).drivers.items()
        if adapter in cast(Any, module).unprepared
    }
    for driver in waiting.values():
        adapter = driver.adapter
        layers = {}
        for layer in layers_of(driver):
            # transformers loads weights by putting other parameters in place.
            if layer.unprepared.pop(adapter, None) is layer.parameter("up", adapter):
                layers[layer.name] = layer
        if layers:
            driver.method.prepare(layers, adapter, driver.config)


def known_optimizers() -> list[Optimizer]:
    """The living optimizers that have stepped since import."""
    return list(_plans)


def tracked_layers() -> Iterable[nn.Module]:
    """The adapted layers alive in this process (for tests)."""
    return list(_layers)


def install() -> Callable[[], None]:
    """Register the hooks with torch, once; called at import.

    Returns:
        A function that takes them out again.
    """
    handles = [
        register_optimizer_step_pre_hook(_before_step),
        register_optimizer_step_post_hook(_after_step),
    ]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove
