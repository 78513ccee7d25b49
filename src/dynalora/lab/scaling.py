"""A trained model at a factor of what its training changed, whatever it was trained with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from dynalora.errors import DynaloraError, UnsupportedError
from dynalora.forgetting.landscape import rank_landscape
from dynalora.forgetting.trim import TrimPoint, update_scaled
from dynalora.lab.baselines import prompt_only
from dynalora.lab.report import Cell, Table


@dataclass(frozen=True)
class Scalable:
    """A trained model that can be taken at any factor of what training changed: 0 is the base model, 1 as trained.

    Attributes:
        at: The model at a factor, for as long as a `with` block lasts; afterwards it is as it was.
        base: The base model beside it, where switching adapters off does not give it back; None where it does.
        norm: ‖ΔW‖_F over all matrices together, with gates counted as open; None: unknown.
    """

    at: Callable[[float], AbstractContextManager[nn.Module]]
    base: nn.Module | None
    norm: float | None


def scalable(model: nn.Module, base: nn.Module | None, load_base: Callable[[], nn.Module]) -> Scalable | None:
    """A trained model, made ready to be scaled. It may be merged for that, and is of no other use afterwards.

    Adapters of dynalora and plain LoRAs are scaled in their layers. All else is merged into the weights, which are then
    interpolated with the base model's: full fine-tuning, starts that change the base weights, and PEFT's methods.

    Args:
        model: The trained model.
        base: The base model, if switching adapters off does not give it back.
        load_base: Loads the base model where it is needed and not there.

    Returns:
        The model; None if it cannot be scaled (virtual tokens, quantised weights that would have to be merged into).
    """
    if isinstance(model, PeftModel):
        if prompt_only(model.active_peft_config):
            return None
        if base is None:
            try:
                with update_scaled(model, 1.0):
                    pass
            except UnsupportedError:
                base = load_base()
            else:
                return Scalable(partial(update_scaled, model), None, _norm_of_factors(model))
        if getattr(model.get_base_model(), "is_quantized", False):
            return None
        merged: Any = model.merge_and_unload()
    else:
        merged = model
    assert base is not None  # full fine-tuning leaves none in the model
    return Scalable(partial(interpolated, merged, base), base, _distance(merged, base))


@contextmanager
@torch.no_grad()
def interpolated(model: nn.Module, base: nn.Module, factor: float) -> Iterator[nn.Module]:
    """A model with the weights (1 − factor)·base + factor·tuned inside, and with its own afterwards.

    Args:
        model: The tuned model.
        base: The base model, with weights of the same names; others stay as they are.
        factor: The factor.
    """
    start = dict(base.named_parameters())
    tuned = [(value, value.detach().clone(), start[name]) for name, value in _shared(model, start)]
    try:
        for value, own, origin in tuned:
            value.copy_(torch.lerp(origin.to(value.device, torch.float32), own.float(), factor))
        yield model
    finally:
        for value, own, _ in tuned:
            value.copy_(own)


def _shared(model: nn.Module, start: dict[str, nn.Parameter]) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights of a model that its base has, too, and that training changed."""
    for name, value in model.named_parameters():
        if name in start and start[name].shape == value.shape:
            origin = start[name].detach().to(value.device, value.dtype)
            if not torch.equal(origin, value):
                yield name, value


@torch.no_grad()
def _distance(model: nn.Module, base: nn.Module) -> float:
    start = dict(base.named_parameters())
    squares = [
        (value.double() - start[name].to(value.device).double()).square().sum().item()
        for name, value in _shared(model, start)
    ]
    return math.sqrt(sum(squares))


def _norm_of_factors(model: nn.Module) -> float | None:
    try:
        rows = rank_landscape(model)
    except DynaloraError:
        return None
    return math.sqrt(sum(value**2 for row in rows for value in row.singular_values))


def curve_table(curves: Mapping[str, Sequence[TrimPoint]], factor: float) -> Table:
    """Forgetting and held-out loss by factor and text; the factor that was taken is marked."""
    several = len(curves) > 1
    rows: list[list[Cell]] = []
    for name, points in curves.items():
        for point in points:
            mark = " (taken)" if point.factor == factor else ""
            loss = None if point.loss is None else f"{point.loss:.4f}"
            text: list[Cell] = [name] if several else []
            rows.append([*text, f"{point.factor:.3g}{mark}", f"{point.kl:.4f} ± {point.kl_error:.4f}", loss])
    return Table(
        [*(["text"] if several else []), "factor", "KL from base", "held-out loss"],
        rows,
        title="The update scaled down",
        note="KL(base ‖ tuned) with its standard error, nats per token; 1 is the adapter as trained.",
    )
