"""Training full fine-tuning, LoRA and DISeL on samples of the linear model, and where they end."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from torch import nn

from dynalora.common.progress import Progress, silent
from dynalora.errors import TrainingError
from dynalora.jobs.linear_model.populations import LinearModel, MeasuredLosses, PopulationLosses, measure_losses
from dynalora.jobs.linear_model.settings import LinearModelSpec
from dynalora.methods import METHODS, config_class

FULL, LORA, DISEL = "full", "lora", "disel"
METHODS_COMPARED = (FULL, LORA, DISEL)
NAMES = {FULL: "full fine-tuning", LORA: "LoRA", DISEL: "DISeL"}

FIXED_TOLERANCE = 0.02
"""Full fine-tuning and LoRA have reached the best fixed correction when their loss is within this share of its loss."""
BAYES_TOLERANCE = 0.05
"""DISeL has reached the Bayes-optimal correction when its loss is within this share of its loss."""

_CURVE_POINTS = 40
_CURVE_SAMPLES = 10_000


@dataclass(frozen=True)
class LinearModelRow:
    """One trained model.

    Attributes:
        method: `full`, `lora` or `disel`.
        losses: Measured after training.
        optimum: The closed form that it should reach: the best fixed correction's (of at most its rank) or Bayes'.
        tolerance: How close, relative to the optimum, counts as reached.
        trainable_parameters: Number of trained parameters.
        seconds: Time of training.
        curve: (step, losses on a smaller sample) during training.
    """

    method: str
    losses: MeasuredLosses
    optimum: PopulationLosses
    tolerance: float
    trainable_parameters: int
    seconds: float
    curve: tuple[tuple[int, MeasuredLosses], ...] = field(repr=False)

    @property
    def excess(self) -> float:
        """Loss on the mixture relative to the optimum, minus 1."""
        return self.losses.mixture / self.optimum.mixture - 1

    @property
    def reached(self) -> bool:
        """Whether the loss is within the tolerance of the optimum."""
        return abs(self.excess) <= self.tolerance


@dataclass(frozen=True)
class GateCurve:
    """DISeL's gates against the logit of the Bayes posterior.

    Attributes:
        logit: wᵀx + c, centres of bins.
        gate: Mean over inputs and components of the gates in each bin.
        low: 10 % quantile of inputs and components.
        high: 90 % quantile.
    """

    logit: tuple[float, ...]
    gate: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class LinearModelResult:
    """The comparison.

    Attributes:
        spec: The settings.
        base: Losses without any correction.
        fixed: Losses of the best fixed correction, of any rank.
        bayes: Losses of the Bayes-optimal correction.
        rows: One per trained model.
        gates: Of the trained DISeL.
    """

    spec: LinearModelSpec
    base: PopulationLosses
    fixed: PopulationLosses
    bayes: PopulationLosses
    rows: tuple[LinearModelRow, ...]
    gates: GateCurve

    def row(self, method: str) -> LinearModelRow:
        """The row of a method."""
        return next(row for row in self.rows if row.method == method)


class _Linear(nn.Module):
    """W0, as a model that PEFT can adapt."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.linear.weight.data.copy_(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x)
        return out


def compare_on_linear_model(spec: LinearModelSpec | None = None, *, progress: Progress = silent) -> LinearModelResult:
    """Train full fine-tuning, LoRA and DISeL on the mixture and compare them with the closed forms.

    Raises:
        TrainingError: A loss is no longer a number.
    """
    spec = spec or LinearModelSpec()
    problem = spec.problem()
    rows = []
    gates: GateCurve | None = None
    for method in METHODS_COMPARED:
        model = _build(method, problem, spec)
        rows.append(_train(method, model, problem, spec, progress))
        if method in METHODS and METHODS[method].gated:
            gates = gate_curve(model, problem)
    assert gates is not None  # DISeL is among the methods
    zero = torch.zeros_like(problem.update)
    base, fixed = (problem.fixed_losses(correction) for correction in (zero, problem.best_fixed()))
    return LinearModelResult(spec, base, fixed, problem.bayes_losses(), tuple(rows), gates)


def _build(method: str, problem: LinearModel, spec: LinearModelSpec) -> nn.Module:
    torch.manual_seed(spec.seed)
    model = _Linear(problem.base_weight)
    if method == FULL:
        return model
    if method == LORA:
        config: peft.PeftConfig = peft.LoraConfig(r=spec.r, lora_alpha=2 * spec.r, target_modules=["linear"])
    else:
        kind: Any = config_class(method)
        # The paper's form, for which the learning rate was chosen.
        options = {"gate_bias_init": spec.gate_bias_init, "match_step": False}
        config = kind(r=spec.r, target_modules=["linear"], **options)
    return peft.get_peft_model(model, config)


def _train(
    method: str, model: nn.Module, problem: LinearModel, spec: LinearModelSpec, progress: Progress
) -> LinearModelRow:
    gated = method in METHODS and METHODS[method].gated
    if gated:
        optimum, tolerance = problem.bayes_losses(), BAYES_TOLERANCE
        correction: Callable[[torch.Tensor], torch.Tensor] = problem.bayes_correction
    else:
        best = problem.best_fixed(None if method == FULL else spec.r)
        optimum, tolerance = problem.fixed_losses(best), FIXED_TOLERANCE

        def correction(x: torch.Tensor) -> torch.Tensor:
            return x @ best.mT

    def measured(samples: int) -> MeasuredLosses:
        return measure_losses(
            problem, model, like=lambda x: x @ problem.base_weight.mT + correction(x), like_losses=optimum,
            samples=samples, seed=spec.seed + 1,
        )  # fmt: skip

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=spec.learning_rate, weight_decay=0.0)
    warmup = max(1, round(0.02 * spec.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / spec.steps)))
    )
    generator = torch.Generator().manual_seed(spec.seed + 2)
    every = max(1, spec.steps // _CURVE_POINTS)
    small = min(_CURVE_SAMPLES, spec.samples)
    curve = [(0, measured(small))]
    what = f"Training {NAMES[method]}"
    spent = 0.0
    progress(what, 0, spec.steps)
    for step in range(1, spec.steps + 1):
        began = time.perf_counter()
        sample = problem.sample(spec.batch_size, generator)
        optimizer.zero_grad()
        loss = (model(sample.x.float()) - sample.y.float()).square().sum(1).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        spent += time.perf_counter() - began
        if step % every == 0 or step == spec.steps:
            if not math.isfinite(loss.item()):
                raise TrainingError(
                    f"The loss of {NAMES[method]} is {loss.item()} at step {step}; lower learning_rate."
                )
            curve.append((step, measured(small)))
            progress(what, step, spec.steps)
    parameters = sum(parameter.numel() for parameter in trained)
    return LinearModelRow(method, measured(spec.samples), optimum, tolerance, parameters, spent, tuple(curve))


@torch.no_grad()
def gate_curve(model: nn.Module, problem: LinearModel, *, samples: int = 50_000, seed: int = 7) -> GateCurve:
    """The gates of a model's first gated layer against the posterior's logit."""
    layer: Any = next(module for module in model.modules() if hasattr(module, "gates"))
    x = problem.sample(samples, torch.Generator().manual_seed(seed)).x
    weight, bias = problem.posterior_parameters
    logit = x @ weight + bias
    gates = layer.gates(x.float(), layer.active_adapters[0]).double()
    edges = torch.linspace(-6, 6, 25, dtype=torch.float64)
    rows = []
    for low, high in itertools.pairwise(edges.tolist()):
        chosen = gates[(logit >= low) & (logit < high)].flatten()
        if len(chosen) >= 20:
            quantiles = torch.quantile(chosen[:1_000_000], torch.tensor([0.1, 0.9], dtype=torch.float64))
            rows.append(((low + high) / 2, float(chosen.mean()), *quantiles.tolist()))
    return GateCurve(*(tuple(column) for column in zip(*rows, strict=True)))
