"""MiLoRA, SORSA and LoRA-Dash against their float64 references."""

from __future__ import annotations

import itertools
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dynalora
from dynalora import LoraDashConfig, MiloraConfig, SorsaConfig
from dynalora.adapter.layer import AdapterLayer
from dynalora.errors import ConfigError, DynaloraError
from tests.reference import starts as reference

shape = st.tuples(st.integers(2, 9), st.integers(2, 9))


def model_of(config: type, shapes: list[tuple[int, int]], *, seed: int = 0, **options: Any) -> tuple[Any, list[Any]]:
    """Linear layers in a row (out, in), float64, adapted: (PEFT model, layers)."""
    torch.manual_seed(seed)
    base = nn.Sequential(*(nn.Linear(inside, out) for out, inside in shapes)).double()
    names = [str(index) for index in range(len(shapes))]
    model = peft.get_peft_model(base, config(**{"r": 2, "alpha": 3, "target_modules": names, **options}))
    return model, [module for module in model.modules() if isinstance(module, AdapterLayer)]


def loss_of(model: Any, layers: list[Any], seed: int) -> Tensor:
    x = torch.randn(5, layers[0].in_features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (model(x) - 1).square().mean()


def train(model: Any, layers: list[Any], steps: int, lr: float = 0.05) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, layers, step).backward()
        optimizer.step()


def product(layer: Any) -> Tensor:
    """The trained components alone, (out, in)."""
    up = layer.parameter("up", "default").detach()
    if "sigma" in layer.parameter_roles:
        up = up * layer.parameter("sigma", "default").detach()
    return up @ layer.parameter("down", "default").detach()


@given(shape=shape, r=st.integers(1, 2), alpha=st.sampled_from([0.5, 3.0]), seed=st.integers(0, 99))
def test_milora_starts_at_the_smallest_triplets(shape: tuple[int, int], r: int, alpha: float, seed: int) -> None:
    model, (layer,) = model_of(MiloraConfig, [shape], r=r, alpha=alpha, seed=seed)
    weight, s = layer.base_layer.weight.detach(), alpha / r
    torch.testing.assert_close(product(layer), reference.milora_start(weight, r, s), atol=1e-9, rtol=1e-9)
    up, down = layer.parameter("up", "default"), layer.parameter("down", "default")
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(layer.get_delta_weight("default"), torch.zeros_like(weight), atol=1e-12, rtol=0)
    train(model, [layer], 3)
    moved = s * (product(layer) - reference.milora_start(weight, r, s))
    torch.testing.assert_close(layer.get_delta_weight("default").detach(), moved, atol=1e-9, rtol=1e-9)
    x = torch.randn(3, shape[1], dtype=torch.float64)
    expected = x @ (weight + moved).t() + layer.base_layer.bias
    torch.testing.assert_close(model(x), expected, atol=1e-9, rtol=1e-9)


@given(shape=shape, r=st.integers(1, 2), alpha=st.sampled_from([0.5, 3.0]), seed=st.integers(0, 99))
def test_sorsa_starts_at_the_largest_triplets(shape: tuple[int, int], r: int, alpha: float, seed: int) -> None:
    model, (layer,) = model_of(SorsaConfig, [shape], r=r, alpha=alpha, seed=seed)
    weight, s = layer.base_layer.weight.detach(), alpha / r
    torch.testing.assert_close(product(layer), reference.sorsa_start(weight, r), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(layer.get_delta_weight("default"), torch.zeros_like(weight), atol=1e-12, rtol=0)
    train(model, [layer], 3)
    moved = s * (product(layer) - reference.sorsa_start(weight, r))
    x = torch.randn(3, shape[1], dtype=torch.float64)
    expected = x @ (weight + moved).t() + layer.base_layer.bias
    torch.testing.assert_close(model(x), expected, atol=1e-9, rtol=1e-9)


@given(sizes=st.lists(st.integers(2, 6), min_size=3, max_size=4), seed=st.integers(0, 99))
def test_sorsa_adds_its_regularisers_gradient(sizes: list[int], seed: int) -> None:
    shapes = [(out, inside) for inside, out in itertools.pairwise(sizes)]
    model, layers = model_of(SorsaConfig, shapes, seed=seed, ortho_weight=0.7)
    for layer in layers:  # away from orthonormal factors
        for parameter in layer.adapter_parameters("default").values():
            parameter.data += 0.2 * torch.randn_like(parameter)
    parameters = [p for p in model.parameters() if p.requires_grad]
    pairs = [(layer.parameter("up", "default"), layer.parameter("down", "default")) for layer in layers]
    regulariser = reference.sorsa_regulariser(pairs)
    wanted = torch.autograd.grad(loss_of(model, layers, 0) + 0.7 * regulariser, parameters)
    (report,) = dynalora.state_report(model)
    assert report.details["ortho_loss_now"] == pytest.approx(float(regulariser.detach()), rel=1e-9)
    before = [p.detach().clone() for p in parameters]
    train(model, layers, 1, lr=1.0)
    for parameter, old, gradient in zip(parameters, before, wanted, strict=True):
        torch.testing.assert_close(old - parameter.detach(), gradient, atol=1e-10, rtol=1e-8)


def test_sorsas_regulariser_is_still_at_the_start() -> None:
    """The vectors are orthonormal to rounding, of which a norm that is not squared would make a full gradient."""
    model, (layer,) = model_of(SorsaConfig, [(9, 7)], ortho_weight=1e3)
    model.float()
    before = layer.parameter("up", "default").detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    (0.0 * model(torch.randn(2, 7)).sum()).backward()
    optimizer.step()
    assert torch.equal(layer.parameter("up", "default"), before)


@given(shape=shape, seed=st.integers(0, 99))
def test_loradash_chooses_the_pairs_that_changed_most(shape: tuple[int, int], seed: int) -> None:
    model, (layer,) = model_of(LoraDashConfig, [shape], seed=seed, warmup_steps=3, tsd_count=2)
    weight = layer.base_layer.weight.detach()
    train(model, [layer], 2)
    assert not layer.has_directions("default")
    assert not layer.parameter("tsd_weight", "default").any()
    train(model, [layer], 1)
    delta = layer.get_delta_weight("default").detach()
    torch.testing.assert_close(delta, 1.5 * product(layer), atol=1e-12, rtol=0)  # the function does not jump
    rates = reference.change_rates(weight, delta)
    best = torch.topk(rates, 2)
    torch.testing.assert_close(layer.buffer("tsd_rate", "default"), best.values, atol=1e-9, rtol=1e-6)
    chosen = layer.buffer("tsd_index", "default").tolist()
    torch.testing.assert_close(rates[chosen], best.values, atol=1e-9, rtol=1e-6)
    train(model, [layer], 2)
    changes = layer.parameter("tsd_weight", "default").detach()
    assert changes.all()
    wanted = reference.dash_update(weight, 1.5 * product(layer), chosen, changes, 1.5)
    torch.testing.assert_close(layer.get_delta_weight("default").detach(), wanted, atol=1e-9, rtol=1e-8)


def test_loradash_warns_of_a_warm_up_beyond_the_run() -> None:
    model, layers = model_of(LoraDashConfig, [(4, 5)], total_steps=3)
    with pytest.warns(UserWarning, match=r"LoraDashConfig\(warmup_steps=100\).*only 3.*lower warmup_steps"):
        train(model, layers, 1)


@pytest.mark.parametrize("config", [MiloraConfig, SorsaConfig])
def test_components_that_cancel_a_start_are_not_removed(config: type) -> None:
    model, layers = model_of(config, [(8, 7), (6, 8)])
    train(model, layers, 2)
    with pytest.raises(dynalora.errors.DynaloraError, match="frozen counterpart"):
        dynalora.compact(model)
    with pytest.raises(ConfigError, match=r"r=7 is more than the 6 singular values"):
        model_of(config, [(8, 7), (6, 8)], r=7)


@pytest.mark.parametrize("config", [MiloraConfig, SorsaConfig])
def test_weight_decay_leaves_the_base_weights_directions_alone(config: type) -> None:
    model, (layer,) = model_of(config, [(8, 7)])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    (0.0 * model(torch.randn(2, 7).double()).sum()).backward()
    optimizer.step()
    delta = layer.get_delta_weight("default").detach()
    torch.testing.assert_close(delta, torch.zeros_like(delta), atol=1e-9, rtol=0)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="ortho_weight"):
        SorsaConfig(ortho_weight=-1)
    with pytest.raises(ConfigError, match="warmup_steps"):
        LoraDashConfig(warmup_steps=0)
    with pytest.raises(ConfigError, match="tsd_count"):
        LoraDashConfig(tsd_count=0)


@pytest.mark.parametrize("config", [SorsaConfig, dynalora.DisloraConfig])
def test_a_start_that_fails_leaves_no_adapter_behind(config: type) -> None:
    base = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 6))
    model: Any = peft.get_peft_model(base, config(r=2, total_steps=9, target_modules=["0"]))
    with torch.no_grad():
        base[1].weight[0, 0] = float("nan")
    names = list(model.state_dict())
    with pytest.raises(DynaloraError, match="not finite"):  # the first layer has begun by then
        model.add_adapter("other", config(r=2, total_steps=9, target_modules=["0", "1"]))
    assert list(model.state_dict()) == names
    assert list(model.peft_config) == ["default"]
