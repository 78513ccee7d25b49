"""Evaluation of P-Tuning: numbers that count positions, against one text at a time and no padding or cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from dynalora.errors import ConfigError, UnsupportedError
from dynalora.evaluation.causal import causal_pass, prompt_length
from dynalora.evaluation.generation import chat_prompt, generate
from dynalora.evaluation.harness import run_harness
from dynalora.evaluation.multiple_choice import Choice, option_scores
from dynalora.evaluation.scoring import answer_loss, evaluate
from dynalora.evaluation.tokens import ensure_pad_token, tokenize
from dynalora.forgetting.base_model import fingerprint
from dynalora.forgetting.retention import base_predictions, retention
from dynalora.forgetting.texts import given_text, own_text
from dynalora.lab.adapters import load_adapter
from dynalora.lab.configs import adapter_config
from dynalora.lab.data.conversations import to_conversations
from dynalora.lab.training.train import held_out_loss, take_off
from tests.unit import tiny

VIRTUAL = 5


def prompted(*, loaded: Path | None = None) -> tuple[Any, Any]:
    """A base model and the same with a P-Tuning adapter that matters, both in float64."""
    tokenizer = tiny.tokenizer()
    ensure_pad_token(tokenizer)
    base = tiny.model(len(tokenizer)).double().eval()
    config = adapter_config("p-tuning", r=VIRTUAL, options={"encoder_hidden_size": 16})
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny.model(len(tokenizer)).double(), config).double()
    for parameter in model.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if loaded is not None:
        model.save_pretrained(loaded)
        model = peft.PeftModel.from_pretrained(tiny.model(len(tokenizer)).double(), loaded).double()
    return base, model.eval()


def slow_log_probs(base: Any, model: Any, ids: list[int]) -> torch.Tensor:
    """Log-probabilities (T, V) of what follows each token of one text, without PEFT's forward pass."""
    encoder = model.prompt_encoder["default"]
    vectors = encoder.embedding.weight
    prompt = encoder.mlp_head(vectors) if hasattr(encoder, "mlp_head") else vectors
    inputs = torch.cat([prompt, base.get_input_embeddings()(torch.tensor(ids))])
    with torch.no_grad():
        logits = base(inputs_embeds=inputs[None]).logits[0]
    return logits[VIRTUAL:].log_softmax(-1)


def texts(count: int = 5) -> list[list[int]]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randint(0, 256, (4 + 3 * number,), generator=generator).tolist() for number in range(count)]


@pytest.mark.parametrize("saved", [False, True])
def test_answer_loss(saved: bool, tmp_path: Path) -> None:
    base, model = prompted(loaded=tmp_path if saved else None)
    rows = [{"input_ids": ids, "labels": [-100] * (len(ids) - 3) + ids[-3:]} for ids in texts()]
    found = answer_loss(model, rows, batch_size=3)
    for total, row in zip(found.sums, rows, strict=True):
        ids = row["input_ids"]
        log_probs = slow_log_probs(base, model, ids)
        direct = -sum(float(log_probs[place - 1, ids[place]]) for place in range(len(ids) - 3, len(ids)))
        assert total == pytest.approx(direct, rel=1e-5)
    assert answer_loss(base, rows).sums != pytest.approx(found.sums, rel=1e-2)  # the prompt matters


def test_logits_of_every_position_and_of_the_last() -> None:
    base, model = prompted()
    ids = texts()[2]
    expected = slow_log_probs(base, model, ids)
    tokens, mask = torch.tensor([[0, 0, *ids]]), torch.tensor([[0, 0, *[1] * len(ids)]])
    for keep in (0, 1, 4):
        logits, cache = causal_pass(model, tokens, mask, keep=keep)
        assert logits.shape[1] == (keep or len(ids) + 2)
        assert cache is None
        shown = logits[0, -(keep or len(ids)) :].log_softmax(-1)
        torch.testing.assert_close(shown, expected[-len(shown) :], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shared", [True, False])
def test_option_scores(shared: bool) -> None:
    base, model = prompted()
    tokenizer = tiny.tokenizer()
    ensure_pad_token(tokenizer)
    choices = [
        Choice("What?", ("yes", "no way", "a"), 0),
        Choice("Which of these is it, then?", ("x", "longer than all"), 1),
        Choice("Hm?", ("b", "c"), 1),
    ]
    found = option_scores(model, tokenizer, choices, share_prompt=shared, batch_size=2)
    for sums, choice in zip(found.sums, choices, strict=True):
        prompt = chat_prompt(tokenizer, choice.question)
        for total, option in zip(sums, choice.options, strict=True):
            ids = prompt + tokenizer(option, add_special_tokens=False)["input_ids"]
            log_probs = slow_log_probs(base, model, ids)
            direct = sum(float(log_probs[place - 1, ids[place]]) for place in range(len(prompt), len(ids)))
            assert total == pytest.approx(direct, rel=1e-5)


def test_greedy_answers_do_not_depend_on_the_batch() -> None:
    base, model = prompted()
    tokenizer = tiny.tokenizer()
    ensure_pad_token(tokenizer)
    prompts = texts()
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(slow_log_probs(base, model, ids)[-1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        expected.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    for batch_size in (1, 2, 5):
        found = generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=batch_size, strip=False)
        assert found == expected
    # A text at which to stop is looked for in the answer alone.
    cut = generate(model, tokenizer, prompts, max_new_tokens=6, stop=(expected[0][1],), strip=False)[0]
    assert cut == expected[0][: expected[0].find(expected[0][1])]


def test_retention() -> None:
    base, model = prompted()
    tokenizer = tiny.tokenizer()
    ensure_pad_token(tokenizer)
    text = given_text(["Some text.", "Something else that is rather longer.", "Hi"], tokenizer)
    found = retention(model, text, batch_size=3)
    kl = count = 0.0
    for row in text.rows:
        with torch.no_grad():
            p = base(torch.tensor([row])).logits[0, :-1].log_softmax(-1)
        q = slow_log_probs(base, model, list(row))[:-1]
        kl += float((p.exp() * (p - q)).sum())
        count += len(row) - 1
    assert found.kl == pytest.approx(kl / count, rel=1e-5)
    assert found.kl > 0.01
    kept = base_predictions(model, text, batch_size=3)
    assert retention(model, text, base=kept, batch_size=3).kl == pytest.approx(found.kl, rel=1e-6)
    assert prompt_length(model) == VIRTUAL  # on again


def test_the_base_model_writes_its_own_text() -> None:
    base, model = prompted()
    tokenizer = tiny.tokenizer()
    ensure_pad_token(tokenizer)
    assert fingerprint(model) == fingerprint(base)
    own, other = (own_text(each, tokenizer, texts=6, tokens=5, cache=False) for each in (base, model))
    assert own.rows == other.rows
    assert generate(model, tokenizer, texts(2), max_new_tokens=3)  # works as before afterwards


def test_held_out_loss_and_exact_answers() -> None:
    base, model = prompted()
    tokenizer = tiny.tokenizer()
    ensure_pad_token(tokenizer)
    rows = tokenize(to_conversations((f"row {i}", row) for i, row in enumerate(tiny.rows(12))), tokenizer)
    by_batch = held_out_loss(model, rows, batch_size=5)
    total, count = 0.0, 0
    for row in rows.rows:  # one by one, without padding, as PEFT runs it
        number = sum(label != -100 for label in row["labels"][1:])
        with torch.no_grad():
            output = model(**{name: torch.tensor([row[name]]) for name in ("input_ids", "labels")})
        total, count = total + float(output.loss) * number, count + number
    assert by_batch == pytest.approx(total / count, rel=1e-5)
    assert by_batch == pytest.approx(answer_loss(model, rows.rows).mean, rel=1e-5)
    assert by_batch != pytest.approx(held_out_loss(base, rows), rel=1e-2)
    assert evaluate(model, tokenizer, rows.rows[:3], samples=1).answer_tokens > 0


def test_taking_it_off_gives_the_base_model_back() -> None:
    base, model = prompted()
    back = take_off(model)
    ids = torch.tensor([texts()[1]])
    assert not isinstance(back, peft.PeftModel)
    torch.testing.assert_close(back(ids).logits, base(ids).logits, rtol=0, atol=0)


def test_a_saved_prompt_is_loaded_for_measuring(tmp_path: Path) -> None:
    folder = tiny.saved_model(tmp_path / "base")
    _, model = prompted(loaded=tmp_path / "adapter")
    ids = texts()[3]
    rows = [{"input_ids": ids, "labels": [-100, *ids[1:]]}]
    expected = answer_loss(model, rows).sums
    again = load_adapter(tmp_path / "adapter", str(folder), dtype="float32")
    assert answer_loss(again, rows).sums == pytest.approx(expected, rel=1e-4)


def test_the_harness_refuses_it() -> None:
    _, model = prompted()
    with pytest.raises(UnsupportedError, match="cannot measure prompt learning"):
        run_harness(model, tiny.tokenizer(), ["arc_easy"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alpha": 8.0}, r"P-Tuning has no scaling, so `alpha` \(8\) means nothing; leave it out"),
        ({"dropout": 0.1}, "P-Tuning has no dropout on an adapter's input"),
        ({"options": {"target_modules": ["q_proj"]}}, "no option 'target_modules'"),
        ({"options": {"encoder_width": 8}}, "no option 'encoder_width'"),
    ],
)
def test_what_it_has_not_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapter_config("p-tuning", **given)
