"""Budgets: counts without weights against adapters that are really there, and ranks against every other rank."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynalora.adapter.config import AdapterConfig
from dynalora.errors import ConfigError
from dynalora.lab.budgets import match_parameters, trainable_parameters
from dynalora.lab.configs import adapter_config, compared_names, method_names
from tests.toys import assert_same_state, gpt2, snapshot
from tests.unit import tiny

TARGETS = ["q_proj", "v_proj", "down_proj"]


def counted(model: Any, config: Any) -> int:
    """What PEFT says of an adapter on a model with weights; of one that grows, at its end."""
    config = config.at_largest() if isinstance(config, AdapterConfig) else config
    adapted = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
    return int(adapted.get_nb_trainable_parameters()[0])


def meta(model: Any) -> Any:
    return copy.deepcopy(model).to("meta")


VARIANTS = [
    *((name, {}) for name in method_names()),
    ("disel", {"gate_bottleneck": 4}),
    ("dira", {"gates": True, "bias": "dira_only"}),
    ("dislora", {"tsd_count": 2}),
    ("pedyra", {"init_weights": "pissa"}),
    ("pedyra", {"use_dora": True}),
    ("lora", {"modules_to_save": ["lm_head"]}),
    ("lora", {"init_lora_weights": "pissa_niter_2"}),
    ("lora", {"init_lora_weights": "olora"}),
    ("randlora", {"sparse": True}),
    ("miss", {"init_weights": "mini", "mini_r": 2}),
    ("p-tuning", {"encoder_reparameterization_type": "LSTM"}),
]


@pytest.mark.parametrize(("method", "options"), VARIANTS)
@settings(max_examples=3, deadline=None)
@given(r=st.integers(1, 12), targets=st.sampled_from([["q_proj"], TARGETS, "all-linear"]))
def test_the_count_is_what_peft_says(method: str, options: dict[str, Any], r: int, targets: Any) -> None:
    model = tiny.model(64)
    config = adapter_config(method, r=r, target_modules=targets, options=options)
    expected = counted(model, config)
    assert trainable_parameters(model, config) == expected
    assert trainable_parameters(meta(model), config) == expected


def test_methods_by_file_and_other_models_count_too() -> None:
    model = tiny.model(64)
    for config in (
        peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
        peft.LoHaConfig(r=3, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
        peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ):
        assert trainable_parameters(model, config) == counted(model, config)
    for method in ("lora", "disel", "dislora", "p-tuning"):
        config = adapter_config(method, r=3)
        assert trainable_parameters(gpt2(), config) == counted(gpt2(), config)


def test_full_fine_tuning_trains_everything_once() -> None:
    model = tiny.model(64)
    assert trainable_parameters(model, None) == sum(p.numel() for p in model.parameters())
    tied = gpt2()  # whose head is its embedding
    assert trainable_parameters(tied, None) == sum(p.numel() for p in tied.parameters())
    assert trainable_parameters(tied.requires_grad_(False), None) == sum(p.numel() for p in tied.parameters())


@pytest.mark.parametrize("method", ["lora", "dislora", "randlora", "p-tuning", "disel"])
def test_nothing_is_changed(method: str) -> None:
    model = tiny.model(64)
    model.lm_head.requires_grad_(False)
    before, names = snapshot(model), [name for name, _ in model.named_modules()]
    config = adapter_config(method, r=2)
    said = config.to_dict()
    state = torch.get_rng_state()
    trainable_parameters(model, config)
    match_parameters(lambda r, pattern: adapter_config(method, r=r), model, 3000)
    assert_same_state(model, before)
    assert [name for name, _ in model.named_modules()] == names
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert not hasattr(model, "peft_config")
    assert config.to_dict() == said
    assert torch.equal(torch.get_rng_state(), state)


# --- matching -----------------------------------------------------------------------------------------------


def maker(method: str, targets: Any = "all-linear", **options: Any) -> Any:
    def make(r: int, pattern: dict[str, int] | None) -> Any:
        chosen = {**options, "rank_pattern": pattern} if pattern else options
        return adapter_config(method, r=r, target_modules=targets, options=chosen)

    return make


@pytest.mark.parametrize("method", method_names())
@settings(max_examples=3, deadline=None)
@given(reference=st.integers(1, 10))
def test_a_match_is_what_it_says(method: str, reference: int) -> None:
    model = tiny.model(64)
    target = counted(model, adapter_config("lora", r=reference))
    found = match_parameters(maker(method), meta(model), target)
    assert found.parameters == counted(model, found.config)
    assert found.difference == pytest.approx((found.parameters - target) / target)
    assert found.within == (abs(found.difference) <= 0.02)
    # No whole rank is nearer.
    for r in range(max(1, found.r - 1), found.r + 2):
        assert abs(counted(model, adapter_config(method, r=r)) - target) >= abs(found.parameters - target)
    if method in ("lora", "rslora", "lora+", "pissa"):
        assert (found.r, found.mixed, found.difference) == (reference, False, 0.0)


@pytest.mark.parametrize("method", ["dora", "disel", "dira", "dislora", "pedyra", "lora+"])
def test_neighbouring_ranks_are_mixed_where_no_whole_rank_will_do(method: str) -> None:
    model = tiny.model(64, layers=6)
    make = maker(method)
    low, high = (counted(model, make(r, None)) for r in (3, 4))
    for share in (0.25, 0.5, 0.7):
        target = round(low + share * (high - low))
        found = match_parameters(make, model, target, tolerance=0.005)
        assert (found.r, found.mixed, found.within) == (3, True, True)
        adapted = peft.get_peft_model(copy.deepcopy(model), found.config)
        assert adapted.get_nb_trainable_parameters()[0] == found.parameters
        assert set(found.config.rank_pattern.values()) == {4}
        layers = [int(re.search(r"layers\\\.(\d+)", key)[1]) for key in found.config.rank_pattern]  # type: ignore[index]
        per_third = [sum(2 * third <= layer < 2 * third + 2 for layer in layers) for third in range(3)]
        assert max(per_third) - min(per_third) <= 3  # of 7 modules in each of 2 layers
        for kind in ("q_proj", "down_proj", "o_proj"):
            of_kind = sum(key.endswith(kind) for key in found.config.rank_pattern)
            assert abs(of_kind - share * 6) <= 2


def test_the_scaling_of_a_module_is_that_of_its_rank() -> None:
    model = tiny.model(64, layers=6)
    target = round(3.5 * counted(model, adapter_config("lora", r=1)))

    @functools.cache
    def alone(method: str, rank: int) -> float:
        adapted = peft.get_peft_model(tiny.model(64), adapter_config(method, r=rank))
        layers = [m for m in adapted.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]
        return float(layers[1].scaling["default"])  # type: ignore[union-attr]

    for method in ("lora", "disel", "rslora"):
        found = match_parameters(maker(method), model, target if method != "disel" else round(1.4 * target), 0.01)
        assert found.mixed
        adapted = peft.get_peft_model(copy.deepcopy(model), found.config)
        for module in adapted.modules():
            if not isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                continue
            rank: Any = getattr(module, "r", None) or getattr(module, "ranks", None)
            assert module.scaling["default"] == pytest.approx(alone(method, rank["default"]))
    # An alpha that the user chose stays.

    def make(r: int, pattern: dict[str, int] | None) -> Any:
        return adapter_config("lora", r=r, alpha=16, options={"rank_pattern": pattern or {}})

    fixed = match_parameters(make, model, target, 0.01)
    assert fixed.mixed
    assert not fixed.config.alpha_pattern  # type: ignore[attr-defined]


def test_what_cannot_be_matched_says_so() -> None:
    model = tiny.model(64)
    encoder = counted(model, adapter_config("p-tuning", r=1))
    few = match_parameters(maker("p-tuning"), model, encoder // 10)
    assert (few.r, few.mixed, few.within, few.parameters) == (1, False, False, encoder)
    between = match_parameters(lambda r, _: adapter_config("adalora", r=r), model, 2500, 0.001)
    assert not between.mixed
    assert not between.within
    many = match_parameters(maker("dislora", ["k_proj"]), model, 10**6)
    assert (many.r, many.within) == (16, False)  # as many as the matrix has singular values
    huge = match_parameters(maker("miss"), model, 10**7)
    assert (huge.r, huge.within) == (32, False)
    ia3 = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    rankless = match_parameters(lambda r, _: ia3, model, 64)
    assert (rankless.parameters, rankless.within) == (64, True)


def test_what_is_searched_need_not_be_a_rank() -> None:
    model = tiny.model(64)

    def make(r: int, pattern: dict[str, int] | None) -> Any:
        return adapter_config("p-tuning", r=4, options={"encoder_hidden_size": r})

    target = counted(model, make(37, None))  # which grows with the square of the encoder's width
    found = match_parameters(make, model, target)
    assert (found.r, found.difference) == (37, 0.0)


def test_randlora_falls_with_its_rank() -> None:
    model = tiny.model(64)
    counts = {r: counted(model, adapter_config("randlora", r=r)) for r in range(1, 40)}
    for target in (counts[3], counts[10], 2 * counts[1], 10):
        found = match_parameters(maker("randlora"), model, target)
        assert abs(found.parameters - target) <= 1.05 * min(abs(c - target) for c in counts.values()) + 1
        assert found.within == (target in (counts[3], counts[10]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target": 0}, "target is 0; give a number of parameters, at least 1"),
        ({"target": 10, "tolerance": -1.0}, r"tolerance is -1\.0; give a part of the target"),
        ({"target": 10, "make": maker("lora", nonsense=1)}, "No rank can be matched: Method 'lora' has no option"),
    ],
)
def test_wrong_requests_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        match_parameters(**{"make": maker("lora"), "model": tiny.model(64), **given})


def test_every_method_to_compare_with_is_counted_here() -> None:
    assert {*compared_names()} == {name for name, _ in VARIANTS} | {"full"}


def test_ranks_that_grow_are_matched_at_what_they_grow_to() -> None:
    model = tiny.model(64)
    make = maker("increlora", TARGETS, target_rank=6, advance_learning=True)
    count = trainable_parameters(model, make(2, None))
    fixed = trainable_parameters(model, adapter_config("lora", r=6, target_modules=TARGETS))
    layers = sum(1 for name, _ in model.named_modules() if name.rpartition(".")[2] in TARGETS)
    assert count == fixed + 6 * layers  # e
