"""The clock: what is a step, whose step it is, and when there is none."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import dynalora
from dynalora.errors import ScheduleError
from tests.driver.loops import (
    CONFIGS,
    adamw,
    adapted,
    assert_close_weights,
    assert_same_weights,
    batches,
    clock,
    differs,
    dira,
    loop,
    sgd,
    trainable,
    weights,
)
from tests.toys import TOYS

every_config = pytest.mark.parametrize("name", CONFIGS)


def test_micro_batches_are_no_steps() -> None:
    model = adapted(dira(total_steps=3))
    optimizer = sgd(model)
    for _ in range(3):
        optimizer.zero_grad()
        for batch in batches(4):
            (model(input_ids=batch, labels=batch).loss / 4).backward()
        optimizer.step()
    assert clock(model) == (3, 3)


def test_bare_loop_with_accumulation_follows_the_large_batch() -> None:
    data = batches(6, size=4)
    whole = adapted(dira(total_steps=6), dtype=torch.float64)
    loop(whole, sgd(whole), data)
    parts = adapted(dira(total_steps=6), dtype=torch.float64)
    optimizer = sgd(parts)
    for batch in data:
        optimizer.zero_grad()
        for one in batch.split(1):
            (parts(input_ids=one, labels=one).loss / 4).backward()
        optimizer.step()
    # transformers computes the loss in float32.
    assert_close_weights(weights(parts), weights(whole), 1e-5)
    assert clock(parts) == clock(whole) == (6, 6)


# --- gradient scaling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@every_config
def test_a_skipped_step_is_no_step(name: str, fused: bool) -> None:
    """An overflow in the middle must leave the trajectory of the run without it."""
    data = batches(5)
    after = {}
    for overflow in (False, True):
        model = adapted(CONFIGS[name](total_steps=5))
        optimizer = adamw(model, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=10_000)
        groups = [dict(group) for group in optimizer.param_groups]
        for index, batch in enumerate(data):
            if overflow and index == 2:
                optimizer.zero_grad()
                before = weights(model)
                scaler.scale(model(input_ids=batch, labels=batch).loss).backward()
                trainable(model)[0].grad[0, 0] = float("inf")
                scaler.step(optimizer)
                scaler.update()
                assert_same_weights(weights(model), before)
                assert clock(model)[0] == 2
                assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == [
                    {k: v for k, v in g.items() if k != "params"} for g in groups
                ]
            optimizer.zero_grad()
            scaler.scale(model(input_ids=batch, labels=batch).loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert clock(model)[0] == 5
        after[overflow] = weights(model)
    assert_close_weights(after[True], after[False], 1e-5)


# --- total steps ---------------------------------------------------------------------------------------------


def test_missing_total_steps_is_one_clear_sentence_before_anything_changes() -> None:
    model = adapted(dira())
    optimizer = sgd(model)
    before = weights(model)
    batch = batches(1)[0]
    model(input_ids=batch, labels=batch).loss.backward()
    with pytest.raises(ScheduleError) as caught:
        optimizer.step()
    message = str(caught.value)
    assert "total_steps" in message
    assert "DiraConfig" in message
    assert "Trainer" in message
    assert "\n" not in message
    assert_same_weights(weights(model), before)
    assert clock(model)[0] == 0


@pytest.mark.parametrize("name", ["disel"])
def test_methods_without_schedule_need_no_total(name: str) -> None:
    model = adapted(CONFIGS[name]())
    loop(model, adamw(model), batches(2))
    assert clock(model)[0] == 2


def test_training_past_the_end_is_said_once() -> None:
    model = adapted(dira(total_steps=2))
    optimizer = sgd(model)
    loop(model, optimizer, batches(2))
    with pytest.warns(UserWarning, match="2 optimizer steps") as caught:
        loop(model, optimizer, batches(3))
    assert len([w for w in caught if "optimizer steps" in str(w.message)]) == 1


def test_restart_schedule() -> None:
    model = adapted(dira(total_steps=2))
    optimizer = sgd(model)
    loop(model, optimizer, batches(2))
    dynalora.restart_schedule(model, total_steps=5)
    assert clock(model) == (0, 5)
    loop(model, optimizer, batches(3))
    assert clock(model) == (3, 5)


def test_state_report_says_what_goes_on() -> None:
    model = adapted(dira(total_steps=8, rank_pattern={"down_proj": 2}))
    model.add_adapter("second", dira(total_steps=4))
    assert [(r.adapter, r.method, r.step, r.total_steps) for r in dynalora.state_report(model)] == [
        ("default", "dira", 0, 8),
        ("second", "dira", 0, 4),
    ]
    loop(model, sgd(model), batches(2))
    first, second = dynalora.state_report(model)
    assert (first.step, second.step) == (2, 0)
    assert {name.rsplit(".", 1)[-1]: rank for name, rank in first.ranks.items()} == {"q_proj": 3, "down_proj": 2}
    assert first.trainable_parameters == sum(p.numel() for p in trainable(model))
    assert second.trainable_parameters == 0
    assert first.details["dira_penalty_weight"] == pytest.approx(0.5 * (1 - 2 / 8))
    assert dynalora.state_report(nn.Linear(2, 2)) == []


# --- saved and loaded ----------------------------------------------------------------------------------------


@every_config
def test_loaded_for_training_the_clock_goes_on(name: str, tmp_path: Path) -> None:
    """N + N steps with SGD, saved in between, equal 2N."""
    data = batches(8)
    straight = adapted(CONFIGS[name](total_steps=8))
    loop(straight, sgd(straight), data)

    first = adapted(CONFIGS[name](total_steps=8))
    loop(first, sgd(first), data[:4])
    first.save_pretrained(tmp_path)
    second = peft.PeftModel.from_pretrained(TOYS["llama"].build(), tmp_path, is_trainable=True)
    assert clock(second) == (4, 8)
    loop(second, sgd(second), data[4:])
    assert_same_weights(weights(second), weights(straight))
    assert clock(second) == (8, 8)


@every_config
def test_loading_an_optimizers_state_as_fsdp_does_is_no_step(name: str, tmp_path: Path) -> None:
    """To load a state into a fresh optimizer, torch's distributed checkpoints let it step on zero gradients first."""
    data = batches(8)
    straight = adapted(CONFIGS[name](total_steps=8))
    loop(straight, adamw(straight), data)
    model = adapted(CONFIGS[name](total_steps=8))
    optimizer = adamw(model)
    loop(model, optimizer, data[:4])
    model.save_pretrained(tmp_path)
    state = get_optimizer_state_dict(model, optimizer)
    resumed = peft.PeftModel.from_pretrained(TOYS["llama"].build(), tmp_path, is_trainable=True)
    optimizer = adamw(resumed)
    set_optimizer_state_dict(resumed, optimizer, state)
    assert clock(resumed) == (4, 8)
    loop(resumed, optimizer, data[4:])
    assert clock(resumed) == (8, 8)
    assert_same_weights(weights(resumed), weights(straight))


@pytest.mark.parametrize("lean", [False, True], ids=["", "low_cpu_mem_usage"])
def test_clock_is_loaded_by_every_way(lean: bool, tmp_path: Path) -> None:
    model = adapted(dira(total_steps=9))
    loop(model, sgd(model), batches(3))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(TOYS["llama"].build(), tmp_path, is_trainable=True, low_cpu_mem_usage=lean)
    assert clock(loaded) == (3, 9)
    fresh = adapted(dira(total_steps=9))
    fresh.load_state_dict(model.state_dict())
    assert clock(fresh) == (3, 9)
    fresh = adapted(dira(total_steps=9))
    peft.set_peft_model_state_dict(fresh, peft.get_peft_model_state_dict(model))
    assert clock(fresh) == (3, 9)
    named = peft.PeftModel.from_pretrained(TOYS["llama"].build(), tmp_path, adapter_name="other", is_trainable=True)
    assert clock(named, "other") == (3, 9)


def test_clock_survives_casting_the_model() -> None:
    """``model.half()`` must not turn 4097 steps into 4096."""
    model = adapted(dira(total_steps=3))
    loop(model, sgd(model), batches(2))
    model.to(torch.bfloat16)
    assert clock(model) == (2, 3)
    counters = [b for n, b in model.named_buffers() if "dira" in n]
    assert counters
    assert all(not b.is_floating_point() for b in counters)


# --- several at once -----------------------------------------------------------------------------------------


@every_config
def test_two_models_do_not_disturb_each_other(name: str) -> None:
    data = batches(6)
    alone = adapted(CONFIGS[name](total_steps=6))
    loop(alone, adamw(alone), data)
    one, two = adapted(CONFIGS[name](total_steps=6)), adapted(CONFIGS[name](total_steps=30), seed=4)
    optimizer_one, optimizer_two = adamw(one), adamw(two)
    for index, batch in enumerate(data):
        loop(one, optimizer_one, [batch])
        if index % 2:
            loop(two, optimizer_two, batches(2, seed=index))
    assert_same_weights(weights(one), weights(alone))
    assert clock(one) == (6, 6)
    assert clock(two) == (6, 30)


def test_one_optimizer_for_two_models() -> None:
    data = batches(4)
    alone = adapted(dira(total_steps=4))
    loop(alone, sgd(alone), data)
    one, two = adapted(dira(total_steps=4)), adapted(dira(total_steps=9), seed=4)
    optimizer = torch.optim.SGD(trainable(one) + trainable(two), lr=0.1)
    for batch in data:
        optimizer.zero_grad()
        (one(input_ids=batch, labels=batch).loss + two(input_ids=batch, labels=batch).loss).backward()
        optimizer.step()
    assert_same_weights(weights(one), weights(alone))
    assert (clock(one), clock(two)) == ((4, 4), (4, 9))


@every_config
def test_an_idle_adapter_keeps_its_clock_and_weights(name: str) -> None:
    data = batches(4)
    alone = adapted(CONFIGS[name](total_steps=4))
    loop(alone, adamw(alone), data)
    model = adapted(CONFIGS[name](total_steps=4))
    torch.manual_seed(8)
    model.add_adapter("second", CONFIGS[name](total_steps=50))
    second = {n: p.detach().clone() for n, p in model.named_parameters() if "second" in n}
    loop(model, adamw(model), data)
    assert_same_weights(weights(model), weights(alone))
    assert clock(model, "default") == (4, 4)
    assert clock(model, "second")[0] == 0
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in second.items())
    model.set_adapter("second")
    loop(model, adamw(model), data[:3])
    assert clock(model, "default") == (4, 4)
    assert clock(model, "second") == (3, 50)
    assert_same_weights({n: dict(model.named_parameters())[n].detach() for n in weights(alone)}, weights(alone))


def test_two_active_adapters_each_count() -> None:
    model = adapted(dira(total_steps=4))
    model.add_adapter("second", dira(total_steps=7))
    model.base_model.set_adapter(["default", "second"])
    loop(model, sgd(model), batches(2))
    assert clock(model, "default") == (2, 4)
    assert clock(model, "second") == (2, 7)


def test_the_second_of_two_optimizers_sees_the_same_step() -> None:
    """λ is that of the training step, whichever optimizer comes first, and the last step is no step too many."""
    config = dira(total_steps=2, penalty_weight=0.5)
    model = adapted(config)
    downs = [p for n, p in model.named_parameters() if p.requires_grad and "_down" in n]
    ups = [p for n, p in model.named_parameters() if p.requires_grad and "_up" in n]
    for up in ups:
        torch.nn.init.normal_(up)
    optimizers = [torch.optim.SGD(part, lr=0.0) for part in (downs, ups)]
    for batch, weight in zip(batches(2), (0.5, 0.25), strict=True):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        before = [up.grad.clone() for up in ups]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for optimizer in optimizers:
                optimizer.step()
        for up, down, gradient in zip(ups, downs, before, strict=True):
            expected = weight * up * (down.norm(dim=1) / up.norm(dim=0))
            torch.testing.assert_close(up.grad - gradient, expected, atol=1e-5, rtol=1e-4)


def test_factors_shared_out_to_two_optimizers_take_one_step() -> None:
    """A over one optimizer and B over another: one training step, two ``step()`` calls."""
    data = batches(5)
    alone = adapted(dira(total_steps=5))
    loop(alone, sgd(alone), data)
    model = adapted(dira(total_steps=5))
    downs = [p for n, p in model.named_parameters() if p.requires_grad and "_down" in n]
    ups = [p for n, p in model.named_parameters() if p.requires_grad and "_up" in n]
    optimizers = torch.optim.SGD(downs, lr=0.1), torch.optim.SGD(ups, lr=0.1)
    for batch in data:
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert clock(model) == (5, 5)
    assert differs(weights(model), weights(alone)) < 0.05


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another, as Lookahead, SAM and torch's ZeroRedundancyOptimizer are."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__([p for group in inner.param_groups for p in group["params"]], dict(inner.defaults))
        self.param_groups = inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


@every_config
def test_a_wrapped_optimizer_makes_one_step(name: str) -> None:
    data = batches(4)
    alone = adapted(CONFIGS[name](total_steps=4))
    loop(alone, adamw(alone), data)
    model = adapted(CONFIGS[name](total_steps=4))
    loop(model, Wrapper(adamw(model)), data)
    assert clock(model) == (4, 4)
    assert_same_weights(weights(model), weights(alone))


class Clipper(Wrapper):
    """A wrapper that changes the gradients before it passes the step on."""

    def step(self, closure: Any = None) -> Any:
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 1e9)
        return self.inner.step(closure)


@every_config
def test_a_wrapper_that_clips_makes_one_step(name: str) -> None:
    data = batches(4)
    alone = adapted(CONFIGS[name](total_steps=4))
    loop(alone, adamw(alone), data)
    model = adapted(CONFIGS[name](total_steps=4))
    loop(model, Clipper(adamw(model)), data)
    assert clock(model) == (4, 4)
    assert_same_weights(weights(model), weights(alone))


@pytest.mark.parametrize("way", ["zero_grad to zeros", "grad.zero_()", "model.zero_grad", "new tensors"])
@every_config
def test_every_way_to_clear_gradients(name: str, way: str) -> None:
    """Gradient tensors may live on from step to step; what counts is that they were computed anew."""
    data = batches(4)
    alone = adapted(CONFIGS[name](total_steps=4))
    loop(alone, adamw(alone), data)
    model = adapted(CONFIGS[name](total_steps=4))
    optimizer = adamw(model)
    for batch in data:
        if way == "zero_grad to zeros":
            optimizer.zero_grad(set_to_none=False)
        elif way == "grad.zero_()":
            for parameter in trainable(model):
                if parameter.grad is not None:
                    parameter.grad.zero_()
        elif way == "model.zero_grad":
            model.zero_grad()
        if way == "new tensors":
            loss = model(input_ids=batch, labels=batch).loss
            gradients = torch.autograd.grad(loss, trainable(model))
            for parameter, gradient in zip(trainable(model), gradients, strict=True):
                parameter.grad = gradient
            dynalora.report_task_loss(model, loss)  # nobody else can see it
        else:
            model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    assert clock(model) == (4, 4)
    assert_same_weights(weights(model), weights(alone))


def test_steps_without_clearing_gradients_count() -> None:
    """Whoever never clears gradients steps all the same, once per call."""
    model = adapted(dira(total_steps=5))
    optimizer = sgd(model, lr=1e-4)
    for batch in batches(3):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    assert clock(model) == (3, 5)


class OwnAdamW(torch.optim.AdamW):
    """An optimizer of the user's own, on top of torch's: both have a ``step`` that torch calls hooks around."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@every_config
def test_a_derived_optimizer_makes_one_step(name: str) -> None:
    data = batches(4)
    alone = adapted(CONFIGS[name](total_steps=4))
    loop(alone, adamw(alone), data)
    model = adapted(CONFIGS[name](total_steps=4))
    loop(model, OwnAdamW(trainable(model), lr=1e-2, weight_decay=0.1), data)
    assert clock(model) == (4, 4)
    assert_same_weights(weights(model), weights(alone))


@every_config
def test_a_copied_model_drives_itself(name: str) -> None:
    data = batches(6)
    straight = adapted(CONFIGS[name](total_steps=6))
    optimizer = sgd(straight)
    loop(straight, optimizer, data[:2])
    twin = copy.deepcopy(straight)
    before = weights(straight)
    loop(twin, sgd(twin), data[2:])
    assert clock(straight) == (2, 6)
    assert_same_weights(weights(straight), before)
    loop(straight, optimizer, data[2:])
    assert clock(twin) == clock(straight) == (6, 6)
    assert_same_weights(weights(twin), weights(straight))


@every_config
def test_a_pickled_model_drives_itself(name: str) -> None:
    """As launchers do that send the model to new processes."""
    data = batches(4)
    model = adapted(CONFIGS[name](total_steps=4))
    loop(model, sgd(model), data[:2])
    sent = pickle.loads(pickle.dumps(model))
    loop(model, sgd(model), data[2:])
    loop(sent, sgd(sent), data[2:])
    assert clock(sent) == clock(model) == (4, 4)
    assert_same_weights(weights(sent), weights(model))


@every_config
def test_accelerate_with_accumulation(name: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    data = batches(4, size=4)
    whole = adapted(CONFIGS[name](total_steps=4))
    loop(whole, adamw(whole), data)
    model = adapted(CONFIGS[name](total_steps=4))
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, optimizer = accelerator.prepare(model, adamw(model))
    prepared.train()
    for batch in data:
        for half in batch.split(2):
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(input_ids=half, labels=half).loss)
                optimizer.step()
                optimizer.zero_grad()
    assert clock(model) == (4, 4)
    assert_close_weights(weights(model), weights(whole), 1e-5)


def test_a_model_without_adapters_is_none_of_our_business() -> None:
    linear = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.1)
    adapted(dira())
    linear(torch.randn(4, 3)).sum().backward()
    optimizer.step()


# --- nothing leaks -------------------------------------------------------------------------------------------


@every_config
@pytest.mark.parametrize("steps", [0, 2])
def test_a_deleted_model_is_collected(name: str, steps: int) -> None:
    model = adapted(CONFIGS[name](total_steps=4))
    optimizer = adamw(model)
    loop(model, optimizer, batches(steps) if steps else [])
    references = [weakref.ref(m) for m in model.modules()] + [weakref.ref(p) for p in model.parameters()]
    del model, optimizer
    gc.collect()
    assert [r() for r in references if r() is not None] == []


@every_config
def test_an_optimizer_that_outlives_the_model_keeps_only_its_parameters(name: str) -> None:
    model = adapted(CONFIGS[name](total_steps=4))
    optimizer = adamw(model)
    loop(model, optimizer, batches(1))
    modules = [weakref.ref(m) for m in model.modules()]
    del model
    gc.collect()
    assert [m() for m in modules if m() is not None] == []
    optimizer.step()  # and does no harm


@every_config
def test_a_deleted_adapter_is_collected(name: str) -> None:
    model = adapted(CONFIGS[name](total_steps=4))
    model.add_adapter("second", CONFIGS[name](total_steps=4))
    loop(model, adamw(model), batches(1))
    gone = [weakref.ref(p) for n, p in model.named_parameters() if "default" in n]
    model.set_adapter("second")
    model.delete_adapter("default")
    gc.collect()
    assert [r() for r in gone if r() is not None] == []
    loop(model, adamw(model), batches(2))
    assert clock(model, "second") == (2, 4)


def test_deleting_the_layer_that_carries_the_clock_keeps_it(tmp_path: Path) -> None:
    """Adapters of different layers: the other one's clock must survive a delete."""
    model = adapted(dira(total_steps=6))
    model.add_adapter("second", dira(total_steps=6, target_modules=["v_proj"]))
    model.set_adapter("second")
    loop(model, sgd(model), batches(2))
    model.delete_adapter("default")
    assert clock(model, "second") == (2, 6)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(
        TOYS["llama"].build(), tmp_path / "second", adapter_name="second", is_trainable=True
    )
    assert clock(loaded, "second") == (2, 6)


# --- training that nobody drives -----------------------------------------------------------------------------


@every_config
def test_training_by_hand_is_noticed_at_saving(name: str, tmp_path: Path) -> None:
    model = adapted(CONFIGS[name](total_steps=3))
    model.train()
    for batch in batches(3):
        model.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        for parameter in trainable(model):
            parameter.data -= 0.1 * parameter.grad
    with pytest.raises(ScheduleError) as caught:
        model.save_pretrained(tmp_path / "out")
    assert "optim" in str(caught.value)
    assert "default" in str(caught.value)
    assert not list((tmp_path / "out").glob("*.safetensors")), "nothing half-written"
    dynalora.accept_undriven(model)
    model.save_pretrained(tmp_path / "out")
    assert list((tmp_path / "out").glob("*.safetensors"))


def test_training_by_hand_without_the_first_layer_is_noticed(tmp_path: Path) -> None:
    """Only part of the layers may have been trained: any of them counts."""
    model = adapted(dira(total_steps=3))
    model.train()
    batch = batches(1)[0]
    model(input_ids=batch, labels=batch).loss.backward()
    last = trainable(model)[-1]
    last.data -= 0.1 * last.grad
    with pytest.raises(ScheduleError):
        model.save_pretrained(tmp_path / "out")


@every_config
def test_saving_without_training_is_fine(name: str, tmp_path: Path) -> None:
    """A forward and a backward pass alone, or a changed start, are no training."""
    model = adapted(CONFIGS[name]())
    model.train()
    batch = batches(1)[0]
    model(input_ids=batch, labels=batch).loss.backward()
    model.save_pretrained(tmp_path / "a")
    model = adapted(CONFIGS[name]())
    for parameter in trainable(model):
        parameter.data.mul_(2)
    model.save_pretrained(tmp_path / "b")


# --- the driver under torch's own variations -----------------------------------------------------------------


def test_lbfgs_with_a_closure() -> None:
    model = adapted(dira(total_steps=3), dtype=torch.float64)
    optimizer = torch.optim.LBFGS(trainable(model), lr=0.05, max_iter=3)
    batch = batches(1)[0]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert clock(model) == (3, 3)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("make", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adafactor", "NAdam", "RAdam", "Muon"])
@every_config
def test_every_torch_optimizer(name: str, make: str) -> None:
    if not hasattr(torch.optim, make):
        pytest.skip(f"this torch has no {make}")
    model = adapted(CONFIGS[name](total_steps=4))
    parameters = [p for p in trainable(model) if p.ndim == 2] if make == "Muon" else trainable(model)
    optimizer = getattr(torch.optim, make)(parameters, lr=1e-3)
    before = weights(model)
    loop(model, optimizer, batches(4))
    assert clock(model) == (4, 4)
    assert differs(weights(model), before) > 0
    assert len(optimizer.param_groups) == 1


def test_optimizer_made_before_the_adapter_and_filled_later() -> None:
    """``add_param_group`` after the first steps must be seen."""
    data = batches(4)
    model = adapted(dira(total_steps=4))
    extra = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([extra], lr=0.1)
    extra.grad = torch.zeros(1)
    optimizer.step()
    optimizer.add_param_group({"params": trainable(model)})
    loop(model, optimizer, data)
    alone = adapted(dira(total_steps=4))
    loop(alone, sgd(alone), data)
    assert_same_weights(weights(model), weights(alone))
