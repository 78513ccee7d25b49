"""Retention against its definition, computed in float64 one token at a time."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import dynalora
from dynalora.common.files import cache_folder
from dynalora.errors import ConfigError, UnsupportedError
from dynalora.forgetting import texts as measured
from dynalora.forgetting.base_model import adapters_off, fingerprint
from dynalora.forgetting.retention import base_predictions, retention
from dynalora.forgetting.texts import own_text

from . import tiny


@pytest.fixture(scope="module")
def words() -> Any:
    return tiny.tokenizer()


def base_model(words: Any) -> Any:
    return tiny.model(len(words)).eval()


def adapted(base: Any, config: Any = None, *, strength: float = 0.3) -> Any:
    config = config or peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(strength * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def text_of(model: Any, words: Any, **options: Any) -> Any:
    return own_text(model, words, **{"texts": 5, "tokens": 7, "cache": False, **options})


@torch.no_grad()
def by_definition(model: Any, text: Any) -> tuple[float, float, float]:
    """KL, base loss and tuned loss, each text alone, without padding."""
    kl = base_loss = tuned_loss = 0.0
    for row, start in zip(text.rows, text.starts, strict=True):
        ids = torch.tensor([row])
        with model.disable_adapter():
            p = model(input_ids=ids).logits[0].double().log_softmax(-1)
        q = model(input_ids=ids).logits[0].double().log_softmax(-1)
        for place in range(start, len(row)):
            kl += float((p[place - 1].exp() * (p[place - 1] - q[place - 1])).sum())
            base_loss -= float(p[place - 1, row[place]])
            tuned_loss -= float(q[place - 1, row[place]])
    return kl / text.tokens, base_loss / text.tokens, tuned_loss / text.tokens


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 1), (2, 3), (8, 256)])
def test_retention_is_its_definition_whatever_the_batch_and_chunk(words: Any, batch_size: int, chunk: int) -> None:
    model = adapted(base_model(words))
    text = text_of(model, words)
    kl, base_loss, tuned_loss = by_definition(model, text)
    found = retention(model, text, batch_size=batch_size, chunk=chunk)
    assert kl > 0.01, "the adapter changes too little for this test to mean anything"
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert found.base_loss == pytest.approx(base_loss, rel=1e-5)
    assert found.tuned_loss == pytest.approx(tuned_loss, rel=1e-5)
    assert found.loss_shift == pytest.approx(tuned_loss - base_loss, rel=1e-3)
    assert found.tokens == text.tokens == sum(map(len, text.rows)) - sum(text.starts)


@pytest.mark.parametrize("method", ["lora", "disel", "dira"])
def test_a_fresh_adapter_forgets_nothing(words: Any, method: str) -> None:
    kinds = {"lora": peft.LoraConfig, "disel": dynalora.DiselConfig, "dira": dynalora.DiraConfig}
    config = kinds[method](r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base_model(words), config).eval()
    found = retention(model, text_of(model, words))
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.loss_shift == pytest.approx(0, abs=1e-6)


def test_predictions_kept_give_the_same_numbers(words: Any) -> None:
    model = adapted(base_model(words))
    text = text_of(model, words)
    kept = base_predictions(model, text, batch_size=3)
    assert [tuple(part.shape) for part in kept.log_probs] == [
        (len(row) - start, len(words)) for row, start in zip(text.rows, text.starts, strict=True)
    ]
    anew, again = retention(model, text), retention(model, text, base=kept)
    assert again.kl == pytest.approx(anew.kl, rel=1e-5)
    assert again.loss_shift == pytest.approx(anew.loss_shift, rel=1e-4)


def test_complete_predictions_need_no_base_model(words: Any) -> None:
    base = base_model(words)
    text = text_of(base, words)
    kept = base_predictions(base, text, dtype=None)
    tuned = adapted(copy.deepcopy(base))
    wanted = retention(tuned, text).kl
    weights = tuned.merge_and_unload()  # a model of its own, in which nothing is left of the base model
    assert retention(weights, text, base=kept).kl == pytest.approx(wanted, rel=1e-3)
    with pytest.raises(ConfigError, match="written by another base model"):
        retention(weights, text)
    partial = base_predictions(base, text, dtype=None, max_bytes=0)
    with pytest.raises(ConfigError, match="written by another base model"):
        retention(weights, text, base=partial)


def test_predictions_of_another_text_are_refused(words: Any) -> None:
    model = adapted(base_model(words))
    kept = base_predictions(model, text_of(model, words, seed=1))
    with pytest.raises(ConfigError, match="another text"):
        retention(model, text_of(model, words), base=kept)


def test_the_text_is_the_base_models_whatever_is_attached(words: Any) -> None:
    bare = text_of(base_model(words), words)
    attached = text_of(adapted(base_model(words), strength=3.0), words)
    assert bare == attached
    assert text_of(base_model(words), words, seed=1).rows != bare.rows


def test_sampling_leaves_the_global_random_state_alone(words: Any) -> None:
    model = base_model(words)
    before = torch.get_rng_state()
    text_of(model, words)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_text_follows_the_models_distribution(words: Any) -> None:
    """Sampled at temperature 1 from the full distribution: the loss on it is close to the model's own entropy."""
    model = base_model(words)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.4)  # flat enough that truncation or a low temperature would show
    model.generation_config.update(do_sample=True, temperature=0.05, top_k=3, top_p=0.2, repetition_penalty=5.0)
    text = own_text(model, words, texts=64, tokens=16, cache=False)
    losses, entropies = [], []
    with torch.no_grad():
        for row, start in zip(text.rows, text.starts, strict=True):
            log_p = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)[start - 1 : -1]
            losses.append(-log_p.gather(1, torch.tensor(row[start:])[:, None]).sum())
            entropies.append(-(log_p.exp() * log_p).sum())
    difference = (torch.stack(losses) - torch.stack(entropies)).sum() / text.tokens
    assert abs(float(difference)) < 0.15
    assert float(torch.stack(entropies).sum()) / text.tokens > 1.0


def test_a_text_ends_where_the_model_ends_it(words: Any) -> None:
    model = base_model(words)
    with torch.no_grad():
        model.lm_head.weight[words.eos_token_id] *= 6  # now and then by far the likeliest
    text = own_text(model, words, texts=32, tokens=24, cache=False)
    written = [row[start:] for row, start in zip(text.rows, text.starts, strict=True)]
    ends = {words.eos_token_id, model.generation_config.eos_token_id}
    assert any(len(row) < 24 for row in written)
    for row in written:
        assert row
        assert not ends & set(row[:-1])
        assert row[-1] in ends or len(row) == 24


# --- the cache --------------------------------------------------------------------------------------------


def test_the_text_is_written_once_and_read_back(words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNALORA_CACHE", str(tmp_path))
    model = base_model(words)
    first = own_text(model, words, texts=4, tokens=5)
    (file,) = (tmp_path / "own-text").iterdir()
    monkeypatch.setattr(measured, "sampled", lambda *_: pytest.fail("sampled again"))
    assert own_text(model, words, texts=4, tokens=5) == first
    assert list((tmp_path / "own-text").iterdir()) == [file]


@pytest.mark.parametrize("damage", ["", "{", '{"rows": []}', '{"rows": [[1], [2], [3], [4]]}', '{"rows": 5}'])
def test_a_damaged_cache_file_is_made_again(words: Any, tmp_path: Path, damage: str) -> None:
    model = base_model(words)
    first = own_text(model, words, texts=4, tokens=5, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_text(encoding="utf-8")
    file.write_text(damage, encoding="utf-8")
    assert own_text(model, words, texts=4, tokens=5, cache=tmp_path) == first
    assert json.loads(file.read_text(encoding="utf-8")) == json.loads(whole)


def test_a_cache_that_cannot_be_written_is_no_error(words: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    made = own_text(base_model(words), words, texts=2, tokens=3, cache=tmp_path / "file")
    assert len(made.rows) == 2


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYNALORA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "dynalora"
    monkeypatch.setenv("DYNALORA_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("DYNALORA_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "dynalora"


# --- the fingerprint --------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_base_weights_alone(words: Any) -> None:
    plain = fingerprint(base_model(words))
    assert fingerprint(base_model(words)) == plain
    for config in (
        peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"]),
        dynalora.DiselConfig(r=3, target_modules=["q_proj", "down_proj"]),
    ):
        assert fingerprint(adapted(base_model(words), config)) == plain
    changed = base_model(words)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    assert fingerprint(changed) != plain
    assert fingerprint(base_model(words).to(torch.bfloat16)) != plain


def test_the_fingerprint_of_4_bit_weights_is_the_same_after_their_first_use(words: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    marks = []
    for scale in (1.0, 1.0, -1.0):
        wide = tiny.model(len(words), width=64)
        wide.model.layers[0].self_attn.o_proj.weight.data.mul_(scale)
        wide.save_pretrained(str(tmp_path / "wide"))
        how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        four = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "wide"), quantization_config=how).eval()
        marks.append(fingerprint(four))
        text = own_text(four, words, texts=2, tokens=4, cache=False)
        assert fingerprint(four) == marks[-1] == text.fingerprint
        assert retention(four, text).kl == pytest.approx(0, abs=1e-7)
    assert marks[0] == marks[1] != marks[2]


def test_a_text_of_another_model_is_refused(words: Any) -> None:
    text = text_of(base_model(words), words)
    other = base_model(words)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.01)
    with pytest.raises(ConfigError, match="another base model"):
        retention(adapted(other), text)


# --- adapters off -----------------------------------------------------------------------------------------


def test_adapters_that_were_off_stay_off(words: Any) -> None:
    model = adapted(base_model(words))
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        on = model(input_ids=ids).logits
        with adapters_off(model):
            off = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, on)
        assert not torch.allclose(on, off)
        with model.disable_adapter():
            with adapters_off(model):
                assert torch.equal(model(input_ids=ids).logits, off)
            assert torch.equal(model(input_ids=ids).logits, off)


def test_a_merged_adapter_is_refused(words: Any) -> None:
    model = adapted(base_model(words))
    text = text_of(model, words)
    model.merge_adapter()
    with pytest.raises(UnsupportedError, match=r"merged into '.*q_proj.*unmerge_adapter"):
        retention(model, text)
    with pytest.raises(UnsupportedError, match="merged"):
        own_text(model, words)


@pytest.mark.parametrize("name", ["texts", "tokens", "batch_size"])
def test_bad_sizes_are_refused(words: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        own_text(base_model(words), words, **{name: 0})


def test_a_base_model_of_its_own_stands_in_for_adapters_off(words: Any) -> None:
    base = base_model(words)
    text = text_of(base, words)
    model = adapted(copy.deepcopy(base))
    one, other = retention(model, text), retention(model, text, base=base)
    assert other == one
    # Weights that were trained themselves cannot be switched off: nothing seems forgotten without the base model.
    full = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in full.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    with pytest.raises(ConfigError, match="was written by another base model"):
        retention(full, text)
    moved = retention(full, text, base=base)
    assert moved.kl > 0.01
    kl, base_loss, tuned_loss = 0.0, 0.0, 0.0
    for row, start in zip(text.rows, text.starts, strict=True):
        ids = torch.tensor([row])
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[0].double().log_softmax(-1) for m in (base, full))
        for place in range(start, len(row)):
            kl += float((p[place - 1].exp() * (p[place - 1] - q[place - 1])).sum())
            base_loss -= float(p[place - 1, row[place]])
            tuned_loss -= float(q[place - 1, row[place]])
    found = (moved.kl, moved.base_loss, moved.loss_shift)
    expected = (kl / text.tokens, base_loss / text.tokens, (tuned_loss - base_loss) / text.tokens)
    assert found == pytest.approx(expected, abs=1e-5)
