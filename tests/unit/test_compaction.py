"""Dead components are removed: the function stays, training goes on, files hold the smaller adapter."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import dynalora
from dynalora import DiraConfig, DiselConfig, DisloraConfig, PedyraConfig
from dynalora.adapter.layer import AdapterLayer
from dynalora.errors import ConfigError, DynaloraError, UnsupportedError
from dynalora.export import compact_adapter_folder, load_without_base
from tests.driver.loops import trainable
from tests.toys import TOYS

TOY = TOYS["llama"]
TARGETS = ["q_proj", "down_proj"]
DEAD = [1, 4]
ALIVE = [0, 2, 3, 5]

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


def adapted(config: type = DiraConfig, **options: Any) -> Any:
    torch.manual_seed(0)
    settings = {"r": 6, "alpha": 9, "target_modules": TARGETS, "total_steps": 50, "init_weights": False}
    return peft.get_peft_model(TOY.build(), config(**{**settings, **options}))


def layers_of(model: Any) -> list[AdapterLayer]:
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]


@torch.no_grad()
def kill(model: Any, dead: list[int] = DEAD) -> None:
    """Bring some components to zero in both factors."""
    for layer in layers_of(model):
        layer.parameter("up", "default")[:, dead] = 0
        layer.parameter("down", "default")[dead] = 0


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    TOY.loss(model, seed=seed).backward()
    optimizer.step()


def of_rank(tensor: Tensor, role: str) -> Tensor:
    """The survivors' part of a tensor of a parameter's shape."""
    return tensor.index_select(0 if role == "down" else 1, torch.tensor(ALIVE))


@pytest.mark.parametrize("threshold", [0.0, 1e-4], ids=["exact", "default"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_survivors_keep_their_values_and_optimizer_state(name: str, threshold: float) -> None:
    model = adapted()
    kill(model)
    optimizer = OPTIMIZERS[name](trainable(model))
    for seed in range(3):
        step(model, optimizer, seed)
    logits = TOY.logits(model)
    before = [
        {role: (p, p.detach().clone(), copy.deepcopy(optimizer.state[p])) for role, p in found.items()}
        for found in (layer.adapter_parameters("default") for layer in layers_of(model))
    ]
    count = sum(p.numel() for p in trainable(model))

    done = dynalora.compact(model, threshold)

    assert done.removed == 2 * len(before)
    assert (done.parameters_before, done.parameters_after) == (count, count * 4 // 6)
    assert sum(p.numel() for p in trainable(model)) == done.parameters_after
    assert all((row.before, row.after, row.lost, row.rewritten) == (6, 4, 0.0, False) for row in done.matrices)
    assert {row.module for row in done.matrices} == set(model.base_model.rank_pattern)
    torch.testing.assert_close(TOY.logits(model), logits, atol=1e-6, rtol=1e-6)
    for layer, roles in zip(layers_of(model), before, strict=True):
        for role, (parameter, value, state) in roles.items():
            assert layer.parameter(role, "default") is parameter
            assert torch.equal(parameter, of_rank(value, role))
            now = optimizer.state[parameter]
            assert now.keys() == state.keys()
            for key, old in state.items():
                expected = of_rank(old, role) if isinstance(old, Tensor) and old.ndim else old
                assert torch.equal(torch.as_tensor(now[key]), torch.as_tensor(expected)), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_like_a_run_that_keeps_the_dead(name: str) -> None:
    weights = {}
    for compacts in (False, True):
        model = adapted(penalty_weight=0.05)
        kill(model)
        optimizer = OPTIMIZERS[name](trainable(model))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
        for seed in range(8):
            if compacts and seed == 4:
                assert dynalora.compact(model).removed == 8
            step(model, optimizer, seed)
            schedule.step()
        assert [layer.rank("default") for layer in layers_of(model)] == [4 if compacts else 6] * 4
        weights[compacts] = [
            (role, p.detach()) for layer in layers_of(model) for role, p in layer.adapter_parameters("default").items()
        ]
    for (role, whole), (_, compacted) in zip(weights[False], weights[True], strict=True):
        torch.testing.assert_close(compacted, of_rank(whole, role), atol=1e-6, rtol=1e-5)


def test_dependent_components_are_rewritten_to_singular_ones() -> None:
    """Six components of which only three directions are different: none is small, and three are too many."""
    model = adapted()
    with torch.no_grad():
        for layer in layers_of(model):
            up, down = (layer.parameter(role, "default") for role in ("up", "down"))
            up[:, 3:] = up[:, :3] @ torch.randn(3, 3)
            down[3:] = torch.randn(3, 3) @ down[:3]
    logits = TOY.logits(model)
    deltas = [layer.get_delta_weight("default").detach() for layer in layers_of(model)]
    assert dynalora.compact(adapted_copy := copy.deepcopy(model), rewrite=False).removed == 0
    assert TOY.logits(adapted_copy).equal(logits)
    done = dynalora.compact(model)
    assert [(row.after, row.rewritten) for row in done.matrices] == [(3, True)] * 4
    assert done.lost < 1e-5
    torch.testing.assert_close(TOY.logits(model), logits, atol=1e-4, rtol=1e-4)
    for layer, delta in zip(layers_of(model), deltas, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("default"), delta, atol=1e-5, rtol=1e-4)
        up, down = (layer.parameter(role, "default").detach() for role in ("up", "down"))
        values = torch.linalg.svdvals(delta)[:3] / layer.scaling["default"]
        torch.testing.assert_close(up.t() @ up, values.diag(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(down @ down.t(), values.diag(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_and_first_moments_follow_a_rewriting_exactly(name: str) -> None:
    """After a step of size 0 a first moment is a multiple of the gradient, which autograd knows of any factors."""
    model = adapted(penalty_weight=0.0)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.parameter("down", "default")[3:] = torch.randn(3, 3) @ layer.parameter("down", "default")[:3]
    optimizer = OPTIMIZERS[name](trainable(model))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step(model, optimizer, 0)
    held = [
        (layer.parameter("down", "default").detach().double(), layer.parameter("up", "default").detach().double())
        for layer in layers_of(model)
    ]
    squares = [
        {role: optimizer.state[p].get("exp_avg_sq") for role, p in layer.adapter_parameters("default").items()}
        for layer in layers_of(model)
    ]
    assert all(row.rewritten and row.after == 3 for row in dynalora.compact(model).matrices)
    followed = [p.grad.clone() for p in trainable(model)]
    moments = [optimizer.state[p]["exp_avg" if name == "adamw" else "momentum_buffer"] for p in trainable(model)]
    optimizer.zero_grad()
    TOY.loss(model, seed=0).backward()
    share = 0.1 if name == "adamw" else 1.0  # Adam's average starts at a tenth of the first gradient
    for parameter, gradient, moment in zip(trainable(model), followed, moments, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(moment / share, parameter.grad, atol=1e-6, rtol=1e-3)
    if name == "adamw":
        for layer, (down, up), square in zip(layers_of(model), held, squares, strict=True):
            new_down, new_up = (layer.parameter(r, "default").detach().double() for r in ("down", "up"))
            s = new_down @ torch.linalg.pinv(down, rtol=1e-5)
            t = torch.linalg.pinv(up, rtol=1e-5) @ new_up
            expected = {"up": square["up"].double() @ (s**2).t(), "down": (t**2).t() @ square["down"].double()}
            for role, value in expected.items():
                now = optimizer.state[layer.parameter(role, "default")]["exp_avg_sq"].double()
                torch.testing.assert_close(now, value, rtol=1e-3, atol=1e-12)


def test_state_in_another_form_starts_anew_and_says_so() -> None:
    model = adapted()
    with torch.no_grad():
        for layer in layers_of(model):
            layer.parameter("down", "default")[3:] = torch.randn(3, 3) @ layer.parameter("down", "default")[:3]
    optimizer = torch.optim.Adafactor(trainable(model), lr=1e-3)
    step(model, optimizer, 0)
    with torch.no_grad():  # the step has made them independent again
        for layer in layers_of(model):
            layer.parameter("down", "default")[3:] = torch.randn(3, 3) @ layer.parameter("down", "default")[:3]
    with pytest.warns(UserWarning, match="Adafactor keeps 'row_var'"):
        dynalora.compact(model)
    step(model, optimizer, 1)
    assert TOY.logits(model).isfinite().all()


def test_small_components_go_relative_to_the_largest_of_all_matrices() -> None:
    model = adapted()
    sizes = torch.tensor([1.0, 0.5, 2e-3, 0.5e-3, 1e-6, 0.0])
    with torch.no_grad():
        for number, layer in enumerate(layers_of(model)):
            up = torch.linalg.qr(torch.randn(layer.out_features, 6)).Q
            down = torch.linalg.qr(torch.randn(layer.in_features, 6)).Q.t()
            layer.parameter("up", "default").copy_(up * sizes * (1.0 if number else 1e-5))
            layer.parameter("down", "default").copy_(down)
    done = dynalora.compact(model, 1e-3)
    # The first matrix is small as a whole: it keeps its one largest component.
    assert [row.after for row in done.matrices] == [1, 3, 3, 3]
    assert done.largest == pytest.approx(1.5)  # s = 9 / 6
    assert done.smallest == pytest.approx(1.5 * 2e-3)
    gone = float(sizes[3:].norm() / sizes.norm())
    assert done.matrices[1].lost == pytest.approx(gone, rel=1e-3)
    assert done.lost == done.matrices[0].lost == pytest.approx(float(sizes[1:].norm() / sizes.norm()), rel=1e-3)


def test_a_saved_adapter_has_its_ranks_in_another_process(tmp_path: Path) -> None:
    model = adapted()
    kill(model, [0, 1, 2])
    dynalora.compact(model)
    model.save_pretrained(tmp_path)
    torch.save(TOY.logits(model), tmp_path / "expected.pt")
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"].values()) == {3}
    script = """
import sys, torch, dynalora
from peft import PeftModel
from tests.toys import TOYS
loaded = PeftModel.from_pretrained(TOYS["llama"].build(), sys.argv[1])
assert set(loaded.base_model.rank_pattern.values()) == {3}
assert sum(p.numel() for n, p in loaded.named_parameters() if "dira" in n) == int(sys.argv[2])
expected = torch.load(sys.argv[1] + "/expected.pt", weights_only=True)
torch.testing.assert_close(TOYS["llama"].logits(loaded), expected, atol=1e-6, rtol=1e-6)
"""
    count = sum(p.numel() for p in trainable(model))
    subprocess.run([sys.executable, "-c", script, str(tmp_path), str(count)], check=True, timeout=900)


def test_a_run_that_compacts_itself_equals_one_that_is_compacted(tmp_path: Path) -> None:
    after = {}
    for itself in (False, True):
        model = adapted(penalty_weight=0.05, compact_every=3 if itself else None, compact_threshold=0.0)
        kill(model)
        optimizer = OPTIMIZERS["adamw"](trainable(model))
        for seed in range(5):
            step(model, optimizer, seed)
            if not itself and seed == 2:
                dynalora.compact(model, 0.0, rewrite=False)
        assert model.base_model.rank_pattern == dict.fromkeys(model.base_model.rank_pattern, 4)
        after[itself] = [p.detach() for p in trainable(model)]
    assert all(one.equal(other) for one, other in zip(after[False], after[True], strict=True))


def test_a_run_that_compacts_itself_resumes_exactly() -> None:
    def begin() -> tuple[Any, torch.optim.Optimizer]:
        model = adapted(penalty_weight=0.05, compact_every=2)
        return model, OPTIMIZERS["adamw"](trainable(model))

    model, optimizer = begin()
    kill(model)
    for seed in range(3):
        step(model, optimizer, seed)
    state, steps = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    for seed in range(3, 6):
        step(model, optimizer, seed)
    other, continued = begin()
    other.load_state_dict(state)
    continued.load_state_dict(steps)
    for seed in range(3, 6):
        step(other, continued, seed)
    assert other.base_model.rank_pattern == model.base_model.rank_pattern
    assert all(one.equal(two) for one, two in zip(trainable(model), trainable(other), strict=True))


def test_pedyra_is_compacted_once_its_ranks_have_settled() -> None:
    for room in (None, 8):
        model = adapted(
            PedyraConfig, adjust_start=1, adjust_interval=1, adjust_end=2, max_rank=room, match_step=False
        ).double()
        optimizer = OPTIMIZERS["adamw"](trainable(model))
        step(model, optimizer, 0)
        with pytest.raises(UnsupportedError, match="moves its ranks until step 2, and is at step 1"):
            dynalora.compact(model)
        step(model, optimizer, 1)
        with torch.no_grad():
            for layer in layers_of(model):
                layer.used("e", "default")[1:] = 0
        logits = TOY.logits(model)
        done = dynalora.compact(model)
        assert [row.after for row in done.matrices] == [1] * 4
        assert not any(row.rewritten for row in done.matrices)
        torch.testing.assert_close(TOY.logits(model), logits, atol=1e-12, rtol=1e-12)
        step(model, optimizer, 2)


def test_gates_that_never_open_take_their_components_with_them(tmp_path: Path) -> None:
    model = adapted(DiselConfig, gate_bias_init=0.0)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.parameter("gate_bias", "default")[DEAD] = -30.0
    batches = [{"input_ids": TOY.batch(seed)["input_ids"]} for seed in range(2)]
    recorded = dynalora.record_gates(model, batches)
    logits = TOY.logits(model)
    assert dynalora.compact(copy.deepcopy(model)).removed == 0
    done = dynalora.compact(model, gates=recorded)
    assert [row.after for row in done.matrices] == [4] * 4
    torch.testing.assert_close(TOY.logits(model), logits, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(TOY.build(), tmp_path)
    assert torch.equal(TOY.logits(loaded), TOY.logits(model))
    with pytest.raises(ConfigError, match=r"6 gates for .* has 4; record them anew"):
        dynalora.compact(model, gates=recorded)


@pytest.mark.parametrize("gates", [False, True])
def test_a_trained_diagonal_of_zero_is_dead_with_gates_too(gates: bool) -> None:
    model = adapted(PedyraConfig, gates=gates, mode="prune", adjust_start=1, adjust_interval=1, adjust_end=1)
    model.double()
    for parameter in trainable(model):
        parameter.requires_grad_(False)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.parameter("e", "default")[DEAD] = 0
    logits = TOY.logits(model)
    assert [row.after for row in dynalora.compact(model).matrices] == [len(ALIVE)] * 4
    torch.testing.assert_close(TOY.logits(model), logits, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("bottleneck", [None, 3])
def test_gated_adapters_train_on(bottleneck: int | None) -> None:
    model = adapted(DiselConfig, gate_bottleneck=bottleneck).double()
    kill(model)
    optimizer = OPTIMIZERS["adamw"](trainable(model))
    step(model, optimizer, 0)
    logits = TOY.logits(model)
    # The first step has moved the gates only where components are alive; the dead stay so.
    assert dynalora.compact(model).removed == 8
    torch.testing.assert_close(TOY.logits(model), logits, atol=1e-12, rtol=1e-10)
    step(model, optimizer, 1)


def test_what_cannot_be_compacted_says_why() -> None:
    with pytest.raises(UnsupportedError, match="frozen counterpart"):
        dynalora.compact(adapted(DisloraConfig, r=2, tsd_count=2))
    model = adapted()
    with pytest.raises(ConfigError, match="threshold=1"):
        dynalora.compact(model, 1.0)
    with pytest.raises(DynaloraError, match="no dynalora adapter named 'other'"):
        dynalora.compact(model, adapter_name="other")
    with pytest.raises(ConfigError, match="has none"):
        dynalora.compact(model, gates=[])
    model.merge_adapter()
    with pytest.raises(UnsupportedError, match="unmerge_adapter"):
        dynalora.compact(model)
    with pytest.raises(ConfigError, match="compact_every must be a positive number of steps, or None, got 0"):
        DiraConfig(compact_every=0)
    with pytest.raises(ConfigError, match="compact_threshold"):
        DiraConfig(compact_threshold=1)


def test_an_adapter_that_has_learnt_nothing_is_left_as_it_is() -> None:
    model = adapted(init_weights=True)
    done = dynalora.compact(model)
    assert (done.removed, done.parameters_before) == (0, done.parameters_after)
    assert [layer.rank("default") for layer in layers_of(model)] == [6] * 4


def test_shapes_that_several_processes_share_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UnsupportedError, match="trains on 2 processes"):
        dynalora.compact(adapted())
    model = adapted(compact_every=30)
    with pytest.raises(UnsupportedError, match="trains on 2 processes"):  # at the first step, not at the thirtieth
        step(model, OPTIMIZERS["adamw"](trainable(model)), 0)


def test_a_saved_adapter_is_compacted_without_its_base(tmp_path: Path) -> None:
    model = adapted(modules_to_save=["lm_head"], exclude_modules=["layers.1.mlp.down_proj"])
    kill(model)
    model.save_pretrained(tmp_path / "whole")
    done = compact_adapter_folder(str(tmp_path / "whole"), tmp_path / "small")
    assert [row.after for row in done.matrices] == [4] * 3
    loaded = peft.PeftModel.from_pretrained(TOY.build(), tmp_path / "small")
    torch.testing.assert_close(TOY.logits(loaded), TOY.logits(model), atol=1e-6, rtol=1e-6)
    before, after = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("whole", "small"))
    assert {key for key in before if before[key] != after[key]} == {"rank_pattern", "scaling_ranks"}
    assert set(load_without_base(str(tmp_path / "small")).base_model.rank_pattern.values()) == {4}
    with pytest.raises(DynaloraError, match="already exists"):
        compact_adapter_folder(str(tmp_path / "whole"), tmp_path / "small")
