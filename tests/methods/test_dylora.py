"""DyLoRA against its equation: drawn prefixes, their gradients, and cutting to a rank."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dynalora import DyloraConfig
from dynalora.adapter.layer import adapter_layers
from dynalora.errors import ConfigError
from dynalora.methods.dylora import cut_to_rank
from tests.reference import dylora as reference


def layered(r: int, alpha: float = 3.0, features: tuple[int, int] = (5, 4), **options: object) -> nn.Module:
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(*features, bias=False)).double()
    config = DyloraConfig(r=r, alpha=alpha, target_modules=["0"], init_weights=False, **options)  # type: ignore[arg-type]
    return peft.get_peft_model(base, config, autocast_adapter_dtype=False).double()  # type: ignore[arg-type]


def only_layer(model: nn.Module) -> object:
    (layer,) = adapter_layers(model).values()
    return layer


@settings(max_examples=15, deadline=None)
@given(
    r=st.integers(1, 6),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    seed=st.integers(0, 99),
    frozen=st.booleans(),
)
def test_every_step_is_the_papers(r: int, sizes: tuple[int, int], seed: int, frozen: bool) -> None:
    model = layered(r, features=sizes, seed=seed, variant="frozen" if frozen else "full").train()
    layer = only_layer(model)
    down, up = (layer.parameter(role, "default") for role in ("down", "up"))
    optimizer = torch.optim.SGD([down, up], lr=0.1)
    x = torch.randn(3, sizes[0], dtype=torch.float64)
    for step in range(4):
        b = layer.drivers["default"].config.prefix(step, r)
        mirrors = [tensor.detach().clone().requires_grad_() for tensor in (down, up)]
        expected = reference.forward(x, layer.base_layer.weight, *mirrors, alpha=3.0, b=b, frozen=frozen)
        expected.square().sum().backward()
        optimizer.zero_grad()
        output = model(x)
        torch.testing.assert_close(output, expected)
        output.square().sum().backward()
        optimizer.step()
        for parameter, mirror in zip((down, up), mirrors, strict=True):
            torch.testing.assert_close(parameter.detach(), mirror.detach() - 0.1 * mirror.grad)


def test_prefixes_take_every_rank_from_the_smallest_on() -> None:
    config = DyloraConfig(r=6, min_rank=3)
    drawn = [config.prefix(step, 6) for step in range(400)]
    assert set(drawn) == {3, 4, 5, 6}
    assert min(drawn.count(b) for b in range(3, 7)) > 60
    assert {config.prefix(step, 2) for step in range(20)} == {2}
    assert [DyloraConfig(r=6, min_rank=3, seed=1).prefix(step, 6) for step in range(400)] != drawn


@pytest.mark.parametrize("rslora", [False, True])
def test_cut_to_a_rank_is_the_prefix_as_it_trained(tmp_path: Path, rslora: bool) -> None:
    model = layered(5, min_rank=2, use_rslora=rslora)
    layer = only_layer(model)
    x = torch.randn(3, 5, dtype=torch.float64)
    layer.buffer("prefix", "default").fill_(2)
    expected = model.train()(x).detach()
    cut_to_rank(model, 2)
    assert layer.rank("default") == 2
    torch.testing.assert_close(model.eval()(x), expected)
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(5, 4, bias=False)).double()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(loaded.eval()(x), expected)
    with pytest.raises(ConfigError, match="rank=0"):
        cut_to_rank(model, 0)
    with pytest.raises(ConfigError, match="named 'other'"):
        cut_to_rank(model, 1, "other")


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="min_rank must be an integer from 1 to r=4, got 5"):
        DyloraConfig(r=4, min_rank=5)
    with pytest.raises(ConfigError, match="variant"):
        DyloraConfig(variant="cold")  # type: ignore[arg-type]
