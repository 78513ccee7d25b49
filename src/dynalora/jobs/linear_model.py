"""The linear model in which a fixed update must fail and a gated one need not (DISeL §2, App. I).

Inputs come in equal parts from two Gaussian populations with the same covariance Σ, a fine-tuning population with mean
μ_F and a pre-training population with mean μ_P. Targets are

    y = (W0 + ΔW*)·x   for inputs of the fine-tuning population,
    y = W0·x           for inputs of the pre-training population,

and the loss is the squared error ‖ŷ − y‖². Known in closed form are

* the best fixed correction, ΔW*·M_F·(M_F + M_P)⁻¹ with the second moments M = E[x xᵀ] (eq. 16), which is ½ΔW* for means
  ±μ (eq. 18), and its loss;
* the Bayes-optimal correction p(x)·ΔW* with the posterior p(x) = σ(wᵀx + c), w = Σ⁻¹(μ_F − μ_P) and
  c = ½(μ_Pᵀ Σ⁻¹ μ_P − μ_Fᵀ Σ⁻¹ μ_F) (eq. 28–30), and its loss, the least that any correction can have (eq. 25).

[`run_linear_model`][dynalora.jobs.linear_model.run_linear_model] trains full fine-tuning, PEFT's LoRA and
DISeL on samples of the mixture, and compares where they end with the two closed forms.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import peft
import torch
from torch import nn

from dynalora.common.files import csv_text
from dynalora.common.progress import Progress, rich_progress, silent
from dynalora.drawing import runs as plots
from dynalora.drawing import style as drawing
from dynalora.errors import ConfigError, TrainingError
from dynalora.lab.report import Cell, Report, Section, Table, rich_table, write_report
from dynalora.lab.report import Figure as Picture
from dynalora.lab.run_folder import RunFolder
from dynalora.methods import METHODS, config_class

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

FULL, LORA, DISEL = "full", "lora", "disel"
METHODS_COMPARED = (FULL, LORA, DISEL)
NAMES = {FULL: "full fine-tuning", LORA: "LoRA", DISEL: "DISeL"}

#: Within these of their closed forms counts as having arrived: LoRA and full fine-tuning, and DISeL.
FIXED_TOLERANCE = 0.02
BAYES_TOLERANCE = 0.05

_CHUNK = 20_000  # samples evaluated at once
_CURVE_POINTS = 40
_CURVE_SAMPLES = 10_000


@dataclass(frozen=True)
class PopulationLosses:
    """Expected squared errors E‖ŷ − y‖².

    Attributes:
        fine_tuning: Over the population that needs the correction.
        pre_training: Over the population that must stay as it was.
    """

    fine_tuning: float
    pre_training: float

    @property
    def mixture(self) -> float:
        """Over the mixture: the mean of the two."""
        return (self.fine_tuning + self.pre_training) / 2


@dataclass(frozen=True)
class Sample:
    """Inputs with targets.

    Attributes:
        x: (n, in).
        y: (n, out).
        fine_tuning: (n), bool; which inputs come from the fine-tuning population.
    """

    x: torch.Tensor
    y: torch.Tensor
    fine_tuning: torch.Tensor


@dataclass(frozen=True, eq=False)
class LinearModel:
    """The two populations and the two maps. All tensors are float64.

    Attributes:
        base_weight: W0, (out, in).
        update: ΔW*, (out, in).
        fine_tuning_mean: μ_F, (in).
        pre_training_mean: μ_P, (in).
        covariance: Σ of both populations, (in, in), positive definite.

    Raises:
        ConfigError: Shapes that do not fit, equal means, or a covariance that is not positive definite.
    """

    base_weight: torch.Tensor
    update: torch.Tensor
    fine_tuning_mean: torch.Tensor
    pre_training_mean: torch.Tensor
    covariance: torch.Tensor
    _root: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.init:
                object.__setattr__(self, item.name, getattr(self, item.name).detach().double())
        width = self.base_weight.shape[1]
        shapes = {
            "update": tuple(self.base_weight.shape),
            "fine_tuning_mean": (width,),
            "pre_training_mean": (width,),
            "covariance": (width, width),
        }
        for name, wanted in shapes.items():
            if tuple(getattr(self, name).shape) != wanted:
                raise ConfigError(
                    f"{name} has shape {tuple(getattr(self, name).shape)}; base_weight asks for {wanted}."
                )
        root, failed = torch.linalg.cholesky_ex(self.covariance)
        # A product such as X Xᵀ is symmetric only to rounding.
        rounding = 1e-12 * float(self.covariance.abs().max())
        if int(failed) or not torch.allclose(self.covariance, self.covariance.mT, rtol=0, atol=rounding):
            raise ConfigError("covariance must be symmetric and positive definite.")
        if torch.equal(self.fine_tuning_mean, self.pre_training_mean):
            raise ConfigError(
                "fine_tuning_mean and pre_training_mean are equal; the populations must differ."
            )
        object.__setattr__(self, "_root", root)

    # --- the populations -----------------------------------------------------------------------------------

    @property
    def second_moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """M_F and M_P, E[x xᵀ] of the fine-tuning and the pre-training population, each (in, in) (eq. 13)."""
        means = (self.fine_tuning_mean, self.pre_training_mean)
        first, second = (self.covariance + torch.outer(mean, mean) for mean in means)
        return first, second

    @property
    def posterior_parameters(self) -> tuple[torch.Tensor, torch.Tensor]:
        """w, (in), and c, a scalar, of the posterior σ(wᵀx + c) (eq. 28)."""
        means = torch.stack([self.fine_tuning_mean, self.pre_training_mean], dim=1)
        solved = torch.cholesky_solve(means, self._root)
        squares = (means * solved).sum(0)
        return solved[:, 0] - solved[:, 1], (squares[1] - squares[0]) / 2

    def posterior(self, x: torch.Tensor) -> torch.Tensor:
        """p(x), the probability that an input belongs to the fine-tuning population: x (…, in) → (…) (eq. 27)."""
        weight, bias = self.posterior_parameters
        return torch.sigmoid(x.double() @ weight + bias)

    def sample(self, n: int, generator: torch.Generator) -> Sample:
        """Inputs of the mixture, each from either population with probability ½, with their targets."""
        chosen = torch.rand(n, generator=generator) < 0.5
        noise = torch.randn(n, self._root.shape[0], generator=generator, dtype=torch.float64)
        x = noise @ self._root.mT
        x += torch.where(chosen[:, None], self.fine_tuning_mean, self.pre_training_mean)
        y = x @ self.base_weight.mT + chosen[:, None] * (x @ self.update.mT)
        return Sample(x, y, chosen)

    # --- closed forms --------------------------------------------------------------------------------------

    def best_fixed(self, rank: int | None = None) -> torch.Tensor:
        """The best correction that is the same for all inputs, (out, in): eq. 16, and eq. 18 for means ±μ.

        Args:
            rank: Best among the corrections of at most this rank; None: among all. The loss exceeds its minimum by
                tr((C − C*) S (C − C*)ᵀ) with S = ½(M_F + M_P), so the best C is the truncated singular value
                decomposition of C* S^½, times S^−½.

        Raises:
            ConfigError: The rank is below 1.
        """
        first, second = self.second_moments
        best: torch.Tensor = torch.linalg.solve(first + second, first @ self.update.mT).mT
        if rank is None:
            return best
        if rank < 1:
            raise ConfigError(f"rank is {rank}; give 1 or more, or None.")
        values, vectors = torch.linalg.eigh((first + second) / 2)
        root = vectors * values.sqrt() @ vectors.mT
        u, sigma, vt = torch.linalg.svd(best @ root, full_matrices=False)
        cut: torch.Tensor = torch.linalg.solve(root, (u[:, :rank] * sigma[:rank] @ vt[:rank]).mT).mT
        return cut

    def fixed_losses(self, correction: torch.Tensor) -> PopulationLosses:
        """The exact losses of a fixed C, (out, in): tr((C − ΔW*) M_F (C − ΔW*)ᵀ) and tr(C M_P Cᵀ) (eq. 14)."""
        first, second = self.second_moments
        correction = correction.double()
        wrong = correction - self.update
        return PopulationLosses(
            float((wrong @ first * wrong).sum()), float((correction @ second * correction).sum())
        )

    def bayes_losses(self) -> PopulationLosses:
        """The losses of the Bayes-optimal correction (eq. 25), as integrals over one variable.

        The posterior depends on x through t = wᵀx + c alone. With a² = δᵀΣ⁻¹δ and δ = μ_F − μ_P, t is N(½a², a²) in the
        fine-tuning and N(−½a², a²) in the pre-training population, and given t both are Gaussian with mean
        ½(μ_F + μ_P) + δt/a² and covariance Σ − δδᵀ/a². So E[‖ΔW*x‖² | t] is a quadratic in t, and what is left is the
        integral of it, times σ(−t)² or σ(t)², over t. The integrand is smooth and decays as a Gaussian does, so the
        trapezoidal rule is exact to rounding.
        """
        delta = self.fine_tuning_mean - self.pre_training_mean
        spread = float((torch.cholesky_solve(delta[:, None], self._root)[:, 0] * delta).sum())
        middle = self.update @ ((self.fine_tuning_mean + self.pre_training_mean) / 2)
        along = self.update @ delta / spread
        given = self.covariance - torch.outer(delta, delta) / spread
        constant = float((self.update @ given * self.update).sum())

        def integral(centre: float, sign: float) -> float:
            width = math.sqrt(spread)
            t = centre + width * torch.linspace(-12, 12, 20_001, dtype=torch.float64)
            density = torch.exp(-((t - centre) ** 2) / (2 * spread)) / (width * math.sqrt(2 * math.pi))
            size = constant + (middle[:, None] + along[:, None] * t).square().sum(0)
            return float(torch.trapezoid(density * size * torch.sigmoid(sign * t) ** 2, t))

        return PopulationLosses(integral(spread / 2, -1.0), integral(-spread / 2, 1.0))

    def bayes_correction(self, x: torch.Tensor) -> torch.Tensor:
        """What the Bayes-optimal correction adds to W0·x: p(x)·ΔW*·x, x (n, in) → (n, out) (eq. 30)."""
        return self.posterior(x)[:, None] * (x.double() @ self.update.mT)


def random_linear_model(
    in_features: int = 16,
    out_features: int = 16,
    task_rank: int = 4,
    separation: float = 1.5,
    seed: int = 0,
) -> LinearModel:
    """The setting of Figure 1: means ±μ, covariance I, random maps.

    W0 and the two factors of ΔW* have independent standard normal entries; μ has a random direction.

    Args:
        in_features: Length of the inputs.
        out_features: Length of the targets.
        task_rank: Rank of ΔW*.
        separation: ‖μ‖ in standard deviations; half the distance of the populations.
        seed: Of everything random.

    Raises:
        ConfigError: A size below 1, a task rank above the sizes, or a separation that is not positive.
    """
    for name, value in (
        ("in_features", in_features),
        ("out_features", out_features),
        ("task_rank", task_rank),
    ):
        if value < 1:
            raise ConfigError(f"{name} is {value}; give 1 or more.")
    if task_rank > min(in_features, out_features):
        raise ConfigError(
            f"task_rank is {task_rank}; give at most {min(in_features, out_features)}, the smaller feature count."
        )
    if not 0 < separation < math.inf:
        raise ConfigError(f"separation is {separation}; give a positive number.")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base, left, right = (
        normal(out_features, in_features),
        normal(out_features, task_rank),
        normal(task_rank, in_features),
    )
    mean = normal(in_features)
    mean *= separation / mean.norm()
    return LinearModel(base, left @ right, mean, -mean, torch.eye(in_features, dtype=torch.float64))


# --- the losses of any model ------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeasuredLosses(PopulationLosses):
    """Losses estimated from samples.

    Attributes:
        error: Standard error of the mixture's loss.
    """

    error: float


@torch.no_grad()
def measure_losses(
    problem: LinearModel,
    predict: Callable[[torch.Tensor], torch.Tensor],
    *,
    like: Callable[[torch.Tensor], torch.Tensor] | None = None,
    like_losses: PopulationLosses | None = None,
    samples: int = 200_000,
    seed: int = 1,
) -> MeasuredLosses:
    """The losses of any model, from samples.

    A predictor that is much like the model and whose losses are known exactly takes most of the sampling error away (a
    control variate): what is estimated is the difference of the two losses on the same inputs.

    Args:
        problem: The populations and maps.
        predict: The model, x (n, in) float32 → ŷ (n, out).
        like: The known predictor, x (n, in) float64 → ŷ (n, out); None: none.
        like_losses: Its exact losses; needed with `like`.
        samples: Number of inputs, from both populations together.
        seed: Of the samples.
    """
    generator = torch.Generator().manual_seed(seed)
    sums = torch.zeros(2, 3, dtype=torch.float64)  # for each population: count, sum, sum of squares
    for start in range(0, samples, _CHUNK):
        sample = problem.sample(min(_CHUNK, samples - start), generator)
        loss = (predict(sample.x.float()).double() - sample.y).square().sum(1)
        if like is not None:
            loss -= (like(sample.x) - sample.y).square().sum(1)
        for row, mask in enumerate((sample.fine_tuning, ~sample.fine_tuning)):
            chosen = loss[mask]
            sums[row] += torch.stack(
                [torch.tensor(float(len(chosen))).double(), chosen.sum(), chosen.square().sum()]
            )
    count, total, square = sums.unbind(1)
    mean = total / count
    variance = (square / count - mean**2).clamp_min(0) / count
    known = like_losses if like_losses is not None else PopulationLosses(0.0, 0.0)
    return MeasuredLosses(
        fine_tuning=float(mean[0]) + known.fine_tuning,
        pre_training=float(mean[1]) + known.pre_training,
        error=float(variance.sum().sqrt()) / 2,
    )


# --- training ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LinearModelSpec:
    """What `dynalora linear-model` does. The defaults take a few minutes on one core.

    Attributes:
        output: The run folder, new or empty; None: `runs/linear-model`.
        in_features: Length of the inputs.
        out_features: Length of the targets.
        task_rank: Rank of ΔW*.
        r: Rank of LoRA and DISeL.
        separation: ‖μ‖ in standard deviations of the populations.
        steps: Optimizer steps, each on new samples.
        batch_size: Samples per step, from both populations.
        learning_rate: Peak; the schedule is a cosine with 2 % warm-up, the optimizer AdamW without weight decay.
        gate_bias_init: DISeL's, as in [`DiselConfig`][dynalora.DiselConfig].
        samples: On which the final losses are measured.
        seed: Of the maps, the start and the samples.
    """

    output: str | None = None
    in_features: int = 16
    out_features: int = 16
    task_rank: int = 4
    r: int = 4
    separation: float = 1.5
    steps: int = 4000
    batch_size: int = 256
    learning_rate: float = 0.02
    gate_bias_init: float = -3.0
    samples: int = 200_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("r", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give 1 or more.")
        if self.samples < 1000:
            raise ConfigError(f"samples is {self.samples}; give 1000 or more.")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate is {self.learning_rate}; give a positive number.")
        self.problem()

    def problem(self) -> LinearModel:
        """The populations and maps that these settings name."""
        return random_linear_model(
            self.in_features, self.out_features, self.task_rank, self.separation, self.seed
        )

    def settings(self) -> dict[str, Any]:
        """The settings as written to the run folder."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "output"}


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


def compare_on_linear_model(
    spec: LinearModelSpec | None = None, *, progress: Progress = silent
) -> LinearModelResult:
    """Train full fine-tuning, LoRA and DISeL on the mixture and compare them with the closed forms.

    Args:
        spec: Settings; None: the defaults.
        progress: Called with the steps done, method by method.

    Raises:
        TrainingError: A loss is no longer a number.
    """
    how = spec or LinearModelSpec()
    problem = how.problem()
    rows = []
    gates: GateCurve | None = None
    for method in METHODS_COMPARED:
        model = _build(method, problem, how)
        rows.append(_train(method, model, problem, how, progress))
        if method in METHODS and METHODS[method].gated:
            gates = gate_curve(model, problem)
    assert gates is not None  # DISeL is among the methods
    zero = torch.zeros_like(problem.update)
    return LinearModelResult(
        how,
        problem.fixed_losses(zero),
        problem.fixed_losses(problem.best_fixed()),
        problem.bayes_losses(),
        tuple(rows),
        gates,
    )


def _build(method: str, problem: LinearModel, how: LinearModelSpec) -> nn.Module:
    torch.manual_seed(how.seed)
    model = _Linear(problem.base_weight)
    if method == FULL:
        return model
    if method == LORA:
        config: peft.PeftConfig = peft.LoraConfig(r=how.r, lora_alpha=2 * how.r, target_modules=["linear"])
    else:
        kind: Any = config_class(method)
        config = kind(r=how.r, target_modules=["linear"], gate_bias_init=how.gate_bias_init)
    return peft.get_peft_model(model, config)


def _train(
    method: str, model: nn.Module, problem: LinearModel, how: LinearModelSpec, progress: Progress
) -> LinearModelRow:
    gated = method in METHODS and METHODS[method].gated
    if gated:
        optimum, tolerance = problem.bayes_losses(), BAYES_TOLERANCE
        correction: Callable[[torch.Tensor], torch.Tensor] = problem.bayes_correction
    else:
        best = problem.best_fixed(None if method == FULL else how.r)
        optimum, tolerance = problem.fixed_losses(best), FIXED_TOLERANCE

        def correction(x: torch.Tensor) -> torch.Tensor:
            return x @ best.mT

    def measured(samples: int) -> MeasuredLosses:
        return measure_losses(
            problem,
            model,
            like=lambda x: x @ problem.base_weight.mT + correction(x),
            like_losses=optimum,
            samples=samples,
            seed=how.seed + 1,
        )

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=how.learning_rate, weight_decay=0.0)
    warmup = max(1, round(0.02 * how.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / how.steps))),
    )
    generator = torch.Generator().manual_seed(how.seed + 2)
    every = max(1, how.steps // _CURVE_POINTS)
    small = min(_CURVE_SAMPLES, how.samples)
    curve = [(0, measured(small))]
    what = f"Training {NAMES[method]}"
    spent = 0.0
    progress(what, 0, how.steps)
    for step in range(1, how.steps + 1):
        began = time.perf_counter()
        sample = problem.sample(how.batch_size, generator)
        optimizer.zero_grad()
        loss = (model(sample.x.float()) - sample.y.float()).square().sum(1).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        spent += time.perf_counter() - began
        if step % every == 0 or step == how.steps:
            if not math.isfinite(loss.item()):
                raise TrainingError(
                    f"The loss of {NAMES[method]} is {loss.item()} at step {step}; lower learning_rate."
                )
            curve.append((step, measured(small)))
            progress(what, step, how.steps)
    parameters = sum(parameter.numel() for parameter in trained)
    return LinearModelRow(method, measured(how.samples), optimum, tolerance, parameters, spent, tuple(curve))


@torch.no_grad()
def gate_curve(model: nn.Module, problem: LinearModel, *, samples: int = 50_000, seed: int = 7) -> GateCurve:
    """The gates of a model's first gated layer against the posterior's logit.

    Args:
        model: A linear model with a gated adapter.
        problem: What it was trained on.
        samples: Inputs that the curve is drawn from.
        seed: Of the inputs.
    """
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


# --- the run ----------------------------------------------------------------------------------------------


def run_linear_model(
    spec: LinearModelSpec | None = None, *, console: Console | None = None
) -> LinearModelResult:
    """Compare on the linear model and write a run folder with the numbers, plots and a report.

    Args:
        spec: Settings; None: the defaults.
        console: Where progress and the table are shown; None: nowhere.

    Raises:
        RunFolderError: The run folder cannot be used.
        TrainingError: A loss is no longer a number.
    """
    how = spec or LinearModelSpec()
    output = how.output or "runs/linear-model"
    with RunFolder.create(output, how.settings()) as run:
        with rich_progress(console) as progress:
            result = compare_on_linear_model(how, progress=progress)
        for row in result.rows:
            for step, losses in row.curve:
                run.log({"method": row.method, "step": step, **asdict(losses), "mixture": losses.mixture})
        table = losses_table(result)
        run.write("losses.csv", _csv(result))
        run.write("losses.json", json.dumps(_plain(result), indent=2) + "\n")
        drawn = {
            "losses": (plot_losses(result), "Loss on each population; closed forms are hatched."),
            "training": (
                plot_training(result),
                "Loss on the mixture during training, with the closed forms.",
            ),
            "gates": (plot_gate_curve(result), "What the gates have learned, against the Bayes posterior."),
        }
        pictures = []
        for name, (made, caption) in drawn.items():
            pictures.append(Picture(plots.save_figure(run, name, made), caption))
        sections = [Section("Losses", _reading(result), tables=[table], figures=pictures)]
        write_report(Report("A fixed update against a gated one", _verdict(result), sections), run.report)
        run.finish()
    if console is not None:
        console.print(rich_table(table))
        console.print(_verdict(result), highlight=False, markup=False)
        console.print(f"Report: {run.report}", highlight=False, markup=False)
    return result


def losses_table(result: LinearModelResult) -> Table:
    """All losses, closed forms first."""
    closed = {
        "no correction": result.base,
        "best fixed correction": result.fixed,
        "Bayes-optimal correction": result.bayes,
    }
    rows: list[list[Cell]] = [
        [name, "closed form", losses.fine_tuning, losses.pre_training, losses.mixture, None, None]
        for name, losses in closed.items()
    ]
    for row in result.rows:
        losses = row.losses
        rows.append(
            [
                NAMES[row.method],
                "trained",
                losses.fine_tuning,
                losses.pre_training,
                losses.mixture,
                f"{100 * row.excess:+.2f} %",
                f"{row.trainable_parameters:,}",
            ]
        )
    return Table(
        ["correction", "how", "fine-tuning", "pre-training", "mixture", "above its optimum", "parameters"],
        rows,
        title="Expected squared error per population",
        note="The optimum of full fine-tuning and LoRA is the best fixed correction (of LoRA's rank), that of DISeL is "
        f"Bayes. Trained models are measured on {result.spec.samples:,} samples.",
    )


def _reading(result: LinearModelResult) -> str:
    return (
        "Half of the inputs need the update, the other half must stay as they were. A fixed update has to settle "
        "between them, and applies about half of what is needed everywhere; a gate can tell the inputs apart as well "
        "as their overlap allows."
    )


def _verdict(result: LinearModelResult) -> str:
    parts = [
        f"{NAMES[row.method]} ends {100 * row.excess:+.2f} % from "
        f"{'Bayes' if row.tolerance == BAYES_TOLERANCE else 'the best fixed correction'}"
        + ("" if row.reached else f" (not within {100 * row.tolerance:.0f} %: train longer)")
        for row in result.rows
    ]
    return "; ".join(parts) + "."


def _plain(result: LinearModelResult) -> dict[str, Any]:
    def losses(value: PopulationLosses) -> dict[str, float]:
        return {**asdict(value), "mixture": value.mixture}

    return {
        "settings": result.spec.settings(),
        "closed_forms": {
            "no_correction": losses(result.base),
            "best_fixed": losses(result.fixed),
            "bayes": losses(result.bayes),
        },
        "trained": {
            row.method: {
                "losses": losses(row.losses),
                "optimum": losses(row.optimum),
                "excess": row.excess,
                "tolerance": row.tolerance,
                "reached": row.reached,
                "trainable_parameters": row.trainable_parameters,
                "seconds": row.seconds,
            }
            for row in result.rows
        },
        "gates": asdict(result.gates),
    }


def _csv(result: LinearModelResult) -> str:
    header = ["correction", "kind", "fine_tuning", "pre_training", "mixture"]
    closed = {"none": result.base, "best_fixed": result.fixed, "bayes": result.bayes}
    rows = (
        *((name, "closed form", losses) for name, losses in closed.items()),
        *((row.method, "trained", row.losses) for row in result.rows),
    )
    return csv_text(
        header,
        ([name, kind, own.fine_tuning, own.pre_training, own.mixture] for name, kind, own in rows),
    )


# --- plots ------------------------------------------------------------------------------------------------


def plot_losses(result: LinearModelResult) -> Figure:
    """Loss of every correction on both populations, side by side (DISeL Figure 1)."""
    trained = {NAMES[row.method]: row.losses for row in result.rows}
    shown: Mapping[str, PopulationLosses] = {
        **{name: losses for name, losses in trained.items() if name != NAMES[DISEL]},
        "best fixed\n(closed form)": result.fixed,
        NAMES[DISEL]: trained[NAMES[DISEL]],
        "Bayes\n(closed form)": result.bayes,
    }
    made, (axis,) = drawing.figure(width=6.8, height=3.8)
    populations = (
        ("fine-tuning population", [losses.fine_tuning for losses in shown.values()]),
        ("pre-training population", [losses.pre_training for losses in shown.values()]),
    )
    for side, (label, values) in enumerate(populations):
        bars = axis.bar(
            [place + (side - 0.5) * 0.38 for place in range(len(shown))], values, width=0.36, label=label,
            color=("0.35", "0.8")[side], edgecolor="black", linewidth=0.6,
        )  # fmt: skip
        for bar, name in zip(bars, shown, strict=True):
            if "closed form" in name:
                bar.set_hatch("///")
        axis.bar_label(bars, fmt="%.3g", fontsize=8, padding=2)
    axis.set_xticks(range(len(shown)), list(shown), fontsize=9)
    axis.grid(False, axis="x")
    axis.set_ylabel("expected squared error")
    axis.set_title("A fixed update leaves an error on both populations", fontsize=10)
    axis.margins(y=0.12)
    axis.legend(frameon=False, fontsize=8)
    return made


def plot_training(result: LinearModelResult) -> Figure:
    """Loss on the mixture during training, with the two closed forms as lines."""
    made, (axis,) = drawing.figure()
    for index, row in enumerate(result.rows):
        axis.plot(
            [step for step, _ in row.curve], [losses.mixture for _, losses in row.curve], label=NAMES[row.method],
            color=drawing.PALETTE[index], marker=drawing.MARKERS[index], markersize=3.5, linewidth=1.3,
        )  # fmt: skip
    axis.axhline(
        result.fixed.mixture, color="black", linestyle="--", linewidth=1, label="best fixed correction"
    )
    axis.axhline(
        result.bayes.mixture, color="black", linestyle=":", linewidth=1.4, label="Bayes-optimal correction"
    )
    axis.set_yscale("log")
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("expected squared error, mixture")
    axis.set_title("Only the gated update gets below the best fixed correction", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    return made


def plot_gate_curve(result: LinearModelResult) -> Figure:
    """DISeL's gates against the logit of the posterior, with the posterior itself."""
    made, (axis,) = drawing.figure(width=5.2)
    curve = result.gates
    logits: Sequence[float] = torch.linspace(min(curve.logit), max(curve.logit), 200).tolist()
    axis.plot(
        logits, [1 / (1 + math.exp(-value)) for value in logits], color="black", linestyle="--", linewidth=1.2,
        label="Bayes posterior p(x)",
    )  # fmt: skip
    axis.fill_between(
        curve.logit, curve.low, curve.high, color="0.8", label="gates, 10 % to 90 %", linewidth=0
    )
    axis.plot(
        curve.logit,
        curve.gate,
        color=drawing.PALETTE[0],
        marker="o",
        markersize=4,
        linewidth=1,
        label="mean gate",
    )
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlabel("log-odds that the input belongs to the fine-tuning population")
    axis.set_ylabel("gate")
    axis.set_title("What the gates have learned", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    return made
