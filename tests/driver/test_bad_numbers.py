"""Losses and gradients that are no numbers: named, not learned from, not saved without a word."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import dynalora
from dynalora.adapter.layer import adapter_layers
from dynalora.driver.finite import some_bad
from dynalora.errors import TrainingError
from dynalora.methods.pedyra import adjustments
from tests.processes import run_two
from tests.toys import MLP
from tests.unit.test_retain import curvature_of

TARGETS = ["first", "second"]
CONFIGS: dict[str, dict[str, Any]] = {
    "DiraConfig": {"compact_every": 2, "total_steps": 9},
    "DiselConfig": {},
    "DisloraConfig": {"total_steps": 9, "loss_smoothing": 0.5, "tsd_count": 2},
    "PedyraConfig": {"adjust_start": 2, "adjust_interval": 1, "adjust_end": 9, "adjust_size": 1},
}
every_method = pytest.mark.parametrize("name", sorted(CONFIGS))
GROWING = {"IncreloraConfig": {"target_rank": 5, "grow_start": 4, "grow_interval": 1, "grow_matrices": 1}}


def adapted(name: str, **options: Any) -> Any:
    torch.manual_seed(3)
    given = {**CONFIGS, **GROWING}[name]
    return peft.get_peft_model(MLP(), getattr(dynalora, name)(r=3, target_modules=TARGETS, **given, **options))


def loss_of(model: Any, seed: int, scale: float = 1.0) -> torch.Tensor:
    x = scale * torch.randn(8, 12, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.cross_entropy(model(x), torch.zeros(8, dtype=torch.long))


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@every_method
def test_a_loss_that_is_no_number_stops_before_the_step(name: str, value: float) -> None:
    model = adapted(name)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    before = state_of(model)
    optimizer.zero_grad()
    (loss_of(model, 3) * value).backward()
    with pytest.raises(TrainingError, match=r"optimizer step 4, first in '(first|second)' \((NaN|infinite values) in"):
        optimizer.step()
    after = state_of(model)
    assert all(torch.equal(after[key], before[key]) for key in before)
    if name == "PedyraConfig":
        assert all(adjustment.step <= 3 for adjustment in adjustments(model))
    # Without that batch, training goes on.
    optimizer.zero_grad()
    loss_of(model, 4).backward()
    optimizer.step()
    assert dynalora.state_report(model)[0].step == 4


def test_the_layer_is_the_one_whose_gradient_it_is() -> None:
    model = adapted("DiraConfig")
    optimizer = torch.optim.SGD(trained(model), lr=1e-2)
    loss_of(model, 0).backward()
    layer = model.base_model.model.second
    layer.parameter("up", "default").grad[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"step 1, first in 'second' \(NaN in the gradient of 'up'\)"):
        optimizer.step()


@every_method
def test_what_is_no_number_is_not_saved_in_silence(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "sound")
    with torch.no_grad():
        model.base_model.model.second.parameter("down", "default")[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="NaN in 'down' of 'second'"):
        model.save_pretrained(tmp_path / "broken")


BESIDES: dict[str, dict[str, Any]] = {"a head": {"modules_to_save": ["head"]}, "biases": {"bias": "all"}}


@pytest.mark.parametrize("besides", sorted(BESIDES))
@every_method
def test_gradients_of_what_is_trained_besides_count_too(name: str, besides: str) -> None:
    model = adapted(name, **BESIDES[besides])
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    loss_of(model, 0).backward()
    head = [parameter for key, parameter in model.named_parameters() if "head" in key and parameter.requires_grad][-1]
    assert head.grad is not None
    head.grad[0] = float("nan")
    before = state_of(model)
    with pytest.raises(
        TrainingError, match=r"step 1, first in a parameter of shape \(3,\) beside the adapter's \(NaN\)"
    ):
        optimizer.step()
    assert all(torch.equal(tensor, before[key]) for key, tensor in state_of(model).items())


@pytest.mark.parametrize("where", ["a head", "what it remembers"])
def test_nothing_that_is_no_number_is_saved_beside_the_weights_in_silence(where: str, tmp_path: Path) -> None:
    model = adapted("DisloraConfig", modules_to_save=["head"])
    layer = model.base_model.model.first
    bad = layer.buffer("balance", "default") if where != "a head" else model.base_model.model.head.weight
    with torch.no_grad():
        bad.view(-1)[0] = float("nan")
    with pytest.warns(UserWarning, match="with NaN in '.*(head|first.dislora_balance).*', which is saved"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_a_loss_that_is_no_number_with_gradients_that_are(smoothing: float, value: float, tmp_path: Path) -> None:
    """As from a constant in the loss: nothing of it is kept, and the adapter can be loaded again."""
    torch.manual_seed(3)
    config = dynalora.DisloraConfig(r=3, target_modules=TARGETS, total_steps=9, loss_smoothing=smoothing, tsd_count=2)
    model = peft.get_peft_model(MLP(), config)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    balance = model.base_model.model.first.buffer("balance", "default")
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    before = balance.clone()
    optimizer.zero_grad()
    (loss_of(model, 2) + value).backward()
    optimizer.step()
    assert torch.equal(balance, before)
    model.save_pretrained(tmp_path)
    peft.PeftModel.from_pretrained(MLP(), tmp_path)


SHARDED = """
import os, sys
import peft, torch
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel
import dynalora
from dynalora.errors import TrainingError
from tests.toys import MLP

if __name__ == "__main__":
    rank, folder, port = sys.argv[1:]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=rank, WORLD_SIZE="2")
    distributed.init_process_group("gloo", rank=int(rank), world_size=2)
    said = []
    for targets in (["first", "second"], ["second"]):
        torch.manual_seed(3)
        model = peft.get_peft_model(MLP(), dynalora.DiselConfig(r=3, target_modules=targets))
        called = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(3):
            optimizer.zero_grad()
            x = torch.randn(8, 12, generator=torch.Generator().manual_seed(10 * step + int(rank)))
            torch.nn.functional.cross_entropy(called(x), torch.zeros(8, dtype=torch.long)).backward()
            mine = [p.grad for p in model.parameters() if p.grad is not None and p.grad.numel()]
            if step == 2 and mine and (targets == ["second"] or rank == "0"):
                mine[0].view(-1)[0] = float("nan")
            try:
                optimizer.step()
            except TrainingError as error:
                said.append(f"{step} {error}")
        said.append(f"{len(targets)} layers, of which here {len(mine)} parameters")
    torch.save(said, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
"""


def test_processes_with_parts_of_the_weights_end_alike(tmp_path: Path) -> None:
    """Under FSDP1 each has its piece of a flat vector, in which there may be nothing of the adapter."""
    run_two(SHARDED, str(tmp_path))
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for said in both:
        assert len(said) == 4
        assert said[0].startswith("2 training of adapter 'default' met NaN or infinite gradients at optimizer step 3")
        assert said[2].startswith("2 training of adapter 'default' met NaN or infinite gradients at optimizer step 3")
    assert sorted(said[3] for said in both)[0] == "1 layers, of which here 0 parameters"


@pytest.mark.parametrize("value", [1.0, float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("scale", [1.0, float("inf")], ids=["usual inputs", "infinite inputs"])
@pytest.mark.parametrize("name", [*sorted(CONFIGS), "IncreloraConfig", "gates"])
def test_nothing_is_learned_from_a_step_that_a_scaler_skips(
    name: str, scale: float, fused: bool, set_to_none: bool, value: float
) -> None:
    """Whatever layers saw in its forward passes."""

    def run(skip: bool) -> dict[str, torch.Tensor]:
        model = adapted("PedyraConfig", gates=True) if name == "gates" else adapted(name)
        parameters = trained(model)
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000)
        for step in range(4):
            if step in (0, 2):
                if skip:
                    optimizer.zero_grad(set_to_none=set_to_none)
                    scaler.scale(loss_of(model, 20, scale) * value).backward()
                    next(p for p in parameters if p.grad is not None).grad.view(-1)[0] = float("inf")
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    scaler.scale(torch.zeros(1))  # makes its scale
                    scaler.update(scaler.get_scale() / 2)
            optimizer.zero_grad(set_to_none=set_to_none)
            for micro in range(2):
                scaler.scale(loss_of(model, 10 * micro + step) / 2).backward()
            scaler.step(optimizer)
            scaler.update()
        return state_of(model)

    with_skip, without = run(True), run(False)
    assert ("up_step" in str(list(without))) == (name in ("DiselConfig", "PedyraConfig", "gates"))
    assert with_skip.keys() == without.keys()
    assert all(torch.equal(with_skip[key], without[key]) for key in without)


@every_method
def test_a_first_batch_that_is_left_out_leaves_no_trace(name: str) -> None:
    """Its error is caught, and training begins with the next one."""

    def run(bad: bool) -> dict[str, torch.Tensor]:
        model = adapted(name)
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        if bad:
            loss_of(model, 30, float("inf")).backward()
            with pytest.raises(TrainingError, match="optimizer step 1"):
                optimizer.step()
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
        return state_of(model)

    with_it, without = run(True), run(False)
    assert with_it.keys() == without.keys()
    assert all(torch.equal(with_it[key], without[key]) for key in without)


@pytest.mark.parametrize("name", ["PedyraConfig", "IncreloraConfig", "DiselConfig"])
def test_nothing_is_learned_from_gradients_that_the_loop_throws_away(name: str) -> None:
    """Two forward passes before one backward pass, micro-batches, clipping, and a backward pass on no scalar."""

    def run(thrown: bool) -> dict[str, torch.Tensor]:
        model = adapted(name)
        optimizer = torch.optim.SGD(trained(model), lr=1e-2)
        for step in range(4):
            if thrown and step != 1:
                (loss_of(model, 30) + loss_of(model, 31)).backward()
                losses = torch.stack([loss_of(model, 32), loss_of(model, 33)])
                losses.backward(torch.ones(2))
                torch.nn.utils.clip_grad_norm_(trained(model), 1e-3)
                optimizer.zero_grad(set_to_none=step != 2)
            both = loss_of(model, step) + loss_of(model, step + 10)
            both.backward()
            torch.nn.utils.clip_grad_norm_(trained(model), 1e-3)
            loss_of(model, step + 20).backward()
            optimizer.step()
            optimizer.zero_grad()
        return state_of(model)

    with_them, without = run(True), run(False)
    assert with_them.keys() == without.keys()
    assert all(torch.equal(with_them[key], without[key]) for key in without)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_largest_numbers_are_numbers(dtype: torch.dtype) -> None:
    """Their sum of squares is infinite, and they are not."""
    most = torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype)
    small = torch.ones(5, dtype=dtype)
    assert not some_bad([most, small, -most])
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = most.clone()
        bad[1, 2] = value
        assert some_bad([small, bad])


MOVING: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in (*CONFIGS, *GROWING)},
    "a budget": ("DiraConfig", {"target_rank": 2, "compact_every": None}),
    "a fixed penalty": ("DisloraConfig", {"ortho_weight": 1e-2}),
}


@pytest.mark.parametrize("kind", sorted(MOVING))
def test_a_further_step_with_the_same_gradients_is_no_training_step(kind: str) -> None:
    """Nothing is added to the gradients once more, also where ranks have moved and gradients with them."""
    name, more = MOVING[kind]

    def run(further: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        options = {**{**CONFIGS, **GROWING}[name], **more}
        model = peft.get_peft_model(MLP(), getattr(dynalora, name)(r=3, target_modules=TARGETS, **options))
        optimizer = torch.optim.SGD(trained(model), lr=1e-2)
        for step in range(9):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
            if further:
                gradients = [None if p.grad is None else p.grad.clone() for p in trained(model)]
                optimizer.param_groups[0]["lr"] = 0.0  # so that the weights stay
                optimizer.step()
                optimizer.param_groups[0]["lr"] = 1e-2
                for parameter, before in zip(trained(model), gradients, strict=True):
                    assert before is None or torch.equal(parameter.grad, before)
        return state_of(model)

    with_them, without = run(True), run(False)
    assert with_them.keys() == without.keys()
    assert all(torch.equal(with_them[key], without[key]) for key in without)


def test_what_retain_has_the_layers_compute_is_no_input_of_training() -> None:
    """The first layer's inputs are the batches, whatever it learns, so that their squares are, too."""

    def seen(retain: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(3)
        config = dynalora.PedyraConfig(
            r=3, target_modules=TARGETS, gates=True, retain=retain, **CONFIGS["PedyraConfig"], match_step=True
        )
        model = peft.get_peft_model(MLP(), config)
        layers = list(adapter_layers(model).values())
        for layer in layers if retain else ():
            layer.curvatures["default"] = curvature_of(layer)
        parameters = trained(model)
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for step in range(5):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            if step == 2:
                parameters[0].grad.view(-1)[0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        sums = layers[0].matched["default"].sums
        assert (sums.counted, sums.coming) == (None, None)
        return layers[0].running("inputs", "default"), layers[0].take_gathered("default")

    (alone, left_alone), (beside, left_beside) = seen(None), seen(1e-3)
    assert torch.equal(alone, beside)
    assert left_alone is None
    assert left_beside is None
