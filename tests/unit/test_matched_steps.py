"""Steps of `up` that follow what a diagonal lets through: what is measured, when, and that the adapter keeps it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dynalora
from dynalora import DiraConfig, DiselConfig, PedyraConfig
from dynalora.adapter.layer import adapter_layers
from dynalora.adapter.matching import MOST, due, let_through, power
from dynalora.adapter.method import Method
from dynalora.errors import CheckpointError
from tests.driver.loops import trainable
from tests.toys import TOYS

LLAMA = TOYS["llama"]
GATED = {
    "disel": (DiselConfig, {}),
    "dira": (DiraConfig, {"gates": True, "penalty_weight": 0.0}),
    "pedyra": (PedyraConfig, {"gates": True, "adjust_start": 2, "adjust_interval": 3, "adjust_end": 9}),
}

FOLLOWING = {
    **GATED,
    "pedyra without gates": (PedyraConfig, {"adjust_start": 2, "adjust_interval": 3, "adjust_end": 9}),
}


def adapted(method: str = "disel", *, seed: int = 0, **options: Any) -> Any:
    config, usual = FOLLOWING[method]
    torch.manual_seed(seed)
    settings = {"r": 3, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", "total_steps": 12}
    return peft.get_peft_model(LLAMA.build(), config(**{**settings, **usual, **options}))


def layers_of(model: Any) -> list[Any]:
    return list(adapter_layers(model).values())


def multiples(model: Any) -> list[float]:
    """The multiple of the learning rate with which every layer's `up` steps now."""
    rules = (layer.matched_rules("default") for layer in layers_of(model))
    return [rule["up"].lr_multiplier for rule in rules]


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int, parts: int = 1) -> None:
    optimizer.zero_grad()
    for part in range(parts):
        (LLAMA.loss(model.train(), seed=seed + 100 * part) / parts).backward()
    optimizer.step()


# --- what is measured ----------------------------------------------------------------------------------------


def test_steps_that_are_measured() -> None:
    assert [n for n in range(1, 70) if due(n)] == [
        *range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64,
    ]  # fmt: skip
    assert sum(due(n) for n in range(1, 10_001)) <= 50


@given(passed=st.floats(0, 1e6), whole=st.floats(1e-6, 1e6))
def test_the_power_is_the_next_one_within_bounds(passed: float, whole: float) -> None:
    found = power(passed, whole)
    assert found is not None
    choices = range(-MOST, MOST + 1)
    wanted = math.log(math.sqrt(whole / passed)) if passed and whole / passed < math.inf else math.inf
    nearest = min(choices, key=lambda k: abs(k / 2 * math.log(2) - min(wanted, 1e9)))
    assert found == nearest or abs(wanted - (found + nearest) / 4 * math.log(2)) < 1e-9  # halfway between two


@pytest.mark.parametrize("sums", [(0.0, 0.0), (math.nan, 1.0), (1.0, math.inf), (math.inf, math.inf)])
def test_nothing_follows_from_no_numbers(sums: tuple[float, float]) -> None:
    assert power(*sums) is None


@pytest.mark.parametrize("bottleneck", [None, 2])
@pytest.mark.parametrize("parts", [1, 3])
def test_rates_are_those_of_what_the_steps_own_passes_let_through(parts: int, bottleneck: int | None) -> None:
    """By hand in float64, from the inputs that the layer got: over all micro-batches, and nothing else."""
    model = adapted(gate_bias_init=-1.0, init_weights=False, gate_bottleneck=bottleneck, r=5).double()
    optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
    layer = layers_of(model)[3]
    inputs: list[Tensor] = []
    layer.register_forward_pre_hook(lambda module, given: inputs.append(given[0].detach()))
    with torch.no_grad():
        LLAMA.loss(model.eval(), seed=77)  # a validation pass does not count
    for seed in range(3):
        role = {name: p.detach().clone() for name, p in layer.adapter_parameters("default").items()}
        inputs.clear()
        step(model, optimizer, seed, parts)
        assert len(inputs) == parts
        x = torch.cat([one.flatten(0, -2) for one in inputs])
        weight = role["gate_out"] @ role["gate_in"] if bottleneck else role["gate_weight"]
        h = x @ role["down"].t()
        openness = ((torch.sigmoid(x @ weight.t() + role["gate_bias"]) * h).square().sum() / h.square().sum()).sqrt()
        assert multiples(model)[3] == 2 ** (round(2 * math.log2(1 / float(openness))) / 2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_passes_repeated_by_gradient_checkpointing_do_not_count(reentrant: bool) -> None:
    sums = []
    for checkpointing in (False, True):
        model = adapted(init_weights=False)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        LLAMA.loss(model.train(), seed=1).backward()
        sums.append(torch.stack([layer.matched["default"].sums.counted for layer in layers_of(model)]))
    torch.testing.assert_close(*sums)


@pytest.mark.parametrize("method", GATED)
def test_rates_fall_as_gates_open(method: str) -> None:
    """And whatever the method, a step of `up` is as long as its layer's multiple says."""
    model = adapted(method, init_weights=True)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
    step(model, optimizer, 0)
    closed = multiples(model)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.parameter("gate_bias", "default").fill_(9.0)
            if method == "pedyra":
                layer.parameter("e", "default").fill_(1.0)
    before = [layer.parameter("up", "default").detach().clone() for layer in layers_of(model)]
    step(model, optimizer, 1)
    assert all(now < then / 8 for now, then in zip(multiples(model), closed, strict=True))
    if method == "disel":
        assert multiples(model) == [1.0] * 4
        for layer, old in zip(layers_of(model), before, strict=True):
            up = layer.parameter("up", "default")
            torch.testing.assert_close(up.detach(), old - 1e-3 * up.grad)


@pytest.mark.parametrize("method", GATED)
def test_a_method_need_not_know_of_its_gates(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does nothing around steps has gates with their own rates, and `up` follows them."""
    model = adapted(method)
    driver = layers_of(model)[0].drivers["default"]
    for hook in ("before_step", "after_step", "optimizer_overrides"):
        monkeypatch.setattr(type(driver.method), hook, getattr(Method, hook))
    step(model, torch.optim.SGD(trainable(model), lr=1e-3), 0)
    measured = multiples(model)
    for layer, multiple in zip(layers_of(model), measured, strict=True):
        assert layer.matched["default"].measuring
        rules = driver.optimizer_overrides(layer)
        assert rules["up"].lr_multiplier == multiple
        assert (rules["gate_bias"].lr_multiplier, rules["gate_bias"].weight_decay) == (5.0, 0.0)


def test_without_gates_rates_are_those_of_the_diagonal_that_trains() -> None:
    """2 / (√3·s·ρ) with ρ the root mean square of e at the step's forward passes, from 8 / s up."""
    model = adapted("pedyra without gates", r=4, alpha=8, adjust_start=100, adjust_end=100, total_steps=200)
    optimizer = torch.optim.Adam(trainable(model), lr=1e-3)
    for number in range(1, 13):
        before = [layer.parameter("e", "default").detach().double() for layer in layers_of(model)]
        step(model, optimizer, number)
        if due(number):
            sizes = [float(e.square().mean().sqrt()) for e in before]
        for size, multiple in zip(sizes, multiples(model), strict=True):
            wanted = max(8 / 2, 2 / math.sqrt(3) / 2 * min(1 / size if size else math.inf, 32.0))
            assert wanted / 2**0.251 < multiple < wanted * 2**0.251
    with torch.no_grad():
        for layer in layers_of(model):
            layer.parameter("e", "default").fill_(3.0)
    step(model, optimizer, 0)
    step(model, optimizer, 1)
    assert multiples(model) == [4.0] * 4


def test_components_in_reserve_and_frozen_ones_do_not_count() -> None:
    """Room for ranks to come is zero, and PiSSA's start stands beside with ones."""
    for options in ({"max_rank": 6}, {"init_weights": "pissa"}):
        model = adapted("pedyra without gates", **options)
        with torch.no_grad():
            for layer in layers_of(model):
                layer.used("e", "default").fill_(0.05)
            for row in let_through(layers_of(model), "default"):
                assert row is not None
                assert row.tolist() == [pytest.approx(3 * 0.05**2), 3]


def test_a_step_of_the_directions_is_as_long_as_loras() -> None:
    """The change of ΔW by the first step that can turn `up`, in both with Adam at one rate."""
    moved = []
    for config in (peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"]), None):
        torch.manual_seed(0)
        model: Any = adapted("pedyra without gates") if config is None else peft.get_peft_model(LLAMA.build(), config)
        if config is None:
            for layer in layers_of(model):
                layer.parameter("e", "default").data.fill_(0.04)
        kinds = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
        before = [module.get_delta_weight("default").detach() for module in kinds.values()]
        held = {
            name: p.detach().clone()
            for name, p in model.named_parameters()
            if not any(u in name for u in ("_up", "lora_B"))
        }
        step(model, torch.optim.Adam(trainable(model), lr=1e-4), 0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in held:
                    parameter.copy_(held[name])
        changes = [m.get_delta_weight("default") - old for m, old in zip(kinds.values(), before, strict=True)]
        moved.append([float(change.detach().norm()) for change in changes])
    for lora, ours in zip(*moved, strict=True):
        assert 0.7 < ours / lora < 1.4  # rates are powers of √2, and LoRA's rows are of length 1 / √3 on average


def test_parts_act_rates_first() -> None:
    """Keeping the base model runs the layers, which must not count as passes of the step."""
    model = adapted("disel", retain=10.0)
    assert [part.name for part in layers_of(model)[0].drivers["default"].parts] == ["rates", "retain"]


def test_the_papers_rates_are_never_measured() -> None:
    for method in FOLLOWING:
        model = adapted(method, match_step=False)
        step(model, torch.optim.SGD(trainable(model), lr=1e-3), 0)
        assert not any("up_step" in name for name in model.state_dict())
    assert DiraConfig().match_step is False  # there is nothing to match without gates


# --- part of the adapter -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", FOLLOWING)
@pytest.mark.parametrize("cut", [1, 5, 9])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path, method: str, cut: int) -> None:
    rate = 1e-3 if method == "pedyra without gates" else 2e-2  # at which they still change
    whole = adapted(method)
    optimizer = torch.optim.AdamW(trainable(whole), lr=rate, weight_decay=0.1)
    for seed in range(12):
        step(whole, optimizer, seed)
    first = adapted(method)
    optimizer = torch.optim.AdamW(trainable(first), lr=rate, weight_decay=0.1)
    for seed in range(cut):
        step(first, optimizer, seed)
    first.save_pretrained(tmp_path)
    state = optimizer.state_dict()
    second = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path, is_trainable=True)
    assert multiples(second) == multiples(first)
    optimizer = torch.optim.AdamW(trainable(second), lr=rate, weight_decay=0.1)
    optimizer.load_state_dict(state)
    for seed in range(cut, 12):
        step(second, optimizer, seed)
    assert multiples(second) == multiples(whole)
    assert len(set(multiples(whole))) > 1
    for one, other in zip(trainable(second), trainable(whole), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", FOLLOWING)
def test_a_run_with_groups_goes_on_from_its_optimizers_state(tmp_path: Path, method: str) -> None:
    """Rates that have changed since do not change which parameters lie in a group."""

    def groups_of(model: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(dynalora.param_groups(model, lr=2e-2, weight_decay=0.1))

    whole = adapted(method)
    optimizer = groups_of(whole)
    for seed in range(10):
        step(whole, optimizer, seed)
    first = adapted(method)
    optimizer = groups_of(first)
    for seed in range(5):
        step(first, optimizer, seed)
    first.save_pretrained(tmp_path)
    state = optimizer.state_dict()
    second = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path, is_trainable=True)
    optimizer = groups_of(second)
    assert [group["params"] for group in optimizer.state_dict()["param_groups"]] == [
        group["params"] for group in state["param_groups"]
    ]
    optimizer.load_state_dict(state)
    for seed in range(5, 10):
        step(second, optimizer, seed)
    assert len(set(multiples(whole))) > 1
    assert multiples(second) == multiples(whole)
    for one, other in zip(trainable(second), trainable(whole), strict=True):
        torch.testing.assert_close(one, other)


def test_copies_and_casts_keep_the_rates() -> None:
    model = adapted(init_weights=False)
    step(model, torch.optim.SGD(trainable(model), lr=1e-3), 0)
    rates = multiples(model)
    assert multiples(copy.deepcopy(model)) == rates
    assert multiples(model.to(torch.bfloat16)) == rates


def test_groups_follow_from_the_rates_that_they_were_made_with() -> None:
    """Also after a restart, whose groups begin with the rates of that time."""
    plain, grouped = adapted(gate_bias_init=-2.0), adapted(gate_bias_init=-2.0)
    for parts in (range(3), range(3, 6)):
        of_plain = torch.optim.SGD(trainable(plain), lr=5e-2, weight_decay=0.2)
        of_groups = torch.optim.SGD(dynalora.param_groups(grouped, lr=5e-2, weight_decay=0.2))
        for seed in parts:
            step(plain, of_plain, seed)
            step(grouped, of_groups, seed)
    assert multiples(plain) == multiples(grouped)
    for one, other in zip(plain.parameters(), grouped.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_an_adapter_from_before_there_was_a_measurement_goes_on_without() -> None:
    model = adapted()
    optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
    step(model, optimizer, 0)
    for layer in layers_of(model):
        layer.set_running("up_step", "default", None)
    for seed in (1, 2):
        step(model, optimizer, seed)
        assert multiples(model) == [pytest.approx(1 + math.exp(3))] * 4


def test_what_cannot_be_a_rate_is_refused(tmp_path: Path) -> None:
    model = adapted()
    step(model, torch.optim.SGD(trainable(model), lr=1e-3), 0)
    for value in (torch.tensor([MOST + 1]), torch.tensor([1, 2]), torch.tensor([0.5])):
        state = {
            name: value if name.endswith("up_step.default") else tensor for name, tensor in model.state_dict().items()
        }
        with pytest.raises(CheckpointError, match="up_step"):
            adapted().load_state_dict(state)


def test_a_layer_without_tokens_keeps_its_rate() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, both: bool) -> Tensor:
            return self.one(x) + self.two(x) if both else self.one(x)

    torch.manual_seed(0)
    model = peft.get_peft_model(Either(), DiselConfig(r=2, target_modules=["one", "two"], init_weights=False))
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    rates = []
    for both in (True, False):
        with torch.no_grad():
            for layer in layers_of(model):
                layer.parameter("gate_bias", "default").fill_(0.0 if both else 9.0)
        model(torch.randn(5, 4), both).square().sum().backward()
        optimizer.step()
        rates.append(multiples(model))
    assert rates[1] == [1.0, rates[0][1]]
    assert rates[0][1] > 1


def _forward(model: Any) -> None:
    LLAMA.loss(model, seed=77)


def _without_gradients(model: Any) -> None:
    """As the probabilities of a policy before its update are computed, in training, too."""
    with torch.no_grad():
        LLAMA.loss(model, seed=77)


def _saliency(model: Any) -> None:
    """The loss's gradient in the embedded words."""
    embedded = model.get_input_embeddings()(LLAMA.batch(77)["input_ids"]).detach().requires_grad_()
    loss = model(inputs_embeds=embedded).logits.float().square().mean()
    assert torch.autograd.grad(loss, embedded)[0].any()


def _backward(model: Any) -> None:
    """Gradients of everything, thrown away."""
    before = {name: p.grad for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    LLAMA.loss(model, seed=77).backward()
    for name, p in model.named_parameters():
        p.grad = before[name]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "look", [_forward, _without_gradients, _saliency, _backward], ids=lambda look: look.__name__[1:]
)
@pytest.mark.parametrize("method", FOLLOWING)
def test_looking_at_gradients_between_steps_changes_nothing_of_the_training(
    method: str, look: Any, training: bool
) -> None:
    """Between steps: whatever is then measured, the run is that without it, bit for bit."""
    runs = []
    for looking in (False, True):
        model = adapted(method)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        for number in range(9):
            step(model, optimizer, number)
            optimizer.zero_grad()
            if looking:
                look(model.train(training))
        runs.append([p.detach().clone() for p in trainable(model)])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)
