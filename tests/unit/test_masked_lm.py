"""Masked-LM perplexity against a loop over single texts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from dynalora import DiselConfig
from dynalora.errors import ConfigError, DataError
from dynalora.evaluation.heads import MASKED_LM
from dynalora.evaluation.masked_lm import mask_text, mask_windows, masked_lm_perplexity, under_head
from dynalora.lab.models import load_model
from tests.unit import tiny

TEXTS = ["The quick brown fox jumps over the lazy dog.", "", "a", "ab", "It rained all day, and nobody minded."]


@pytest.fixture(scope="module")
def words() -> Any:
    made = tiny.tokenizer(chat=False)
    made.add_special_tokens({"mask_token": "<mask>", "pad_token": "<pad>"})
    return made


def encoder(words: Any, kind: str) -> Any:
    torch.manual_seed(3)
    sizes: dict[str, Any] = {
        "vocab_size": len(words), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 140, "initializer_range": 0.3,
        "pad_token_id": words.pad_token_id,
    }  # fmt: skip
    if kind == "roberta":
        sizes["pad_token_id"] = 1  # positions are counted from here; in none of the texts
        return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**sizes)).eval()
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).eval()


@torch.no_grad()
def naive(model: Any, text: Any) -> tuple[float, list[tuple[float, int]]]:
    """One text at a time, float64 softmax, one masked position after the other."""
    sums = []
    for row, places in zip(text.rows, text.masked, strict=True):
        seen = [text.mask_id if place in places else token for place, token in enumerate(row)]
        log_p = model(input_ids=torch.tensor([seen])).logits[0].double().log_softmax(-1)
        sums.append((-sum(float(log_p[place, row[place]]) for place in places), len(places)))
    return sum(s for s, _ in sums) / sum(n for _, n in sums), sums


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_perplexity_is_that_of_a_naive_loop(kind: str, batch_size: int, words: Any) -> None:
    model = peft.get_peft_model(
        encoder(words, kind), DiselConfig(r=2, target_modules=["query", "value"], init_weights=False)
    ).train()
    text = mask_text(TEXTS, words)
    found = masked_lm_perplexity(model, text, batch_size=batch_size)
    assert model.training
    loss, sums = naive(model.eval(), text)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert found.tokens == sum(n for _, n in sums) == text.tokens
    n = len(sums)
    spread = math.sqrt(sum((s - loss * k) ** 2 for s, k in sums) / (n - 1) / n)
    assert found.error == pytest.approx(spread / (text.tokens / n), rel=1e-4)
    with model.disable_adapter():
        assert masked_lm_perplexity(model, text).loss != pytest.approx(loss, rel=1e-3)


def test_the_mask_follows_the_seed_and_nothing_else(words: Any) -> None:
    before = torch.get_rng_state()
    text = mask_text(TEXTS, words, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert mask_text(TEXTS, words, seed=1) == text
    assert mask_text(TEXTS, words, seed=2).masked != text.masked
    # A text's mask does not depend on the texts before it.
    assert mask_text(["other words", *TEXTS[1:]], words, seed=1).masked[1:] == text.masked[1:]


def test_shares_are_of_the_ordinary_tokens(words: Any) -> None:
    text = mask_text(TEXTS, words, share=0.15)
    assert [len(row) for row in text.rows] == [len(TEXTS[0]), 2, len(TEXTS[4])]
    assert [len(places) for places in text.masked] == [round(0.15 * 44), 1, round(0.15 * 37)]
    with_ends = mask_text(["<|im_end|>abcdef<|im_end|>"], words, share=0.99)
    assert with_ends.masked == ((1, 2, 3, 4, 5, 6),)
    assert [len(row) for row in mask_text(TEXTS, words, max_length=5).rows] == [5, 2, 5]


def test_windows_are_masked_alike_and_get_the_special_tokens(words: Any) -> None:
    rows = [list(range(10, 30)), list(range(40, 70)), [5]]
    plain = mask_windows(rows, words, seed=1)
    assert plain.rows == tuple(map(tuple, rows[:2]))
    assert [len(places) for places in plain.masked] == [3, round(0.15 * 30)]
    ended = tiny.tokenizer(chat=False)
    ended.add_special_tokens({"mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"})
    found = mask_windows(rows, ended, seed=1)
    assert found.rows == tuple((ended.cls_token_id, *row, ended.sep_token_id) for row in rows[:2])
    # The same ordinary tokens, one place to the right.
    assert found.masked == tuple(tuple(place + 1 for place in places) for places in plain.masked)
    model = encoder(words, "bert")
    loss, _ = naive(model, plain)
    score = masked_lm_perplexity(model, plain)
    assert score.interval.value == pytest.approx(math.exp(loss), rel=1e-4)
    assert math.log(score.interval.high / score.interval.value) == pytest.approx(1.96 * score.error, rel=1e-3)
    assert math.log(score.interval.value / score.interval.low) == pytest.approx(1.96 * score.error, rel=1e-3)


def test_what_cannot_be_masked_is_named(words: Any) -> None:
    for given, message in (
        ({"share": 0.0}, r"share is 0\.0"),
        ({"share": 1.0}, r"share is 1\.0"),
        ({"max_length": 3}, "max_length is 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            mask_text(TEXTS, words, **given)
    with pytest.raises(ConfigError, match="got one string"):
        mask_text("text", words)
    with pytest.raises(ConfigError, match="has no mask token"):
        mask_text(TEXTS, tiny.tokenizer())
    with pytest.raises(ConfigError, match="has no mask token"):
        mask_windows([[5, 6]], tiny.tokenizer())
    with pytest.raises(ConfigError, match=r"share is 1\.0"):
        mask_windows([[5, 6]], words, share=1.0)
    with pytest.raises(DataError, match="None of the 1 windows"):
        mask_windows([[5]], words)
    with pytest.raises(DataError, match="None of the 2 texts"):
        mask_text(["", "a"], words)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        masked_lm_perplexity(encoder(words, "bert"), mask_text(TEXTS, words), batch_size=0)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_classifier_in_memory_is_measured_like_its_saved_adapter(kind: str, words: Any, tmp_path: Path) -> None:
    original = encoder(words, kind)
    original.save_pretrained(tmp_path / "base")
    text = mask_text(TEXTS, words)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
    targets = r".*encoder\.layer\.\d+\..*(query|value|dense)"
    classifier: Any = peft.get_peft_model(loaded, DiselConfig(r=3, target_modules=targets, task_type="SEQ_CLS"))
    with torch.no_grad():
        for name, parameter in classifier.named_parameters():
            if "up" in name or "gate" in name:
                parameter.normal_(0, 0.3)
    classifier.save_pretrained(tmp_path / "adapter")
    auto = transformers.AutoModelForMaskedLM
    saved = peft.PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    wanted = masked_lm_perplexity(saved, text).loss
    found = masked_lm_perplexity(under_head(classifier, auto.from_pretrained(tmp_path / "base")), text).loss
    assert found == pytest.approx(wanted, rel=1e-6)
    assert found != pytest.approx(masked_lm_perplexity(original, text).loss, rel=1e-3)
    with classifier.disable_adapter():
        assert masked_lm_perplexity(
            under_head(classifier, auto.from_pretrained(tmp_path / "base")), text
        ).loss == pytest.approx(masked_lm_perplexity(original, text).loss, rel=1e-6)
    other = encoder(words, "roberta" if kind == "bert" else "bert")
    with pytest.raises(ConfigError, match="does not fit under the head of a"):
        under_head(classifier, other)


def test_an_encoder_without_a_masked_lm_head_is_refused(words: Any, tmp_path: Path) -> None:
    original = encoder(words, "bert")
    original.save_pretrained(tmp_path / "whole")
    assert type(load_model(str(tmp_path / "whole"), heads=(MASKED_LM,))) is transformers.BertForMaskedLM
    original.bert.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ConfigError, match="has no masked-LM head"):
        load_model(str(tmp_path / "encoder"), heads=(MASKED_LM,))
