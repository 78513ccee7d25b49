"""Optimizers that find their own rate, keep copies of the weights, or step within backward; averages of weights."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers.optimization import Adafactor

import dynalora
from dynalora.adapter.layer import adapter_layers
from dynalora.driver.model import fill_reference
from dynalora.errors import TrainingError
from dynalora.methods.dislora import FIXED_WEIGHT, weights_for_training
from tests.driver.loops import CONFIGS, adapted, batches, disel, loop, pedyra, trainable, weights
from tests.matrix.rows import Row, every_row
from tests.toys import TOYS, llama

every_config = pytest.mark.parametrize("name", CONFIGS)


class OneRate(torch.optim.AdamW):
    """Refuses groups of different rates and keeps its factor of the rate in them, as Prodigy and D-Adaptation do."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr, weight_decay=0.1)
        for group in self.param_groups:
            group |= {"d": 1.0, "k": 0}

    def step(self, closure: Any = None) -> Any:
        if len({group["lr"] for group in self.param_groups}) > 1:
            raise RuntimeError("Setting different lr values in different parameter groups is not supported")
        loss = super().step(closure)
        for group in self.param_groups:
            group["k"] += 1
        return loss


@every_config
def test_an_optimizer_that_finds_its_own_rate(name: str) -> None:
    model = adapted(CONFIGS[name](total_steps=6))
    optimizer = Adafactor(trainable(model), scale_parameter=True, relative_step=True, warmup_init=True, lr=None)
    before = weights(model)
    loop(model, optimizer, batches(3))
    [report] = dynalora.state_report(model)
    assert report.step == 3
    assert any(not torch.equal(value, before[key]) for key, value in weights(model).items())


@pytest.mark.parametrize(
    "config", [disel, lambda **options: pedyra(match_step=True, adjust_start=8, adjust_end=9, **options)]
)
def test_a_multiple_of_the_rate_where_groups_may_have_one_only(config: Any) -> None:
    """A step is proportional to the rate, so scaling it afterwards is what a group of one's own would do."""
    one, other = adapted(config(), dtype=torch.float64), adapted(config(), dtype=torch.float64)
    single, usual = OneRate(trainable(one), lr=1e-2), torch.optim.AdamW(trainable(other), lr=1e-2, weight_decay=0.1)
    loop(one, single, batches(4))
    loop(other, usual, batches(4))
    for key, value in weights(one).items():
        torch.testing.assert_close(value, weights(other)[key], rtol=1e-9, atol=1e-9, msg=key)
    assert [group["k"] for group in single.param_groups] == [4]
    plain = adapted(disel(gate_lr_multiplier=1.0), dtype=torch.float64)
    loop(plain, OneRate(trainable(plain), lr=1e-2), batches(4))
    gates = [key for key in weights(one) if "gate_bias" in key]
    assert all(not torch.allclose(weights(plain)[key], weights(one)[key]) for key in gates)


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD (Defazio et al., 2024) without momentum: steps of z, weighed by squares of the rate into x."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_lr_power": 2.0, "weight_sum": 0.0, "lr_max": -1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr_max"] = max(group["lr"], group["lr_max"])
            weight = group["lr_max"] ** group["weight_lr_power"]
            group["weight_sum"] += weight
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                z = self.state[parameter].setdefault("z", parameter.clone())
                z.sub_(parameter.grad, alpha=group["lr"])
                parameter.lerp_(z, weight / group["weight_sum"])


@pytest.mark.parametrize("apart", [False, True])
def test_averages_that_are_weighed_by_the_rate(apart: bool) -> None:
    """A multiple of the rate leaves the weights of schedule-free's average as they are, in whatever groups."""
    one, other = adapted(disel()), adapted(disel())
    groups: Any = [{"params": [p]} for p in trainable(one)] if apart else trainable(one)
    loop(one, ScheduleFree(groups, lr=0.1), batches(4))
    loop(other, ScheduleFree(dynalora.param_groups(other, lr=0.1), lr=0.1), batches(4))
    for key, value in weights(one).items():
        torch.testing.assert_close(value, weights(other)[key], rtol=1e-5, atol=1e-7, msg=key)


def test_a_multiple_of_a_rate_that_the_optimizer_chooses() -> None:
    """Adafactor's relative step has no rate to multiply, so the step is multiplied."""

    def moved(multiple: float) -> dict[str, torch.Tensor]:
        model = adapted(disel(gate_lr_multiplier=multiple))
        before = weights(model)
        optimizer = Adafactor(trainable(model), scale_parameter=True, relative_step=True, warmup_init=True, lr=None)
        loop(model, optimizer, batches(1))
        return {key: value - before[key] for key, value in weights(model).items()}

    usual, faster = moved(1.0), moved(3.0)
    for key, value in usual.items():
        torch.testing.assert_close(faster[key], value * (3 if "gate" in key else 1), rtol=1e-3, atol=1e-7, msg=key)
    assert any("gate" in key and value.any() for key, value in usual.items())


@pytest.mark.parametrize("flat", [False, True])
def test_copies_of_weights_in_the_state_know_new_triples(flat: bool) -> None:
    class Copying(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    value = parameter.detach().clone()
                    self.state[parameter]["p0" if flat else "z"] = value.flatten() if flat else value
            return loss

    model = adapted(pedyra(adjust_start=1, adjust_interval=1, adjust_end=1, init_weights=True))
    optimizer = Copying(trainable(model), lr=1e-2)
    loop(model, optimizer, batches(1))
    grown = [layer for layer in adapter_layers(model).values() if layer.rank("default") > 3]
    assert grown
    for layer in adapter_layers(model).values():
        for parameter in layer.adapter_parameters("default").values():
            [held] = optimizer.state[parameter].values()
            assert torch.equal(held.view(parameter.shape), parameter.detach())


@every_config
def test_an_optimizer_for_each_parameter_within_backward(name: str) -> None:
    """Exact for methods that look at one parameter at a time; refused by name for those that need the whole step."""

    def train(within: bool) -> Any:
        model = adapted(CONFIGS[name](total_steps=6))
        optimizers = {p: torch.optim.AdamW([p], lr=1e-2) for p in trainable(model)}

        def step(parameter: torch.Tensor) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        if within:
            for parameter in optimizers:
                parameter.register_post_accumulate_grad_hook(step)
        for batch in batches(3):
            model(input_ids=batch, labels=batch).loss.backward()
            for parameter in () if within else optimizers:
                step(parameter)
        return weights(model)

    if name in ("dislora", "pedyra", "increlora", "triadaptlora"):
        with pytest.raises(TrainingError, match="steps within backward"):
            train(True)
        return
    for key, value in train(True).items():
        torch.testing.assert_close(value, train(False)[key], msg=key)


@every_row
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_an_average_of_the_weights_follows_ranks_that_move(row: Row, decay: float) -> None:
    toy = TOYS["llama"]
    model = row.adapt(toy).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    snapshot = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for _ in range(6):
        toy.loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    ranks = [layer.rank("default") for layer in adapter_layers(model).values()]
    assert [layer.rank("default") for layer in adapter_layers(average).values()] == ranks
    if decay == 0:
        torch.testing.assert_close(toy.logits(average.module), toy.logits(model))
    else:
        assert torch.isfinite(toy.logits(average.module)).all()
    # A copy that somebody else made is theirs, and stays as it was.
    assert {layer.rank("default") for layer in adapter_layers(snapshot).values()} == {4}


@every_row
def test_the_reference_of_preference_training_is_a_copy_of_the_adapter(row: Row) -> None:
    """As TRL makes it: a second adapter `ref` with the configuration of `default`, whose ranks may have moved."""
    toy = TOYS["llama"]
    model = row.adapt(toy).train()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for _ in range(4):
        toy.loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = toy.logits(model)
    model.add_adapter("ref", model.peft_config["default"])
    fill_reference(model)
    model.set_adapter("ref")
    torch.testing.assert_close(toy.logits(model), expected)
    model.set_adapter("default")
    torch.testing.assert_close(toy.logits(model), expected)


def test_an_adapter_called_ref_of_its_own_is_left_alone() -> None:
    model = adapted(disel())
    model.add_adapter("ref", disel(r=2))
    before = {key: value.clone() for key, value in model.state_dict().items() if key.endswith(".ref")}
    fill_reference(model)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    fill_reference(peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])))


def test_a_task_loss_of_zero_says_nothing_of_its_gradient() -> None:
    ortho = torch.tensor(0.3, dtype=torch.float64)
    for value in (0.0, 3e-8, -3e-8):
        k, task, penalty = weights_for_training(torch.tensor(value, dtype=torch.float64), ortho)
        assert (float(k), float(task), float(penalty)) == (0, 1, FIXED_WEIGHT)
    _, task, penalty = weights_for_training(torch.tensor(1e-3, dtype=torch.float64), ortho)
    assert float(task + penalty) == pytest.approx(1)


@pytest.mark.parametrize("name", ["dira", "pedyra"])
def test_training_in_eval_state_is_the_same_run(name: str) -> None:
    one, other = (adapted(CONFIGS[name](total_steps=6)) for _ in range(2))
    for model, mode in ((one, True), (other, False)):
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        model.train(mode)
        for batch in batches(5):
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for key, value in weights(one).items():
        assert torch.equal(value, weights(other)[key]), key


def test_vectors_in_half_precision_are_told() -> None:
    model = adapted(disel())
    for parameter in trainable(model):
        parameter.data = parameter.data.bfloat16()
    with pytest.warns(UserWarning, match="half precision"):
        loop(model, torch.optim.AdamW(trainable(model), lr=1e-2), batches(1))
