"""`max_forgetting`: the weight that follows the KL, the end of a run, and resuming; replay and the user's own text."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import dynalora
from dynalora.adapter.budget import controlled_weight, due, measured, new_state
from dynalora.adapter.layer import adapter_layers
from dynalora.driver import drivers_of
from dynalora.errors import ConfigError, TrainingError
from dynalora.forgetting.budget import BudgetOutcome, TextMeter, hold_budget, retain_part, some_texts
from dynalora.forgetting.retain import read_curvature, retain_cost
from dynalora.forgetting.retention import retention
from dynalora.forgetting.texts import MeasuredText, anchor_text, given_text
from tests.processes import run_two

from . import tiny


@pytest.fixture(scope="module")
def words() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNALORA_CACHE", str(tmp_path_factory.getbasetemp() / "budget-cache"))


def adapted(words: Any, config: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    if config is None:
        values = {"r": 4, "penalty_weight": 0.0, "retain": 30.0, "max_forgetting": 0.05, **options}
        config = dynalora.DiraConfig(target_modules="all-linear", **values)
    return peft.get_peft_model(tiny.model(len(words)), config)


def part_of(model: Any) -> Any:
    ((driver, _),) = drivers_of(model)
    return retain_part(driver)


# --- the weight -----------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    kl=st.floats(1e-4, 10), ratio=st.floats(0.1, 100), log=st.floats(-6, 0), retain=st.floats(1, 1e4),
    step=st.integers(0, 60), total=st.none() | st.integers(30, 300),
)  # fmt: skip
def test_the_weight_is_its_definition(
    kl: float, ratio: float, log: float, retain: float, step: int, total: int | None
) -> None:
    state = new_state()
    state[0] = log
    weight = controlled_weight(state, torch.tensor(kl / ratio), retain, 0.2, kl, step, total)
    u = log
    if step >= (5 if total is None else 0.15 * total):
        if kl < 1.3 * 0.2:
            u += 15 / (total or 30) * max(math.log(kl / (1.3 * 0.2)), -1.0)
        elif kl > 2.5 * 0.2:
            u += 15 / (total or 30) * min(math.log(kl / (2.5 * 0.2)), 1.0)
        u = min(max(u, -math.log(1000)), 0.0)
    assert float(weight) == pytest.approx(retain * math.exp(u), rel=1e-3)
    assert measured(state) == (pytest.approx(kl), step)


@pytest.mark.parametrize("kl", [1e-4, 0.15, 30.0])
def test_the_weight_is_retain_at_most_and_a_thousandth_at_least(kl: float) -> None:
    state = new_state()
    weights = [float(controlled_weight(state, torch.tensor(kl), 700.0, 0.1, kl, step, 30)) for step in range(31)]
    assert max(weights) == pytest.approx(700.0)
    assert weights[4] == pytest.approx(700.0)  # at first nothing follows from how little has changed
    assert weights[30] == pytest.approx(0.7 if kl == 1e-4 else 700.0)


def test_the_weight_rises_again_where_too_much_is_forgotten() -> None:
    state = new_state()
    state[0] = -5.0
    low = float(controlled_weight(state, torch.tensor(1.0), 700.0, 0.1, 1.0, 10, 30))
    high = float(controlled_weight(state, torch.tensor(1.0), 700.0, 0.1, 1.0, 11, 30))
    assert low < high <= 700.0


def test_the_weight_stays_until_a_change_was_measured() -> None:
    """Weights move before anything is measured, and the first measurement may find none yet."""
    state = new_state()
    for step, kl in enumerate((None, 0.0, None), start=10):
        assert float(controlled_weight(state, torch.tensor(1e-9), 700.0, 0.1, kl, step, 30)) == pytest.approx(700.0)
    assert float(controlled_weight(state, torch.tensor(1e-3), 700.0, 0.1, 1e-3, 13, 30)) < 700.0


def test_between_measurements_the_ratio_stays() -> None:
    state = new_state()
    state[0] = -3.0
    first = controlled_weight(state, torch.tensor(0.01), 1.0, 0.1, 0.2, 15, None)
    again = controlled_weight(state, torch.tensor(0.02), 1.0, 0.1, None, 16, None)
    assert float(first) == pytest.approx(math.exp(-3.0))  # twice the budget is left alone
    assert float(again / first) == pytest.approx(1.6**0.5, rel=1e-4)  # and 4 times is not: 15/30 · log(4 / 2.5)
    assert measured(state) == (pytest.approx(0.2), 15)


def test_a_penalty_that_is_no_number_leaves_no_trace() -> None:
    state = new_state()
    for kl in (0.0, 0.1):
        for value in (float("nan"), 0.0, float("inf")):
            weight = controlled_weight(state, torch.tensor(value), 10.0, 0.1, kl, 20, 30)
            assert torch.isfinite(weight)
            assert torch.isfinite(state).all()


@pytest.mark.parametrize(("total", "most"), [(30, 9), (1000, 25), (None, 25)])
def test_measurements_are_sparse(total: int | None, most: int) -> None:
    steps = [step for step in range(total or 1000) if due(step, total)]
    assert 0 not in steps
    assert 4 <= len(steps) <= most


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), True, "much"])
def test_budgets_that_cannot_be_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="max_forgetting must be a positive number"):
        dynalora.DiraConfig(retain=1.0, max_forgetting=value)


def test_a_budget_without_retain_says_what_else_there_is() -> None:
    with pytest.raises(ConfigError, match=r"give retain=1000.0 too.*RetentionMonitor.*trim"):
        dynalora.DiraConfig(max_forgetting=0.1)
    with pytest.raises(ConfigError, match="retain_mode must be"):
        dynalora.DiraConfig(retain=1.0, retain_mode="sometimes")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="retain_on must be"):
        dynalora.DiraConfig(retain=1.0, retain_on=[])
    with pytest.raises(ConfigError, match="retain_on must be left out"):
        dynalora.DiraConfig(retain_on=["text"])


# --- runs -----------------------------------------------------------------------------------------------------


def trainer_of(words: Any, model: Any, folder: Any, steps: int = 30, rate: float = 2e-2, **more: Any) -> Any:
    data = [{"input_ids": (ids := words(row["response"])["input_ids"]), "labels": ids} for row in tiny.rows(8)]
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, learning_rate=rate, report_to="none", use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=4, logging_steps=5, **{"save_strategy": "no", **more},
    )  # fmt: skip
    return transformers.Trainer(
        model, arguments, train_dataset=data, data_collator=transformers.DataCollatorForSeq2Seq(words),
        processing_class=words,
    )  # fmt: skip


@pytest.mark.parametrize("rate", [1e-2, 3e-2])
@pytest.mark.parametrize("name", ["dira", "disel", "pedyra"])
def test_a_trainers_run_ends_at_its_budget(words: Any, tmp_path: Any, name: str, rate: float) -> None:
    options: Any = {"r": 4, "target_modules": "all-linear", "retain": 30.0, "max_forgetting": 0.05}
    configs: Any = {
        "dira": lambda: dynalora.DiraConfig(**options),
        "disel": lambda: dynalora.DiselConfig(**options),
        "pedyra": lambda: dynalora.PedyraConfig(**options),
    }
    model = adapted(words, configs[name]())
    trainer = trainer_of(words, model, tmp_path, rate=rate)
    trainer.train()
    kl = retention(model, anchor_text(model, words)).kl
    assert 0.9 * 0.05 <= kl <= 1.1 * 0.05
    report = dynalora.state_report(model)[0].details
    assert report["max_forgetting"] == 0.05
    assert report["forgetting_step"] == 25
    assert "forgets" in report["budget"]
    logged = [row for row in trainer.state.log_history if "retain_kl" in row]
    assert len(logged) >= 5
    assert all(row["retain_weight"] > 0 and row["retain_penalty"] >= 0 for row in logged)


def loop(words: Any, model: Any, steps: int, rate: float = 2e-2) -> None:
    ids = torch.tensor([words("It is seven!")["input_ids"]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_loop_of_ones_own_calls_once_before_and_once_after(words: Any) -> None:
    model = adapted(words)
    text = anchor_text(model, words, texts=24, tokens=10, cache=False)
    dynalora.prepare_retain(model, words, text)
    loop(words, model, 20)
    (outcome,) = hold_budget(model)
    kl = retention(model, text).kl
    assert outcome.kl == pytest.approx(kl, rel=1e-5)
    assert outcome.held
    assert 0.045 <= kl <= 0.055
    assert hold_budget(adapted(words)) == []  # which has not trained


def test_a_loop_that_forgets_to_end_its_budget_hears_of_it_when_it_saves(words: Any, tmp_path: Any) -> None:
    model = adapted(words)
    dynalora.prepare_retain(model, words, anchor_text(model, words, texts=4, tokens=4, cache=False))
    model.save_pretrained(tmp_path / "start")  # before any step there is nothing to end
    loop(words, model, 2)
    with pytest.warns(UserWarning, match=r"max_forgetting=0\.05.*call dynalora\.hold_budget\(model\)"):
        model.save_pretrained(tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path / "b")  # it says so once
        hold_budget(model)
        model.save_pretrained(tmp_path / "c")


def test_a_run_that_does_not_need_its_budget_says_so(words: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(words, max_forgetting=5.0, total_steps=10)
    dynalora.prepare_retain(model, words, anchor_text(model, words, texts=8, tokens=6, cache=False))
    loop(words, model, 10, rate=1e-4)
    with caplog.at_level(logging.INFO, logger="dynalora"):
        (outcome,) = hold_budget(model)
    assert outcome.factor == 1.0
    assert not outcome.held
    assert "the run did not need the budget" in caplog.text
    late = BudgetOutcome("default", 0.1, 0.05, 0.05, 1.0, weight=50.0, retain=100.0)
    assert "had not fallen far enough" in str(late)


def test_weights_that_are_no_numbers_are_no_success(words: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(words)
    dynalora.prepare_retain(model, words, anchor_text(model, words, texts=4, tokens=4, cache=False))
    loop(words, model, 2)
    layer = next(iter(adapter_layers(model).values()))
    layer.parameter("up", "default").data.fill_(float("nan"))
    assert hold_budget(model) == []
    assert "max_forgetting=0.05 was not held" in caplog.text


def test_a_copy_asks_for_its_own_text(words: Any) -> None:
    model = adapted(words)
    dynalora.prepare_retain(model, words, anchor_text(model, words, texts=4, tokens=4, cache=False))
    twin = copy.deepcopy(model)
    with pytest.raises(TrainingError, match="prepare_retain"):
        loop(words, twin, 1)
    loop(words, model, 1)


def test_measuring_does_not_touch_what_is_random(words: Any) -> None:
    model = adapted(words).train()
    meter = TextMeter(model, anchor_text(model, words, texts=4, tokens=4, cache=False))
    state = torch.get_rng_state()
    assert meter.kl() == pytest.approx(0.0, abs=1e-9)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_some_texts_are_from_all_over() -> None:
    text = MeasuredText(tuple((index, 1) for index in range(10)), (1,) * 10)
    assert [row[0] for row in some_texts(text, 4).rows] == [0, 2, 5, 7]
    assert some_texts(text, 20) == text


def test_half_a_run_resumed_equals_the_whole(words: Any, tmp_path: Any) -> None:
    weights, states = [], []
    for halves in (False, True):
        model = adapted(words)
        folder = tmp_path / str(halves)
        trainer_of(words, model, folder, save_strategy="steps", save_steps=13).train()
        if halves:  # the first half as a killed run left it, resumed by another process' objects
            model = adapted(words)
            trainer_of(words, model, folder).train(resume_from_checkpoint=str(folder / "checkpoint-13"))
        weights.append(peft.get_peft_model_state_dict(model))
        states.append([layer.running("budget", "default") for layer in adapter_layers(model).values()])
        assert part_of(model).outcome.held
    assert [state is not None for state in states[0]].count(True) == 1
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_a_new_run_begins_anew(words: Any, tmp_path: Any) -> None:
    model = adapted(words)
    trainer_of(words, model, tmp_path, steps=6).train()
    first = part_of(model).outcome
    trainer_of(words, model, tmp_path, steps=6, rate=1e-3).train()
    assert part_of(model).outcome is not first
    state = next(layer.running("budget", "default") for layer in adapter_layers(model).values())
    assert state is not None
    assert measured(state)[1] == 5


# --- replay ---------------------------------------------------------------------------------------------------


def test_replay_adds_the_gradient_of_the_kl(words: Any) -> None:
    model = adapted(words, retain_mode="replay", max_forgetting=None, init_weights=False, dropout=0.5).train()
    text = anchor_text(model, words, texts=9, tokens=5, cache=False)
    meter = TextMeter(model, text)
    parameters = [p for p in model.parameters() if p.requires_grad]
    seen = set()
    for step in range(3):
        value, gradients = meter.replay(step, parameters)
        rows = range(step, 9, 3)
        part = MeasuredText(tuple(text.rows[i] for i in rows), tuple(text.starts[i] for i in rows))
        assert float(value) == pytest.approx(retention(model, part).kl, rel=1e-4)
        seen.add(round(float(value), 9))
        direction = [torch.randn_like(p) for p in parameters]
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True) if g is not None)
        ends = []
        for size in (1e-3, -1e-3):
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(d, alpha=size)
                ends.append(retention(model, part).kl)
                for p, d in zip(parameters, direction, strict=True):
                    p.sub_(d, alpha=size)
        assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(slope, rel=0.05, abs=1e-3)
    assert len(seen) == 3
    assert model.training
    assert all(p.grad is None for p in parameters)


def test_replay_keeps_more_and_to_a_budget(words: Any, tmp_path: Any) -> None:
    lost = {}
    for weight in (1e-6, 3.0):
        model = adapted(words, retain_mode="replay", retain=weight, max_forgetting=None)
        trainer_of(words, model, tmp_path).train()
        assert not any(layer.curvatures for layer in adapter_layers(model).values())
        lost[weight] = retention(model, anchor_text(model, words)).kl
    assert lost[3.0] < 0.5 * lost[1e-6]
    model = adapted(words, retain_mode="replay", retain=3.0, max_forgetting=0.05)
    trainer_of(words, model, tmp_path).train()
    assert part_of(model).outcome.held


# --- the user's own text ----------------------------------------------------------------------------------------


def test_texts_of_the_users_own_are_kept(words: Any, tmp_path: Any) -> None:
    texts = ["One is less than two.", "Seven is\nprime."]
    plain, lines = tmp_path / "texts.txt", tmp_path / "texts.jsonl"
    plain.write_text("\n\n".join(texts))
    tiny.write_jsonl(lines, [{"text": text} for text in texts])
    for source in (texts, str(plain), str(lines)):
        model = adapted(words, retain_on=source)
        trainer_of(words, model, tmp_path, steps=2).train()
        assert part_of(model).meter.text == given_text(texts, words)
    model.save_pretrained(tmp_path / "saved")
    assert "texts.jsonl" not in (tmp_path / "saved" / "adapter_config.json").read_text()
    assert model.peft_config["default"].retain_on == str(lines)


# --- costs, precision, processes --------------------------------------------------------------------------------


@pytest.mark.parametrize("gates", [False, True])
def test_the_cost_in_memory_is_that_of_what_is_kept(words: Any, gates: bool) -> None:
    config = dynalora.DiraConfig(r=4, target_modules="all-linear", retain=1.0, gates=gates, penalty_weight=0.0)
    model = adapted(words, config)
    text = anchor_text(model, words, texts=6, tokens=8, cache=False)
    read_curvature(model, text, rank=20, bank=16)
    tensors = {}
    for layer in adapter_layers(model).values():
        curvature = layer.curvatures["default"]
        moments = (curvature.inputs, curvature.outputs)
        parts = [part for moment in moments for part in (moment.basis, moment.diagonal)]
        for tensor in (*parts, curvature.bank):
            if tensor is not None:
                tensors[id(tensor)] = tensor.numel() * tensor.element_size()
    cost = retain_cost(model, rank=20, bank=16)
    assert cost.bytes == sum(tensors.values())
    assert cost.share(1000) == pytest.approx(cost.share(10) / 100)


def test_the_cost_of_a_large_model_needs_no_weights() -> None:
    with torch.device("meta"):
        config = transformers.LlamaConfig(
            hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32
        )
        base = transformers.LlamaForCausalLM(config)
        model = peft.get_peft_model(base, dynalora.DiraConfig(target_modules="all-linear", retain=1.0))
    cost = retain_cost(model)
    widths = 3 * 4096 + 11008 + 5 * 4096 + 2 * 11008  # q, k and v read one tensor, gate and up another
    assert cost.bytes == 2 * 4 * 129 * widths
    assert cost.share(2048) < 0.01


@pytest.mark.parametrize("kind", ["bfloat16", "checkpointing", "tied", "4-bit"])
@pytest.mark.parametrize("mode", ["quadratic", "replay"])
def test_bases_of_all_kinds_train_within_a_budget(words: Any, kind: str, mode: str, tmp_path: Any) -> None:
    base = tiny.model(len(words), width=64)
    if kind == "bfloat16":
        base = base.bfloat16()
    elif kind == "tied":
        base.config.tie_word_embeddings = True
        base.tie_weights()
    elif kind == "4-bit":
        pytest.importorskip("bitsandbytes")
        base.save_pretrained(tmp_path)
        how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=how)
    config = dynalora.DiraConfig(
        r=4, target_modules="all-linear", retain=30.0, max_forgetting=0.05, retain_mode=mode, penalty_weight=0.0
    )  # type: ignore[call-arg]
    model = peft.get_peft_model(base, config).train()
    if kind == "checkpointing":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    dynalora.prepare_retain(model, words, anchor_text(model, words, texts=6, tokens=8, cache=False))
    loop(words, model, 8)
    part = part_of(model)
    assert torch.isfinite(torch.as_tensor(part.weight))
    assert part.value > 0
    for layer in adapter_layers(model).values():
        assert mode == "replay" or torch.isfinite(layer.curvatures["default"].outputs.basis).all()
        assert all(torch.isfinite(p).all() for p in layer.adapter_parameters("default").values())
    (outcome,) = hold_budget(model)
    assert outcome.kl <= 0.055


WORKER = """
import os, sys
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from tests.unit import test_budget as this
rank, folder, port = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2")
torch.set_num_threads(1)
distributed.init_process_group("gloo", rank=rank, world_size=2)
torch.save(this.on_processes(slice(rank, None, 2), DistributedDataParallel), f"{folder}/{rank}.pt")
distributed.destroy_process_group()
"""


def on_processes(rows: slice, wrap: Any = lambda model: model) -> dict[str, torch.Tensor]:
    """A run over its part of every batch; the adapter at its end."""
    words = tiny.tokenizer()
    model = adapted(words).train()
    dynalora.prepare_retain(model, words, given_text([row["response"] for row in tiny.rows(6)], words))
    called = wrap(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    ids = torch.tensor([words(text)["input_ids"] for text in ("One.", "Six.", "Ten.", "Two.")])[rows]
    for _ in range(10):
        called(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    hold_budget(model)
    return {name: value.detach() for name, value in peft.get_peft_model_state_dict(model).items()}


def test_two_processes_train_as_one(tmp_path: Any) -> None:
    run_two(WORKER, str(tmp_path))
    alone = on_processes(slice(None))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert any("budget" in name for name in alone)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, atol=2e-5, rtol=2e-3)
