"""`retain` together with what else an adapter can have or go through."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

import dynalora
from dynalora.adapter.layer import adapter_layers
from dynalora.errors import ConfigError
from dynalora.export.snapshot import held_gates
from dynalora.forgetting.retain import prepare_retain
from dynalora.forgetting.retention import retention
from dynalora.forgetting.texts import OwnText, anchor_text, answered_text
from dynalora.methods import config_class, method_names
from tests.toys import TOYS
from tests.unit import tiny
from tests.unit.test_retain import by_definition, curvature_of, penalty_of

STRONG = 1e4
"""A weight at which much is kept."""


@pytest.fixture(scope="module")
def words() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def text_of(words: Any, model: Any) -> OwnText:
    """Text that a model's base writes."""
    return anchor_text(model, words, texts=16, tokens=24)


def trained(words: Any, config: Any, base: Any = None) -> Any:
    """A tiny language model with an adapter that has learned a few rows."""
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny.model(len(words)) if base is None else base, config).train()
    prepare_retain(model, words, text_of(words, model))
    learn(words, model)
    return model


def learn(words: Any, model: Any) -> None:
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    rows = [torch.tensor([words(row["response"])["input_ids"]]) for row in tiny.rows(4)]
    for ids in [*rows, *rows]:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def configuration(method: str, retain: float | None = None, **more: Any) -> Any:
    return config_class(method)(r=4, target_modules="all-linear", total_steps=8, retain=retain, **more)


def forgotten(words: Any, model: Any) -> float:
    return retention(model, text_of(words, model)).kl


@pytest.mark.parametrize("method", method_names())
def test_every_method_forgets_less_with_it(words: Any, method: str) -> None:
    loose, kept = (forgotten(words, trained(words, configuration(method, retain))) for retain in (None, STRONG))
    assert kept < 0.7 * loose


def test_ranks_that_move_keep_the_penalty_what_it_is() -> None:
    torch.manual_seed(0)
    config = dynalora.PedyraConfig(
        r=3, target_modules=["first", "second"], retain=30.0, adjust_start=1, adjust_interval=1, adjust_end=5,
        adjust_size=1, total_steps=6, init_weights=False,
    )  # fmt: skip
    model = peft.get_peft_model(TOYS["mlp"].build().double(), config).train()
    layers = adapter_layers(model, "default")
    for layer in layers.values():
        layer.curvatures["default"] = curvature_of(layer)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(6):
        TOYS["mlp"].loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    [report] = dynalora.state_report(model)
    assert len(set(report.ranks.values())) > 1, "ranks have moved"
    assert penalty_of(layers).item() == pytest.approx(by_definition(model), rel=1e-9)


@pytest.mark.parametrize("method", ["dira", "pedyra", "dislora"])
def test_a_static_update_is_still_a_plain_lora(words: Any, method: str, tmp_path: Any) -> None:
    model = trained(words, configuration(method, STRONG)).eval()
    dynalora.export_lora(model, tmp_path / "plain")
    plain = peft.PeftModel.from_pretrained(tiny.model(len(words)), tmp_path / "plain").eval()
    assert plain.peft_config["default"].peft_type == "LORA"
    ids = torch.arange(24).reshape(2, 12)
    torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits, atol=2e-5, rtol=2e-5)


def test_another_adapter_beside_it_has_no_part_in_it(words: Any) -> None:
    """Training an adapter without `retain` is the same run whether or not another one has it."""

    def second(retain: float | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny.model(len(words)), configuration("dira", retain)).train()
        prepare_retain(model, words, text_of(words, model))
        torch.manual_seed(1)
        model.add_adapter("other", configuration("dira"))
        model.set_adapter("other")
        learn(words, model)
        return {name: weight.detach() for name, weight in model.named_parameters() if ".other" in name}

    with_it, without = second(STRONG), second(None)
    assert with_it.keys() == without.keys()
    assert all(torch.equal(weight, without[name]) for name, weight in with_it.items())


def test_a_second_task_keeps_what_the_first_taught(words: Any) -> None:
    """The adapter of the first task is merged, so the base model that writes the text to keep knows that task."""
    first = trained(words, configuration("dira")).merge_and_unload()
    text = text_of(words, first)
    assert text.fingerprint != text_of(words, tiny.model(len(words))).fingerprint
    loose, kept = (
        retention(trained(words, configuration("disel", retain), copy.deepcopy(first)), text, base=first).kl
        for retain in (None, STRONG)
    )
    assert kept < 0.7 * loose


def test_answers_to_prompts_are_what_the_base_model_says_to_them(words: Any, tmp_path: Any) -> None:
    first = trained(words, configuration("dira"))
    prompts: list[Any] = ["Name a number.", list(words("Is it")["input_ids"])]
    text = answered_text(first, words, prompts, tokens=6, cache=tmp_path)
    assert text.rows[1][: text.starts[1]] == tuple(prompts[1])
    assert all(1 <= len(row) - start <= 6 for row, start in zip(text.rows, text.starts, strict=True))
    assert text.fingerprint == answered_text(tiny.model(len(words)), words, prompts, tokens=6, cache=False).fingerprint
    assert answered_text(first, words, prompts, tokens=6, cache=tmp_path) == text  # from the file
    assert len(list(tmp_path.iterdir())) == 1
    both = text + text_of(words, first)
    assert both.tokens == text.tokens + text_of(words, first).tokens
    assert both.rows[:2] == text.rows
    for wrong in ("Name a number.", [], [[]]):
        with pytest.raises(ConfigError, match="prompts"):
            answered_text(first, words, wrong, cache=False)


def test_answers_to_the_first_tasks_prompts_are_kept_in_the_second(words: Any) -> None:
    first = trained(words, configuration("dira")).merge_and_unload()
    prompts = [list(words(f"{word} is")["input_ids"]) for word in ("Seven", "Nine", "Two", "Ten")]
    answers = answered_text(first, words, prompts, tokens=12, cache=False)

    def second(*more: Any) -> float:
        torch.manual_seed(0)
        model = peft.get_peft_model(copy.deepcopy(first), configuration("dira", 1e3)).train()
        keep = anchor_text(first, words, texts=4, tokens=8, cache=False)
        prepare_retain(model, words, sum(more, keep))
        learn(words, model)
        return retention(model, answers, base=first).kl

    assert second(answers) < 0.8 * second()


def test_held_gates_keep_it_too(words: Any) -> None:
    """A snapshot of DISeL's gates is a plain update, and forgets no more than that without `retain` either."""

    def snapshot(retain: float | None) -> float:
        model = trained(words, configuration("disel", retain)).eval()
        ids = [torch.tensor([words(row["response"])["input_ids"]]) for row in tiny.rows(4)]
        record = dynalora.record_gates(model, [{"input_ids": row, "labels": row} for row in ids])
        with held_gates(model, record):
            return forgotten(words, model)

    assert snapshot(STRONG) < 0.7 * snapshot(None)


def test_doras_norms_are_trained_beside_it(words: Any) -> None:
    loose, kept = (
        forgotten(words, trained(words, configuration("pedyra", retain, use_dora=True))) for retain in (None, STRONG)
    )
    assert kept < loose
