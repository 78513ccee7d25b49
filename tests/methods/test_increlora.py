"""IncreLoRA against its float64 reference: forward, scores, growth, what trains ahead, the penalty."""

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

from dynalora import IncreloraConfig, export_lora, state_report
from dynalora.adapter.layer import AdapterLayer
from dynalora.errors import ConfigError, ScheduleError
from tests.reference import growth as reference

SIZES = st.lists(st.integers(4, 8), min_size=3, max_size=4)


def model_of(sizes: list[int], *, seed: int = 0, **options: Any) -> tuple[Any, list[Any]]:
    """Linear layers in a row, float64, with tanh between: (PEFT model, layers)."""
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)]
    names = [str(index) for index in range(len(layers))]
    config = IncreloraConfig(**{"r": 2, "alpha": 3, "target_modules": names, **options})
    model = peft.get_peft_model(nn.Sequential(*layers).double(), config, autocast_adapter_dtype=False).double()
    adapted = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    with torch.no_grad():
        for layer in adapted:
            for role, parameter in layer.adapter_parameters("default").items():
                parameter.copy_(torch.randn_like(parameter) * (1.0 if role == "e" else 0.5))
    return model, adapted


def mirror(layer: Any) -> reference.Matrix:
    tensors = {role: p.detach().clone() for role, p in layer.adapter_parameters("default").items()}
    ahead = layer.running("ahead_e", "default") is not None
    return reference.Matrix(
        layer.base_layer.weight.detach().clone(),
        tensors["down"],
        tensors["e"],
        tensors["up"],
        tensors["ahead_down"] if ahead else None,
        tensors["ahead_up"] if ahead else None,
    )


def data(width: int, step: int) -> Tensor:
    return torch.randn(6, width, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def whole_loss(sizes: list[int], step: int) -> Any:
    def loss(weights: list[Tensor]) -> Tensor:
        x = data(sizes[0], step)
        for weight in weights:
            x = x @ weight.T
        return (x - 1).square().mean()

    return loss


def assert_same(layers: list[Any], matrices: list[reference.Matrix]) -> None:
    for layer, matrix in zip(layers, matrices, strict=True):
        for role in ("down", "e", "up"):
            found = layer.used(role, "default").detach()
            torch.testing.assert_close(found, getattr(matrix, role), atol=1e-9, rtol=1e-9, msg=role)
        if matrix.ahead_up is not None:
            torch.testing.assert_close(layer.parameter("ahead_up", "default").detach(), matrix.ahead_up)


@settings(deadline=None, max_examples=12)
@given(
    sizes=SIZES,
    seed=st.integers(0, 99),
    k=st.integers(1, 2),
    ahead=st.booleans(),
    micro=st.integers(1, 2),
    room=st.sampled_from([None, 4]),
)
def test_training_is_the_papers(sizes: list[int], seed: int, k: int, ahead: bool, micro: int, room: int | None) -> None:
    options = {"target_rank": 4, "grow_start": 3, "grow_interval": 2, "grow_rank": k, "grow_matrices": 1}
    model, layers = model_of(sizes, seed=seed, advance_learning=ahead, beta2=0.7, max_rank=room, **options)
    matrices = [mirror(layer) for layer in layers]
    if room:
        for matrix in matrices:
            matrix.down, matrix.e, matrix.up = matrix.down[:2].clone(), matrix.e[:2].clone(), matrix.up[:, :2].clone()
        for layer in layers:  # what is reserved is zero
            layer.resize("default", range(2))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    s, total = 3 / 2, 4 * len(layers)
    for number in range(1, 8):
        optimizer.zero_grad()
        for part in data(sizes[0], number).split(6 // micro):
            ((model(part) - 1).square().mean() / micro).backward()
        optimizer.step()
        reference.step(matrices, whole_loss(sizes, number), s, lr=0.02, gamma=0.1, betas=(0.85, 0.7))
        missing = total - sum(len(matrix.e) for matrix in matrices)
        if number >= 3 and (number - 3) % 2 == 0 and missing >= k:
            able = [m for m in matrices if len(m.e) + k <= min(4 if room else 99, *m.weight.shape)]
            for index in reference.chosen(able, 1):
                matrix = able[index]
                place = next(i for i, m in enumerate(matrices) if m is matrix)
                was = len(matrix.e)
                assert layers[place].rank("default") == was + k
                if matrix.ahead_down is not None:
                    assert matrix.ahead_up is not None
                    joined = {"down": matrix.ahead_down, "up": matrix.ahead_up, "e": torch.full((k,), 1e-5)}
                else:  # drawn at random
                    joined = {
                        "down": layers[place].used("down", "default").detach()[was:].clone(),
                        "up": layers[place].used("up", "default").detach()[:, was:].clone(),
                        "e": torch.zeros(k),
                    }
                matrix.down = torch.cat([matrix.down, joined["down"]])
                matrix.up = torch.cat([matrix.up, joined["up"]], 1)
                matrix.e = torch.cat([matrix.e, joined["e"].double()])
                if matrix.ahead_down is not None:
                    matrix.ahead_down = layers[place].parameter("ahead_down", "default").detach().clone()
                    matrix.ahead_up = layers[place].parameter("ahead_up", "default").detach().clone()
            if missing - k < k:
                for matrix in matrices:
                    matrix.ahead_down = matrix.ahead_up = None
        assert_same(layers, matrices)


def test_it_starts_as_the_paper_says() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(400, 300))
    x = torch.randn(5, 400)
    expected = base(x)
    model = peft.get_peft_model(base, IncreloraConfig(r=6, target_modules=["0"], grow_rank=2))
    (layer,) = (module for module in model.modules() if isinstance(module, AdapterLayer))
    assert not layer.parameter("e", "default").any()
    for role in ("down", "up", "ahead_down", "ahead_up"):
        values = layer.parameter(role, "default").detach()
        assert abs(float(values.std()) - 0.02) < 0.002
        assert values.shape[0 if role.endswith("down") else 1] == (2 if role.startswith("ahead") else 6)
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-6)


def trained(steps: int, **options: Any) -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 8))
    schedule = {"grow_start": 2, "grow_interval": 2, "target_rank": 3}
    config = IncreloraConfig(r=1, target_modules=["0", "2", "4"], total_steps=30, **{**schedule, **options})
    model = peft.get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run(model, optimizer, range(steps))
    return model, optimizer


def run(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
        (model(x) - 1).square().mean().backward()
        optimizer.step()


def test_what_joins_brings_its_momentum_and_what_follows_it_starts_anew() -> None:
    def momenta(model: Any, optimizer: torch.optim.Optimizer, role: str) -> list[Tensor]:
        layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
        return [optimizer.state[layer.parameter(role, "default")]["exp_avg"] for layer in layers]

    grown, still = trained(2, grow_matrices=3), trained(2, grow_start=20)
    ups = zip(momenta(*grown, "up"), momenta(*still, "up"), momenta(*still, "ahead_up"), strict=True)
    for momentum, own, ahead in ups:
        assert ahead.any()
        assert torch.equal(momentum, torch.cat([own, ahead], 1))
    assert not any(momentum.any() for momentum in momenta(*grown, "ahead_up"))


def test_growth_ends_at_the_budget_and_nothing_trains_ahead_any_more(tmp_path: Path) -> None:
    model, _ = trained(30)
    [report] = state_report(model)
    assert report.details["total_rank"] == report.details["budget"] == 9
    for layer in model.modules():
        if isinstance(layer, AdapterLayer):
            assert layer.running("ahead_e", "default") is None
            assert layer.running("importance", "default") is None
            assert not layer.probes
            assert layer.factors("default")[1].shape[0] == layer.rank("default")
    written = export_lora(model, tmp_path / "lora")
    assert sum(written.ranks.values()) == 9


def test_the_weights_gradient_is_only_computed_where_a_growth_remembers_it() -> None:
    model, optimizer = trained(1, grow_start=8, beta1=0.0, beta2=0.0)
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    wanted = []
    for step in range(1, 11):
        wanted.append(bool(layers[0].probes))
        run(model, optimizer, range(step, step + 1))
    assert wanted == [step in (8, 10) for step in range(2, 12)]


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole, _ = trained(9)
    begun, optimizer = trained(5)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer")
    begun.save_pretrained(tmp_path)
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 8))
    resumed = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    again = torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad], lr=1e-2)
    again.load_state_dict(torch.load(tmp_path / "optimizer"))
    run(resumed, again, range(5, 9))
    expected = {name: tensor for name, tensor in whole.state_dict().items() if "increlora" in name}
    found = {name: tensor for name, tensor in resumed.state_dict().items() if "increlora" in name}
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_gradient_scaler_changes_no_score() -> None:
    def importance(scale: float | None) -> list[Tensor]:
        model, optimizer = trained(0, grow_start=20)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(3):
            optimizer.zero_grad()
            x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
            scaler.scale((model(x) - 1).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
        return [layer.running("importance", "default") for layer in layers]  # type: ignore[misc]

    for plain, scaled in zip(importance(None), importance(1024.0), strict=True):
        assert plain.min() > 0
        torch.testing.assert_close(scaled, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_rank": 1}, "target_rank must be an integer of at least r=4"),
        ({"grow_rank": 0}, "grow_rank must be a positive integer"),
        ({"grow_start": 1.5}, "grow_start must be a whole number"),
        ({"grow_matrices": 0}, "grow_matrices must be a positive integer"),
        ({"beta1": 1.0}, "beta1 must be in"),
        ({"ortho_weight": -1}, "ortho_weight must be a number of at least 0"),
        ({"advance_learning": 1}, "advance_learning must be True or False"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IncreloraConfig(r=4, **options)


def test_a_schedule_that_never_grows_is_refused() -> None:
    with pytest.raises(ScheduleError, match="grow_start=40"):
        trained(1, grow_start=40)
