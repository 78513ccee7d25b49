"""The linear model: closed forms against sampling and against what they claim, and training against both."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dynalora.errors import ConfigError
from dynalora.jobs.linear_model import report
from dynalora.jobs.linear_model.populations import (
    LinearModel,
    PopulationLosses,
    Sample,
    measure_losses,
    random_linear_model,
)
from dynalora.jobs.linear_model.settings import LinearModelSpec
from dynalora.jobs.linear_model.training import LinearModelResult, compare_on_linear_model
from tests.unit.program import Program

QUICK = LinearModelSpec(
    in_features=10, out_features=8, task_rank=2, r=2, separation=1.0, steps=1000, batch_size=128,
    learning_rate=0.03, samples=40_000,
)  # fmt: skip


def skewed(seed: int = 3) -> LinearModel:
    """Means that are not symmetric, and correlated inputs, so that c ≠ 0 and the best fixed update is not ½ΔW*."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(5, 5, generator=generator).double()
    return LinearModel(
        torch.randn(3, 5, generator=generator),
        torch.randn(3, 5, generator=generator),
        torch.randn(5, generator=generator),
        torch.randn(5, generator=generator) * 0.5 + 0.3,
        mix @ mix.mT / 5 + 0.5 * torch.eye(5).double(),
    )


PROBLEMS = {"symmetric": random_linear_model(6, 5, 2, 1.2, seed=4), "skewed": skewed()}


@pytest.fixture(params=PROBLEMS.values(), ids=PROBLEMS.keys())
def problem(request: pytest.FixtureRequest) -> LinearModel:
    found: LinearModel = request.param
    return found


def sampled(problem: LinearModel, correction: torch.Tensor, sample: Sample) -> list[torch.Tensor]:
    """Per-input losses of each population, straight from the definition."""
    wanted = sample.y - sample.x @ problem.base_weight.T
    loss = (correction - wanted).square().sum(1)
    return [loss[sample.fine_tuning], loss[~sample.fine_tuning]]


def agrees(losses: list[torch.Tensor], exact: PopulationLosses) -> None:
    for found, known in zip(losses, (exact.fine_tuning, exact.pre_training), strict=True):
        error = float(found.std() / len(found) ** 0.5)
        assert abs(float(found.mean()) - known) < 4 * error
        assert error < 0.02 * known  # or the comparison would say nothing


class TestClosedForms:
    def test_losses_agree_with_sampling(self, problem: LinearModel) -> None:
        sample = problem.sample(200_000, torch.Generator().manual_seed(1))
        fixed = problem.best_fixed()
        agrees(sampled(problem, sample.x @ fixed.T, sample), problem.fixed_losses(fixed))
        agrees(sampled(problem, problem.bayes_correction(sample.x), sample), problem.bayes_losses())

    def test_posterior_is_the_share_of_the_fine_tuning_population(self, problem: LinearModel) -> None:
        sample = problem.sample(400_000, torch.Generator().manual_seed(2))
        posterior = problem.posterior(sample.x)
        for low in (0.1, 0.3, 0.5, 0.7):
            chosen = (posterior >= low) & (posterior < low + 0.2)
            share = float(sample.fine_tuning[chosen].double().mean())
            assert share == pytest.approx(float(posterior[chosen].mean()), abs=4 * 0.5 / int(chosen.sum()) ** 0.5)

    def test_posterior_equals_the_ratio_of_the_densities(self) -> None:
        problem = skewed()
        x = torch.randn(50, 5, generator=torch.Generator().manual_seed(5)).double()
        densities = [
            torch.distributions.MultivariateNormal(mean, problem.covariance).log_prob(x).exp()
            for mean in (problem.fine_tuning_mean, problem.pre_training_mean)
        ]
        torch.testing.assert_close(problem.posterior(x), densities[0] / (densities[0] + densities[1]))

    def test_best_fixed_correction_is_half_the_update_for_opposite_means(self) -> None:
        problem = PROBLEMS["symmetric"]
        torch.testing.assert_close(problem.best_fixed(), problem.update / 2)
        weight, bias = problem.posterior_parameters
        torch.testing.assert_close(weight, 2 * torch.linalg.solve(problem.covariance, problem.fine_tuning_mean))
        assert abs(float(bias)) < 1e-12
        losses = problem.fixed_losses(problem.best_fixed())
        assert losses.fine_tuning == pytest.approx(losses.pre_training)
        whole = problem.fixed_losses(torch.zeros_like(problem.update))
        assert losses.mixture == pytest.approx(whole.mixture / 2)
        assert whole.pre_training == 0

    def test_no_fixed_correction_is_better(self, problem: LinearModel) -> None:
        free = problem.best_fixed().clone().requires_grad_()
        first, second = problem.second_moments
        wrong = free - problem.update
        ((wrong @ first * wrong).sum() + (free @ second * free).sum()).backward()
        assert float(free.grad.norm()) < 1e-9  # type: ignore[union-attr]

    @pytest.mark.parametrize("rank", [1, 2])
    def test_no_correction_of_lower_rank_is_better(self, rank: int) -> None:
        problem = skewed()
        best = problem.best_fixed(rank)
        assert int(torch.linalg.matrix_rank(best)) == rank
        least = problem.fixed_losses(best).mixture
        assert least > problem.fixed_losses(problem.best_fixed()).mixture + 1e-6
        first, second = problem.second_moments
        # Descent from random starts, over the factors, never gets below.
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            up = torch.randn(3, rank, generator=generator).double().requires_grad_()
            down = torch.randn(rank, 5, generator=generator).double().requires_grad_()
            optimizer = torch.optim.LBFGS([up, down], max_iter=300, line_search_fn="strong_wolfe")

            def closure(
                up: torch.Tensor = up, down: torch.Tensor = down, optimizer: torch.optim.Optimizer = optimizer
            ) -> torch.Tensor:
                optimizer.zero_grad()
                product = up @ down
                wrong = product - problem.update
                loss = (wrong @ first * wrong).sum() + (product @ second * product).sum()
                loss.backward()
                return loss

            optimizer.step(closure)
            reached = problem.fixed_losses((up @ down).detach()).mixture
            assert reached >= least - 1e-8
            if seed == 0:
                assert reached == pytest.approx(least, rel=1e-4)

    def test_no_other_gate_is_better(self, problem: LinearModel) -> None:
        """eq. 24 is the pointwise minimum: on the same inputs every other gate loses."""
        sample = problem.sample(100_000, torch.Generator().manual_seed(6))
        weight, bias = problem.posterior_parameters
        update = sample.x @ problem.update.T

        def loss(scale: float, shift: float) -> float:
            gate = torch.sigmoid(scale * (sample.x @ weight + bias) + shift)[:, None]
            return float(torch.cat(sampled(problem, gate * update, sample)).mean())

        best = loss(1.0, 0.0)
        for scale, shift in ((0.5, 0.0), (2.0, 0.0), (1.0, 0.8), (1.0, -0.8)):
            assert loss(scale, shift) > best

    def test_bayes_is_below_the_best_fixed_and_vanishes_with_separation(self) -> None:
        shares = []
        for separation in (0.5, 1.0, 2.0, 4.0):
            problem = random_linear_model(6, 5, 2, separation, seed=4)
            shares.append(problem.bayes_losses().mixture / problem.fixed_losses(problem.best_fixed()).mixture)
        assert shares == sorted(shares, reverse=True)
        assert shares[0] < 1
        assert shares[-1] < 1e-3

    def test_what_cannot_be_is_refused(self) -> None:
        problem = PROBLEMS["symmetric"]
        with pytest.raises(ConfigError, match=r"update has shape \(2, 2\)"):
            replace(problem, update=torch.zeros(2, 2))
        with pytest.raises(ConfigError, match="positive definite"):
            replace(problem, covariance=-torch.eye(6))
        uneven = torch.eye(6).double()
        uneven[0, 1] = 1e-15
        replace(problem, covariance=uneven)  # symmetric to rounding, as a product of matrices is
        uneven[0, 1] = 1e-6
        with pytest.raises(ConfigError, match="symmetric"):
            replace(problem, covariance=uneven)
        with pytest.raises(ConfigError, match="are equal"):
            replace(problem, pre_training_mean=problem.fine_tuning_mean)
        with pytest.raises(ConfigError, match="task_rank is 9; give at most 5"):
            random_linear_model(6, 5, 9)
        with pytest.raises(ConfigError, match="rank is 0"):
            problem.best_fixed(0)


def test_measured_losses_agree_with_the_closed_forms_with_and_without_a_control_variate() -> None:
    problem = skewed()
    correction = problem.best_fixed() + 0.05

    def predict(x: torch.Tensor) -> torch.Tensor:
        return x.double() @ (problem.base_weight + correction).T

    exact = problem.fixed_losses(correction)
    plain = measure_losses(problem, predict, samples=50_000)
    best = problem.best_fixed()
    controlled = measure_losses(
        problem, predict, like=lambda x: x @ (problem.base_weight + best).T, like_losses=problem.fixed_losses(best),
        samples=50_000,
    )  # fmt: skip
    for found in (plain, controlled):
        assert found.mixture == pytest.approx(exact.mixture, abs=4 * found.error)
    assert controlled.error < plain.error / 3


def check(result: LinearModelResult) -> None:
    """What Figure 1 says, as numbers."""
    full, lora, disel = (result.row(name) for name in ("full", "lora", "disel"))
    fixed, bayes = result.fixed, result.bayes
    for row in (full, lora):
        assert row.losses.mixture == pytest.approx(fixed.mixture, rel=0.02)
        assert row.losses.mixture > fixed.mixture - 4 * row.losses.error
        # Neither population is served: both keep about half of the whole error of the uncorrected model.
        for value in (row.losses.fine_tuning, row.losses.pre_training):
            assert value == pytest.approx(fixed.mixture, rel=0.2)
    assert disel.losses.mixture == pytest.approx(bayes.mixture, rel=0.05)
    assert disel.losses.mixture > bayes.mixture - 4 * disel.losses.error
    assert disel.losses.error < 0.01 * bayes.mixture
    assert disel.losses.fine_tuning < 0.7 * fixed.fine_tuning
    assert disel.losses.pre_training < 0.7 * fixed.pre_training
    assert all(row.reached for row in result.rows)
    # The gate itself is the posterior, not only its loss.
    for logit, gate in zip(result.gates.logit, result.gates.gate, strict=True):
        if abs(logit) < 3:
            assert gate == pytest.approx(1 / (1 + 2.718281828**-logit), abs=0.08)


@pytest.fixture(scope="module")
def quick() -> LinearModelResult:
    return compare_on_linear_model(QUICK)


def test_training_ends_at_the_closed_forms(quick: LinearModelResult) -> None:
    check(quick)


@pytest.mark.slow
def test_training_ends_at_the_closed_forms_with_the_defaults() -> None:
    check(compare_on_linear_model(LinearModelSpec()))


def test_every_model_starts_at_the_base_model(quick: LinearModelResult) -> None:
    for row in quick.rows:
        step, losses = row.curve[0]
        assert step == 0
        assert losses.mixture == pytest.approx(quick.base.mixture, abs=4 * losses.error)
        assert losses.pre_training == pytest.approx(0, abs=0.02 * quick.base.mixture)
    counts = {row.method: row.trainable_parameters for row in quick.rows}
    assert counts == {"full": 80, "lora": 2 * 18, "disel": 2 * 18 + 2 * 10 + 2}


def test_lora_of_too_small_a_rank_ends_at_the_optimum_of_its_rank() -> None:
    result = compare_on_linear_model(replace(QUICK, r=1, steps=300, samples=20_000))
    lora = result.row("lora")
    assert lora.optimum.mixture > 1.05 * result.fixed.mixture
    assert lora.reached


def test_figures_draw_the_numbers(quick: LinearModelResult) -> None:
    figures = report.figures(quick)
    (axis,) = figures["losses"][0].axes
    heights = [[bar.get_height() for bar in group] for group in axis.containers if hasattr(group, "patches")]
    assert [label.get_text() for label in axis.get_xticklabels()] == [
        "full fine-tuning", "LoRA", "best fixed\n(closed form)", "DISeL", "Bayes\n(closed form)",
    ]  # fmt: skip
    assert heights[0][1] == quick.row("lora").losses.fine_tuning
    assert heights[1][3] == quick.row("disel").losses.pre_training
    assert heights[0][4] == quick.bayes.fine_tuning
    assert "both populations" in axis.get_title()
    (axis,) = figures["training"][0].axes
    labelled = {line.get_label(): line for line in axis.lines}
    assert labelled["best fixed correction"].get_ydata()[0] == quick.fixed.mixture
    assert labelled["Bayes-optimal correction"].get_ydata()[0] == quick.bayes.mixture
    assert labelled["DISeL"].get_xdata()[-1] == QUICK.steps
    (axis,) = figures["gates"][0].axes
    labelled = {line.get_label(): line for line in axis.lines}
    assert tuple(labelled["mean gate"].get_ydata()) == quick.gates.gate


def test_from_the_command_line(tmp_path: Path, program: Program) -> None:
    shown = program(
        "linear-model", "-o", str(tmp_path / "run"), "--in-features", "4", "--out-features", "3", "--task-rank", "1",
        "-r", "1", "--steps", "20", "-b", "16", "--samples", "2000", "--seed", "5",
    )  # fmt: skip
    assert shown.code == 0, shown.err
    assert "Bayes-optimal correction" in shown.out
    assert "DISeL's gate ends at" in shown.out
    assert "train longer" in shown.out  # twenty steps do not reach it, and the program says so
    run = tmp_path / "run"
    for name in ("losses", "training", "gates"):
        assert (run / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (run / "plots" / f"{name}.svg").read_bytes()
    content = json.loads((run / "losses.json").read_text())
    problem = random_linear_model(4, 3, 1, 1.5, seed=5)
    assert content["closed_forms"]["bayes"]["mixture"] == pytest.approx(problem.bayes_losses().mixture)
    assert content["trained"]["disel"]["reached"] is False
    with open(run / "losses.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["correction"] for row in rows] == ["none", "best_fixed", "bayes", "full", "lora", "disel"]
    assert "A fixed update against a gated one" in (run / "report.html").read_text()
    again = program("linear-model", "-o", str(run))
    assert again.code == 2
    assert "already holds a run" in again.err


def test_wrong_settings_are_told_before_anything_is_trained(tmp_path: Path, program: Program) -> None:
    for flags, words in (
        (["--task-rank", "17"], "--task-rank is 17; give at most 16"),
        (["--separation", "0"], "--separation is 0"),
        (["--steps", "0"], "--steps is 0"),
        (["--lr", "-1"], "--lr is -1"),
        (["--samples", "10"], "--samples is 10"),
    ):
        shown = program("linear-model", "-o", str(tmp_path / "run"), *flags)
        assert (shown.code, words in shown.err) == (2, True), shown.err
    assert not (tmp_path / "run").exists()
