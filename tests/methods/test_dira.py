"""DiRA against its float64 reference: forward, closed-form gradient, schedules, spectrum and landscape."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dynalora
from dynalora import DiraConfig
from dynalora.adapter.layer import AdapterLayer
from dynalora.spectral.spectrum import factor_spectrum
from tests.reference import dira as reference
from tests.toys import TOYS

FORMS = ("product", "variational")
SCHEDULES = ("linear", "cosine", "constant")
every_form = pytest.mark.parametrize("form", FORMS)


def adapted_linear(
    in_features: int, out_features: int, *, seed: int = 0, bias: bool = True, **options: Any
) -> tuple[nn.Module, Any]:
    """One float64 linear layer with a non-zero DiRA adapter: (PEFT model, layer)."""
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(in_features, out_features, bias=bias)).double()
    options = {"r": 3, "alpha": 5, "total_steps": 10, "init_weights": False, **options}
    model = peft.get_peft_model(base, DiraConfig(target_modules=["0"], **options))
    layer = next(m for m in model.modules() if isinstance(m, AdapterLayer))
    for factor in factors(layer):
        factor.data.copy_(torch.randn(factor.shape, dtype=torch.float64))
    return model, layer


def factors(layer: Any, adapter: str = "default") -> tuple[Tensor, Tensor]:
    """(A, B) in the paper's names: r × in and out × r."""
    return layer.dira_down[adapter], layer.dira_up[adapter]


def step_effect(
    layer: Any, loss: Callable[[], Tensor], step: Callable[[torch.optim.Optimizer], None]
) -> tuple[Tensor, Tensor]:
    """What one SGD step of size 1 subtracts from A and B beyond the task gradient."""
    A, B = factors(layer)
    task = torch.autograd.grad(loss(), (A, B))
    before = A.detach().clone(), B.detach().clone()
    step(torch.optim.SGD([A, B], lr=1.0))
    return before[0] - A.detach() - task[0], before[1] - B.detach() - task[1]


def plain(loss: Callable[[], Tensor]) -> Callable[[torch.optim.Optimizer], None]:
    def step(optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def assert_penalty(
    layer: Any, effect: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor], form: str, lam: float
) -> None:
    wanted = reference.penalty_gradient(form, *before)
    torch.testing.assert_close(effect[0], lam * wanted[0], atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(effect[1], lam * wanted[1], atol=1e-12, rtol=1e-9)


shapes = st.integers(1, 9)


@given(in_features=shapes, out_features=shapes, r=st.integers(1, 6), rslora=st.booleans(), seed=st.integers(0, 99))
def test_forward_equals_the_reference(in_features: int, out_features: int, r: int, rslora: bool, seed: int) -> None:
    model, layer = adapted_linear(in_features, out_features, seed=seed, r=r, alpha=3, use_rslora=rslora)
    x = torch.randn(2, 4, in_features, dtype=torch.float64)
    A, B = factors(layer)
    s = 3 / math.sqrt(r) if rslora else 3 / r
    expected = reference.forward(x, layer.base_layer.weight, layer.base_layer.bias, A, B, s)
    torch.testing.assert_close(model(x), expected, atol=1e-11, rtol=1e-9)


# --- the gradient of the penalty -----------------------------------------------------------------------------


@given(
    in_features=shapes,
    out_features=shapes,
    r=st.integers(1, 6),
    form=st.sampled_from(FORMS),
    zero_A=st.sets(st.integers(0, 5)),
    zero_B=st.sets(st.integers(0, 5)),
    weight=st.sampled_from([1e-4, 0.3, 7.0]),
    seed=st.integers(0, 99),
)
def test_added_gradient_equals_autograd(
    in_features: int, out_features: int, r: int, form: str, zero_A: set[int], zero_B: set[int], weight: float, seed: int
) -> None:
    model, layer = adapted_linear(
        in_features, out_features, seed=seed, r=r, penalty=form, penalty_weight=weight, penalty_schedule="constant"
    )
    A, B = factors(layer)
    for i in range(r):
        if i in zero_A:
            A.data[i] = 0
        if i in zero_B:
            B.data[:, i] = 0
    before = A.detach().clone(), B.detach().clone()
    x = torch.randn(5, in_features, dtype=torch.float64)

    def loss() -> Tensor:
        return model(x).square().sum()

    effect = step_effect(layer, loss, plain(loss))
    assert effect[0].isfinite().all()
    assert effect[1].isfinite().all()
    assert_penalty(layer, effect, before, form, weight)


@every_form
def test_default_start_has_no_nan(form: str) -> None:
    """up = 0 at the start: every column of B is a zero column."""
    model, layer = adapted_linear(4, 3, penalty=form, penalty_weight=0.5, penalty_schedule="constant")
    A, B = factors(layer)
    B.data.zero_()
    before = A.detach().clone(), B.detach().clone()
    x = torch.randn(5, 4, dtype=torch.float64)

    def loss() -> Tensor:
        return model(x).square().sum()

    assert_penalty(layer, step_effect(layer, loss, plain(loss)), before, form, 0.5)


@every_form
def test_penalty_is_added_once_under_gradient_accumulation(form: str) -> None:
    model, layer = adapted_linear(4, 3, penalty=form, penalty_weight=0.5, penalty_schedule="constant")
    x = torch.randn(8, 4, dtype=torch.float64)
    before = tuple(f.detach().clone() for f in factors(layer))

    def loss() -> Tensor:
        return model(x).square().mean()

    def accumulated(optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        for part in x.split(2):
            (model(part).square().mean() / 4).backward()
        optimizer.step()

    assert_penalty(layer, step_effect(layer, loss, accumulated), before, form, 0.5)


@every_form
@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_penalty_with_a_closure(form: str, how: str) -> None:
    """A closure makes the gradients inside ``step``, and usually clears them first."""
    model, layer = adapted_linear(4, 3, penalty=form, penalty_weight=0.5, penalty_schedule="constant")
    x = torch.randn(8, 4, dtype=torch.float64)
    before = tuple(f.detach().clone() for f in factors(layer))
    values: list[float] = []

    def loss() -> Tensor:
        return model(x).square().mean()

    def step(optimizer: torch.optim.Optimizer) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        result = optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
        values.append(float(result))

    expected = float(loss())
    assert_penalty(layer, step_effect(layer, loss, step), before, form, 0.5)
    assert values == [pytest.approx(expected)], "the closure's loss must stay the task loss"


@every_form
@pytest.mark.parametrize("unscale_first", [False, True])
def test_penalty_under_gradient_scaling(form: str, unscale_first: bool) -> None:
    model, layer = adapted_linear(4, 3, penalty=form, penalty_weight=0.5, penalty_schedule="constant")
    x = torch.randn(8, 4, dtype=torch.float64)
    before = tuple(f.detach().clone() for f in factors(layer))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def loss() -> Tensor:
        return model(x).square().mean()

    def step(optimizer: torch.optim.Optimizer) -> None:
        scaler.scale(loss()).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    assert_penalty(layer, step_effect(layer, loss, step), before, form, 0.5)


@every_form
@pytest.mark.parametrize("unscale_first", [False, True])
def test_penalty_when_a_fused_optimizer_unscales_itself(form: str, unscale_first: bool) -> None:
    """Fused optimizers divide by the scale in their kernel, so what is added must carry the scale."""
    x = torch.randn(8, 4, dtype=torch.float64)
    after = {}
    for scaled in (False, True):
        model, layer = adapted_linear(4, 3, penalty=form, penalty_weight=0.5, penalty_schedule="constant")
        optimizer = torch.optim.AdamW(list(factors(layer)), lr=0.1, eps=1.0, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=4096.0, enabled=scaled)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            if unscale_first:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        after[scaled] = [f.detach().clone() for f in factors(layer)]
    for with_scaler, without in zip(after[True], after[False], strict=True):
        torch.testing.assert_close(with_scaler, without, atol=1e-10, rtol=1e-9)


@every_form
def test_clipping_acts_on_the_task_gradient_only(form: str) -> None:
    model, layer = adapted_linear(4, 3, penalty=form, penalty_weight=0.5, penalty_schedule="constant")
    x = torch.randn(8, 4, dtype=torch.float64)
    A, B = factors(layer)
    before = A.detach().clone(), B.detach().clone()

    def loss() -> Tensor:
        return model(x).square().mean()

    task = torch.autograd.grad(loss(), (A, B))
    norm = torch.sqrt(sum(g.square().sum() for g in task))
    optimizer = torch.optim.SGD([A, B], lr=1.0)
    loss().backward()
    nn.utils.clip_grad_norm_([A, B], 0.01)
    optimizer.step()
    ratio = 0.01 / (norm + 1e-6)
    effect = (before[0] - A.detach() - ratio * task[0], before[1] - B.detach() - ratio * task[1])
    assert_penalty(layer, effect, before, form, 0.5)


@pytest.mark.parametrize("magnitude", [1e-3, 1e-15, 1e-22, 1e-24, 1e-30, 1e-38, 0.0])
def test_vanishing_components_keep_a_bounded_gradient(magnitude: float) -> None:
    """‖∂/∂B_:,i‖ is λ‖A_i,:‖ however small B_:,i is, also where its square underflows in float32."""
    torch.manual_seed(0)
    config = DiraConfig(
        r=2, alpha=2, target_modules=["0"], penalty_weight=0.1, penalty_schedule="constant", init_weights=False
    )
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)
    layer = next(m for m in model.modules() if isinstance(m, AdapterLayer))
    A, B = factors(layer)
    assert A.dtype == torch.float32
    B.data[:, 0] = magnitude
    for parameter in (A, B):
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD([A, B], lr=1e-30).step()
    assert float(B.grad[:, 0].norm()) <= 0.1 * float(A[0].norm()) * 1.5
    assert float(A.grad[0].norm()) <= 0.1 * max(5**0.5 * magnitude * 1.5, 1e-20)
    if magnitude >= 1e-30:
        assert float(B.grad[:, 0].norm()) == pytest.approx(0.1 * float(A[0].norm()), rel=1e-4)


@every_form
@pytest.mark.parametrize("frozen", ["A", "B"])
def test_a_frozen_factor_leaves_the_other_penalised(form: str, frozen: str) -> None:
    model, layer = adapted_linear(4, 3, penalty=form, penalty_weight=0.5, penalty_schedule="constant")
    A, B = factors(layer)
    still, moving = (A, B) if frozen == "A" else (B, A)
    still.requires_grad_(False)
    before = A.detach().clone(), B.detach().clone()
    x = torch.randn(5, 4, dtype=torch.float64)
    (task,) = torch.autograd.grad(model(x).square().mean(), moving)
    optimizer = torch.optim.SGD([moving], lr=1.0)
    model(x).square().mean().backward()
    optimizer.step()
    wanted = reference.penalty_gradient(form, *before)
    index = 1 if frozen == "A" else 0
    torch.testing.assert_close(before[index] - moving.detach() - task, 0.5 * wanted[index])
    assert torch.equal(still, before[1 - index])
    assert still.grad is None


def test_penalty_ignores_the_scaling() -> None:
    """The penalty is on B·A as written: alpha must not enter."""
    effects = []
    for alpha in (1, 50):
        model, layer = adapted_linear(4, 3, alpha=alpha, penalty_weight=0.5, penalty_schedule="constant")
        x = torch.zeros(2, 4, dtype=torch.float64)  # no task gradient

        def loss(model: nn.Module = model, x: Tensor = x) -> Tensor:
            return model(x).square().sum()

        effects.append(step_effect(layer, loss, plain(loss)))
    assert effects[0][0].abs().max() > 0.01
    assert torch.equal(effects[0][0], effects[1][0])
    assert torch.equal(effects[0][1], effects[1][1])


def test_logged_loss_is_the_task_loss() -> None:
    model, layer = adapted_linear(4, 3, penalty_weight=100.0)
    x = torch.randn(8, 4, dtype=torch.float64)
    A, B = factors(layer)
    expected = reference.forward(x, layer.base_layer.weight, layer.base_layer.bias, A, B, 5 / 3).square().mean()
    torch.testing.assert_close(model.train()(x).square().mean(), expected)


def test_several_layers_are_penalised_each_on_its_own() -> None:
    toy = TOYS["mlp"]
    config = DiraConfig(
        r=3,
        alpha=3,
        target_modules=list(toy.targets),
        penalty_weight=0.4,
        penalty_schedule="constant",
        init_weights=False,
    )
    model = peft.get_peft_model(toy.build().double(), config)
    layers = [m for m in model.modules() if isinstance(m, AdapterLayer)]
    assert len(layers) == 2
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    by_id = {id(p): n for n, p in model.named_parameters()}
    names = list(before)
    trainable = [p for p in model.parameters() if p.requires_grad]
    task = dict(zip(names, torch.autograd.grad(toy.loss(model), trainable), strict=True))
    optimizer = torch.optim.SGD(trainable, lr=1.0)
    toy.loss(model).backward()
    optimizer.step()
    for layer in layers:
        A, B = factors(layer)
        names_AB = by_id[id(A)], by_id[id(B)]
        wanted = reference.penalty_gradient("product", *(before[n] for n in names_AB))
        for name, now, grad in zip(names_AB, (A, B), wanted, strict=True):
            torch.testing.assert_close(before[name] - now.detach() - task[name], 0.4 * grad, atol=1e-7, rtol=1e-5)


def test_a_layer_without_gradient_does_no_harm() -> None:
    """As in a mixture of experts, where some experts see no token."""
    toy = TOYS["mlp"]
    model = peft.get_peft_model(
        toy.build(), DiraConfig(target_modules=list(toy.targets), penalty_weight=0.5, total_steps=4, init_weights=False)
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    hidden = model.base_model.model.first(toy.batch(1)["x"])
    hidden.square().mean().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


# --- λ over the run ------------------------------------------------------------------------------------------


@given(schedule=st.sampled_from(SCHEDULES), total=st.integers(1, 12), data=st.data(), form=st.sampled_from(FORMS))
def test_schedule_seen_by_the_optimizer(schedule: str, total: int, data: Any, form: str) -> None:
    done = data.draw(st.integers(0, total - 1))
    model, layer = adapted_linear(4, 3, penalty=form, penalty_weight=0.7, penalty_schedule=schedule, total_steps=total)
    x = torch.randn(5, 4, dtype=torch.float64)

    def loss() -> Tensor:
        return model(x).square().mean()

    still = torch.optim.SGD(list(factors(layer)), lr=0.0)
    for _ in range(done):
        plain(loss)(still)
    before = tuple(f.detach().clone() for f in factors(layer))
    lam = reference.schedule(schedule, 0.7, done, total)
    assert_penalty(layer, step_effect(layer, loss, plain(loss)), before, form, lam)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.filterwarnings("ignore:the schedule of adapter")
def test_decayed_schedules_stay_at_zero_afterwards(schedule: str) -> None:
    model, layer = adapted_linear(4, 3, penalty_weight=0.7, penalty_schedule=schedule, total_steps=2)
    x = torch.randn(5, 4, dtype=torch.float64)

    def loss() -> Tensor:
        return model(x).square().mean()

    still = torch.optim.SGD(list(factors(layer)), lr=0.0)
    for _ in range(2):
        plain(loss)(still)
    effect = step_effect(layer, loss, plain(loss))
    assert max(float(e.abs().max()) for e in effect) < 1e-12


def test_constant_schedule_needs_no_total() -> None:
    model, layer = adapted_linear(4, 3, penalty_schedule="constant", penalty_weight=0.2, total_steps=None)
    x = torch.randn(5, 4, dtype=torch.float64)
    before = tuple(f.detach().clone() for f in factors(layer))

    def loss() -> Tensor:
        return model(x).square().mean()

    assert_penalty(layer, step_effect(layer, loss, plain(loss)), before, "product", 0.2)


def test_penalty_drives_unused_components_down() -> None:
    """A rank-1 task with rank-4 factors: the penalty removes what the task does not need, plain training does not."""
    ranks = {}
    for weight in (0.0, 0.02):
        torch.manual_seed(3)
        base = nn.Sequential(nn.Linear(8, 6, bias=False)).double()
        change = torch.outer(torch.randn(6), torch.randn(8)).double()
        target = base[0].weight.detach() + change
        config = DiraConfig(r=4, alpha=4, target_modules=["0"], penalty_weight=weight, penalty_schedule="constant")
        model = peft.get_peft_model(base, config)
        layer = next(m for m in model.modules() if isinstance(m, AdapterLayer))
        factors(layer)[1].data.copy_(0.5 * torch.randn(6, 4).double())
        factors(layer)[0].data.copy_(0.5 * torch.randn(4, 8).double())
        optimizer = torch.optim.Adam(list(factors(layer)), lr=0.05)
        # Six inputs leave a null space, in which only the penalty acts.
        x = torch.randn(6, 8, dtype=torch.float64)
        for _ in range(250):
            optimizer.zero_grad()
            (model(x) - x @ target.T).square().mean().backward()
            optimizer.step()
        ranks[weight] = int((reference.spectrum(*factors(layer), 1.0) > 0.02).sum())
    assert ranks[0.0] >= 3
    assert ranks[0.02] <= 2


# --- spectrum and landscape ----------------------------------------------------------------------------------


@given(out=shapes, inp=shapes, r=st.integers(1, 7), true_rank=st.integers(0, 7), seed=st.integers(0, 99))
def test_spectrum_from_factors_equals_dense_svd(out: int, inp: int, r: int, true_rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(out, r, generator=generator, dtype=torch.float64)
    A = torch.randn(r, inp, generator=generator, dtype=torch.float64)
    A[true_rank:] = 0
    values = factor_spectrum(B, A)
    expected = torch.linalg.svdvals(B @ A)
    count = min(len(values), len(expected))
    torch.testing.assert_close(values[:count], expected[:count], atol=1e-10, rtol=1e-9)
    assert (expected[count:] < 1e-9).all()
    assert (values.diff() <= 1e-12).all()


@pytest.mark.parametrize("tau", [1e-3, 0.3])
def test_rank_landscape_equals_the_reference(tau: float) -> None:
    toy = TOYS["llama"]
    config = DiraConfig(
        r=4,
        alpha=6,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 3},
        init_weights=False,
        total_steps=5,
    )
    model = peft.get_peft_model(toy.build(), config)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, AdapterLayer)}
    first = layers[min(layers)]
    first.dira_up["default"].data[:, :2] = 0  # two dead components
    first.dira_down["default"].data[2] *= 1e-5  # and one below the threshold
    for layer in layers.values():
        layer.dira_up["default"].data.mul_(3)
    rows = dynalora.rank_landscape(model, tau=tau)
    assert len(rows) == len(layers) == 4
    for row in rows:
        name = next(n for n in layers if n.endswith(row.module) or row.module.endswith(n))
        layer = layers[name]
        s = 6 / layer.rank("default")
        A, B = factors(layer)
        wanted = reference.landscape(A, B, s, tau)
        assert row.rank == layer.rank("default")
        assert row.effective_rank == wanted["k"], name
        assert row.energy == pytest.approx(wanted["energy"], abs=1e-6)
        assert row.nuclear_norm == pytest.approx(wanted["nuclear_norm"], rel=1e-5)
        values = torch.as_tensor(row.singular_values, dtype=torch.float64)
        expected = reference.spectrum(A, B, s)[: len(values)]
        torch.testing.assert_close(values, expected, atol=1e-6, rtol=1e-5)
        assert row.kind == name.rsplit(".", 1)[-1]
        assert f".{row.layer}." in name


# --- what a user may get wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("penalty", "l1"), ("penalty_weight", -1e-4), ("penalty_weight", float("nan")), ("penalty_schedule", "quadratic")],
)
def test_bad_values_name_field_and_choices(field: str, value: Any) -> None:
    with pytest.raises(dynalora.errors.ConfigError) as caught:
        DiraConfig(**{field: value})
    assert field in str(caught.value)
    assert str(value) in str(caught.value)


def test_defaults_are_the_papers() -> None:
    config = DiraConfig()
    assert (config.penalty, config.penalty_weight, config.penalty_schedule) == ("product", 1e-4, "linear")


def test_start_is_loras() -> None:
    """down Kaiming-uniform(√5), that is uniform within ±1/√in; up zero."""
    fresh = peft.get_peft_model(nn.Sequential(nn.Linear(400, 30)), DiraConfig(r=50, target_modules=["0"]))
    layer = next(m for m in fresh.modules() if isinstance(m, AdapterLayer))
    A, B = factors(layer)
    bound = 1 / math.sqrt(400)
    assert torch.count_nonzero(B) == 0
    assert A.abs().max() <= bound
    assert A.abs().max() > 0.99 * bound
    assert float(A.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
