"""TriAdaptLoRA against its float64 reference: the core, its scores, and how it grows."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynalora import TriAdaptLoraConfig, compact, export_lora
from dynalora.adapter.layer import AdapterLayer
from dynalora.errors import CheckpointError, ConfigError, ScheduleError, UnsupportedError
from tests.reference import growth as reference

STEPS = 8


def model_of(sizes: list[int], *, seed: int = 0, **options: Any) -> tuple[Any, list[Any]]:
    """Linear layers in a row, float64: (PEFT model, layers)."""
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)]
    defaults = {"r": 2, "alpha": 3, "target_modules": [str(index) for index in range(len(layers))]}
    config = TriAdaptLoraConfig(**{**defaults, "total_steps": STEPS, **options})
    model = peft.get_peft_model(nn.Sequential(*layers).double(), config, autocast_adapter_dtype=False).double()
    adapted = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    with torch.no_grad():
        for layer in adapted if not config.init_weights else ():
            core = layer.used("core", "default")
            core += 0.3 * torch.randn_like(core)
            layer.buffer("last_norm", "default").copy_(core.norm())
    return model, adapted


def loss_of(weights: list[Tensor], x: Tensor) -> Tensor:
    for weight in weights:
        x = x @ weight.T
    return (x - 1).square().mean()


def used(layer: Any) -> dict[str, Tensor]:
    return {role: layer.used(role, "default").detach().clone() for role in ("down", "core", "up")}


@settings(deadline=None, max_examples=12)
@given(
    sizes=st.lists(st.integers(4, 8), min_size=3, max_size=5),
    seed=st.integers(0, 99),
    k=st.integers(1, 2),
    exponential=st.booleans(),
    room=st.sampled_from([None, 5]),
)
def test_training_is_the_papers(sizes: list[int], seed: int, k: int, exponential: bool, room: int | None) -> None:
    options = {"target_rank": 4, "grow_start": 2, "grow_interval": 2, "grow_rank": k, "max_rank": room}
    growth = "exponential" if exponential else "linear"
    model, layers = model_of(sizes, seed=seed, growth=growth, init_weights=False, **options)
    weights = [layer.base_layer.weight.detach() for layer in layers]
    mirrors = [used(layer) for layer in layers]
    norms = [reference.tri_score(mirror["core"], 1, 0.0)[1] for mirror in mirrors]
    blocks = [1] * len(layers)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for number in range(1, STEPS + 1):
        x = torch.randn(6, sizes[0], generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        for mirror in mirrors:
            for tensor in mirror.values():
                tensor.requires_grad_()
        wholes = [
            w + reference.tri_update(m["down"], m["core"], m["up"], 3 / 2)
            for w, m in zip(weights, mirrors, strict=True)
        ]
        loss_of(wholes, x).backward()
        for mirror in mirrors:
            for role, tensor in mirror.items():
                assert tensor.grad is not None
                mirror[role] = (tensor - 0.05 * tensor.grad).detach()
        missing = 4 * len(layers) - sum(len(mirror["core"]) for mirror in mirrors)
        if number % 2 == 0 and missing >= k:
            scores = []
            for i, mirror in enumerate(mirrors):
                score, norms[i] = reference.tri_score(mirror["core"], blocks[i], norms[i])
                scores.append(score)
            count = min(reference.tri_count(missing, (number - 2) / (STEPS - 2), exponential), missing // k)
            able = [i for i, w in enumerate(weights) if len(mirrors[i]["core"]) + k <= min(room or 99, *w.shape)]
            for i in sorted(able, key=lambda i: (-scores[i], i))[:count]:
                was, mirror = len(mirrors[i]["core"]), mirrors[i]
                assert layers[i].rank("default") == was + k
                drawn = used(layers[i])
                mirror["core"] = reference.bordered(mirror["core"], k)
                mirror["down"] = torch.cat([mirror["down"], drawn["down"][was:]])
                mirror["up"] = torch.cat([mirror["up"], torch.zeros_like(drawn["up"][:, was:])], 1)
                blocks[i] += 1
        for layer, mirror in zip(layers, mirrors, strict=True):
            for role, tensor in used(layer).items():
                torch.testing.assert_close(tensor, mirror[role], atol=1e-9, rtol=1e-9, msg=role)
            if room:
                assert (
                    layer.parameter("core", "default").shape
                    == (5 if min(layer.base_layer.weight.shape) > 4 else 4,) * 2
                )


def test_everything_moves_from_the_start_that_is_the_base_model() -> None:
    """As released, `up` and the core are both zero, and so are all gradients."""
    model, layers = model_of([6, 5, 7], grow_start=6)
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = loss_of([layer.base_layer.weight for layer in layers], x)
    torch.testing.assert_close((model(x) - 1).square().mean(), expected, atol=0, rtol=0)
    assert all(torch.equal(used(layer)["core"], torch.eye(2, dtype=torch.float64)) for layer in layers)
    before = [used(layer) for layer in layers]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    for layer, was in zip(layers, before, strict=True):
        assert not any(torch.equal(tensor, was[role]) for role, tensor in used(layer).items())


def test_growing_changes_nothing_and_the_new_block_trains() -> None:
    model, layers = model_of([6, 5, 7], init_weights=False, grow_start=6)
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = model(x).detach()
    config = model.peft_config["default"]
    for layer in layers:
        layer.grow(config, "default", torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x), expected)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    for layer in layers:
        core = used(layer)["core"]
        assert core[2, :2].any()
        assert core[:2, 2].any()
        assert core[2, 2] != 1


@pytest.mark.parametrize("room", [None, 6])
@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_the_optimizers_state_of_a_core_follows_in_both_dimensions(kind: str, room: int | None) -> None:
    model, (layer,) = model_of([7, 6], r=3, init_weights=False, max_rank=room, grow_start=6)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(parameters, lr=0.1) if kind == "adamw" else torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    )
    model(torch.randn(3, 7, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    core = layer.parameter("core", "default")
    key = "exp_avg" if kind == "adamw" else "momentum_buffer"
    was, gradient = optimizer.state[core][key].clone(), core.grad.clone()
    layer.resize(
        "default",
        [2, 0],
        {
            "down": torch.ones(1, 7),
            "up": torch.ones(6, 1),
            "core": (torch.tensor([[5.0, 6.0]]), torch.tensor([[7.0], [8.0], [9.0]])),
        },
    )
    assert layer.used("core", "default")[2].tolist() == [5, 6, 9]
    assert layer.used("core", "default")[:, 2].tolist() == [7, 8, 9]
    keep = torch.tensor([2, 0])
    for now, before in ((optimizer.state[core][key], was), (core.grad, gradient)):
        assert now.shape == (room or 3, room or 3)
        torch.testing.assert_close(now[:2, :2], before[keep][:, keep])
        assert not now[2:].any()
        assert not now[:, 2:].any()


def test_saved_loaded_exported_with_the_core_folded_in(tmp_path: Path) -> None:
    model, layers = model_of([6, 5, 7], init_weights=False, grow_start=2, grow_interval=1, target_rank=3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(3, 6, dtype=torch.float64)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    assert [layer.rank("default") for layer in layers] != [2, 2]
    expected = model.eval()(x)
    model.save_pretrained(tmp_path / "own")
    export_lora(model, tmp_path / "lora")
    for kind in ("own", "lora"):
        base, _ = model_of([6, 5, 7])
        loaded = peft.PeftModel.from_pretrained(base.unload(), tmp_path / kind, autocast_adapter_dtype=False)
        torch.testing.assert_close(loaded(x), expected, atol=1e-12, rtol=1e-12)
    state = peft.get_peft_model_state_dict(model)
    name = next(name for name in state if name.endswith("core"))
    with pytest.raises(CheckpointError, match="do not agree on a rank"):
        peft.set_peft_model_state_dict(model, {**state, name: state[name][:, 1:]})
    with pytest.raises(UnsupportedError, match="core mixes its components"):
        compact(model)


def test_settings_and_schedules_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="growth must be 'linear' or 'exponential'"):
        TriAdaptLoraConfig(growth="cubic")  # type: ignore[arg-type]
    model, _ = model_of([6, 5], total_steps=None, grow_start=2, grow_interval=1)
    model(torch.randn(3, 6, dtype=torch.float64)).square().mean().backward()
    with pytest.raises(ScheduleError, match="number of optimizer steps is unknown"):
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
