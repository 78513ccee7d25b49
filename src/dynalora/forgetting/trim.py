"""Scaling an adapter's update down after training, as far as a bound on forgetting asks for.

With factor f every adapted layer computes y = W0·x + f·(W'·x − W0·x): 1 is the adapter as trained, 0 the base model.
Forgetting falls faster than learning does: most of what a large learning rate forgets
is back at f between 0.3 and 0.7.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer

from dynalora.adapter.layer import AdapterLayer, adapter_layers
from dynalora.common.notebook import Shown
from dynalora.common.processes import from_first
from dynalora.common.progress import Progress, counted, silent
from dynalora.driver import drivers_of
from dynalora.errors import ConfigError, TrainingError, UnsupportedError
from dynalora.forgetting.base_model import refuse_merged
from dynalora.forgetting.defaults import TRIM_FACTORS
from dynalora.forgetting.retention import base_predictions, retention
from dynalora.forgetting.texts import MeasuredText

"""Factors of the curve, from the adapter as trained downwards."""
NEAR_BEST = 0.01
"""Share of the lowest loss by which another may be higher and still count as near it."""
_SEARCH = 8  # most measurements for the factor of a bound
_CLOSE = 0.97  # share of the bound at which the search ends


@dataclass(frozen=True)
class TrimPoint:
    """An adapter at one factor.

    Attributes:
        factor: Of its update.
        kl: KL(base ‖ adapted) on the text, nats per token.
        kl_error: Its standard error over the texts.
        loss: Held-out loss of the task; None where none was measured.
    """

    factor: float
    kl: float
    kl_error: float
    loss: float | None = None


class TrimCurve(list[TrimPoint], Shown):
    """An adapter at several factors, which a notebook shows as a table and a picture."""


@dataclass(frozen=True)
class Trim:
    """What trimming came to.

    Attributes:
        factor: The factor that was taken.
        points: The curve, factors descending, with the one that was taken.
    """

    factor: float
    points: tuple[TrimPoint, ...]

    @property
    def taken(self) -> TrimPoint:
        """The point that was taken."""
        return next(point for point in self.points if point.factor == self.factor)


def trim_curve(
    model: PeftModel,
    text: MeasuredText,
    *,
    loss: Callable[[], float] | None = None,
    factors: Sequence[float] = TRIM_FACTORS,
    adapter: str | None = None,
    batch_size: int = 8,
    progress: Progress = silent,
) -> TrimCurve:
    """Forgetting and held-out loss of an adapter at several factors; the adapter is left as it is.

    Args:
        model: A causal language model with an adapter of dynalora's, or a LoRA of PEFT's.
        text: Text to measure forgetting on, from [`own_text`][dynalora.forgetting.texts.own_text] or `given_text`.
        loss: Measures the model's held-out loss as it is when called; None: not measured.
        factors: The factors.
        adapter: Its name; None: the active one.
        batch_size: Texts per pass.
        progress: Called with the number of factors done.

    Raises:
        ConfigError: A factor below 0, or there is no such adapter.
        UnsupportedError: The adapter's update cannot be scaled (PEFT's other methods), or is merged.
    """
    measure = _Measure(model, text, loss, factors, adapter, batch_size)
    return TrimCurve(measure.curve(factors, progress))


def smallest_near_best(losses: Mapping[float, float]) -> float:
    """The smallest factor whose loss is within 1 % ([`NEAR_BEST`][dynalora.forgetting.trim.NEAR_BEST]) of the lowest.

    Args:
        losses: Factor → loss, at least one.
    """
    limit = min(losses.values()) * (1 + NEAR_BEST)
    return min(factor for factor, loss in losses.items() if loss <= limit)


def trim(
    model: PeftModel,
    text: MeasuredText,
    *,
    max_kl: float,
    loss: Callable[[], float] | None = None,
    factors: Sequence[float] = TRIM_FACTORS,
    adapter: str | None = None,
    batch_size: int = 8,
    progress: Progress = silent,
) -> Trim:
    """Scale an adapter's update down to where it forgets no more than is allowed; the model is changed.

    The factor is the largest up to 1 whose KL is at most `max_kl`, to a few hundredths of it. Saving the adapter then
    writes the scaled update (as a smaller `alpha`), and everything else that reads it (merge, export, spectra) sees it.

    Args:
        model: As in [`trim_curve`][dynalora.forgetting.trim.trim_curve], and so are the other arguments.
        text: Text to measure forgetting on.
        max_kl: The most that may be forgotten, nats per token on that text; above 0.
        loss: Measures the held-out loss.
        factors: The factors of the curve.
        adapter: The adapter's name.
        batch_size: Texts per pass.
        progress: Called with the number of factors done.

    Returns:
        The factor and the curve.

    Raises:
        ConfigError: `max_kl` is not above 0, and as `trim_curve`.
        TrainingError: The KL of the adapter as trained is not finite.
        UnsupportedError: As `trim_curve`.
    """
    if not 0 < max_kl < float("inf"):
        raise ConfigError(f"max_kl is {max_kl!r}; give the most KL to allow, a number above 0 such as 0.05.")
    factors = [1.0, *sorted({*factors} - {1.0}, reverse=True)]
    measure = _Measure(model, text, loss, factors, adapter, batch_size)
    points = measure.curve(factors, progress)
    if not math.isfinite(points[0].kl):
        raise TrainingError(
            f"adapter {measure.name!r} has a KL of {points[0].kl}, so its weights are no numbers any more and cannot "
            "be scaled; train it again with a smaller learning rate."
        )
    low = max((p for p in points if p.kl <= max_kl), key=lambda p: p.factor, default=_BASE)
    if low.factor < 1.0:
        high = min((p for p in points if p.factor > low.factor), key=lambda p: p.factor)
        low = measure.search(low, high, max_kl)
        if low.factor not in {point.factor for point in points}:
            points.append(measure.at(low.factor) if loss is not None or low is _BASE else low)
    scale_update(model, low.factor, measure.name)
    return Trim(low.factor, tuple(sorted(points, key=lambda point: -point.factor)))


_BASE = TrimPoint(0.0, 0.0, 0.0)


class _Measure:
    """Measures an adapter at factors; the base model's predictions are made once."""

    def __init__(
        self,
        model: PeftModel,
        text: MeasuredText,
        loss: Callable[[], float] | None,
        factors: Sequence[float],
        adapter: str | None,
        batch_size: int,
    ) -> None:
        for factor in factors:
            if not factor >= 0:
                raise ConfigError(
                    f"factors holds {factor!r}; give numbers from 0 (the base model) up to 1 (as trained)."
                )
        refuse_merged(model)
        self.model, self.text, self.loss, self.batch_size = model, text, loss, batch_size
        self.name = adapter or model.active_adapter
        self.layers = _scalable(model, self.name)
        self.base = base_predictions(model, text, batch_size=batch_size, dtype=None, max_bytes=2**30)

    def curve(self, factors: Sequence[float], progress: Progress) -> list[TrimPoint]:
        """The adapter at each of the factors."""
        return [self.at(factor) for factor in counted(factors, "Scaling the update", progress)]

    def at(self, factor: float, *, with_loss: bool = True) -> TrimPoint:
        """The adapter at one factor; on several processes the first one's numbers, so that all take the same factor."""
        with _at(self.layers, self.name, factor):
            result = retention(self.model, self.text, base=self.base, batch_size=self.batch_size)
            value = float(self.loss()) if self.loss is not None and with_loss else None
        return from_first(TrimPoint(float(factor), result.kl, result.kl_error, value))

    def search(self, low: TrimPoint, high: TrimPoint, max_kl: float) -> TrimPoint:
        """The adapter as close below the bound as need be, between one below and one above.

        KL is nearly a power of the factor, and a power through both points tells where to look next.
        """
        for _ in range(_SEARCH):
            if low.kl >= _CLOSE * max_kl:
                break
            width = high.factor - low.factor
            guess = low.factor + width / 2
            if math.isfinite(high.kl):
                power = 2.0
                if low.kl > 0:
                    power = max(0.5, math.log(high.kl / low.kl) / math.log(high.factor / low.factor))
                guess = high.factor * ((1 + _CLOSE) / 2 * max_kl / high.kl) ** (1 / power)
            guess = min(max(guess, low.factor + width / 50), high.factor - width / 50)
            point = self.at(guess, with_loss=False)
            low, high = (point, high) if point.kl <= max_kl else (low, point)
        return low


def scale_update(model: PeftModel, factor: float, adapter: str | None = None) -> None:
    """Multiply an adapter's update by a factor, for good: in the layers and in the configuration that is saved.

    Raises:
        ConfigError: The factor is negative.
        UnsupportedError: The update cannot be scaled.
    """
    if not factor >= 0:
        raise ConfigError(f"factor is {factor!r}; give a number from 0 (the base model) up to 1 (as trained).")
    name = adapter or model.active_adapter
    for layer in _scalable(model, name):
        _scale(layer, name, factor)
    # The configuration may serve several models: this one gets its own.
    config: Any = copy.copy(model.peft_config[name])
    field = "alpha" if hasattr(config, "alpha") else "lora_alpha"
    setattr(config, field, getattr(config, field) * factor)
    config.alpha_pattern = {key: alpha * factor for key, alpha in (config.alpha_pattern or {}).items()}
    model.peft_config[name] = config
    for driver, _ in drivers_of(model):
        if driver.adapter == name:
            driver.config = config


@contextmanager
def update_scaled(model: PeftModel, factor: float, adapter: str | None = None) -> Iterator[PeftModel]:
    """The model with an adapter's update scaled inside, and exactly as it was afterwards.

    Args:
        model: The model with the adapter.
        factor: The factor.
        adapter: Its name; None: the active one.

    Raises:
        ConfigError: There is no such adapter.
        UnsupportedError: The update cannot be scaled.
    """
    name = adapter or model.active_adapter
    with _at(_scalable(model, name), name, factor):
        yield model


def _scalable(model: PeftModel, adapter: str) -> list[AdapterLayer | LoraLayer]:
    if adapter not in model.peft_config:
        raise ConfigError(f"The model has no adapter {adapter!r}; it has {', '.join(map(repr, model.peft_config))}.")
    layers: list[AdapterLayer | LoraLayer] = list(adapter_layers(model, adapter).values())
    for module in model.modules():
        if isinstance(module, LoraLayer) and adapter in module.scaling:
            if module.use_dora.get(adapter):
                raise UnsupportedError(
                    f"adapter {adapter!r} is a DoRA of PEFT's, whose norms do not scale with its update; plain LoRAs "
                    "and dynalora's adapters can be scaled."
                )
            layers.append(module)
    if not layers:
        kind = type(model.peft_config[adapter]).__name__
        raise UnsupportedError(f"adapter {adapter!r} ({kind}) has no layers whose update can be scaled.")
    return layers


def _scale(layer: AdapterLayer | LoraLayer, adapter: str, factor: float) -> None:
    if isinstance(layer, AdapterLayer):
        layer.scale_update(adapter, factor)
    else:
        layer.scaling[adapter] *= factor


@contextmanager
def _at(layers: Sequence[AdapterLayer | LoraLayer], adapter: str, factor: float) -> Iterator[None]:
    """The adapter at a factor inside, and as it was afterwards, bit for bit."""
    before = [(layer.scaling[adapter], _copies(layer, adapter) if factor != 1 else []) for layer in layers]
    try:
        if factor != 1:
            for layer in layers:
                _scale(layer, adapter, factor)
        yield
    finally:
        with torch.no_grad():
            for layer, (scaling, tensors) in zip(layers, before, strict=True):
                layer.scaling[adapter] = scaling
                for tensor, value in tensors:
                    tensor.copy_(value)


def _copies(layer: AdapterLayer | LoraLayer, adapter: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What scaling may change besides the layer's factor, each with a copy of its values."""
    if not isinstance(layer, AdapterLayer):
        return []
    buffers = [layer.running(role, adapter) for role in layer.buffer_roles]
    tensors = [*layer.adapter_parameters(adapter).values(), *(b for b in buffers if b is not None)]
    return [(tensor.detach(), tensor.detach().clone()) for tensor in tensors]
