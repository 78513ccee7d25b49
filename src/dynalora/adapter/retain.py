"""Retention as a part that any method's adapters can have: a penalty on how much the base model's own text changes.

For a layer with input x and output y = W0·x, on text that the base model wrote, let C = E[x xᵀ] and G = E[g gᵀ], with
g the gradient at y of the text's summed loss. The text's tokens are the model's own samples, so G is the Fisher
information of y. For a change ΔW of this weight alone, to second order and per token (Martens and Grosse 2015),

    KL(base ‖ tuned) ≈ ½ tr(G ΔW C ΔWᵀ)

With s·ΔW = s·up·diag(d)·down this is a form in r × r products only,

    P = ½ s² Σ_ij (upᵀ G up)_ij · M_ij,      M = diag(d) · (down C downᵀ) · diag(d)

For an update that depends on the input (gates), M is the mean of m(x) m(x)ᵀ over stored inputs x of the base model,
with m(x) = g(x) ⊙ d ⊙ down(x) as the layer computes it. The gradient of `weight` · Σ_layers P is added right before the
optimizer's step, so the logged loss stays the task's. With `retain_mode="replay"` the gradient is that of the KL itself
on a few texts, and with `max_forgetting` the weight follows the KL ([`adapter.budget`][dynalora.adapter.budget]).
"""

from __future__ import annotations

import operator
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dynalora.adapter.budget import Meter, controlled_weight, due, measured, new_state
from dynalora.adapter.curvature import Curvature
from dynalora.adapter.layer import AdapterLayer
from dynalora.adapter.storage import BUDGET
from dynalora.common.processes import spread_as, whole
from dynalora.driver import Moment, Part
from dynalora.errors import TrainingError
from dynalora.spectral.second_moment import SecondMoment, StackedMoments

BANK_ROWS = 256
"""Stored inputs that one step reads; steps take turns over the bank."""


class RetentionPenalty:
    """Σ P over layers, as at the top of this module. What does not change from step to step is laid out once.

    The tensors of the curvatures become views of what is held here. The layers are not held.

    Args:
        layers: The adapted layers.
        adapter: The adapter.
    """

    def __init__(self, layers: Sequence[AdapterLayer], adapter: str) -> None:
        if not layers:
            raise ValueError("the adapter adapts no layer")
        self.adapter = adapter
        self.curvatures = [layer.curvatures[adapter] for layer in layers]
        self._places = _places(layers, adapter)
        # Layers with a common input have one moment of it; those with gates read stored inputs instead.
        self._readers: dict[SecondMoment, list[int]] = defaultdict(list)
        for index, (layer, curvature) in enumerate(zip(layers, self.curvatures, strict=True)):
            if not layer.depends_on_input(adapter):
                self._readers[curvature.inputs].append(index)
        self._inputs = StackedMoments(
            list(self._readers), [self._places[readers[0]] for readers in self._readers.values()]
        )
        self._outputs = StackedMoments([curvature.outputs for curvature in self.curvatures], self._places)

    def serves(self, layers: Sequence[AdapterLayer]) -> bool:
        """Whether these layers still have the curvatures, and are still where they were."""
        curvatures = [layer.curvatures[self.adapter] for layer in layers]
        return (
            len(curvatures) == len(self.curvatures)
            and all(map(operator.is_, curvatures, self.curvatures))
            and _places(layers, self.adapter) == self._places
        )

    def __call__(self, layers: Sequence[AdapterLayer], step: int = 0) -> torch.Tensor:
        """The penalty at the present weights: a scalar that can be differentiated in all parameters.

        Args:
            layers: The layers that this was made with.
            step: Which part of the stored inputs is read, for updates that depend on them.
        """
        # up is (out, r), with the diagonal in it where there are no gates, and down (r, in).
        sides = [
            layer.sides(self.adapter) if layer.depends_on_input(self.adapter) else layer.factors(self.adapter)
            for layer in layers
        ]
        outer = [forms[0] for forms in self._outputs.forms([[up.mT] for up, _ in sides])]
        inner: dict[int, torch.Tensor] = {}
        rows = [[sides[index][1] for index in readers] for readers in self._readers.values()]
        for readers, forms in zip(self._readers.values(), self._inputs.forms(rows), strict=True):
            inner.update(zip(readers, forms, strict=True))
        groups: dict[tuple[torch.Size, torch.device], list[int]] = defaultdict(list)
        for index, layer in enumerate(layers):
            if index not in inner:
                inner[index] = _narrow_moment(layer, self.adapter, self.curvatures[index], step).to(outer[index].dtype)
            groups[outer[index].shape, outer[index].device].append(index)
        total: torch.Tensor | None = None
        for (_, device), group in groups.items():
            products = torch.stack([outer[index] for index in group]) * torch.stack([inner[index] for index in group])
            weights = [0.5 * layers[index].scaling[self.adapter] ** 2 for index in group]
            value = products.sum((1, 2)) @ torch.tensor(weights, dtype=products.dtype).to(device, non_blocking=True)
            total = value if total is None else total + value.to(total.device)
        assert total is not None
        return total


def _places(layers: Sequence[AdapterLayer], adapter: str) -> list[tuple[torch.device, torch.dtype]]:
    """Where, and how precisely, each layer's forms are wanted."""
    parameters = [layer.parameter("up", adapter) for layer in layers]
    return [(parameter.device, torch.promote_types(parameter.dtype, torch.float32)) for parameter in parameters]


def _narrow_moment(layer: AdapterLayer, adapter: str, curvature: Curvature, step: int) -> torch.Tensor:
    """E[m(x) m(x)ᵀ], (r, r), over the part of the stored inputs whose turn it is."""
    bank = curvature.bank
    assert bank is not None
    parts = max(1, bank.shape[0] // BANK_ROWS)
    rows = bank[step % parts :: parts].to(layer.parameter("up", adapter).device)
    with _without_dropout(layer, adapter):
        narrow = layer.narrow(rows, adapter)
    return narrow.mT @ narrow / rows.shape[0]


@contextmanager
def _without_dropout(layer: AdapterLayer, adapter: str) -> Iterator[None]:
    probability, layer.adapter_dropout[adapter] = layer.adapter_dropout[adapter], 0.0
    try:
        yield
    finally:
        layer.adapter_dropout[adapter] = probability


@contextmanager
def _in_full(layers: Sequence[AdapterLayer], adapter: str) -> Iterator[list[torch.Tensor]]:
    """Let the layers have whole parameters inside, where FSDP2 has spread them over processes, all of which must ask.

    Yields:
        The parameters that train, in the order of layers and roles, to differentiate in.
    """
    spread: list[tuple[nn.Module, nn.Parameter]] = []
    parameters: list[torch.Tensor] = []
    try:
        for layer in layers:
            for role, parameter in layer.adapter_parameters(adapter).items():
                if hasattr(parameter, "full_tensor"):
                    holder = layer.container(role)
                    spread.append((holder, parameter))
                    parameter = nn.Parameter(whole(parameter.detach()), requires_grad=parameter.requires_grad)
                    holder._parameters[adapter] = parameter
                if parameter.requires_grad:
                    parameters.append(parameter)
        yield parameters
    finally:
        for holder, parameter in spread:
            holder._parameters[adapter] = parameter


class Retain(Part):
    """Adds the gradient of the penalty to an adapter's, at every step. One object per adapter; its driver holds it.

    Args:
        replays: Whether it is the gradient of the KL itself, which takes a backward pass of its own.

    Attributes:
        weight: Of the penalty at the last step.
        value: Σ P at the last step, without the weight; with `retain_mode="replay"` the KL on the step's texts.
        meter: Measures the model; None until text was read. It belongs to one model: copies have none.
        outcome: What became of the budget, once the run has ended.
        ends_itself: Whether a trainer is at work, which ends the budget when the run ends.
    """

    name = "retain"

    def __init__(self, replays: bool = False) -> None:
        # Layers spread over processes can be had in full for the penalty, not for a pass of the model.
        self.sharding = () if replays else ("FSDP2",)
        self.weight: torch.Tensor | float | None = None
        self.value: torch.Tensor | None = None
        self.meter: Meter | None = None
        self.outcome: Any = None
        self.ends_itself = False
        self._warned = False
        # Of the training step that is under way: gradients by parameter, and the parameters that have had theirs.
        self._gradients: dict[int, torch.Tensor] = {}
        self._done: set[int] = set()
        self._penalty: RetentionPenalty | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "meter": None, "_gradients": {}, "_done": set(), "_penalty": None}

    def exchanges(self, config: Any) -> bool:
        """What is measured for a budget must be the same number in all processes."""
        return config.max_forgetting is not None

    def needs_whole_steps(self, config: Any) -> bool:
        """The gradients of all layers are had together, at the weights of the step's start."""
        return True

    def ready(self, config: Any, layers: Iterable[AdapterLayer], adapter: str) -> bool:
        """Whether the text that a configuration needs has been read."""
        replay = config.retain_mode == "replay"
        measures = replay or config.max_forgetting is not None
        unread = not replay and any(adapter not in layer.curvatures for layer in layers)
        return not unread and (self.meter is not None or not measures)

    def before_step(self, moment: Moment) -> None:
        """Add the gradient to the parameters that are about to step.

        A training step may be made by several optimizers; all get gradients at the weights as they were at its start.

        Raises:
            TrainingError: No text of the base model was read yet.
        """
        parameters = [
            parameter
            for layer in moment.layers
            for parameter in layer.adapter_parameters(moment.adapter).values()
            if moment.awaits(parameter)
        ]
        ids = {id(parameter) for parameter in parameters}
        if not self._gradients or not self._done.isdisjoint(ids):
            self._done.clear()
            self._gradients = self._differentiate(moment)
        weight = self.weight
        assert weight is not None
        for parameter in parameters:
            gradient = self._gradients.get(id(parameter))
            if gradient is None:
                continue
            if isinstance(weight, torch.Tensor):
                weight = weight.to(gradient.device)
            addition = gradient * (weight * moment.grad_scale)
            if parameter.grad is None:
                parameter.grad = addition
            else:
                parameter.grad.add_(addition)
        self._done |= ids

    def metrics(self, moment: Moment) -> dict[str, float]:
        """The weight, the penalty without it, and the KL that was measured last."""
        if self.weight is None or self.value is None:
            return {}
        numbers = {"retain_weight": float(self.weight), "retain_penalty": float(self.value)}
        last = self._measured(moment)
        return numbers if last is None else {**numbers, "retain_kl": last[0]}

    def report(self, moment: Moment) -> dict[str, Any]:
        """The weight, and where the adapter stands with its budget."""
        config = moment.config
        report: dict[str, Any] = {"retain_weight": config.retain if self.weight is None else float(self.weight)}
        if config.max_forgetting is not None:
            report["max_forgetting"] = config.max_forgetting
            last = self._measured(moment)
            if last is not None:
                report["forgetting"], report["forgetting_step"] = last
            if self.outcome is not None:
                report["budget"] = str(self.outcome)
        return report

    def check_finished(self, moment: Moment, when: str) -> None:
        """Warn, once, of an adapter whose budget nobody ended.

        Args:
            moment: The present moment.
            when: What the user is doing, for the message.
        """
        config, adapter = moment.config, moment.adapter
        steps_made = self.weight is not None
        if config.max_forgetting is None or not steps_made or self.outcome is not None or self.ends_itself:
            return
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{when}: adapter {adapter!r} was trained with max_forgetting={config.max_forgetting:g}, and may be "
                "above it: call dynalora.hold_budget(model) after the last step (checkpoints on the way need no call).",
                stacklevel=2,
            )

    def forget_run(self, lead: AdapterLayer, adapter: str) -> None:
        """Begin the budget of a new run."""
        lead.set_running(BUDGET.name, adapter, None)
        self.outcome = None
        self._warned = False

    def _measured(self, moment: Moment) -> tuple[float, int] | None:
        state = None if moment.lead is None else moment.lead.running(BUDGET.name, moment.adapter)
        return None if state is None else measured(state)

    def _differentiate(self, moment: Moment) -> dict[int, torch.Tensor]:
        """The gradient of Σ P, or of the KL itself, by the parameter's id; and the weight for it."""
        layers, adapter, config = moment.all_layers, moment.adapter, moment.config
        if not self.ready(config, layers, adapter):
            raise TrainingError(
                f"{type(config).__name__}(retain={config.retain:g}) needs text of the base model, and "
                f"adapter {adapter!r} has not read any: call dynalora.prepare_retain(model, tokenizer) once before "
                "training, or give transformers' Trainer the tokenizer (processing_class=tokenizer), which then does."
            )
        parameters = [
            parameter
            for layer in layers
            for parameter in layer.adapter_parameters(adapter).values()
            if parameter.requires_grad
        ]
        if config.retain_mode == "replay":
            assert self.meter is not None
            value, gradients = self.meter.replay(moment.step, parameters)
        else:
            with torch.enable_grad(), _in_full(layers, adapter) as full:
                if self._penalty is None or not self._penalty.serves(layers):
                    self._penalty = RetentionPenalty(layers, adapter)
                value = self._penalty(layers, moment.step)
                gradients = tuple(
                    gradient if gradient is None else spread_as(parameter, gradient)
                    for parameter, gradient in zip(
                        parameters, torch.autograd.grad(value, full, allow_unused=True), strict=True
                    )
                )
        self.value = value.detach()
        self.outcome = None  # a run that goes on after its end has to be ended again
        fixed = config.max_forgetting is None or moment.skipped  # nothing is learned from a step that is not taken
        self.weight = config.retain if fixed else self._controlled(moment, self.value)
        return {
            id(parameter): gradient
            for parameter, gradient in zip(parameters, gradients, strict=True)
            if gradient is not None
        }

    def _controlled(self, moment: Moment, value: torch.Tensor) -> torch.Tensor:
        """The weight that keeps to the budget."""
        lead, config = moment.lead, moment.config
        state = lead.running(BUDGET.name, moment.adapter)
        if state is None:
            lead.set_running(BUDGET.name, moment.adapter, new_state().to(value.device))
            state = lead.running(BUDGET.name, moment.adapter)
        kl = None
        if due(moment.step, moment.total_steps):
            assert self.meter is not None
            kl = self.meter.kl()
        return controlled_weight(
            state, value, config.retain, config.max_forgetting, kl, moment.step, moment.total_steps
        )
