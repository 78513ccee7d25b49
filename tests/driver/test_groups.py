"""What the user's optimizer looks like: the same before and after every step, whatever happens in it."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

import dynalora
from tests.driver.loops import (
    CONFIGS,
    adamw,
    adapted,
    assert_close_weights,
    assert_same_weights,
    batches,
    disel,
    loop,
    pedyra,
    trainable,
    weights,
)
from tests.toys import TOYS

every_config = pytest.mark.parametrize("name", CONFIGS)


def shape_of(optimizer: torch.optim.Optimizer) -> list[tuple[list[int], dict[str, Any]]]:
    return [
        ([id(p) for p in group["params"]], {k: v for k, v in group.items() if k != "params"})
        for group in optimizer.param_groups
    ]


def two_groups(model: Any) -> list[dict[str, Any]]:
    parameters = trainable(model)
    return [
        {"params": parameters[:3], "lr": 1e-2, "weight_decay": 0.1, "name": "a"},
        {"params": parameters[3:], "lr": 3e-3, "weight_decay": 0.0, "name": "b"},
    ]


@every_config
def test_groups_are_the_users_after_every_step(name: str) -> None:
    model = adapted(CONFIGS[name](total_steps=3))
    optimizer = torch.optim.AdamW(two_groups(model))
    groups, lists = list(optimizer.param_groups), [group["params"] for group in optimizer.param_groups]
    before = shape_of(optimizer)
    for batch in batches(3):
        loop(model, optimizer, [batch])
        assert shape_of(optimizer) == before
        assert all(now is then for now, then in zip(optimizer.param_groups, groups, strict=True))
        assert all(g["params"] is then for g, then in zip(optimizer.param_groups, lists, strict=True))


@every_config
def test_a_step_that_raises_does_no_lasting_harm(name: str) -> None:
    """torch calls no hook after such a step: the groups are the user's again when they are next saved or stepped."""
    model = adapted(CONFIGS[name](total_steps=3))

    class Failing(torch.optim.AdamW):
        fail = False

        def step(self, closure: Any = None) -> Any:
            if self.fail:
                raise RuntimeError("out of memory, say")
            return super().step(closure)

    optimizer = Failing(two_groups(model))
    before = shape_of(optimizer)
    data = batches(4)
    loop(model, optimizer, data[:1])
    optimizer.fail = True
    with pytest.raises(RuntimeError, match="out of memory"):
        loop(model, optimizer, data[1:2])
    assert [len(group["params"]) for group in optimizer.state_dict()["param_groups"]] == [3, len(before[1][0])]
    assert shape_of(optimizer) == before
    with pytest.raises(RuntimeError, match="out of memory"):
        loop(model, optimizer, data[1:2])
    optimizer.fail = False
    loop(model, optimizer, data[1:3])
    assert shape_of(optimizer) == before

    alone = adapted(CONFIGS[name](total_steps=3))
    loop(alone, torch.optim.AdamW(two_groups(alone)), data[:3])
    assert_same_weights(weights(model), weights(alone))


@every_config
def test_groups_are_the_users_after_a_failing_closure(name: str) -> None:
    model = adapted(CONFIGS[name](total_steps=3))
    optimizer = adamw(model)
    before = shape_of(optimizer)

    def closure() -> float:
        raise RuntimeError("in the closure")

    with pytest.raises(RuntimeError, match="in the closure"):
        optimizer.step(closure)
    assert shape_of(optimizer) == before


@every_config
def test_state_dict_has_the_users_structure(name: str) -> None:
    model = adapted(CONFIGS[name](total_steps=6))
    optimizer = torch.optim.AdamW(two_groups(model))
    data = batches(6)
    loop(model, optimizer, data[:3])
    state = optimizer.state_dict()
    assert [group["name"] for group in state["param_groups"]] == ["a", "b"]
    assert [len(group["params"]) for group in state["param_groups"]] == [3, len(trainable(model)) - 3]
    assert [group["lr"] for group in state["param_groups"]] == [1e-2, 3e-3]
    assert len(state["state"]) == len(trainable(model))

    # The same state in a fresh optimizer goes on as the old one would.
    state, start = copy.deepcopy(state), copy.deepcopy(model.state_dict())
    loop(model, optimizer, data[3:])
    straight = weights(model)
    model.load_state_dict(start)
    again = torch.optim.AdamW(two_groups(model))
    again.load_state_dict(state)
    loop(model, again, data[3:])
    assert_same_weights(weights(model), straight)


@every_config
def test_learning_rate_schedulers_keep_working(name: str) -> None:
    model = adapted(CONFIGS[name](total_steps=6))
    optimizer = torch.optim.AdamW(two_groups(model))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[1e-2, 2e-2], total_steps=7)
    plain = torch.optim.AdamW(two_groups(adapted(CONFIGS[name](total_steps=6))))
    expected = torch.optim.lr_scheduler.OneCycleLR(plain, max_lr=[1e-2, 2e-2], total_steps=7)
    for batch in batches(6):
        loop(model, optimizer, [batch], scheduler)
        plain.step()
        expected.step()
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in plain.param_groups]
        assert [g["betas"] for g in optimizer.param_groups] == [g["betas"] for g in plain.param_groups]


def test_reduce_on_plateau() -> None:
    model = adapted(disel())
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    for value in (1.0, 2.0, 3.0):
        loop(model, optimizer, batches(1))
        scheduler.step(value)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.25)
    assert len(optimizer.param_groups) == 1


@every_config
@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_param_groups_equal_the_automatic_path(name: str, decay: float) -> None:
    data = batches(5)
    automatic = adapted(CONFIGS[name](total_steps=5))
    loop(automatic, torch.optim.AdamW(trainable(automatic), lr=1e-2, weight_decay=decay), data)
    explicit = adapted(CONFIGS[name](total_steps=5))
    groups = dynalora.param_groups(explicit, lr=1e-2, weight_decay=decay)
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in trainable(explicit)}
    assert all(g["params"] for g in groups)
    loop(explicit, torch.optim.AdamW(groups), data)
    assert_close_weights(weights(explicit), weights(automatic), 1e-7)


def test_param_groups_show_the_gates() -> None:
    model = adapted(disel(gate_lr_multiplier=4.0, match_step=False))
    groups = dynalora.param_groups(model, lr=1e-2, weight_decay=0.2)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    for name, values in found.items():
        wanted = (4e-2, 0.0) if "gate" in name else (1e-2, 0.2)
        assert values == pytest.approx(wanted), name


def test_the_rules_cover_gates_only() -> None:
    """A head trained beside the gates follows the user's own settings."""
    toy = TOYS["mlp"]
    config = dynalora.DiselConfig(
        r=3, target_modules=["first"], modules_to_save=["head"], init_weights=False, match_step=False
    )
    model = peft.get_peft_model(toy.build(), config)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1, weight_decay=0.5)
    before = weights(model)
    toy.loss(model).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer.step()
    for name, now in weights(model).items():
        lr, decay = (0.5, 0.0) if "gate" in name else (0.1, 0.5)
        torch.testing.assert_close(now, before[name] - lr * (gradients[name] + decay * before[name]), msg=name)


def test_tensor_learning_rates() -> None:
    """Capturable and compiled optimizers hold their rate in a tensor, which must not be multiplied in place."""
    model = adapted(disel(), dtype=torch.float64)
    rate = torch.tensor(1e-2, dtype=torch.float64)
    optimizer = torch.optim.AdamW(trainable(model), lr=rate, weight_decay=0.1)
    loop(model, optimizer, batches(3))
    assert float(rate) == 1e-2
    assert optimizer.param_groups[0]["lr"] is rate
    plain = adapted(disel(), dtype=torch.float64)
    loop(plain, torch.optim.AdamW(trainable(plain), lr=1e-2, weight_decay=0.1), batches(3))
    assert_close_weights(weights(model), weights(plain), 1e-12)


class CountingGroups(torch.optim.SGD):
    """Keeps its step count in the group, as schedule-free optimizers and Prodigy do."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return result


@every_config
@pytest.mark.parametrize("separate", [False, True], ids=["one group", "gates apart"])
def test_what_an_optimizer_writes_into_its_groups_stays(name: str, separate: bool) -> None:
    model = adapted(CONFIGS[name](total_steps=4))
    groups: list[dict[str, Any]] = [{"params": trainable(model)}]
    if separate:
        gates = [p for n, p in model.named_parameters() if p.requires_grad and "gate" in n]
        chosen = {id(p) for p in gates}
        groups = [{"params": [p for p in trainable(model) if id(p) not in chosen]}]
        if gates:
            groups.append({"params": gates})
    optimizer = CountingGroups(groups, lr=1e-2)
    loop(model, optimizer, batches(4))
    assert [group["k"] for group in optimizer.param_groups] == [4] * len(groups)


@pytest.mark.parametrize(
    "config",
    [disel(total_steps=3), pedyra(match_step=True, adjust_start=8, adjust_end=9, ortho_weight=0.0)],
    ids=["disel", "pedyra"],
)
@pytest.mark.parametrize("grouped", [False, True], ids=["automatic", "param_groups"])
def test_weight_decay_takes_off_the_same_whatever_the_multiple_of_the_rate(config: Any, grouped: bool) -> None:
    """Steps are matched to LoRA's, and so is what decay takes off at each: learning rate times weight decay."""
    model = adapted(config)
    loop(model, adamw(model), batches(2))  # so that no factor is zero
    apart = [p for group in dynalora.param_groups(model, lr=1.0) if group["lr"] != 1 for p in group["params"]]
    assert any(parameter.ndim > 1 for parameter in apart)
    groups = dynalora.param_groups(model, lr=1e-2, weight_decay=0.5) if grouped else trainable(model)
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.5)
    decaying = [group for group in dynalora.param_groups(model, lr=1e-2, weight_decay=0.5) if group["weight_decay"]]
    decays = {id(parameter) for group in decaying for parameter in group["params"]}
    before = {p: p.detach().clone() for p in trainable(model)}
    for parameter in before:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, start in before.items():
        if id(parameter) in decays:
            torch.testing.assert_close(parameter.detach(), start * (1 - 1e-2 * 0.5))
