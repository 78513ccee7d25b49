"""DiRA with a budget of ranks and with its penalty after the step: exact zeros, met budgets, and runs that go on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dynalora
from dynalora import DiraConfig
from dynalora.adapter.layer import AdapterLayer, adapter_layers
from dynalora.driver import drivers_of
from dynalora.errors import ConfigError, ScheduleError
from dynalora.methods.dira.budget import Line, first_weight, next_weight, select
from tests.driver.loops import OrderedTrainer, arguments, examples, trainable
from tests.reference import dira as reference
from tests.toys import TOYS, Toy

OPTIMIZERS: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.01),
    "fused": lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True),
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=10 * lr, momentum=0.9),
}
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def adapted(toy: Toy, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    settings = {"r": 8, "target_modules": list(toy.targets), "task_type": toy.task_type, "total_steps": 20}
    return peft.get_peft_model(toy.build(), DiraConfig(**{**settings, **options}))


def layers_of(model: Any) -> list[Any]:
    return list(adapter_layers(model).values())


def ranks(model: Any) -> list[int]:
    return [layer.rank("default") for layer in layers_of(model)]


def live(model: Any) -> list[int]:
    """Components that are not zero in both factors."""
    return [
        int(((layer.used("down", "default") != 0).any(1) | (layer.used("up", "default") != 0).any(0)).sum())
        for layer in layers_of(model)
    ]


def train(model: Any, toy: Toy, optimizer: torch.optim.Optimizer, steps: range) -> None:
    model.train()
    for step in steps:
        optimizer.zero_grad()
        toy.loss(model, seed=step).backward()
        optimizer.step()


def weight_of(model: Any) -> float:
    ((driver, layers),) = drivers_of(model)
    return driver.method.metrics(driver.moment(layers))["dira_penalty_weight"]


# --- what the formulas say -----------------------------------------------------------------------------------


@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 5)),
    lr=st.sampled_from([0.5, 1.0, 0.01]),
    weight=st.sampled_from([0.0, 0.3, 2.0, 50.0]),
    zero=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_proximal_step_equals_the_reference(
    shape: tuple[int, int, int], lr: float, weight: float, zero: int, seed: int
) -> None:
    inp, out, r = shape
    torch.manual_seed(seed)
    config = DiraConfig(
        r=r, target_modules=["0"], penalty_mode="proximal", penalty_weight=weight, penalty_schedule="constant"
    )
    model = peft.get_peft_model(nn.Sequential(nn.Linear(inp, out)).double(), config)
    (layer,) = layers_of(model)
    A, B = layer.parameter("down", "default"), layer.parameter("up", "default")
    A.data = torch.randn(r, inp, dtype=torch.float64)
    B.data = torch.randn(out, r, dtype=torch.float64)
    if zero < r:
        B.data[:, zero] = 0
    optimizer = torch.optim.SGD([A, B], lr=lr)
    model(torch.randn(3, inp, dtype=torch.float64)).square().mean().backward()
    expected = reference.proximal(A - lr * A.grad, B - lr * B.grad, lr * weight)
    optimizer.step()
    # Dead components lie last.
    alive = [i for i in range(r) if bool(expected[0][i].any())]
    order = [*alive, *(i for i in range(r) if i not in alive)]
    torch.testing.assert_close(A.detach(), expected[0][order], atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(B.detach(), expected[1][:, order], atol=1e-12, rtol=1e-9)


@given(
    rows=st.lists(st.lists(st.floats(0, 9), min_size=1, max_size=5), min_size=1, max_size=5),
    prices=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    share=st.floats(0, 1),
)
def test_selection_equals_the_reference(rows: list[list[float]], prices: list[int], share: float) -> None:
    prices = prices[: len(rows)]
    limit = share * sum(price * len(row) for price, row in zip(prices, rows, strict=True))
    flat = [(value / prices[m], m, prices[m]) for m, row in enumerate(rows) for value in row]
    keep = iter(select(*map(list, zip(*flat, strict=True)), limit))
    chosen = [{i for i in range(len(row)) if next(keep)} for row in rows]
    assert chosen == reference.survivors(rows, [float(p) for p in prices], limit)


@given(total=st.integers(1, 400), done=st.integers(0, 400), excess=st.floats(-50, 50), weight=st.floats(1e-3, 1e3))
def test_line_and_dual_update_equal_the_reference(total: int, done: int, excess: float, weight: float) -> None:
    start, end = Line.steps(total)
    assert 1 <= start <= end <= max(1, total)
    line = Line(start, end, 80.0, 30.0)
    assert line.allowed(done) == pytest.approx(reference.allowed(done, start, end, 80.0, 30.0))
    expected = reference.dual(weight, 1.0, excess, 0.0, 50.0, end - start + 1)
    assert next_weight(weight, 1.0, excess, line) == pytest.approx(expected)


def test_first_weight_takes_half_of_what_has_grown_to_zero() -> None:
    sizes = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    assert first_weight(sizes, 0.1, 5) * 0.1 * 5 == pytest.approx(2.0)
    assert first_weight(sizes * 0, 0.1, 5) == 0
    assert first_weight(sizes, 0.0, 5) == 0


# --- the budget is met ---------------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("toy", TOYS.values(), ids=lambda toy: toy.name)
@pytest.mark.parametrize(("seed", "lr", "target"), [(0, 1e-3, 2), (1, 1e-1, 4), (2, 1e-5, 3.5)])
def test_a_run_ends_at_its_average_rank(optimizer: str, toy: Toy, seed: int, lr: float, target: float) -> None:
    model = adapted(toy, seed, target_rank=target)
    train(model, toy, OPTIMIZERS[optimizer](trainable(model), lr), range(20))
    total = round(target * len(ranks(model)))
    assert sum(ranks(model)) == sum(live(model)) == total
    assert min(ranks(model)) >= 1
    assert sum(row.rank for row in dynalora.rank_landscape(model)) == total
    assert weight_of(model) == 0


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("options", [{}, {"gates": True}], ids=["plain", "gates"])
def test_a_run_ends_at_its_share_of_the_parameters(share: float, options: dict[str, Any]) -> None:
    toy = TOYS["llama"]
    model = adapted(toy, target_rank=share, r=16, **options)
    before = sum(p.numel() for p in trainable(model))
    train(model, toy, torch.optim.AdamW(trainable(model), lr=1e-2), range(20))
    after = sum(p.numel() for p in trainable(model))
    assert after == pytest.approx(share * before, rel=0.05)


@pytest.mark.parametrize("share", [0.2, 0.3, 0.45, 0.7])
@pytest.mark.parametrize("toy", TOYS.values(), ids=lambda toy: toy.name)
def test_a_share_is_met_as_nearly_as_few_components_allow(toy: Toy, share: float) -> None:
    """A component of these is up to 7 % of the whole; half of one is the most that a budget is missed by."""
    model = adapted(toy, target_rank=share, total_steps=30)
    prices = [layer.in_features + layer.out_features for layer in layers_of(model)]
    before = 8 * sum(prices)
    dearest = max(prices)
    train(model, toy, torch.optim.AdamW(trainable(model), lr=1e-3), range(30))
    after = sum(price * rank for price, rank in zip(prices, ranks(model), strict=True))
    assert abs(after - share * before) <= dearest / 2


def cut_short(tmp_path: Path, kind: str) -> Any:
    """A run whose budget cannot have been met, and the warnings of training and saving it."""
    toy = TOYS["llama"]
    model = adapted(toy, target_rank=2, total_steps=None if kind == "trainer" else 40)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if kind == "trainer":

            class Stop(transformers.TrainerCallback):
                def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                    control.should_training_stop = state.global_step == 9

            options = arguments(tmp_path / "run", max_steps=40, save_strategy="steps", save_steps=3)
            OrderedTrainer(model, options, train_dataset=examples(80), callbacks=[Stop()]).train()
        else:  # as many steps as there would be batches, with two batches to a step
            train(model, toy, torch.optim.AdamW(trainable(model), lr=1e-2), range(20))
        model.save_pretrained(tmp_path / "saved")
        model.save_pretrained(tmp_path / "again")
    return [str(row.message) for row in caught if "target_rank=2" in str(row.message)]


@pytest.mark.parametrize(("kind", "done"), [("trainer", 9), ("loop", 20)])
def test_a_run_that_ends_too_early_says_so_once(tmp_path: Path, kind: str, done: int) -> None:
    (message,) = cut_short(tmp_path, kind)
    assert f"met at step 24 of a run of 40 optimizer steps, and this is step {done}" in message
    assert message.startswith("at the end of training" if kind == "trainer" else "saving")


def test_a_met_budget_is_nothing_to_warn_of(tmp_path: Path) -> None:
    toy = TOYS["mlp"]
    model = adapted(toy, target_rank=2)
    model.save_pretrained(tmp_path / "untrained")
    train(model, toy, torch.optim.AdamW(trainable(model), lr=1e-2), range(12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "trained")


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 60])
def test_runs_of_any_length_meet_their_budget(mode: str, steps: int) -> None:
    toy = TOYS["mlp"]
    model = adapted(toy, target_rank=3, penalty_mode=mode, total_steps=steps)
    train(model, toy, torch.optim.AdamW(trainable(model), lr=1e-2), range(steps))
    assert sum(ranks(model)) == 6


def test_ranks_differ_where_matrices_differ() -> None:
    toy = TOYS["llama"]
    model = adapted(toy, target_rank=4, total_steps=60)
    train(model, toy, torch.optim.AdamW(trainable(model), lr=1e-2), range(60))
    assert sum(ranks(model)) == 24
    assert len(set(ranks(model))) > 1


def test_ranks_of_a_pattern_count_from_where_they_began() -> None:
    toy = TOYS["llama"]
    model = adapted(toy, r=4, rank_pattern={"q_proj": 12}, target_rank=6)
    train(model, toy, torch.optim.AdamW(trainable(model), lr=1e-2), range(20))
    assert sum(ranks(model)) == 36
    with pytest.raises(ConfigError, match="average rank that the adapter begins with, 4"):
        adapted(toy, r=8, rank_pattern=dict.fromkeys(toy.targets, 4), target_rank=5)


def test_the_task_decides_what_stays() -> None:
    """One of two layers has something to learn; it keeps the ranks."""
    torch.manual_seed(1)
    base = nn.ModuleDict({"used": nn.Linear(10, 10, bias=False), "idle": nn.Linear(10, 10, bias=False)}).double()
    target = torch.randn(10, 6).double() @ torch.randn(6, 10).double()

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = base

        def forward(self, x: Tensor) -> Tensor:
            return self.layers["used"](x) + 1e-3 * self.layers["idle"](x).detach() + 0 * self.layers["idle"](x)

    config = DiraConfig(r=8, target_modules=["used", "idle"], target_rank=4, total_steps=120)
    model = peft.get_peft_model(Both(), config)
    optimizer = torch.optim.SGD(trainable(model), lr=0.02, momentum=0.9)
    x = torch.randn(40, 10, dtype=torch.float64)
    goal = model(x).detach() + x @ target.T / 10
    for _ in range(120):
        optimizer.zero_grad()
        (model(x) - goal).square().mean().backward()
        optimizer.step()
    assert ranks(model) == [7, 1]


def test_what_may_live_on_is_not_shrunk() -> None:
    """At the first step at which the line leaves no room for all, the chosen are where a LoRA would have them."""
    toy = TOYS["llama"]
    start, _ = Line.steps(40)
    runs = []
    for options in ({"target_rank": 2}, {"penalty_weight": 0.0}):
        model = adapted(toy, total_steps=40, **options)
        train(model, toy, torch.optim.AdamW(trainable(model), lr=1e-2), range(start + 1))
        runs.append(layers_of(model))
    sizes, same = [], []
    for layer, lora in zip(*runs, strict=True):
        ends = [(one.used("down", "default"), one.used("up", "default")) for one in (layer, lora)]
        assert layer.rank("default") == 8  # shrunk, and not dead yet
        for i in range(8):
            same.append(all(torch.equal(ends[0][k].select(k, i), ends[1][k].select(k, i)) for k in (0, 1)))
            sizes.append(float(ends[1][0][i].norm() * ends[1][1][:, i].norm()))
    assert 0 < same.count(False) < 6
    assert max(size for size, equal in zip(sizes, same, strict=True) if not equal) <= sorted(sizes)[len(sizes) // 3]


# --- zero stays zero -----------------------------------------------------------------------------------------


@every_optimizer
def test_what_has_died_stays_exactly_zero(optimizer: str) -> None:
    toy = TOYS["llama"]
    weight = 0.08 if optimizer == "sgd" else 0.8  # its rate is ten times as large
    model = adapted(
        toy, penalty_mode="proximal", penalty_weight=weight, penalty_schedule="constant", init_weights=False
    )
    with torch.no_grad():
        for layer in layers_of(model):  # products of norms from 0.02 to 0.3
            down, up = layer.parameter("down", "default"), layer.parameter("up", "default")
            up.mul_(torch.linspace(0.02, 0.3, 8) / up.norm(dim=0) / down.norm(dim=1))
    stepping = OPTIMIZERS[optimizer](trainable(model), 1e-2)
    counts = []
    for step in range(25):
        if step == 12:  # from now on nothing shrinks, and momentum is free to act
            next(iter(model.peft_config.values())).penalty_weight = 0.0
        train(model, toy, stepping, range(step, step + 1))
        counts.append(sum(live(model)))
    assert counts[11] < counts[0]
    assert counts[12:] == [counts[11]] * 13
    assert ranks(model) == [8] * len(ranks(model))
    for layer in layers_of(model):
        for row, column in zip(layer.used("down", "default"), layer.used("up", "default").T, strict=True):
            assert bool(row.any()) == bool(column.any())


def test_dead_components_can_be_taken_out_at_times_of_ones_own() -> None:
    toy = TOYS["llama"]
    model = adapted(toy, target_rank=3, compact_every=15)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    train(model, toy, optimizer, range(14))
    assert ranks(model) == [8] * 6
    assert sum(live(model)) == 18
    train(model, toy, optimizer, range(14, 15))
    assert sum(ranks(model)) == sum(live(model)) == 18


def test_a_run_ends_without_the_dead_however_seldom_they_are_taken_out() -> None:
    toy = TOYS["llama"]
    model = adapted(toy, target_rank=3, compact_every=15, total_steps=25)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    train(model, toy, optimizer, range(24))
    assert sum(live(model)) == 18
    train(model, toy, optimizer, range(24, 25))
    assert sum(ranks(model)) == sum(live(model)) == 18


def test_taking_them_out_changes_nothing_but_the_size() -> None:
    toy = TOYS["llama"]
    updates, states = [], []
    for every in (None, 100):
        model = adapted(toy, target_rank=3, compact_every=every)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        train(model, toy, optimizer, range(19))  # after the last step both are small
        updates.append([layer.get_delta_weight("default").detach() for layer in layers_of(model)])
        states.append(sum(s.numel() for state in optimizer.state.values() for s in state.values()))
    for small, whole in zip(*updates, strict=True):
        torch.testing.assert_close(small, whole, atol=1e-5, rtol=1e-4)
    assert states[0] < 0.5 * states[1]


# --- runs that go on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("cut", [1, 5, 12, 15])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path, mode: str, cut: int) -> None:
    toy = TOYS["llama"]
    options = {"target_rank": 3, "penalty_mode": mode}
    whole = adapted(toy, **options)
    train(whole, toy, torch.optim.AdamW(trainable(whole), lr=1e-2), range(20))

    first = adapted(toy, **options)
    optimizer = torch.optim.AdamW(trainable(first), lr=1e-2)
    train(first, toy, optimizer, range(cut))
    first.save_pretrained(tmp_path)
    state = optimizer.state_dict()
    second = peft.PeftModel.from_pretrained(toy.build(), tmp_path, is_trainable=True)
    optimizer = torch.optim.AdamW(trainable(second), lr=1e-2)
    optimizer.load_state_dict(state)
    train(second, toy, optimizer, range(cut, 20))
    assert ranks(second) == ranks(whole)
    for one, other in zip(trainable(second), trainable(whole), strict=True):
        assert torch.equal(one, other)


def test_under_transformers_trainer(tmp_path: Path) -> None:
    toy = TOYS["llama"]
    model = adapted(toy, target_rank=2, total_steps=None)
    options = arguments(tmp_path, max_steps=10, logging_strategy="steps", logging_steps=1)
    run = OrderedTrainer(model, options, train_dataset=examples(20))
    run.train()
    assert sum(ranks(model)) == 12
    assert len(set(ranks(model))) > 1
    logged = [row for row in run.state.log_history if "dira_mean_rank" in row]
    assert logged[0]["dira_mean_rank"] == 8
    assert logged[-1]["dira_mean_rank"] == 2


def test_a_new_run_begins_its_budget_anew() -> None:
    toy = TOYS["llama"]
    model = adapted(toy, target_rank=4)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    train(model, toy, optimizer, range(20))
    dynalora.restart_schedule(model, total_steps=20)
    model.peft_config["default"].target_rank = 2
    train(model, toy, optimizer, range(20))
    assert sum(ranks(model)) == 12


def test_a_run_of_unknown_length_is_refused() -> None:
    toy = TOYS["mlp"]
    model = adapted(toy, target_rank=4, total_steps=None)
    with pytest.raises(ScheduleError, match="total_steps"):
        train(model, toy, torch.optim.AdamW(trainable(model), lr=1e-2), range(1))


def test_what_an_optimizer_without_a_rate_of_its_own_does() -> None:
    from transformers.optimization import Adafactor

    toy = TOYS["llama"]
    model = adapted(toy, target_rank=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        train(model, toy, Adafactor(trainable(model), scale_parameter=True, relative_step=True), range(20))
    assert sum(ranks(model)) == 24


def test_two_optimizers_share_a_budget() -> None:
    toy = TOYS["llama"]
    model = adapted(toy, target_rank=3)
    halves = [
        torch.optim.AdamW([layer.parameter(role, "default") for layer in layers_of(model)], lr=lr)
        for role, lr in (("down", 1e-3), ("up", 1e-2))
    ]
    for step in range(20):
        for half in halves:
            half.zero_grad()
        toy.loss(model, seed=step).backward()
        for half in halves:
            half.step()
    assert sum(ranks(model)) == sum(live(model)) == 18


# --- what a user may get wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"target_rank": 0}, "target_rank"),
        ({"target_rank": -1}, "target_rank"),
        ({"target_rank": 8}, "target_rank"),
        ({"target_rank": "4"}, "target_rank"),
        ({"target_rank": True}, "target_rank"),
        ({"target_rank": math.nan}, "target_rank"),
        ({"penalty_mode": "prox"}, "penalty_mode"),
        ({"target_rank": 4, "penalty": "variational"}, "penalty"),
        ({"target_rank": 4, "penalty_weight": 1e-3}, "penalty_weight"),
        ({"target_rank": 4, "penalty_schedule": "constant"}, "penalty_schedule"),
        ({"target_rank": 4, "compact_threshold": 0.1}, "compact_threshold"),
        ({"target_rank": 4, "penalty_mode": "gradient", "penalty_weight": 0.0}, "penalty_weight"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_sentence(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DiraConfig(**options)
    assert str(caught.value).startswith(f"DiraConfig: {field} must be")
    assert "\n" not in str(caught.value)


def test_a_share_below_one_component_each_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match=r"target_rank=0.05 is a share"):
        adapted(TOYS["llama"], target_rank=0.05)


def test_the_papers_form_stays_the_default_without_a_budget() -> None:
    assert not DiraConfig().proximal
    assert DiraConfig(target_rank=4).proximal
    assert not DiraConfig(target_rank=4, penalty_mode="gradient").proximal


def test_report_and_saved_ranks(tmp_path: Path) -> None:
    toy = TOYS["llama"]
    model = adapted(toy, target_rank=2)
    train(model, toy, torch.optim.AdamW(trainable(model), lr=1e-2), range(20))
    (report,) = dynalora.state_report(model)
    assert report.details["target_rank"] == 2
    assert report.details["dira_mean_rank"] == 2
    logits = toy.logits(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(toy.build(), tmp_path)
    assert ranks(again) == ranks(model)
    assert torch.equal(toy.logits(again), logits)
    assert isinstance(layers_of(again)[0], AdapterLayer)
