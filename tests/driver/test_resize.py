"""Ranks that change in the middle of a run: the parameters, their gradients, optimizer state, loading."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import dynalora
from dynalora.adapter.layer import AdapterLayer
from dynalora.methods.dira import DiraLayer
from tests.driver.loops import trainable
from tests.toys import TOYS

TOY = TOYS["mlp"]
KEEP = [3, 0, 2]

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "torch-adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "transformers-adafactor": lambda p: transformers.Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False),
}


def adapted(**options: Any) -> tuple[Any, AdapterLayer]:
    torch.manual_seed(0)
    model = peft.get_peft_model(
        TOY.build(), dynalora.DiraConfig(r=4, alpha=8, target_modules=["first", "second"], total_steps=50, **options)
    )
    return model, next(m for m in model.modules() if isinstance(m, AdapterLayer))


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int = 0) -> Tensor:
    optimizer.zero_grad()
    loss = TOY.loss(model, seed=seed)
    loss.backward()
    optimizer.step()
    return loss


def new_components(layer: AdapterLayer, count: int = 2) -> dict[str, Tensor]:
    return {"down": torch.randn(count, layer.in_features), "up": torch.zeros(layer.out_features, count)}


@pytest.mark.parametrize("reserve", [0, 7], ids=["exact", "reserved"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_survivors_keep_everything_and_newcomers_start_clean(
    name: str, reserve: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DiraLayer, "reserve", lambda self, config, r: reserve)
    model, layer = adapted(init_weights=False)
    optimizer = OPTIMIZERS[name](trainable(model))
    for seed in range(3):
        held = step(model, optimizer, seed)
    parameters = layer.adapter_parameters("default")
    before = {role: p.detach().clone() for role, p in parameters.items()}
    state = {role: copy.deepcopy(optimizer.state[p]) for role, p in parameters.items()}
    delta = layer.get_delta_weight("default").detach()
    lost = layer.scaling["default"] * torch.outer(before["up"][:, 1], before["down"][1])

    layer.resize("default", KEEP, new_components(layer))
    assert layer.rank("default") == 5
    assert all(p is parameters[role] for role, p in layer.adapter_parameters("default").items())
    torch.testing.assert_close(layer.get_delta_weight("default"), delta - lost)
    factored = {"exp_avg_sq_row": "down", "row_var": "down", "exp_avg_sq_col": "up", "col_var": "up"}
    for role, dim in (("down", 0), ("up", 1)):
        p = parameters[role]
        assert p.shape[dim] == max(reserve, 5)
        assert torch.equal(
            layer.used(role, "default").narrow(dim, 0, 3), before[role].index_select(dim, torch.tensor(KEEP))
        )
        for key, old in state[role].items():
            now = optimizer.state[p][key]
            if not isinstance(old, Tensor) or old.ndim == 0 or (key in factored and factored[key] != role):
                assert now == old if not isinstance(old, Tensor) else torch.equal(now, old), key
                continue
            along = dim if old.ndim == 2 else 0
            assert torch.equal(now.narrow(along, 0, 3), old.index_select(along, torch.tensor(KEEP))), key
            assert not now.narrow(along, 3, now.shape[along] - 3).any(), key
    for seed in range(3):
        held = step(model, optimizer, seed)  # noqa: F841
    assert all(p.isfinite().all() for p in parameters.values())
    if reserve:
        assert not parameters["down"][5:].any()
        assert not parameters["up"][:, 5:].any()


def test_reserved_room_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    after = {}
    for reserve in (0, 9):
        monkeypatch.setattr(DiraLayer, "reserve", lambda self, config, r, n=reserve: n)
        model, layer = adapted(init_weights=False)
        optimizer = OPTIMIZERS["adamw"](trainable(model))
        for seed in range(4):
            if seed == 2:
                torch.manual_seed(1)
                layer.resize("default", KEEP, new_components(layer))
            step(model, optimizer, seed)
        after[reserve] = TOY.logits(model), layer.used("down", "default").detach().clone()
    for exact, reserved in zip(after[0], after[9], strict=True):
        torch.testing.assert_close(reserved, exact, atol=1e-6, rtol=1e-5)


def test_a_second_optimizer_that_steps_later_has_gradients_that_fit() -> None:
    model, layer = adapted(init_weights=False, penalty_weight=0.0)
    down, up = (layer.parameter(role, "default") for role in ("down", "up"))
    one, other = torch.optim.SGD([down], lr=0.1), torch.optim.SGD([up], lr=0.1, momentum=0.5)
    TOY.loss(model).backward()
    one.step()
    expected = up.grad[:, KEEP].clone()
    layer.resize("default", KEEP, new_components(layer))
    assert torch.equal(up.grad[:, :3], expected)
    other.step()
    assert up.shape[1] == down.shape[0] == 5


def test_state_that_cannot_follow_starts_anew_and_says_so() -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["sketch"] = torch.zeros(3, 5)

    model, layer = adapted()
    optimizer = Odd(trainable(model), lr=0.1)
    step(model, optimizer)
    with pytest.warns(UserWarning, match="sketch"):
        layer.resize("default", KEEP)
    assert layer.parameter("down", "default") not in optimizer.state
    step(model, optimizer)


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        (lambda p: torch.optim.Rprop(p, lr=0.02), "step_size", 0.02),
        (lambda p: torch.optim.Adagrad(p, lr=0.02, initial_accumulator_value=0.3), "sum", 0.3),
    ],
    ids=["rprop", "adagrad"],
)
def test_new_components_begin_as_the_optimizer_begins(make: Any, key: str, value: float) -> None:
    model, layer = adapted(init_weights=False)
    optimizer = make(trainable(model))
    step(model, optimizer)
    layer.resize("default", KEEP, new_components(layer))
    for role, dim in (("down", 0), ("up", 1)):
        state = optimizer.state[layer.parameter(role, "default")][key]
        torch.testing.assert_close(state.narrow(dim, 3, 2), torch.full_like(state.narrow(dim, 3, 2), value))


class Remembering(torch.optim.SGD):
    """Makes state of any form at its first step with a parameter."""

    def __init__(self, parameters: Any, make: Callable[[Tensor], dict[str, Any]], within: bool = False) -> None:
        self.make, self.within = make, within
        super().__init__(parameters, lr=0.1)

    def states(self) -> Any:
        return self.param_groups[0].setdefault("state", {}) if self.within else self.state

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for parameter in [parameter for group in self.param_groups for parameter in group["params"]]:
            state = self.states().setdefault(parameter, {})
            if not state.keys() - {"seed"}:
                state.update(self.make(parameter.detach()))


class Projection:
    def __init__(self, parameter: Tensor) -> None:
        self.matrix = torch.eye(parameter.shape[0])


@pytest.mark.parametrize("key", ["x0", "slow_params", "slow_buffer"])
def test_other_copies_of_the_weights_know_new_components(key: str) -> None:
    model, layer = adapted(init_weights=False)
    optimizer = Remembering(trainable(model), lambda p: {key: p.clone()})
    step(model, optimizer)
    layer.resize("default", KEEP, new_components(layer))
    for parameter in layer.adapter_parameters("default").values():
        assert torch.equal(optimizer.state[parameter][key], parameter.detach())


def test_a_copy_that_stands_for_zeros_knows_new_components() -> None:
    """Prodigy keeps one number for a parameter that began with zeros, as LoRA's second factor does."""
    model, layer = adapted()
    optimizer = Remembering(trainable(model), lambda p: {"s": torch.zeros(p.numel()), "p0": torch.zeros(())})
    step(model, optimizer)
    up = layer.parameter("up", "default")
    layer.resize("default", KEEP, {**new_components(layer), "up": torch.ones(layer.out_features, 2)})
    kept, new = optimizer.state[up]["p0"].view(up.shape).split([3, 2], dim=1)
    assert not kept.any()
    assert (new == 1).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: {"exp_avg": torch.zeros_like(p), "projector": Projection(p)},
        lambda p: {"exp_avg": torch.zeros_like(p), "Q": [torch.eye(size) for size in p.shape]},
        lambda p: {"exp_avg": torch.zeros_like(p), "s": torch.zeros(1), "p0": torch.zeros(1)},
        lambda p: {"exp_avg": torch.zeros(2, p.shape[1])},
    ],
    ids=["object", "list", "sample", "projected"],
)
@pytest.mark.parametrize("way", ["resize", "compact"])
def test_state_in_another_form_starts_anew(make: Any, way: str) -> None:
    model, layer = adapted(init_weights=False)
    optimizer = Remembering(trainable(model), make)
    for parameter in trainable(model):
        optimizer.state[parameter]["seed"] = 7  # as a constructor puts it there, once
    step(model, optimizer)
    down = layer.parameter("down", "default")
    down.data[1] = down.data[0]  # so that compacting rewrites the factors
    change = {
        "resize": lambda: layer.resize("default", KEEP, new_components(layer)),
        "compact": lambda: dynalora.compact(model),
    }
    with pytest.warns(UserWarning, match="starts anew"):
        change[way]()
    assert optimizer.state[down] == {"seed": 7}
    step(model, optimizer)
    assert optimizer.state[down].keys() > {"seed"}


def test_two_averages_in_one_array_follow() -> None:
    model, layer = adapted(init_weights=False)
    optimizer = Remembering(trainable(model), lambda p: {"state1": torch.stack([p, 2 * p])})
    step(model, optimizer)
    up = layer.parameter("up", "default")
    before = optimizer.state[up]["state1"]
    layer.resize("default", KEEP, new_components(layer))
    after = optimizer.state[up]["state1"]
    assert torch.equal(after[..., :3], before[..., KEEP])
    assert not after[..., 3:].any()


def test_state_that_is_kept_in_a_group_follows() -> None:
    model, layer = adapted(init_weights=False)
    optimizer = Remembering(trainable(model), lambda p: {"exp_avg": p.clone()}, within=True)
    step(model, optimizer)
    layer.resize("default", KEEP, new_components(layer))
    for parameter in layer.adapter_parameters("default").values():
        assert optimizer.states()[parameter]["exp_avg"].shape == parameter.shape


def test_lbfgs_forgets_its_history() -> None:
    model, layer = adapted(init_weights=False)
    optimizer = torch.optim.LBFGS(trainable(model), lr=0.1, max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = TOY.loss(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.state
    layer.resize("default", KEEP, new_components(layer, 3))
    assert not optimizer.state
    optimizer.step(closure)
    assert layer.parameter("down", "default").shape[0] == 6


def test_samples_of_a_vector_are_not_fitted_to_it() -> None:
    """What is saved of Prodigy's every eleventh entry is shorter than the vector, of whatever rank."""
    model = peft.get_peft_model(TOY.build(), dynalora.DiselConfig(r=4, target_modules=["first"]))
    make = lambda p: {"exp_avg": torch.zeros_like(p), "s": torch.ones(p.flatten()[::11].shape)}  # noqa: E731
    optimizer = Remembering(trainable(model), make)
    step(model, optimizer)
    other = Remembering(trainable(model), make)
    other.load_state_dict(optimizer.state_dict())
    step(model, other)
    vectors = [p for p in trainable(model) if p.ndim == 1]
    assert vectors
    assert all(other.state[p]["s"].shape == (1,) for p in vectors)


def test_fused_sgd_takes_parameters_whose_first_gradient_comes_later() -> None:
    late, early = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    model, _ = adapted(init_weights=False)
    optimizer = torch.optim.SGD([early, late, *trainable(model)], lr=0.1, momentum=0.5, fused=True)
    early.grad = torch.ones(3)
    step_without_zeroing(model, optimizer)
    late.grad, early.grad = torch.ones(3), torch.ones(3)
    step_without_zeroing(model, optimizer)
    torch.testing.assert_close(late.detach(), torch.full((3,), 0.9))
    torch.testing.assert_close(early.detach(), torch.full((3,), 0.75))


def step_without_zeroing(model: Any, optimizer: torch.optim.Optimizer) -> None:
    TOY.loss(model).backward()
    optimizer.step()


def test_what_shrinks_shrinks_in_the_copies_that_optimizers_go_on_from() -> None:
    """Otherwise a schedule-free optimizer would pull components up again that the penalty shrinks after its step."""
    torch.manual_seed(0)
    config = dynalora.DiraConfig(
        penalty_weight=9.0, r=4, target_modules=["first"], penalty_mode="proximal", total_steps=9
    )
    model = peft.get_peft_model(TOY.build(), config)
    layer = next(m for m in model.modules() if isinstance(m, AdapterLayer))
    down, up = (layer.parameter(role, "default") for role in ("down", "up"))
    with torch.no_grad():
        up.fill_(0.3)
    optimizer = Remembering(trainable(model), lambda p: {"z": p.clone(), "ax": p.clone()})
    optimizer.param_groups[0]["lr"] = 1e-3
    step(model, optimizer)
    for parameter in (down, up):
        state = optimizer.state[parameter]
        assert torch.equal(state["z"], parameter.detach())
        assert not torch.equal(state["ax"], parameter.detach())


@pytest.mark.parametrize("kind", ["AdamW8bit", "Lion8bit", "PagedAdamW8bit"])
def test_8bit_state_follows(kind: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(1200, 1100))
    model = peft.get_peft_model(
        base, dynalora.DiraConfig(r=6, target_modules=["0"], penalty_weight=0.0, init_weights=False)
    )
    layer = next(m for m in model.modules() if isinstance(m, AdapterLayer))
    optimizer = getattr(bitsandbytes.optim, kind)(trainable(model), lr=1e-3)
    x = torch.randn(3, 1200)

    def train() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    def unpacked(p: Tensor) -> Tensor:
        state = optimizer.state[p]
        return bitsandbytes.functional.dequantize_blockwise(
            state["state1"], absmax=state["absmax1"], code=state["qmap1"], blocksize=256
        )

    alone = torch.nn.Parameter(torch.ones(100, 100))
    alone.grad = torch.ones_like(alone)
    try:
        getattr(bitsandbytes.optim, kind)([alone], lr=1e-3).step()
    except Exception as error:
        pytest.skip(f"bitsandbytes has no 8-bit optimizers here: {error}")
    train()
    down = layer.parameter("down", "default")
    assert optimizer.state[down]["state1"].dtype == torch.uint8
    before = unpacked(down).clone()
    layer.resize("default", [4, 1], {"down": torch.randn(3, 1200), "up": torch.zeros(1100, 3)})
    after = unpacked(down)
    scale = before.abs().max()
    assert (after[:2] - before[[4, 1]]).abs().max() < 0.02 * scale
    assert after[2:].abs().max() < 1e-4 * scale  # zero as 8 bits write it beside other numbers
    for _ in range(2):
        train()
    assert down.shape == (5, 1200)
    assert down.isfinite().all()


# --- saving and loading --------------------------------------------------------------------------------------


def test_saved_adapter_has_its_ranks_and_its_scaling(tmp_path: Path) -> None:
    for reserve in (0, 9):
        folder = tmp_path / str(reserve)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DiraLayer, "reserve", lambda self, config, r, n=reserve: n)
            model, layer = adapted(init_weights=False, alpha_pattern={"first": 7})
            layer.resize("default", [2])
            model.save_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(TOY.build(), folder)
        assert model.rank_pattern == loaded.rank_pattern == {"first": 1, "second": 4}
        torch.testing.assert_close(TOY.logits(loaded), TOY.logits(model), atol=1e-6, rtol=1e-6)
        assert {k: tuple(p.shape) for k, p in loaded.named_parameters() if "first.dira" in k} == {
            "base_model.model.first.dira_down.default": (1, 12),
            "base_model.model.first.dira_up.default": (20, 1),
        }
        # And once more, from what was loaded.
        loaded.save_pretrained(folder / "again")
        again = peft.PeftModel.from_pretrained(TOY.build(), folder / "again")
        assert torch.equal(TOY.logits(again), TOY.logits(loaded))


@pytest.mark.parametrize("reserve", [0, 9], ids=["into exact", "into reserved"])
@pytest.mark.parametrize("written_with", [0, 9], ids=["from exact", "from reserved"])
@pytest.mark.parametrize("way", ["state_dict", "load_adapter", "set_state"])
def test_loading_takes_on_the_ranks(way: str, written_with: int, reserve: int, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiraLayer, "reserve", lambda self, config, r: written_with)
        model, layer = adapted(init_weights=False)
        layer.resize("default", [2, 1], new_components(layer, 5))
        expected = TOY.logits(model)
        patch.setattr(DiraLayer, "reserve", lambda self, config, r: reserve)
        other, into = adapted(init_weights=False)
        parameters = list(other.parameters())
        if way == "state_dict":
            result = other.load_state_dict(model.state_dict())
            assert not result.missing_keys
            assert not result.unexpected_keys
        elif way == "load_adapter":
            model.save_pretrained(tmp_path)
            other.load_adapter(tmp_path, "default", is_trainable=True)
        else:
            peft.set_peft_model_state_dict(other, peft.get_peft_model_state_dict(model))
    assert into.rank("default") == 7
    assert all(one is two for one, two in zip(other.parameters(), parameters, strict=True))
    assert into.parameter("down", "default").shape[0] == max(7, reserve)
    torch.testing.assert_close(TOY.logits(other), expected, atol=1e-6, rtol=1e-6)


def test_an_optimizer_goes_on_after_other_ranks_are_loaded() -> None:
    model, layer = adapted(init_weights=False)
    optimizer = OPTIMIZERS["adamw"](trainable(model))
    step(model, optimizer)
    small = copy.deepcopy(model)
    next(m for m in small.modules() if isinstance(m, AdapterLayer)).resize("default", [1])
    model.load_state_dict(small.state_dict())
    step(model, optimizer)
    assert layer.rank("default") == 1


def test_export_and_merge_after_a_change(tmp_path: Path) -> None:
    model, layer = adapted(init_weights=False)
    layer.resize("default", [0], new_components(layer, 1))
    expected = TOY.logits(model)
    dynalora.export_lora(model, tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(TOY.build(), tmp_path / "lora")
    torch.testing.assert_close(TOY.logits(loaded), expected, atol=1e-5, rtol=1e-5)
    assert math.isclose(loaded.base_model.model.first.scaling["default"], layer.scaling["default"])
    torch.testing.assert_close(TOY.logits(model.merge_and_unload()), expected, atol=1e-5, rtol=1e-5)


def test_impossible_sizes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiraLayer, "reserve", lambda self, config, r: 5)
    model, layer = adapted()
    with pytest.raises(ValueError, match="at least one"):
        layer.resize("default", [])
    with pytest.raises(ValueError, match="reserved"):
        layer.resize("default", KEEP, new_components(layer, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.resize("default", KEEP, new_components(layer, 2))
    assert layer.rank("default") == 5
    assert TOY.logits(model).isfinite().all()
