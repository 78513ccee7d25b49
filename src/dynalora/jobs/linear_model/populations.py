"""The two populations of the linear model, the closed forms, and the losses of any model measured on samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch

from dynalora.errors import ConfigError, check_least

_CHUNK = 20_000  # samples evaluated at once


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
        for name, expected in shapes.items():
            if tuple(getattr(self, name).shape) != expected:
                raise ConfigError(
                    f"{name} has shape {tuple(getattr(self, name).shape)}; base_weight asks for {expected}."
                )
        root, failed = torch.linalg.cholesky_ex(self.covariance)
        # A product such as X Xᵀ is symmetric only to rounding.
        rounding = 1e-12 * float(self.covariance.abs().max())
        if int(failed) or not torch.allclose(self.covariance, self.covariance.mT, rtol=0, atol=rounding):
            raise ConfigError("covariance must be symmetric and positive definite.")
        if torch.equal(self.fine_tuning_mean, self.pre_training_mean):
            raise ConfigError("fine_tuning_mean and pre_training_mean are equal; the populations must differ.")
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
        return PopulationLosses(float((wrong @ first * wrong).sum()), float((correction @ second * correction).sum()))

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
        conditional = self.covariance - torch.outer(delta, delta) / spread
        constant = float((self.update @ conditional * self.update).sum())

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
    in_features: int = 16, out_features: int = 16, task_rank: int = 4, separation: float = 1.5, seed: int = 0
) -> LinearModel:
    """The setting of Figure 1: means ±μ, covariance I, random maps.

    W0 and the two factors of ΔW* have independent standard normal entries; μ has a random direction.

    Raises:
        ConfigError: A size below 1, a task rank above the sizes, or a separation that is not positive.
    """
    check_least(1, in_features=in_features, out_features=out_features, task_rank=task_rank)
    if task_rank > min(in_features, out_features):
        raise ConfigError(
            f"task_rank is {task_rank}; give at most {min(in_features, out_features)}, the smaller feature count."
        )
    if not 0 < separation < math.inf:
        raise ConfigError(f"separation is {separation}; give a positive number.")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base, left = normal(out_features, in_features), normal(out_features, task_rank)
    right = normal(task_rank, in_features)
    mean = normal(in_features)
    mean *= separation / mean.norm()
    return LinearModel(base, left @ right, mean, -mean, torch.eye(in_features, dtype=torch.float64))


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
            sums[row] += torch.stack([torch.tensor(float(len(chosen))).double(), chosen.sum(), chosen.square().sum()])
    count, total, square = sums.unbind(1)
    mean = total / count
    variance = (square / count - mean**2).clamp_min(0) / count
    exact = like_losses if like_losses is not None else PopulationLosses(0.0, 0.0)
    return MeasuredLosses(
        fine_tuning=float(mean[0]) + exact.fine_tuning,
        pre_training=float(mean[1]) + exact.pre_training,
        error=float(variance.sum().sqrt()) / 2,
    )
