"""Retention as a part that any method's adapters can have: a penalty on how much the base model's own text changes.

For a layer with input x and output y = W0·x, on text that the base model wrote, let C = E[x xᵀ] and G = E[g gᵀ], with
g the gradient at y of the text's summed loss. The text's tokens are the model's own samples, so G is the Fisher
information of y. For a change ΔW of this weight alone, to second order and per token (Martens and Grosse 2015),

    KL(base ‖ tuned) ≈ ½ tr(G ΔW C ΔWᵀ)

With s·ΔW = s·up·diag(d)·down this is a form in r × r products only,

    P = ½ s² Σ_ij (upᵀ G up)_ij · M_ij,      M = diag(d) · (down C downᵀ) · diag(d)

For an update that depends on the input (gates), M is the mean of m(x) m(x)ᵀ over stored inputs x of the base model,
with m(x) = g(x) ⊙ d ⊙ down(x) as the layer computes it. The gradient of `weight` · Σ_layers P is added right before the
optimizer's step, so the logged loss stays the task's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from dynalora.adapter.curvature import Curvature
from dynalora.adapter.layer import AdapterLayer
from dynalora.driver import Moment
from dynalora.errors import TrainingError
from dynalora.spectral.second_moment import SecondMoment

BANK_ROWS = 256
"""Stored inputs that one step reads; steps take turns over the bank."""


def retention_penalty(
    layers: Iterable[AdapterLayer], adapter: str, curvatures: Mapping[AdapterLayer, Curvature], step: int = 0
) -> torch.Tensor:
    """Σ P over layers, as at the top of this module: a scalar that can be differentiated in all parameters.

    Args:
        layers: The adapted layers.
        adapter: The adapter.
        curvatures: What each layer knows of the base model's text.
        step: Which part of the stored inputs is read, for updates that depend on them.
    """
    total: torch.Tensor | None = None
    groups: dict[tuple[object, ...], list[AdapterLayer]] = defaultdict(list)
    for layer in layers:
        up, _ = layer.sides(adapter)
        gated = layer.depends_on_input(adapter)
        groups[up.shape, layer.in_features, layer.scaling[adapter], up.dtype, up.device, gated].append(layer)
    for group in groups.values():
        first = group[0]
        moments = [curvatures[layer] for layer in group]
        place = first.parameter("up", adapter)
        outputs = SecondMoment.stack([moment.outputs for moment in moments]).to(place.device, place.dtype)
        if first.depends_on_input(adapter):
            up = torch.stack([layer.sides(adapter)[0] for layer in group])
            second = torch.stack(
                [
                    _narrow_moment(layer, adapter, moment, step)
                    for layer, moment in zip(group, moments, strict=True)
                ]
            )
        else:
            factors = [layer.factors(adapter) for layer in group]
            up = torch.stack([pair[0] for pair in factors])  # (L, out, r), the diagonal in it
            down = torch.stack([pair[1] for pair in factors])
            inputs = SecondMoment.stack([moment.inputs for moment in moments]).to(place.device, place.dtype)
            second = inputs.form(down)
        value = 0.5 * first.scaling[adapter] ** 2 * (outputs.form(up.mT) * second).sum()
        total = value if total is None else total + value.to(total.device)
    if total is None:
        raise ValueError("the adapter adapts no layer")
    return total


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


class Retain:
    """Adds the gradient of the penalty to an adapter's, at every step. One object per adapter; its driver holds it.

    Attributes:
        weight: Of the penalty.
        value: Σ P at the last step, without the weight.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.value: torch.Tensor | None = None
        # Of the training step that is under way: gradients by parameter, and the parameters that have had theirs.
        self._gradients: dict[int, torch.Tensor] = {}
        self._done: set[int] = set()

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
        for parameter in parameters:
            gradient = self._gradients.get(id(parameter))
            if gradient is None:
                continue
            addition = gradient * (self.weight * moment.grad_scale)
            if parameter.grad is None:
                parameter.grad = addition
            else:
                parameter.grad.add_(addition)
        self._done |= ids

    def _differentiate(self, moment: Moment) -> dict[int, torch.Tensor]:
        """The gradient of Σ P by parameter, by the parameter's id."""
        layers, adapter = moment.all_layers, moment.adapter
        unread = [layer.name for layer in layers if adapter not in layer.curvatures]
        if unread:
            raise TrainingError(
                f"{type(moment.config).__name__}(retain={moment.config.retain:g}) needs text of the base model, and "
                f"adapter {adapter!r} has not read any: call dynalora.prepare_retain(model, tokenizer) once before "
                "training, or give transformers' Trainer the tokenizer (processing_class=tokenizer), which then does."
            )
        parameters = [
            parameter
            for layer in layers
            for parameter in layer.adapter_parameters(adapter).values()
            if parameter.requires_grad
        ]
        with torch.enable_grad():
            curvatures = {layer: layer.curvatures[adapter] for layer in layers}
            value = retention_penalty(layers, adapter, curvatures, moment.step)
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        self.value = value.detach()
        return {
            id(parameter): gradient
            for parameter, gradient in zip(parameters, gradients, strict=True)
            if gradient is not None
        }
