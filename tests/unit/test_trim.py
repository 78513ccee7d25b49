"""Scaling updates down: exact in the weights, the curve and the bound, and what is saved."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

import dynalora
from dynalora.adapter.layer import adapter_layers
from dynalora.errors import ConfigError, UnsupportedError
from dynalora.forgetting.retention import retention
from dynalora.forgetting.texts import own_text
from dynalora.forgetting.trim import scale_update, trim, trim_curve

from . import tiny

CONFIGS = {
    "dira": dynalora.DiraConfig(r=3),
    "disel": dynalora.DiselConfig(r=3, gate_bias_init=0.5, alpha_pattern={"q_proj": 5.0}),
    "dislora": dynalora.DisloraConfig(r=3, tsd_count=2, warmup_steps=1, total_steps=9),
    "pedyra": dynalora.PedyraConfig(r=3, total_steps=90),
    "pedyra-dora": dynalora.PedyraConfig(r=3, use_dora=True, total_steps=90),
    "pedyra-dora-pissa": dynalora.PedyraConfig(r=3, use_dora=True, init_weights="pissa", total_steps=90),
    "lora": peft.LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM"),
}
every_config = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(scope="module")
def words() -> Any:
    return tiny.tokenizer()


def adapted(words: Any, name: str, strength: float = 0.1) -> Any:
    config = copy.deepcopy(CONFIGS[name])
    config.target_modules = {"q_proj", "down_proj", "v_proj"}
    model = peft.get_peft_model(tiny.model(len(words)).double(), config)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(strength * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.eval()


def outputs(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each adapted layer makes of a fixed input."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)
    }
    with torch.no_grad():
        return {name: layer(x[:, : layer.in_features]) for name, layer in layers.items()}


@every_config
@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0])
def test_a_scaled_update_is_that_part_of_the_change(words: Any, name: str, factor: float) -> None:
    model = adapted(words, name)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tuned = outputs(model, x)
    with model.disable_adapter():
        base = outputs(model, x)
    scale_update(model, factor)
    for layer, result in outputs(model, x).items():
        expected = base[layer] + factor * (tuned[layer] - base[layer])
        torch.testing.assert_close(result, expected, atol=1e-10, rtol=1e-9)


@every_config
def test_what_is_saved_is_scaled_and_the_users_configuration_is_not(words: Any, name: str, tmp_path: Any) -> None:
    model = adapted(words, name)
    given = model.peft_config["default"]
    before = dict(given.to_dict())
    scale_update(model, 0.5)
    assert given.to_dict() == before
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.model(len(words)).double(), tmp_path).eval()
    ids = torch.tensor([[4, 8, 15, 16, 23, 42]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


@every_config
def test_the_curve_falls_and_leaves_the_adapter_as_it_was(words: Any, name: str) -> None:
    model = adapted(words, name, 0.3)
    text = own_text(model, words, texts=6, tokens=8, cache=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ids = torch.tensor([[4, 8, 15, 16, 23, 42]])
    with torch.no_grad():
        logits = model(ids).logits
    calls = iter((0.3, 0.4, 0.5))
    points = trim_curve(model, text, factors=(1.0, 0.5, 0.0), loss=lambda: next(calls))
    assert [point.loss for point in points] == [0.3, 0.4, 0.5]
    assert points[0].kl == pytest.approx(retention(model, text).kl, rel=1e-6)
    assert points[0].kl > points[1].kl > points[2].kl >= 0
    assert points[2].kl < 1e-9
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)


def test_trimming_ends_just_within_the_bound(words: Any) -> None:
    model = adapted(words, "disel", 0.3)
    text = own_text(model, words, texts=6, tokens=8, cache=False)
    bound = 0.5 * retention(model, text).kl
    done = trim(model, text, max_kl=bound)
    kl = retention(model, text).kl
    assert 0.95 * bound < kl <= bound
    assert done.taken.kl == pytest.approx(kl, rel=1e-6)
    assert [point.factor for point in done.points] == sorted((p.factor for p in done.points), reverse=True)
    assert model.peft_config["default"].alpha == pytest.approx(6.0 * done.factor)


def test_an_adapter_within_the_bound_is_left_alone(words: Any) -> None:
    model = adapted(words, "dira", 0.3)
    text = own_text(model, words, texts=4, tokens=6, cache=False)
    assert trim(model, text, max_kl=2 * retention(model, text).kl).factor == 1.0


def test_what_cannot_be_scaled_says_so(words: Any) -> None:
    model = peft.get_peft_model(tiny.model(len(words)), peft.IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedError, match="IA3Config"):
        scale_update(model, 0.5)
    dora = peft.get_peft_model(
        tiny.model(len(words)), peft.LoraConfig(use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    with pytest.raises(UnsupportedError, match="norms do not scale"):
        scale_update(dora, 0.5)
    ours = adapted(words, "dira")
    text = own_text(ours, words, texts=2, tokens=3, cache=False)
    for bound in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="max_kl"):
            trim(ours, text, max_kl=bound)
    with pytest.raises(ConfigError, match="factors holds -1"):
        trim_curve(ours, text, factors=[-1])
    with pytest.raises(ConfigError, match="no adapter 'other'"):
        scale_update(ours, 0.5, "other")
    assert all(layer.scaling["default"] == 1.0 for layer in adapter_layers(ours, "default").values())
