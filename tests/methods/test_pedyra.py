"""PE-DyRA against its float64 simulation: scores, decisions and weights of whole runs; and what surrounds them."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dynalora
from dynalora import PedyraConfig
from dynalora.adapter.layer import AdapterLayer
from dynalora.driver import drivers_of
from dynalora.errors import ConfigError, DynaloraError, ScheduleError, UnsupportedError
from dynalora.export import export_adapter_folder, export_ranks
from dynalora.methods.pedyra import AdjustmentPlan, PedyraLayer, adjustments, choose
from dynalora.methods.pedyra import method as pedyra_method
from tests.matrix.test_precision import forward_on, quantised_mlp
from tests.reference import pedyra as reference
from tests.toys import TOYS

WIDTHS = ((5, 7), (7, 4), (4, 6))


class Chain(nn.Module):
    def __init__(self, widths: tuple[tuple[int, int], ...] = WIDTHS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in widths)

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(torch.tanh(x) if number else x)
        return x


def chain(start: int = 0, /, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, list[PedyraLayer]]:
    """A chain of adapted layers: (PEFT model, its layers)."""
    torch.manual_seed(start)
    defaults = {
        "r": 3,
        "alpha": 4,
        "target_modules": r"layers\.\d",
        "adjust_start": 2,
        "adjust_interval": 2,
        "adjust_end": 8,
        "adjust_size": 2,
        "total_steps": 10,
    }
    model = peft.get_peft_model(Chain().to(dtype), PedyraConfig(**{"match_step": False, **defaults, **options}))
    return model, layers_of(model)


def layers_of(model: nn.Module) -> list[PedyraLayer]:
    return [module for module in model.modules() if isinstance(module, PedyraLayer)]


def ranks(model: nn.Module) -> list[int]:
    return [layer.rank("default") for layer in layers_of(model)]


def batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 5, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randn(6, 6, generator=generator, dtype=torch.float64).to(dtype)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    model.train()
    x, target = batch(seed, next(model.parameters()).dtype)
    optimizer.zero_grad()
    (model(x) - target).square().mean().backward()
    optimizer.step()


def run(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for number in range(first, last):
        step(model, optimizer, number)


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03, **options)


def sgd(model: nn.Module, lr: float = 0.1, momentum: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=momentum)


def triple(layer: PedyraLayer, index: int) -> reference.Triple:
    return reference.Triple(
        {
            "down": layer.used("down", "default")[index].detach().clone(),
            "e": layer.used("e", "default")[index : index + 1].detach().clone(),
            "up": layer.used("up", "default")[:, index].detach().clone(),
        }
    )


def simulation(layers: list[PedyraLayer], setting: reference.Settings) -> reference.Simulation:
    return reference.Simulation(
        [
            reference.Layer(
                layer.get_base_layer().weight.detach().clone(),
                layer.get_base_layer().bias.detach().clone(),
                layer.scaling["default"],
                [triple(layer, i) for i in range(layer.rank("default"))],
                limit=min(layer.in_features, layer.out_features),
            )
            for layer in layers
        ],
        setting,
    )


# --- whole runs ----------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    seed=st.integers(0, 999),
    rank=st.integers(2, 4),
    size=st.integers(1, 4),
    mode=st.sampled_from(["both", "both", "prune", "expand"]),
    mix=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    weighting=st.booleans(),
    normalize=st.booleans(),
    betas=st.sampled_from([(0.85, 0.85), (0.5, 0.9), (0.0, 0.3)]),
    gamma=st.sampled_from([0.0, 0.1, 0.3]),
    momentum=st.sampled_from([0.0, 0.9]),
    times=st.sampled_from([(1, 1, 9), (2, 3, 9), (4, 2, 7), (0.3, 0.2, 0.9)]),
    zero_start=st.booleans(),
    reserve=st.booleans(),
    mean_norm=st.booleans(),
)
def test_runs_equal_the_simulation(
    seed: int,
    rank: int,
    size: int,
    mode: str,
    mix: float,
    weighting: bool,
    normalize: bool,
    betas: tuple[float, float],
    gamma: float,
    momentum: float,
    times: tuple[float, float, float],
    zero_start: bool,
    reserve: bool,
    mean_norm: bool,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, layers = chain(
            seed,
            r=rank,
            alpha=2 * rank,
            adjust_start=times[0],
            adjust_interval=times[1],
            adjust_end=times[2],
            adjust_size=size,
            score_mix=mix,
            gradient_weighting=weighting,
            normalize_scores=normalize,
            beta1=betas[0],
            beta2=betas[1],
            ortho_weight=gamma,
            ortho_reduction="mean_norm" if mean_norm else "sum",
            mode=mode,
            init_weights=zero_start,
            max_rank=7 if reserve else None,
            seed=seed,
        )
        setting = reference.Settings(size, mix, *betas, gamma, 0.05, momentum, mode, weighting, normalize, mean_norm)
        simulated = simulation(layers, setting)
        optimizer = sgd(model, 0.05, momentum)
        due = [n for n in range(1, 11) if AdjustmentPlan.of(layers[0].drivers["default"].config, 10).due(n)]
        assert due
        for number in range(1, 11):
            before = sum(ranks(model))
            step(model, optimizer, number)
            simulated.step(*batch(number))
            if number in due:
                record = adjustments(model)[-1]
                assert record.step == number
                expected = simulated.scores
                for layer, scores in zip(layers, expected, strict=True):
                    assert record.scores[layer.name] == pytest.approx(scores, rel=1e-6, abs=1e-14)
                names = [layer.name for layer in layers]
                new = {i: triple(layer, layer.rank("default") - 1) for i, layer in enumerate(layers)}
                pruned, expanded = simulated.adjust(new)
                assert record.pruned == [(names[layer], i) for layer, i in pruned]
                assert record.expanded == [names[layer] for layer in expanded]
                assert list(record.ranks.values()) == ranks(model) == [len(x.triples) for x in simulated.layers]
                if mode == "both":
                    assert sum(ranks(model)) == before
                assert min(ranks(model)) >= 1
            else:
                assert sum(ranks(model)) == before
        assert [record.step for record in adjustments(model)] == due
    for layer, wanted in zip(layers, simulated.layers, strict=True):
        for i, one in enumerate(wanted.triples):
            for role, value in triple(layer, i).weight.items():
                torch.testing.assert_close(value, one.weight[role], atol=1e-9, rtol=1e-7)


def test_random_importance_prunes_at_random_and_the_same_every_time() -> None:
    decided = {}
    for seed in (0, 0, 1):
        model, _ = chain(importance="random", seed=seed)
        run(model, sgd(model), 0, 10)
        found = [(one.pruned, one.expanded) for one in adjustments(model)]
        assert decided.setdefault(seed, found) == found
        assert not any(b for n, b in model.named_buffers() if "sensitivity" in n or "inputs" in n)
    assert decided[0] != decided[1]


# --- decisions -----------------------------------------------------------------------------------------------


@given(
    scores=st.lists(st.lists(st.integers(0, 4).map(float), min_size=1, max_size=4), min_size=1, max_size=5),
    size=st.integers(1, 8),
    extra=st.lists(st.integers(0, 2), min_size=5, max_size=5),
    mode=st.sampled_from(["both", "prune", "expand"]),
)
def test_decisions(scores: list[list[float]], size: int, extra: list[int], mode: Any) -> None:
    limits = [len(layer) + more for layer, more in zip(scores, extra, strict=False)]
    pruned, expanded = choose(scores, size, limits, mode)
    assert len(set(pruned)) == len(pruned)
    assert len(set(expanded)) == len(expanded)
    after = [
        len(own) - sum(1 for layer, _ in pruned if layer == number) + (number in expanded)
        for number, own in enumerate(scores)
    ]
    assert all(1 <= rank <= limit for rank, limit in zip(after, limits, strict=True))
    if mode == "both":
        assert sum(after) == sum(map(len, scores))
    simulated = reference.Simulation(
        [reference.Layer(torch.zeros(1, 1), torch.zeros(1), 1.0, [], limit=limit) for limit in limits],
        reference.Settings(size, 0, 0, 0, 0, 0, 0, mode, True, True),
    )
    simulated.scores = scores
    assert (pruned, expanded) == simulated.decide()


@given(
    start=st.one_of(st.integers(1, 30), st.floats(0.01, 0.5)),
    interval=st.one_of(st.integers(1, 9), st.floats(0.01, 0.5)),
    end=st.one_of(st.integers(30, 60), st.floats(0.5, 0.99)),
    total=st.integers(1, 200),
)
def test_plan(start: float, interval: float, end: float, total: int) -> None:
    plan = AdjustmentPlan.of(PedyraConfig(adjust_start=start, adjust_interval=interval, adjust_end=end), total)
    due = [n for n in range(300) if plan.due(n)]
    assert len(due) == plan.count
    assert due == list(range(plan.start, plan.end + 1, plan.interval))
    for n in range(300):
        assert plan.matters(n) == (n >= 1 and any(0 <= d - n < plan.horizon for d in due)), n
    fractions = [value for value in (start, interval, end) if value < 1]
    if len(fractions) == 3:  # what room is reserved by
        assert plan.count <= int((end - start) / interval + 1e-6) + 1


# --- expansion -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"max_rank": 6}], ids=["exact", "reserved"])
def test_expansion_leaves_the_function_unchanged(dtype: torch.dtype, options: dict[str, Any]) -> None:
    model, layers = chain(dtype=dtype, mode="expand", adjust_size=3, init_weights=False, ortho_weight=0.0, **options)
    x, _ = batch(0, dtype)
    before = model(x).detach()
    run(model, sgd(model, lr=0.0), 0, 2)
    assert ranks(model) == [4, 4, 4]
    tolerance = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 1e-14, "rtol": 1e-14}
    torch.testing.assert_close(model(x).detach(), before, **tolerance)
    for layer in layers:
        assert float(layer.used("e", "default")[-1].detach()) == 0
        for factor in (layer.used("down", "default"), layer.used("up", "default").t()):
            gram = factor.detach().double() @ factor.detach().double().t()
            assert gram[-1, -1] == pytest.approx(1, rel=1e-6)
            assert gram[-1, :-1].abs().max() < 1e-6
    step(model, sgd(model), 3)
    assert float(layers[0].used("e", "default")[-1].detach()) != 0, "and the new triple trains"


def test_a_full_layer_is_passed_over() -> None:
    model, _ = chain(r=4, adjust_size=3, adjust_start=1, adjust_interval=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(model, sgd(model), 0, 9)
    assert sum(ranks(model)) == 12
    assert all(rank <= min(shape) for rank, shape in zip(ranks(model), WIDTHS, strict=True))


# --- the gradient --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reserve", [None, 6])
def test_orthogonality_gradient_equals_autograd(reserve: int | None) -> None:
    model, layers = chain(ortho_weight=0.3, init_weights=False, max_rank=reserve, adjust_start=5, adjust_end=9)
    factors = [layer.used(role, "default") for layer in layers for role in ("down", "up")]
    penalty = 0.0
    for down, up in zip(factors[::2], factors[1::2], strict=True):
        eye = torch.eye(3, dtype=torch.float64)
        penalty += (down @ down.T - eye).square().sum() + (up.T @ up - eye).square().sum()
    parameters = [layer.parameter(role, "default") for layer in layers for role in ("down", "up")]
    expected = torch.autograd.grad(0.3 * penalty, parameters)
    x, target = batch(0)
    task = torch.autograd.grad((model(x) - target).square().mean(), parameters)
    step(model, sgd(model, lr=0.0), 0)
    for p, one, other in zip(parameters, expected, task, strict=True):
        torch.testing.assert_close(p.grad, one + other, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("reserve", [None, 6])
def test_matched_steps_bound_the_penalty_by_a_share_of_the_tasks_gradient(reserve: int | None) -> None:
    """Factor by factor, in its own direction; what is shorter stays as it is."""
    lengths = []
    for gamma in (0.3, 1e-6):
        options = {"match_step": True, "init_weights": False, "adjust_start": 5, "adjust_end": 9}
        model, layers = chain(ortho_weight=gamma, max_rank=reserve, **options)
        factors = [layer.used(role, "default") for layer in layers for role in ("down", "up")]
        parameters = [layer.parameter(role, "default") for layer in layers for role in ("down", "up")]
        penalty = 0.0
        for factor, rows in zip(factors, (True, False) * len(layers), strict=True):
            gram = factor @ factor.T if rows else factor.T @ factor
            penalty += (gram - torch.eye(3, dtype=torch.float64)).square().sum()
        whole = torch.autograd.grad(gamma * penalty, parameters)
        x, target = batch(0)
        task = torch.autograd.grad((model(x) - target).square().mean(), parameters)
        step(model, sgd(model, lr=0.0), 0)
        for parameter, one, other in zip(parameters, whole, task, strict=True):
            share = float(one.norm() / other.norm())
            torch.testing.assert_close(parameter.grad, other + one * min(1.0, 0.3 / share), atol=1e-12, rtol=1e-10)
            lengths.append(share)
    assert max(lengths) > 0.3 > min(lengths)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_gradient_scaling_changes_nothing(fused: bool) -> None:
    """Scores from unscaled gradients, γ's part with the scale; a skipped step teaches nothing."""
    after = {}
    for scaled in (False, True):
        model, _ = chain(dtype=torch.float32, init_weights=False)
        optimizer = adamw(model, fused=fused, eps=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10_000, enabled=scaled)
        for number in range(8):
            for overflow in (True, False) if scaled and number == 3 else (False,):
                optimizer.zero_grad()
                x, target = batch(number, torch.float32)
                scaler.scale((model.train()(x) - target).square().mean()).backward()
                if overflow:
                    layers_of(model)[1].parameter("down", "default").grad[0, 0] = float("inf")
                scaler.step(optimizer)
                scaler.update()
        after[scaled] = ranks(model), [p.detach().clone() for p in model.parameters()], adjustments(model)
    assert after[True][0] == after[False][0]
    for one, other in zip(after[True][2], after[False][2], strict=True):
        assert (one.pruned, one.expanded) == (other.pruned, other.expanded)
    for one, other in zip(after[True][1], after[False][1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


# --- the inputs' average -------------------------------------------------------------------------------------


def inputs(model: nn.Module) -> list[Tensor]:
    return [layer.running("inputs", "default").clone() for layer in layers_of(model)]


def test_accumulated_batches_count_as_one() -> None:
    found = []
    for parts in (1, 3):
        model, _ = chain(init_weights=False)
        optimizer = sgd(model)
        for number in range(2):
            optimizer.zero_grad()
            x, target = batch(number)
            for a, b in zip(x.chunk(parts), target.chunk(parts), strict=True):
                ((model.train()(a) - b).square().mean() / parts).backward()
            model.eval()(x)  # no training, no statistics
            optimizer.step()
        found.append(inputs(model))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_inputs_are_seen_once_under_gradient_checkpointing(reentrant: bool | None) -> None:
    toy = TOYS["llama"]
    torch.manual_seed(0)
    model = peft.get_peft_model(
        toy.build(),
        PedyraConfig(
            r=3, target_modules=["q_proj", "k_proj", "down_proj"], adjust_start=9, adjust_end=9, total_steps=9
        ),
    )
    if reentrant is not None:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    layers = layers_of(model.train())
    seen: dict[str, Tensor] = {}
    for layer in layers:
        layer.register_forward_pre_hook(lambda m, args: seen.setdefault(m.name, args[0].detach().clone()))
    optimizer = sgd(model)
    toy.loss(model).backward()
    counts = [layer.gathered["default"].counted[-1] for layer in layers]
    assert {int(count) for count in counts} == {21}, "3 · 7 tokens, once"
    optimizer.step()
    for layer in layers:
        expected = 0.15 * seen[layer.name].square().mean((0, 1))
        torch.testing.assert_close(layer.running("inputs", "default"), expected, atol=1e-6, rtol=1e-4)


# --- only while it matters -----------------------------------------------------------------------------------


def test_averages_live_only_while_they_matter_and_decisions_are_the_same(tmp_path: Path) -> None:
    """With fast decay few steps matter: the same decisions as the simulation that averages from the start."""
    options = {"adjust_start": 40, "adjust_interval": 30, "adjust_end": 70, "total_steps": 80}
    model, layers = chain(beta1=0.3, beta2=0.2, init_weights=False, **options)
    plan = AdjustmentPlan.of(layers[0].drivers["default"].config, 80)
    assert plan.horizon < 30
    simulated = simulation(layers, reference.Settings(2, 0.5, 0.3, 0.2, 0.1, 0.02, 0.0, "both", True, True))
    optimizer = sgd(model, 0.02)
    for number in range(1, 76):
        gathering = [layer.gathering["default"] for layer in layers]
        assert number == 1 or all(g == (plan.matters(number) or plan.matters(number - 1)) for g in gathering)
        step(model, optimizer, number)
        simulated.step(*batch(number))
        alive = [layer.running(role, "default") is not None for layer in layers for role in ("inputs", "uncertainty_e")]
        assert all(alive) if plan.matters(number + 1) and plan.matters(number) else True
        if not plan.matters(number) or plan.due(number):
            assert not any(alive)
        if plan.due(number):
            record = adjustments(model)[-1]
            for layer, scores in zip(layers, simulated.scores, strict=True):
                assert record.scores[layer.name] == pytest.approx(scores, rel=1e-5)
            new = {i: triple(layer, layer.rank("default") - 1) for i, layer in enumerate(layers)}
            pruned, _ = simulated.adjust(new)
            assert record.pruned == [(layers[layer].name, i) for layer, i in pruned]
    model.save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        kinds = {name.rpartition("pedyra_")[2] for name in file.keys()}  # noqa: SIM118
    assert kinds == {"down", "up", "e", "progress", "record"}


# --- resuming ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reserve", [None, 6], ids=["exact", "reserved"])
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("way", ["save_pretrained", "load_adapter", "state_dict"])
def test_resumed_runs_are_exact(way: str, stop: int, reserve: int | None, tmp_path: Path) -> None:
    """Before, at, between and after adjustments, which are at 2, 4, 6 and 8."""
    whole, _ = chain(max_rank=reserve, dtype=torch.float32)
    run(whole, adamw(whole), 0, 10)

    model, _ = chain(max_rank=reserve, dtype=torch.float32)
    optimizer = adamw(model)
    run(model, optimizer, 0, stop)
    saved = copy.deepcopy(optimizer.state_dict())
    torch.manual_seed(0)
    if way == "save_pretrained":
        model.save_pretrained(tmp_path)
        resumed: Any = peft.PeftModel.from_pretrained(Chain(), tmp_path, is_trainable=True)
    else:
        resumed, _ = chain(max_rank=reserve, dtype=torch.float32)
        if way == "load_adapter":
            model.save_pretrained(tmp_path)
            resumed.load_adapter(tmp_path, "default", is_trainable=True)
        else:
            resumed.load_state_dict(model.state_dict())
    assert ranks(resumed) == ranks(model)
    optimizer = adamw(resumed)
    optimizer.load_state_dict(saved)
    run(resumed, optimizer, stop, 10)
    assert ranks(resumed) == ranks(whole)
    assert adjustments(resumed) == adjustments(whole)
    now = {n: p for n, p in resumed.named_parameters() if p.requires_grad}
    for name, p in whole.named_parameters():
        if p.requires_grad:
            if reserve and way == "save_pretrained":
                assert p.shape == now[name].shape
            assert torch.equal(p, now[name]), name


def test_rank_pattern_is_public_and_saved(tmp_path: Path) -> None:
    config = PedyraConfig(
        r=3, target_modules=r"layers\.\d", adjust_start=1, adjust_interval=1, adjust_end=5, total_steps=9
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(Chain(), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(model, adamw(model), 0, 6)
    assert list(model.rank_pattern.values()) == ranks(model)
    assert list(model.rank_pattern) == ["layers.0", "layers.1", "layers.2"]
    assert ranks(model) != [3, 3, 3]
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {f"^{n}".replace(".", r"\."): r for n, r in model.rank_pattern.items() if r != 3} == written["rank_pattern"]
    assert config.rank_pattern == {}, "the user's own configuration can be used for another run"
    assert ranks(peft.get_peft_model(Chain(), config)) == [3, 3, 3]
    loaded = peft.PeftModel.from_pretrained(Chain(), tmp_path)
    assert loaded.rank_pattern == model.rank_pattern
    assert [x.scaling for x in layers_of(loaded)] == [x.scaling for x in layers_of(model)]


def test_export_loads_in_peft_with_patterns(tmp_path: Path) -> None:
    model, _ = chain(dtype=torch.float32, init_weights=False)
    run(model, adamw(model), 0, 10)
    x, _ = batch(3, torch.float32)
    expected = model.eval()(x).detach()
    dynalora.export_lora(model, tmp_path / "lora")
    fresh = Chain()
    base = {n: t for n, t in model.base_model.model.state_dict().items() if "base_layer" in n}
    fresh.load_state_dict({n.replace("base_layer.", ""): t for n, t in base.items()})
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "lora")
    torch.testing.assert_close(loaded(x), expected, atol=1e-5, rtol=1e-5)
    lora = peft.LoraConfig.from_pretrained(tmp_path / "lora")
    assert lora.rank_pattern


# --- optimizers and storage ----------------------------------------------------------------------------------


def test_survivors_keep_their_optimizer_state_through_a_run() -> None:
    model, layers = chain(init_weights=False)
    optimizer = adamw(model)
    run(model, optimizer, 0, 1)
    taken: dict[str, Any] = {}
    original = AdapterLayer.resize

    def watched(self: Any, adapter: str, keep: Any, new: Any = None) -> None:
        p = self.parameter("down", adapter)
        taken[self.name] = copy.deepcopy(optimizer.state[p]), list(keep), new is not None
        original(self, adapter, keep, new)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterLayer, "resize", watched)
        run(model, optimizer, 1, 2)
    assert taken
    for layer in layers:
        if layer.name not in taken:
            continue
        state, keep, grown = taken[layer.name]
        now = optimizer.state[layer.parameter("down", "default")]
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(now[key][: len(keep)], state[key][keep])
            assert not now[key][len(keep) :].any()
            assert len(now[key]) == len(keep) + grown
        assert now["step"] == state["step"] == 2


def test_no_recompilation_where_room_is_reserved() -> None:
    model, _ = chain(dtype=torch.float32, max_rank=6, init_weights=False, adjust_interval=1)
    plain, _ = chain(dtype=torch.float32, max_rank=6, init_weights=False, adjust_interval=1)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.base_model.model, backend=counter, fullgraph=True)
    for net, called in ((model, compiled), (plain, plain)):
        optimizer = adamw(net)
        for number in range(8):
            net.train()
            x, target = batch(number, torch.float32)
            optimizer.zero_grad()
            (called(x) - target).square().mean().backward()
            optimizer.step()
    assert len(adjustments(model)) == 7
    assert ranks(model) == ranks(plain)
    assert counter.frame_count <= 3, counter.frame_count
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


# --- never silently a plain LoRA -----------------------------------------------------------------------------


def one_step(**options: Any) -> None:
    model, _ = chain(**options)
    step(model, sgd(model), 0)


def test_too_few_steps_is_an_error() -> None:
    for options in (
        {"adjust_start": 0.5, "adjust_interval": 0.1, "adjust_end": 0.6, "total_steps": 1},
        {"adjust_start": 12, "adjust_end": 20, "total_steps": 10},
    ):
        with pytest.raises(ScheduleError, match="adjust_start") as caught:
            one_step(**options)
        assert "\n" not in str(caught.value)


def test_unknown_length_is_an_error_only_for_fractions() -> None:
    with pytest.raises(ScheduleError, match="total_steps"):
        one_step(adjust_start=0.1, total_steps=None)
    one_step(total_steps=None)


def test_rank_one_everywhere_is_an_error() -> None:
    with pytest.raises(ScheduleError, match="r=1"):
        one_step(r=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_step(r=1, mode="expand")


def test_adjust_end_after_the_end_is_said_once() -> None:
    model, _ = chain(adjust_end=500)
    with pytest.warns(UserWarning, match="adjust_end=500") as caught:
        run(model, sgd(model), 0, 3)
    assert len([w for w in caught if "adjust_end" in str(w.message)]) == 1


def test_more_than_can_move_is_said() -> None:
    with pytest.warns(UserWarning, match=r"adjust_size=4.*at most 3"):
        one_step(adjust_size=4)
    with pytest.warns(UserWarning, match=r"adjust_size=9.*only 6"):
        one_step(adjust_size=9, mode="prune")


def test_one_layer_only_is_said() -> None:
    with pytest.warns(UserWarning, match="only one layer"):
        one_step(target_modules=r"layers\.0", adjust_size=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("adjust_start", 0),
        ("adjust_start", 1.5),
        ("adjust_interval", -1),
        ("adjust_end", float("nan")),
        ("adjust_size", 0),
        ("score_mix", 1.2),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("ortho_weight", -1),
        ("ortho_reduction", "max"),
        ("mode", "sideways"),
        ("importance", "guess"),
        ("max_rank", 2),
        ("adjust_end", 0.01),
    ],
)
def test_bad_values_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field) as caught:
        PedyraConfig(**{field: value})
    assert str(value) in str(caught.value)


def test_state_report() -> None:
    model, _ = chain()
    run(model, sgd(model), 0, 3)
    (report,) = dynalora.state_report(model)
    assert report.details["adjustments_done"] == 1
    assert report.details["adjustments_planned"] == 4
    assert report.details["next_adjustment"] == 4
    assert report.details["total_rank"] == 9


# --- with DoRA -----------------------------------------------------------------------------------------------


def dora(toy_name: str = "llama", base: nn.Module | None = None, **options: Any) -> Any:
    toy = TOYS[toy_name]
    torch.manual_seed(0)
    defaults = {
        "r": 3,
        "alpha": 5,
        "target_modules": list(toy.targets),
        "use_dora": True,
        "adjust_start": 1,
        "adjust_interval": 1,
        "adjust_end": 6,
        "adjust_size": 2,
    }
    return peft.get_peft_model(base or toy.build(), PedyraConfig(**{"match_step": False, **defaults, **options})).eval()


def fit_dora(model: nn.Module, toy_name: str = "llama", steps: int = 5) -> None:
    optimizer = adamw(model)
    for number in range(steps):
        optimizer.zero_grad()
        TOYS[toy_name].loss(model.train(), seed=number).backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("name", TOYS)
def test_dora_starts_at_the_base_and_trains(name: str) -> None:
    toy = TOYS[name]
    expected = toy.logits(toy.build())
    model = dora(name)
    assert torch.equal(toy.logits(model), expected)
    before = [layer.parameter("magnitude", "default").detach().clone() for layer in layers_of(model)]
    fit_dora(model, name)
    assert len(set(ranks(model))) > 1
    for layer, old in zip(layers_of(model), before, strict=True):
        assert not torch.equal(layer.parameter("magnitude", "default"), old)
    with model.disable_adapter():
        assert torch.equal(toy.logits(model), expected)


@pytest.mark.parametrize("name", ["mlp", "llama", "gpt2"])
def test_dora_equals_pefts(name: str, tmp_path: Path) -> None:
    """The export is a DoRA that PEFT computes by itself, from the whole weight."""
    toy = TOYS[name]
    model = dora(name, init_weights=False)
    fit_dora(model, name)
    expected = toy.logits(model)
    dynalora.export_lora(model, tmp_path / "dora")
    loaded = peft.PeftModel.from_pretrained(toy.build(), tmp_path / "dora")
    assert loaded.peft_config["default"].use_dora
    torch.testing.assert_close(toy.logits(loaded), expected, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "own")
    again = peft.PeftModel.from_pretrained(toy.build(), tmp_path / "own")
    assert torch.equal(toy.logits(again), expected)


def test_dora_gradients_equal_pefts(tmp_path: Path) -> None:
    toy = TOYS["mlp"]
    model = dora("mlp", toy.build().double(), init_weights=False)
    dynalora.export_lora(model, tmp_path / "dora")
    other = peft.PeftModel.from_pretrained(toy.build().double(), tmp_path / "dora", is_trainable=True)
    x = toy.batch(1)["x"].double()
    for net in (model, other):
        net.eval()(x=x).square().sum().backward()
    own = model.base_model.model.first
    theirs = other.base_model.model.first
    torch.testing.assert_close(
        own.parameter("magnitude", "default").grad, theirs.lora_magnitude_vector["default"].weight.grad
    )
    torch.testing.assert_close(own.parameter("down", "default").grad, theirs.lora_A["default"].weight.grad)
    torch.testing.assert_close(own.parameter("up", "default").grad, theirs.lora_B["default"].weight.grad)


@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_dora_merges_and_unmerges(name: str) -> None:
    toy = TOYS[name]
    model = dora(name, init_weights=False)
    expected, weights = toy.logits(model), [layer.get_base_weight().clone() for layer in layers_of(model)]
    deltas = [layer.get_delta_weight("default").detach() for layer in layers_of(model)]
    model.merge_adapter()
    torch.testing.assert_close(toy.logits(model), expected, atol=1e-4, rtol=1e-4)
    for layer, delta in zip(layers_of(model), deltas, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("default"), delta, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    for layer, weight in zip(layers_of(model), weights, strict=True):
        torch.testing.assert_close(layer.get_base_weight(), weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(toy.logits(model), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(toy.logits(model.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)


def test_dora_is_active_and_merged_one_at_a_time() -> None:
    toy = TOYS["mlp"]
    model = dora("mlp", init_weights=False)
    model.add_adapter("second", PedyraConfig(r=2, target_modules=list(toy.targets), init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(UnsupportedError, match="one at a time"):
        toy.logits(model)
    with pytest.raises(UnsupportedError, match="one at a time"):
        model.merge_adapter(adapter_names=["second", "default"])


def test_dora_expansion_leaves_the_function_unchanged() -> None:
    base = TOYS["llama"].build().double()
    model = dora(base=base, init_weights=False, mode="expand", ortho_weight=0.0)
    before = TOYS["llama"].logits(model)
    optimizer = sgd(model, lr=0.0)
    TOYS["llama"].loss(model.train()).backward()
    optimizer.step()
    assert max(ranks(model)) == 4
    torch.testing.assert_close(TOYS["llama"].logits(model), before, atol=1e-12, rtol=1e-10)


# --- with PiSSA ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_dora", [False, True], ids=["", "dora"])
@pytest.mark.parametrize("name", ["mlp", "llama", "gpt2"])
def test_pissa_starts_at_the_base_from_its_largest_triplets(name: str, use_dora: bool, tmp_path: Path) -> None:
    toy = TOYS[name]
    base = toy.build()
    state, expected = {n: t.clone() for n, t in base.state_dict().items()}, toy.logits(toy.build())
    model = dora(name, base, use_dora=use_dora, init_weights="pissa")
    torch.testing.assert_close(toy.logits(model), expected, atol=1e-5, rtol=1e-4)
    for layer in layers_of(model):
        weight = layer.get_base_weight().detach()
        weight = weight.t() if type(layer.get_base_layer()).__name__ == "Conv1D" else weight
        own = layer.scaling["default"] * (layer.used("up", "default") * layer.used("e", "default"))
        u, sigma, vt = (part.float() for part in torch.linalg.svd(weight.double()))
        wanted = (u[:, :3] * sigma[:3]) @ vt[:3]
        torch.testing.assert_close((own @ layer.used("down", "default")).detach(), wanted, atol=1e-5, rtol=1e-4)
    fit_dora(model, name)
    assert len(set(ranks(model))) > 1
    trained = toy.logits(model)
    assert not torch.allclose(trained, expected, atol=1e-3)

    model.save_pretrained(tmp_path / "own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pedyra_method, "decompose_each", None)  # loading decomposes nothing
        loaded = peft.PeftModel.from_pretrained(toy.build(), tmp_path / "own")
    assert torch.equal(toy.logits(loaded), trained)
    assert loaded.rank_pattern == model.rank_pattern
    dynalora.export_lora(model, tmp_path / "lora")
    exported = peft.PeftModel.from_pretrained(toy.build(), tmp_path / "lora")
    torch.testing.assert_close(toy.logits(exported), trained, atol=1e-4, rtol=1e-4)
    unloaded = model.unload().state_dict()
    assert all(torch.equal(unloaded[n], t) for n, t in state.items())


def test_pissa_resumes_exactly(tmp_path: Path) -> None:
    whole = dora(init_weights="pissa", use_dora=False)
    fit_dora(whole, steps=5)
    model = dora(init_weights="pissa", use_dora=False)
    optimizer = adamw(model)
    for number in range(5):
        if number == 2:
            model.save_pretrained(tmp_path)
            model = peft.PeftModel.from_pretrained(TOYS["llama"].build(), tmp_path, is_trainable=True)
            saved, optimizer = optimizer.state_dict(), adamw(model)
            optimizer.load_state_dict(saved)
        optimizer.zero_grad()
        TOYS["llama"].loss(model.train(), seed=number).backward()
        optimizer.step()
    for name, p in whole.named_parameters():
        assert torch.equal(p, dict(model.named_parameters())[name]), name
    assert adjustments(model) == adjustments(whole)


def test_pissa_needs_rank_within_the_weight() -> None:
    with pytest.raises(ConfigError, match=r"r must be at most 4.*layers\.1.*got 5"):
        chain(r=5, init_weights="pissa")
    with pytest.raises(ConfigError, match="init_weights"):
        PedyraConfig(init_weights="olora")


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_weights": "pissa"}, {"max_rank": 6}], ids=str)
def test_export_from_a_folder_alone(options: dict[str, Any], tmp_path: Path) -> None:
    """Without the base model: the factors as they are, whatever came with them, and the ranks for a fresh run."""
    toy = TOYS["llama"]
    model = dora(**{"use_dora": False, **options})
    fit_dora(model)
    model.save_pretrained(tmp_path / "own")
    export_adapter_folder(str(tmp_path / "own"), str(tmp_path / "lora"))
    exported = peft.PeftModel.from_pretrained(toy.build(), tmp_path / "lora")
    torch.testing.assert_close(toy.logits(exported), toy.logits(model), atol=1e-4, rtol=1e-4)

    export_ranks(str(tmp_path / "own"), str(tmp_path / "ranks.json"))
    config = peft.LoraConfig(**json.loads((tmp_path / "ranks.json").read_text()))
    fresh = peft.get_peft_model(toy.build(), config)
    found = {
        n.removeprefix("base_model.model."): m.r["default"] for n, m in fresh.named_modules() if hasattr(m, "lora_A")
    }
    assert found == model.rank_pattern
    with pytest.raises(DynaloraError, match="already exists"):
        export_ranks(str(tmp_path / "own"), str(tmp_path / "ranks.json"))


# --- on a 4-bit base -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_dora", [False, True])
def test_ranks_move_on_a_4_bit_base(use_dora: bool, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = quantised_mlp(4)
        x = torch.randn(6, 64, generator=torch.Generator().manual_seed(3))
        expected = forward_on(base, x)  # packs the weights
        config = PedyraConfig(
            r=3,
            target_modules=["first", "second"],
            use_dora=use_dora,
            adjust_start=1,
            adjust_interval=1,
            adjust_end=6,
            adjust_size=2,
        )
        model = peft.get_peft_model(base, config)
        assert torch.equal(forward_on(model, x), expected)
        optimizer = adamw(model)
        for _ in range(6):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(x=x), torch.arange(6) % 3).backward()
            optimizer.step()
        assert sum(ranks(model)) == 6
        assert [one.step for one in adjustments(model)] == [1, 2, 3, 4, 5, 6]
        trained = forward_on(model, x)
        assert not torch.equal(trained, expected)
        with model.disable_adapter():
            assert torch.equal(forward_on(model, x), expected)
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(quantised_mlp(4), tmp_path)
        assert loaded.rank_pattern == model.rank_pattern
        saved = peft.get_peft_model_state_dict(model)
        assert all(torch.equal(t, saved[n]) for n, t in peft.get_peft_model_state_dict(loaded).items())
        # On a CPU bitsandbytes unpacks its weights to save them and packs them anew, which rounds them again.
        torch.testing.assert_close(forward_on(loaded, x), trained, atol=0.03, rtol=0)


@pytest.mark.parametrize("alpha", [4, 8])
def test_a_matched_step_goes_as_far_as_loras(alpha: int) -> None:
    """At the start half a step of e, and with |e| = 1/8 a step of up, beside a first step of LoRA (alpha = 2r)."""
    toy = TOYS["llama"]
    model = peft.get_peft_model(toy.build(), PedyraConfig(r=4, alpha=alpha, target_modules=["q_proj", "down_proj"]))
    groups = dynalora.param_groups(model, lr=1e-3)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for layer in layers_of(model):
        s = layer.scaling["default"]
        down, up = (layer.parameter(role, "default").detach() for role in ("down", "up"))
        # One entry's step of a component of LoRA: up moves by η everywhere, down's rows have length 1/√3.
        lora = 2 * 1e-3 * layer.out_features**0.5 / 3**0.5
        by_e = s * rates[id(layer.parameter("e", "default"))] * down.norm(dim=1) * up.norm(dim=0)
        torch.testing.assert_close(by_e, by_e.mean().expand(4), rtol=1e-5, atol=0)
        assert 2**-0.5 <= float(by_e[0]) / (2 * lora) <= 2**0.5
        by_up = s * 0.125 * rates[id(layer.parameter("up", "default"))] * layer.out_features**0.5
        assert 2**-0.5 <= by_up / (lora * 3**0.5 / 2) <= 2**0.5
        assert rates[id(layer.parameter("down", "default"))] == 1e-3


@pytest.mark.parametrize("r", [3, 9])
def test_directions_start_orthonormal_or_as_in_the_paper(r: int) -> None:
    base = torch.nn.Sequential(torch.nn.Linear(400, 7))
    layer = next(iter(layers_of(peft.get_peft_model(base, PedyraConfig(r=r, target_modules=["0"])))))
    down, up, e = (layer.parameter(role, "default").detach() for role in ("down", "up", "e"))
    assert not e.any()
    torch.testing.assert_close(down @ down.t(), torch.eye(r), atol=1e-5, rtol=0)
    torch.testing.assert_close(up.norm(dim=0), torch.ones(r))
    if r <= 7:
        torch.testing.assert_close(up.t() @ up, torch.eye(r), atol=1e-5, rtol=0)
    base = torch.nn.Sequential(torch.nn.Linear(400, 300))
    config = PedyraConfig(r=r, target_modules=["0"], init_weights=True)
    layer = next(iter(layers_of(peft.get_peft_model(base, config))))
    for role in ("down", "up"):
        factor = layer.parameter(role, "default").detach()
        assert float(factor.std()) == pytest.approx(0.02, rel=0.1)
        assert abs(float(factor.mean())) < 0.003
    assert not layer.parameter("e", "default").any()


@pytest.mark.parametrize("reduction", ["sum", "mean_norm"])
def test_diagnostics_are_what_the_figures_show(reduction: str, tmp_path: Path) -> None:
    model, layers = chain(init_weights=False, diagnostics=True, ortho_reduction=reduction, adjust_start=3)
    optimizer = sgd(model, 0.05, 0.0)
    for number in range(1, 5):
        optimizer.zero_grad()
        x, target = batch(number)
        (model(x) - target).square().mean().backward()
        gradients = {
            role: float(torch.cat([layer.parameter(role, "default").grad.flatten() for layer in layers]).norm())
            for role in ("down", "e", "up")
        }
        optimizer.step()
    [(driver, own)] = drivers_of(model)
    values = driver.method.metrics(driver.moment(own))
    for role, norm in gradients.items():
        assert values[f"pedyra_gradient_{role}"] == pytest.approx(norm, rel=1e-5)
    terms = []
    for layer in layers:
        for rows in (layer.used("down", "default"), layer.used("up", "default").T):
            terms.append(float((rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype)).norm()))
    expected = sum(term**2 for term in terms) if reduction == "sum" else sum(terms) / len(terms)
    assert values["pedyra_ortho_loss"] == pytest.approx(expected)
    effective = [int((torch.linalg.svdvals(layer.get_delta_weight("default")) > 1e-3).sum()) for layer in layers]
    assert values["pedyra_effective_rank"] == pytest.approx(sum(effective) / len(layers))
    assert values["pedyra_utilisation"] == pytest.approx(sum(effective) / sum(ranks(model)))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(Chain().double(), tmp_path)
    assert layers_of(loaded)[0].running("gradient_norms", "default") is not None
    assert PedyraConfig().diagnostics is False
    plain, _ = chain()
    [(driver, own)] = drivers_of(plain)
    assert set(driver.method.metrics(driver.moment(own))) == {"pedyra_rank_min", "pedyra_rank_max"}


def test_masked_triples_stay_and_may_come_back() -> None:
    model, layers = chain(
        r=4, mode="mask", adjust_start=2, adjust_interval=2, adjust_end=8, adjust_size=2, total_steps=9
    )
    optimizer = adamw(model)
    for number in range(1, 10):
        step(model, optimizer, number)
        assert ranks(model) == [4] * len(layers)  # nothing is removed
        if number not in (2, 4, 6, 8):
            continue
        record = adjustments(model)[-1]
        assert record.step == number
        # The lowest 2, 4, 6, 8 of today's scores, of every layer all but its best at most.
        order = sorted(
            (value, name, index) for name, values in record.scores.items() for index, value in enumerate(values)
        )
        left = dict.fromkeys(record.scores, 4)
        expected: set[tuple[str, int]] = set()
        for _, name, index in order:
            if len(expected) < number and left[name] > 1:
                left[name] -= 1
                expected.add((name, index))
        assert set(record.pruned) == expected
        assert record.ranks == left
        assert record.expanded == []
        zero = {
            (layer.name, index)
            for layer in layers
            for index, value in enumerate(layer.parameter("e", "default").tolist())
            if value == 0
        }
        assert zero == expected
    assert len(adjustments(model)) == 4
    assert all(float(layer.parameter("e", "default").detach().abs().min()) > 0 for layer in layers)  # they train on
