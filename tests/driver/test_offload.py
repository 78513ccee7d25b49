"""Base weights that Accelerate keeps on a disk or in memory and loads for each call (`device_map="auto"`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch

import dynalora
from dynalora.forgetting.base_model import fingerprint
from dynalora.forgetting.retention import retention
from dynalora.forgetting.texts import given_text
from tests.driver.loops import assert_close_weights, trainable
from tests.driver.test_two_processes import CONFIGS, SHARED, weights
from tests.toys import tokens
from tests.unit import tiny

STEPS = 6

PEDYRA = {"adjust_start": 1, "adjust_interval": 2, "adjust_end": 5, "adjust_size": 3, "total_steps": 8}
METHODS: dict[str, Any] = {
    **{name: CONFIGS[name] for name in CONFIGS if name not in ("dislora smoothed", "dislora star", "dira budget")},
    "pedyra pissa": lambda: dynalora.PedyraConfig(**SHARED, **PEDYRA, init_weights="pissa"),
    "pedyra dora": lambda: dynalora.PedyraConfig(**SHARED, **PEDYRA, use_dora=True),
}


@pytest.fixture(scope="module")
def words() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def base(words: Any, folder: Path | None) -> Any:
    """A tiny Llama, with a folder all but its embedding and first block in it, as a device map has it."""
    model = tiny.model(len(words))
    if folder is None:
        return model
    here, there = ("model.embed_tokens", "model.rotary_emb", "model.layers.0"), ("model.layers.1", "model.norm")
    places = {**dict.fromkeys(here, "cpu"), **dict.fromkeys((*there, "lm_head"), "disk")}
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=str(folder / "offloaded"), force_hooks=True
    )


def trained(words: Any, name: str, folder: Path | None) -> Any:
    torch.manual_seed(4)
    config = METHODS[name]()
    model = peft.get_peft_model(base(words, folder), config)
    if config.retain is not None:
        dynalora.prepare_retain(model, words, given_text([row["response"] for row in tiny.rows(6)], words))
    optimizer = torch.optim.SGD(trainable(model), lr=0.05)
    model.train()
    for step in range(STEPS):
        rows = tokens(4, 6, seed=step)
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("name", METHODS)
def test_offloaded_base_weights_change_nothing(words: Any, name: str, tmp_path: Path) -> None:
    plain, offloaded = trained(words, name, None), trained(words, name, tmp_path)
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    assert_close_weights(weights(offloaded), weights(plain), 1e-5)
    offloaded.save_pretrained(str(tmp_path / "saved"))
    again = peft.PeftModel.from_pretrained(base(words, None), str(tmp_path / "saved")).eval()
    rows = tokens(2, 6, seed=99)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=rows).logits, offloaded(input_ids=rows).logits, atol=1e-4, rtol=1e-4)


def test_what_reads_the_base_model_finds_offloaded_weights(words: Any, tmp_path: Path) -> None:
    plain, offloaded = trained(words, "dira", None), trained(words, "dira", tmp_path)
    assert fingerprint(offloaded) == fingerprint(plain)
    text = given_text([row["response"] for row in tiny.rows(4)], words)
    assert retention(offloaded, text).kl == pytest.approx(retention(plain, text).kl, rel=1e-3)
    rows = tokens(2, 6, seed=99)
    with torch.no_grad():
        expected = plain(input_ids=rows).logits
        offloaded.merge_adapter()
        torch.testing.assert_close(offloaded(input_ids=rows).logits, expected, atol=1e-4, rtol=1e-4)
