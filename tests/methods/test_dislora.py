"""DisLoRA against its float64 reference: start, forward, directions, losses and their weights."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dynalora
from dynalora import DisloraConfig
from dynalora.adapter import directions
from dynalora.adapter.directions import choose_directions
from dynalora.adapter.layer import AdapterLayer
from dynalora.errors import ConfigError, TrainingError
from dynalora.methods import dislora
from dynalora.spectral import decomposition
from tests.matrix.test_precision import quantised_mlp
from tests.reference import dislora as reference
from tests.toys import TOYS


def model_of(shapes: list[tuple[int, int]], *, seed: int = 0, **options: Any) -> tuple[Any, list[Any]]:
    """Linear layers in a row (out, in), float64, adapted: (PEFT model, layers)."""
    torch.manual_seed(seed)
    base = nn.Sequential(*(nn.Linear(inside, out) for out, inside in shapes)).double()
    names = [str(index) for index in range(len(shapes))]
    mine = {"r": 2, "alpha": 3, "warmup_steps": 2, "tsd_count": 2, "match_step": False}
    options = {**mine, "target_modules": names, **options}
    model = peft.get_peft_model(base, DisloraConfig(**options))
    return model, [module for module in model.modules() if isinstance(module, AdapterLayer)]


def train(model: Any, steps: int, *, lr: float = 0.05, seed: int = 1, optimizer: Any = None) -> Any:
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(parameters, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, generator).backward()
        optimizer.step()
    return optimizer


def loss_of(model: Any, generator: torch.Generator) -> Tensor:
    first = next(module for module in model.modules() if isinstance(module, AdapterLayer))
    x = torch.randn(5, first.in_features, generator=generator, dtype=torch.float64)
    return (model(x) - 1).square().mean()


def tensors(layer: Any) -> dict[str, Tensor]:
    return {role: tensor.detach() for role, tensor in layer.saved_tensors("default").items()}


def row_of(sizes: list[int]) -> list[tuple[int, int]]:
    """Shapes (out, in) of layers in a row, from the sizes between them."""
    return [(out, inside) for inside, out in itertools.pairwise(sizes)]


shape = st.tuples(st.integers(2, 9), st.integers(2, 9))


# --- start and forward ---------------------------------------------------------------------------------------


@given(shape=shape, r=st.integers(1, 2), alpha=st.sampled_from([0.1, 3.0, 50.0]), seed=st.integers(0, 99))
def test_start_is_the_base_model_at_its_smallest_triplets(
    shape: tuple[int, int], r: int, alpha: float, seed: int
) -> None:
    model, (layer,) = model_of([shape], r=r, alpha=alpha, seed=seed)
    weight = layer.base_layer.weight
    up, sigma, down = reference.decompose(weight)
    smallest = up[:, -r:] * sigma[-r:] @ down[-r:]
    have = tensors(layer)
    torch.testing.assert_close(have["up"] * have["sigma"] @ have["down"], smallest, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(have["sigma"], sigma[-r:], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(layer.get_delta_weight("default"), torch.zeros_like(weight), atol=1e-12, rtol=0)
    x = torch.randn(3, shape[1], dtype=torch.float64)
    torch.testing.assert_close(model(x), layer.base_layer(x), atol=1e-10, rtol=1e-10)


@given(shape=shape, seed=st.integers(0, 99), init=st.sampled_from(["zero", "sigma"]), chosen=st.booleans())
def test_forward_equals_the_reference(shape: tuple[int, int], seed: int, init: str, chosen: bool) -> None:
    model, (layer,) = model_of([shape], seed=seed, tsd_init=init)
    train(model, 4 if chosen else 1)
    have, r = tensors(layer), 2
    assert bool((have["tsd_index"] >= 0).all()) == chosen
    start = have["frozen_up"][:, :r], have["start_sigma"], have["frozen_down"][:r]
    directions = [
        (have["tsd_weight"][i], have["frozen_up"][:, r + i], have["frozen_down"][r + i])
        for i in range(len(have["tsd_weight"]))
    ]
    x = torch.randn(2, 3, shape[1], dtype=torch.float64)
    base = layer.base_layer
    trained = have["up"], have["sigma"], have["down"]
    expected = reference.forward(x, base.weight, base.bias, trained, start, directions, 3 / 2)
    torch.testing.assert_close(model(x), expected, atol=1e-10, rtol=1e-9)


@given(shape=shape, seed=st.integers(0, 99))
def test_gradients_equal_those_of_the_plain_form(shape: tuple[int, int], seed: int) -> None:
    """The products skip the frozen components' gradients; those of the trained ones must not change by it."""
    model, (layer,) = model_of([shape], seed=seed)
    train(model, 3)
    x = torch.randn(4, shape[1], dtype=torch.float64, requires_grad=True)
    own = {role: p for role, p in layer.adapter_parameters("default").items()}
    got = torch.autograd.grad(model(x).sin().sum(), (x, *own.values()))
    up, down = layer.factors("default")
    plain = layer.base_layer(x) + layer.scaling["default"] * (x @ down.t() @ up.t())
    wanted = torch.autograd.grad(plain.sin().sum(), (x, *own.values()))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-9)


def test_rank_above_the_singular_values_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"r=5.*4 × 9.*rank_pattern"):
        model_of([(4, 9)], r=5)


def test_more_directions_than_pairs_takes_all_pairs() -> None:
    model, (layer,) = model_of([(3, 4)], tsd_count=8)
    train(model, 3)
    assert sorted(tensors(layer)["tsd_index"].tolist()) == [0, 1, 2]


# --- the losses ----------------------------------------------------------------------------------------------


@given(
    shapes=st.lists(st.integers(2, 6), min_size=3, max_size=4),
    weight=st.sampled_from(["adaptive", 5e-5, 0.7]),
    reduction=st.sampled_from(["squared", "mean_norm"]),
    seed=st.integers(0, 99),
)
def test_gradient_of_a_step_is_that_of_the_total_loss(
    shapes: list[int], weight: Any, reduction: str, seed: int
) -> None:
    """Eq. 15 with the weights as constants, by autograd, against what SGD with step size 1 subtracts."""
    options = {"ortho_weight": weight, "ortho_reduction": reduction, "tsd_count": 0, "r": 2}
    model, layers = model_of(row_of(shapes), seed=seed, **options)
    for layer in layers:  # away from orthonormal factors
        for parameter in layer.adapter_parameters("default").values():
            parameter.data += 0.2 * torch.randn_like(parameter)
    parameters = [p for p in model.parameters() if p.requires_grad]
    task = loss_of(model, torch.Generator().manual_seed(3))
    pairs = [(layer.parameter("up", "default"), layer.parameter("down", "default")) for layer in layers]
    ortho = reference.ortho_loss(pairs, reduction == "squared")
    if weight == "adaptive":
        _, task_weight, ortho_weight = reference.weights(float(task), float(ortho))
    else:
        task_weight, ortho_weight = 1.0, weight
    wanted = torch.autograd.grad(task_weight * task + ortho_weight * ortho, parameters)
    before = [p.detach().clone() for p in parameters]
    train(model, 1, lr=1.0, seed=3)
    for parameter, old, gradient in zip(parameters, before, wanted, strict=True):
        torch.testing.assert_close(old - parameter.detach(), gradient, atol=1e-10, rtol=1e-8)
    metrics = model_metrics(model)
    assert metrics["dislora_ortho_loss"] == pytest.approx(float(ortho), rel=1e-9)
    if weight == "adaptive":
        assert metrics["dislora_task_loss"] == pytest.approx(float(task), rel=1e-6)
        assert metrics["dislora_task_weight"] == pytest.approx(task_weight, rel=1e-5)


def model_metrics(model: Any) -> dict[str, float]:
    (report,) = dynalora.state_report(model)
    return report.details


@given(task=st.floats(1e-3, 1e3), ratio=st.floats(2e-3, 500.0))
def test_weights_follow_the_formula(task: float, ratio: float) -> None:
    got = dislora.adaptive_weights(*(torch.tensor(value, dtype=torch.float64) for value in (task, task * ratio)))
    for one, other in zip(got, reference.weights(task, task * ratio), strict=True):
        assert float(one) == pytest.approx(other, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("task", "ortho", "wanted"),
    [
        (1.0, 0.0, (1.0, 0.0)),
        (1.0, 1e-300, (1.0, 0.0)),
        (0.0, 0.0, (1.0, 0.0)),
        (1e-30, 1e30, (0.0, 1.0)),
        (float("inf"), 1.0, (1.0, 0.0)),
        (float("nan"), 1.0, (1.0, 0.0)),
        (1.0, float("nan"), (1.0, 0.0)),
        (1.0, float("inf"), (1.0, 0.0)),
        (-1.0, 1.0, (0.5, 0.5)),
    ],
)
def test_weights_at_the_limits(task: float, ortho: float, wanted: tuple[float, float]) -> None:
    got = dislora.adaptive_weights(*(torch.tensor(value, dtype=torch.float64) for value in (task, ortho)))
    assert [float(weight) for weight in got[1:]] == pytest.approx(wanted, abs=1e-5)


def test_smoothed_losses_are_bias_corrected_averages() -> None:
    balance = torch.zeros(8, dtype=torch.float64)
    losses = [(2.0, 0.5), (1.0, 0.25), (float("nan"), 0.1), (3.0, 0.75)]
    average, count = torch.zeros(2, dtype=torch.float64), 0
    for task, ortho in losses:
        if math.isfinite(task):
            average, count = 0.9 * average + 0.1 * torch.tensor([task, ortho], dtype=torch.float64), count + 1
        got = dislora._smooth(balance, torch.tensor(task).double(), torch.tensor(ortho).double(), 0.9)
        torch.testing.assert_close(torch.stack(got), average / (1 - 0.9**count))


# --- where the task loss comes from --------------------------------------------------------------------------


def test_micro_batches_add_up_and_scaling_is_undone() -> None:
    whole, _ = model_of([(4, 5), (3, 4)])
    split = copy.deepcopy(whole)
    x = torch.randn(8, 5, dtype=torch.float64)
    for model, parts in ((whole, 1), (split, 4)):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            for piece in x.chunk(parts):
                ((model(piece) - 1).square().mean() / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
    one, other = model_metrics(whole), model_metrics(split)
    assert one == pytest.approx(other, rel=1e-6)
    assert one["dislora_task_loss"] > 0


def test_loss_scaling_is_undone() -> None:
    plain, _ = model_of([(4, 5)])
    scaled = copy.deepcopy(plain)
    x = torch.randn(8, 5, dtype=torch.float64)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for model in (plain, scaled):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean()
            if model is plain:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
    assert model_metrics(plain) == pytest.approx(model_metrics(scaled), rel=1e-6)


def test_a_skipped_step_leaves_no_loss_behind() -> None:
    model, _ = model_of([(4, 5)])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(8, 5, dtype=torch.float64)
    (100 * model(x).square().mean()).backward()
    optimizer.zero_grad()  # this one is never taken
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    assert model_metrics(model)["dislora_task_loss"] == pytest.approx(float(loss), rel=1e-6)


def test_the_loss_of_another_model_is_not_taken() -> None:
    model, _ = model_of([(4, 5)])
    other, _ = model_of([(4, 5)], seed=1)
    x = torch.randn(8, 5, dtype=torch.float64)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = model(x).square().mean()
    loss.backward()
    (1000 * other(x).square().mean()).backward()
    optimizer.step()
    assert model_metrics(model)["dislora_task_loss"] == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_two_models_in_turns_take_their_own_losses(set_to_none: bool) -> None:
    """Gradients that a step or their clearing has written to were not made by the other model's loss."""
    models = [model_of([(4, 5)], seed=seed)[0] for seed in (0, 1)]
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in models]
    x = torch.randn(8, 5, dtype=torch.float64)
    for _ in range(3):
        for factor, model, optimizer in zip((1, 1000), models, optimizers, strict=True):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss = factor * model(x).square().mean()
            loss.backward()
            optimizer.step()
            assert model_metrics(model)["dislora_task_loss"] == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_loss_is_seen_through_gradient_checkpointing(reentrant: bool) -> None:
    model, _ = model_of([(4, 5), (3, 4)])
    x = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant).square().mean()
    loss.backward()
    optimizer.step()
    assert model_metrics(model)["dislora_task_loss"] == pytest.approx(float(loss), rel=1e-6)


def test_an_unseen_loss_is_one_clear_sentence_and_can_be_supplied() -> None:
    model, _ = model_of([(4, 5)])
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    before = [p.detach().clone() for p in parameters]

    def gradients() -> Tensor:
        loss = model(torch.ones(2, 5, dtype=torch.float64)).square().mean()
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, grads, strict=True):
            parameter.grad = gradient
        return loss.detach()

    gradients()
    with pytest.raises(TrainingError, match=r"saw no loss.*report_task_loss"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    dynalora.report_task_loss(model, loss := gradients())
    optimizer.step()
    assert model_metrics(model)["dislora_task_loss"] == pytest.approx(float(loss), rel=1e-6)


def test_fixed_weights_need_no_loss() -> None:
    model, _ = model_of([(4, 5)], ortho_weight=5e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    torch.optim.SGD(parameters, lr=0.1).step()
    assert "dislora_k" not in model_metrics(model)


def test_the_head_beside_the_adapter_is_weighed_alike() -> None:
    model, (layer,) = model_of([(4, 5), (3, 4)], target_modules=["0"], modules_to_save=["1"], tsd_count=0, r=1)
    layer.parameter("up", "default").data *= 1.5
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("modules_to_save" in name for name in parameters)
    x = torch.randn(8, 5, dtype=torch.float64)
    loss = (model(x) - 1).square().mean()
    gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    before = {name: p.detach().clone() for name, p in parameters.items()}
    (model(x) - 1).square().mean().backward()
    torch.optim.SGD(list(parameters.values()), lr=1.0).step()
    weight = model_metrics(model)["dislora_task_weight"]
    assert 0.01 < weight < 0.99
    for name, parameter in parameters.items():
        if "modules_to_save" in name:
            torch.testing.assert_close(
                before[name] - parameter.detach(), weight * gradients[name], rtol=1e-6, atol=1e-9
            )


# --- the directions ------------------------------------------------------------------------------------------


@given(
    shapes=st.lists(st.integers(3, 14), min_size=2, max_size=3),
    score=st.sampled_from(["residual", "update"]),
    count=st.integers(1, 4),
    lr=st.sampled_from([0.01, 0.3]),
    seed=st.integers(0, 99),
)
def test_directions_equal_a_dense_computation(shapes: list[int], score: str, count: int, lr: float, seed: int) -> None:
    model, layers = model_of(row_of(shapes), seed=seed, r=2, tsd_count=count, tsd_score=score)
    train(model, 2, lr=lr, seed=seed)
    for layer in layers:
        have, r = tensors(layer), 2
        residual = have["up"] * have["sigma"] @ have["down"]
        if score == "update":
            residual = residual - have["frozen_up"][:, :r] * have["start_sigma"] @ have["frozen_down"][:r]
        weight = layer.base_layer.weight.detach()
        rates = reference.change_rates(weight, residual, 1e-7 * float(weight.norm()))
        taken = min(count, len(rates))
        wanted = rates.sort(descending=True)
        torch.testing.assert_close(have["tsd_rate"], wanted.values[:taken], rtol=1e-5, atol=1e-9)
        gaps = wanted.values[:taken] - wanted.values[1 : taken + 1] if taken < len(rates) else torch.ones(1)
        if float(gaps.min()) > 1e-6 * float(wanted.values[0]):  # no ties
            assert have["tsd_index"].tolist() == wanted.indices[:taken].tolist()
        _, sigma, _ = reference.decompose(weight)
        torch.testing.assert_close(have["tsd_sigma"], sigma[have["tsd_index"]], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("score", ["residual", "update"])
def test_directions_need_only_few_pairs_and_widen_when_unsure(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few pairs at first, the bound on the rest decides when to look at more; the result stays exact."""
    model, (layer,) = model_of([(40, 60)], r=4, tsd_count=3, tsd_score=score)
    train(model, 1, lr=0.3)
    asked: list[int] = []
    smallest = decomposition.smallest_triplets

    def counting(weight: Tensor, k: int) -> decomposition.Triplets:
        asked.append(k)
        return smallest(weight, k)

    monkeypatch.setattr(directions, "smallest_triplets", counting)
    (found,) = choose_directions([layer], "default", layer.drivers["default"].config)
    residual = torch.matmul(*layer.residual("default", score)).detach()
    rates = reference.change_rates(layer.base_layer.weight.detach(), residual, 0.0)
    assert found.index.tolist() == rates.sort(descending=True).indices[:3].tolist()
    assert asked == sorted(asked)
    assert (score == "residual") == (not asked or asked[-1] < 40)


def test_switching_the_directions_on_changes_nothing_at_once() -> None:
    model, layers = model_of([(6, 7), (5, 6)])
    optimizer = train(model, 1)
    x = torch.randn(4, 7, dtype=torch.float64)
    generator = torch.Generator().manual_seed(9)
    optimizer.zero_grad()
    loss_of(model, generator).backward()
    optimizer.step()  # the end of the warm-up: chosen within this step
    assert all(layer.has_directions("default") for layer in layers)
    now = model(x)
    for layer in layers:
        layer.buffer("frozen_up", "default")[:, 2:] = 0
    torch.testing.assert_close(model(x), now, atol=1e-12, rtol=0)


def test_sigma_init_starts_the_weights_at_the_singular_values() -> None:
    model, (layer,) = model_of([(6, 7)], tsd_init="sigma")
    train(model, 2)
    have = tensors(layer)
    assert torch.equal(have["tsd_weight"], have["tsd_sigma"])


def test_weights_of_directions_begin_with_clean_optimizer_state() -> None:
    """Zero gradients during the warm-up would make Adam's first steps three times too long."""
    model, (layer,) = model_of([(6, 7)], ortho_weight=0)
    weight = layer.parameter("tsd_weight", "default")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    train(model, 2, optimizer=optimizer)
    assert weight not in optimizer.state
    train(model, 1, optimizer=optimizer)
    assert int(optimizer.state[weight]["step"]) == 1


def test_directions_are_chosen_once_even_in_a_second_run() -> None:
    model, (layer,) = model_of([(6, 7)])
    train(model, 5)
    first = tensors(layer)["tsd_index"].clone()
    dynalora.restart_schedule(model)
    train(model, 5, lr=0.5, seed=4)
    assert torch.equal(tensors(layer)["tsd_index"], first)


def test_a_warmup_as_long_as_the_run_is_said() -> None:
    model, _ = model_of([(6, 7)], warmup_steps=9, total_steps=9)
    with pytest.warns(UserWarning, match=r"warmup_steps=9.*only 9"):
        train(model, 1)


def test_a_third_of_the_run_is_the_default() -> None:
    assert DisloraConfig().warmup(90) == 30
    assert DisloraConfig().warmup(1) == 1
    assert DisloraConfig(tsd_count=0).warmup(90) is None
    model, (layer,) = model_of([(6, 7)], warmup_steps=None, total_steps=9)
    train(model, 2)
    assert not layer.has_directions("default")
    train(model, 1)
    assert layer.has_directions("default")


# --- around it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"ortho_weight": 1e-3}, {"loss_smoothing": 0.8}], ids=str)
def test_resumed_before_at_and_after_the_end_of_warmup(stop: int, options: dict[str, Any], tmp_path: Path) -> None:
    def adam(model: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)

    def steps(model: Any, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            optimizer.zero_grad()
            loss_of(model, torch.Generator().manual_seed(number)).backward()
            optimizer.step()

    whole, _ = model_of([(6, 7), (5, 6)], **options)
    steps(whole, adam(whole), range(6))
    part, _ = model_of([(6, 7), (5, 6)], **options)
    optimizer = adam(part)
    steps(part, optimizer, range(stop))
    part.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 5)).double()
    again = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    optimizer = adam(again)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    steps(again, optimizer, range(stop, 6))
    before, after = whole.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter", "load_adapter without PeftModel"])
def test_every_way_of_loading_decomposes_nothing(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = TOYS["llama"]
    config = DisloraConfig(r=2, target_modules=["q_proj"], warmup_steps=1, task_type="CAUSAL_LM")
    model = peft.get_peft_model(toy.build(), config)
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, AdapterLayer)):
            layer.parameter("sigma", "default").add_(1.0)
    expected = toy.logits(model)
    model.save_pretrained(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("decomposed")

    monkeypatch.setattr(directions, "decompose_each", refuse)
    if how == "from_pretrained":
        loaded: Any = peft.PeftModel.from_pretrained(toy.build(), tmp_path)
    elif how == "load_adapter":
        loaded = peft.PeftModel.from_pretrained(toy.build(), tmp_path, adapter_name="first")
        loaded.load_adapter(tmp_path, "second")
        loaded.set_adapter("second")
    else:
        loaded = toy.build()
        loaded.load_adapter(str(tmp_path))
    torch.testing.assert_close(toy.logits(loaded), expected)


@pytest.mark.parametrize("first", ["forward", "forward of a copy", "saving", "merging", "param_groups"])
def test_a_saved_configuration_without_its_weights_starts_anew(first: str, tmp_path: Path) -> None:
    toy = TOYS["llama"]
    config = DisloraConfig(r=2, target_modules=["q_proj"], warmup_steps=1, task_type="CAUSAL_LM")
    fresh = peft.get_peft_model(toy.build(), config)
    fresh.save_pretrained(tmp_path)
    again: Any = DisloraConfig.from_pretrained(str(tmp_path))
    again.inference_mode = False
    model = peft.get_peft_model(toy.build(), again)
    if first == "forward of a copy":
        model = copy.deepcopy(model)
    if first.startswith("forward"):
        toy.logits(model)
    elif first == "saving":
        peft.get_peft_model_state_dict(model)
    elif first == "merging":
        model.merge_adapter()
        model.unmerge_adapter()
    else:
        dynalora.param_groups(model, lr=1e-3)
    state = model.state_dict()
    started = {name: tensor for name, tensor in fresh.state_dict().items() if "dislora_" in name}
    assert any(tensor.abs().sum() > 0 for name, tensor in started.items() if "_up" in name)
    for name, tensor in started.items():
        assert torch.equal(state[name], tensor), name


def test_loading_decomposes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = model_of([(6, 7)])
    train(model, 3)
    model.save_pretrained(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("decomposed")

    monkeypatch.setattr(directions, "decompose_each", refuse)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 6)).double()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    x = torch.randn(4, 7, dtype=torch.float64)
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(AssertionError, match="decomposed"):
        model_of([(6, 7)])


@pytest.mark.parametrize("weight_size", [0.02, 1.0, 30.0])
def test_a_matched_step_moves_the_function_like_loras(weight_size: float) -> None:
    """One step of Adam, whose every entry is the learning rate: how far each part moves the update."""
    out, inside, r, rate = 64, 48, 8, 1e-4
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(inside, out, bias=False)).double()
    base[0].weight.data *= weight_size
    config = DisloraConfig(r=r, target_modules=["0"], ortho_weight=0, tsd_count=0)
    model = peft.get_peft_model(base, config)
    layer = next(module for module in model.modules() if isinstance(module, AdapterLayer))
    start = tensors(layer)
    lora = dislora.LENGTH * rate * 2 / math.sqrt(3) * math.sqrt(out * r)
    sigma = float(start["sigma"].square().mean().sqrt())
    parameters = [p for p in model.parameters() if p.requires_grad]
    for role in ("up", "down"):
        parameter = layer.parameter(role, "default")
        parameter.grad = torch.randn_like(parameter)
    torch.optim.Adam(parameters, lr=rate, eps=1e-12).step()
    moved = float(layer.get_delta_weight("default").norm())
    fastest = dislora.FASTEST * rate * 1.5 * sigma * math.sqrt((out + inside) * r)
    if fastest < lora:
        assert moved == pytest.approx(fastest, rel=0.1)
    else:
        assert 2**-0.5 * 0.9 < moved / lora < 2**0.5 * 1.1  # to a power of two


def test_unmatched_steps_take_the_optimizers_rate() -> None:
    model, (layer,) = model_of([(6, 7)], match_step=False)
    rules = layer.drivers["default"].method.optimizer_overrides(layer.drivers["default"].config, layer, "default")
    assert {rule.lr_multiplier for rule in rules.values()} == {1.0}
    assert {group["lr"] for group in dynalora.param_groups(model, lr=0.5)} == {0.5}


def test_lost_orthogonality_is_said_when_logged() -> None:
    model, (layer,) = model_of([(6, 7)])
    layer.parameter("up", "default").data *= 4
    train(model, 1, lr=1e-6)
    with pytest.warns(UserWarning, match="lost their orthogonality.*match_step=True"):
        model_metrics(model)


def test_the_directions_are_listed_with_their_scores() -> None:
    model, (layer,) = model_of([(6, 7)])
    method = layer.drivers["default"].method
    assert method.decided({"layer": layer}, "default") == []
    train(model, 3)
    rows = method.decided({"layer": layer}, "default")
    assert [row["singular_value_index"] for row in rows] == tensors(layer)["tsd_index"].tolist()
    assert rows[0]["change_rate"] >= rows[1]["change_rate"] > 0
    assert all(row["module"] == "layer" for row in rows)


def test_weight_decay_leaves_the_factors_alone() -> None:
    model, _ = model_of([(6, 7)], ortho_weight=0, tsd_count=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5).step()
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


def test_the_authors_code_lets_factors_decay() -> None:
    for match in (False, True):
        model, (layer,) = model_of([(6, 7)], ortho_weight=0, tsd_count=0, decay_factors=True, match_step=match)
        parameters = [p for p in model.parameters() if p.requires_grad]
        before = layer.parameter("sigma", "default").detach().clone()
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5).step()
        torch.testing.assert_close(layer.parameter("sigma", "default").detach(), 0.95 * before)


@given(shape=shape, seed=st.integers(0, 99), count=st.integers(1, 3))
def test_the_authors_code_chooses_the_smallest_rates(shape: tuple[int, int], seed: int, count: int) -> None:
    model, (layer,) = model_of([shape], seed=seed, tsd_choice="smallest", tsd_init="sigma", tsd_count=count)
    train(model, 1)
    have = tensors(layer)
    assert not bool((have["tsd_index"] >= 0).any())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss_of(model, torch.Generator().manual_seed(2)).backward()
    optimizer.step()
    have = tensors(layer)
    residual = have["up"] * have["sigma"] @ have["down"]
    rates = reference.change_rates(layer.base_layer.weight, residual, 1e-12)
    smallest = rates.sort().values[: min(count, min(shape))]
    torch.testing.assert_close(have["tsd_rate"], smallest, atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(have["tsd_weight"], have["tsd_sigma"], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("warmup_steps", 0),
        ("warmup_fraction", 1.0),
        ("warmup_fraction", 0.0),
        ("tsd_count", -1),
        ("tsd_score", "both"),
        ("tsd_init", "one"),
        ("ortho_weight", -1.0),
        ("ortho_weight", "often"),
        ("ortho_reduction", "sum"),
        ("tsd_choice", "median"),
        ("decay_factors", 1),
        ("loss_smoothing", 1.0),
    ],
)
def test_bad_values_name_field_and_remedy(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field}"):
        DisloraConfig(**{field: value})


def test_half_precision_base_keeps_factors_in_full() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 10)).bfloat16()
    weight = base[0].weight.detach().float()
    model = peft.get_peft_model(base, DisloraConfig(r=3, target_modules=["0"]))
    layer = next(module for module in model.modules() if isinstance(module, AdapterLayer))
    up = layer.parameter("up", "default")
    assert up.dtype == torch.float32
    torch.testing.assert_close(up.t() @ up, torch.eye(3), atol=1e-5, rtol=0)
    _, sigma, _ = reference.decompose(weight)
    torch.testing.assert_close(layer.parameter("sigma", "default").double(), sigma[-3:], atol=1e-5, rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.isfinite(model(torch.randn(2, 12).bfloat16())).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_are_decomposed_as_they_act(bits: int) -> None:
    """The triplets are those of the weight that the quantised layer multiplies by, not of its packed numbers."""
    model = quantised_mlp(bits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        acting = (model.second(torch.eye(64))).detach().t()  # no bias
        model = peft.get_peft_model(model, DisloraConfig(r=3, target_modules=["second"]))
    layer = next(module for module in model.modules() if isinstance(module, AdapterLayer))
    have = tensors(layer)
    sigma = reference.decompose(acting)[1]
    size = float(sigma[0])
    torch.testing.assert_close(have["sigma"].double(), sigma[-3:], atol=2e-2 * size, rtol=0)
    # The layer multiplies within its own rounding; 8 bits quantise the input as well.
    moved = (have["up"].t() @ acting @ have["down"].t()).double()
    torch.testing.assert_close(moved, torch.diag(have["sigma"]).double(), atol=2e-2 * size, rtol=0)
    full = reference.decompose(layer.base_matrix())[1]
    torch.testing.assert_close(have["sigma"].double(), full[-3:], atol=1e-5 * size, rtol=0)
