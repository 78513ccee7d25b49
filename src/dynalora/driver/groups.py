"""Parameters that step with a learning rate or a weight decay of their own.

Moving them to groups of their own for good would break learning-rate schedulers made before, and the user's own
bookkeeping. So they step in extra groups that exist only during the step, made from the user's group with its current
learning rate. Optimizer state is kept by parameter, so it does not notice.
"""

from __future__ import annotations

import statistics
import warnings
import weakref
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from dynalora.driver.model import prepare_unloaded
from dynalora.driver.moment import OptimizerOverride

# A parameter group with this key already follows the adapter's rules (see `param_groups`), and is left as it is. The
# value is the multiple of the learning rate that it was made with, from which rules that change go on; True: none do.
GROUP_MARK = "dynalora"

Settings = dict[str, Any]

_told: weakref.WeakSet[Optimizer] = weakref.WeakSet()


@dataclass
class StepGroups:
    """The groups of one optimizer during a step.

    Attributes:
        overrides: What differs, by the parameter's id.
        replaced: The user's groups while others are in place: each group, its own settings, and those it has instead;
            None between steps.
    """

    overrides: dict[int, OptimizerOverride]
    replaced: list[tuple[Settings, Settings, Settings]] | None = None
    #: Where the rate cannot be multiplied: parameters, what they were before the step, multiples of the step.
    moved: list[tuple[torch.Tensor, torch.Tensor, float]] = field(default_factory=list)

    def apply(self, optimizer: Optimizer) -> None:
        """Put the groups of the step in place."""
        if not self.overrides:
            return
        if isinstance(optimizer, torch.optim.LBFGS):
            self._tell_of_one_group(optimizer)
            return
        self.replaced = []
        during: list[Settings] = []
        one_rate = allows_one_rate(optimizer)
        group: Settings
        settings: Settings
        for group in optimizer.param_groups:
            # Where the optimizer chooses the rate itself (Adafactor's relative step), there is none to multiply.
            plain, rules = self._sorted(group, one_rate or group.get("lr", 0) is None)
            # The mark keeps an optimizer inside this one, stepping the same groups, from doing it again.
            # The group itself stays wherever it can, since optimizers keep notes in their groups.
            settings = {"params": plain}
            # Except that schedule-free's notes depend on the rate, and must go on from the user's.
            if rules and not plain and not _schedule_free(group):
                settings = {**_overridden(group, *rules.pop(0)), GROUP_MARK: True}
            self.replaced.append((group, {key: group[key] for key in settings if key in group}, settings))
            during.append(group)
            during.extend({**group, **_overridden(group, *rule), GROUP_MARK: True} for rule in rules)
        for group, _, settings in self.replaced:
            group.update(settings)
        optimizer.param_groups[:] = during

    def restore(self, optimizer: Optimizer) -> None:
        """Put the user's groups back, if others are in place."""
        with torch.no_grad():
            for parameter, start, multiple in self.moved:
                if parameter.shape == start.shape:
                    parameter.copy_(torch.lerp(start, parameter, multiple))
        self.moved = []
        if self.replaced is None:
            return
        for group, before, during in self.replaced:
            # What the optimizer itself has changed since is its own business.
            group.update({key: value for key, value in before.items() if group.get(key) is during[key]})
            for key in during.keys() - before.keys():
                del group[key]
        optimizer.param_groups[:] = [group for group, _, _ in self.replaced]
        self.replaced = None

    def _tell_of_one_group(self, optimizer: Optimizer) -> None:
        """Say, once for an optimizer, that it steps all parameters alike."""
        if optimizer in _told or all(override.lr_multiplier == 1.0 for override in self.overrides.values()):
            return
        _told.add(optimizer)
        warnings.warn(
            f"{type(optimizer).__name__} steps all parameters as one vector and finds their scales itself, so learning "
            "rates of some parameters' own (gate_lr_multiplier, match_step) have no effect with it.",
            stacklevel=2,
        )

    def _sorted(
        self, group: Settings, one_rate: bool
    ) -> tuple[list[Any], list[tuple[tuple[float, float | None], list[Any]]]]:
        """A group's parameters without a rule of their own, and the others by their rule."""
        apart: dict[tuple[float, float | None], list[Any]] = {}
        plain = []
        for parameter in group["params"]:
            override = self.overrides.get(id(parameter))
            multiple = 1.0 if override is None else override.lr_multiplier / group.get(GROUP_MARK, 1.0)
            if one_rate and multiple != 1.0 and parameter.grad is not None:
                self.moved.append((parameter, parameter.detach().clone(), multiple))
            decay = None if override is None else override.decay(group.get("weight_decay"), multiple)
            multiple = 1.0 if one_rate else multiple
            if (multiple, decay) == (1.0, None):
                plain.append(parameter)
            else:
                apart.setdefault((multiple, decay), []).append(parameter)
        return plain, list(apart.items())


def allows_one_rate(optimizer: Optimizer) -> bool:
    """Whether an optimizer refuses groups with different learning rates: Prodigy and D-Adaptation.

    They estimate one factor `d` of all rates and keep it in every group. Their steps are proportional to the rate, so a
    multiple of it is applied to the step that they have made.
    """
    return bool(optimizer.param_groups) and all("d" in group and "k" in group for group in optimizer.param_groups)


def _schedule_free(group: Settings) -> bool:
    """Whether a group has the notes of schedule-free optimizers."""
    return "weight_sum" in group and "lr_max" in group


def _overridden(group: Settings, rule: tuple[float, float | None], parameters: list[Any]) -> Settings:
    """The settings with which some parameters of a group step."""
    lr_multiplier, weight_decay = rule
    settings: Settings = {"params": parameters}
    if lr_multiplier != 1.0 and group.get("lr") is not None:
        settings["lr"] = group["lr"] * lr_multiplier
        if _schedule_free(group):
            # The largest rate so far, and the sum of weights that follow from the rates.
            settings["lr_max"] = group["lr_max"] * lr_multiplier
            settings["weight_sum"] = group["weight_sum"] * lr_multiplier ** group.get("weight_lr_power", 2)
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
    of_adapters: set[int] = set()
    for module in model.modules():
        if not hasattr(module, "adapter_parameters"):
            continue
        layer = cast(Any, module)
        for adapter, driver in layer.drivers.items():
            overrides = driver.optimizer_overrides(layer)
            for role, parameter in layer.adapter_parameters(adapter).items():
                of_adapters.add(id(parameter))
                if role in overrides:
                    rules[id(parameter)] = overrides[role]
    sorted_out: dict[tuple[bool, float, float], list[torch.Tensor]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        rule = rules.get(id(parameter), OptimizerOverride())
        # Multiples that change do not tell groups apart: a state that was saved fits the groups of a resumed run.
        multiple = rule.lr_multiplier if rule.begins is None else rule.begins
        decay = weight_decay if parameter.ndim > 1 or id(parameter) in of_adapters else 0.0
        changed = rule.decay(decay, multiple)
        decay = decay if changed is None else changed
        sorted_out.setdefault((rule.begins is not None, float(multiple), decay), []).append(parameter)
    groups = []
    for (changes, multiple, decay), params in sorted_out.items():
        if changes:
            multiple = statistics.median_low(float(rules[id(parameter)].lr_multiplier) for parameter in params)
            changed = rules[id(params[0])].decay(weight_decay, multiple)
            decay = weight_decay if changed is None else changed
        groups.append({"params": params, "lr": lr * multiple, "weight_decay": decay, GROUP_MARK: multiple})
    return groups
