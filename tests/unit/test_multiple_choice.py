"""Option likelihoods, on models of a few kilobytes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers

from dynalora.common.statistics import ratio
from dynalora.errors import ConfigError, DataError, UnsupportedError
from dynalora.evaluation import multiple_choice
from dynalora.evaluation.generation import chat_prompt
from dynalora.evaluation.multiple_choice import Choice, OptionScores, option_scores, right_option_losses

from . import tiny

CHOICES = [
    Choice("Which is warm?", ("ice", "the sun in summer", "snow"), 1),
    Choice("What is it that we breathe, day and night, without a thought?", ("air", "stones"), 0),
    Choice("Who?", ("an owl", "a", "two of the three", "nobody at all"), 3),
    Choice("How many legs has an ant?", ("4", "6", "8", "10", "none"), 1),
    Choice("One-token options?", ("a", "b", "c"), 2),
]


def one_at_a_time(model: Any, tokenizer: Any, choices: Sequence[Choice]) -> list[list[float]]:
    """Log-likelihoods without batches, padding or cache: what they are by definition."""
    model.eval()
    found = []
    for choice in choices:
        prompt = chat_prompt(tokenizer, choice.question)
        found.append([])
        for option in choice.options:
            ids = list(tokenizer(option, add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + ids])).logits[0].double()
            known = torch.log_softmax(logits, dim=-1)
            total = sum(float(known[len(prompt) + place - 1, token]) for place, token in enumerate(ids))
            found[-1].append(total)
    return found


def gpt2(vocabulary: int) -> Any:
    torch.manual_seed(3)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=vocabulary,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=256,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def assert_close(found: Sequence[Sequence[float]], wanted: Sequence[Sequence[float]]) -> None:
    assert [len(row) for row in found] == [len(row) for row in wanted]
    for row, other in zip(found, wanted, strict=True):
        assert row == pytest.approx(other, abs=2e-4)


# --- scores -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["", "Answer."])
@pytest.mark.parametrize("make", [tiny.model, gpt2])
def test_the_right_options_losses_can_be_had_alone(make: Any, system: str) -> None:
    words = tiny.tokenizer()
    model = make(len(words))
    whole = option_scores(model, words, CHOICES, system=system)
    alone = right_option_losses(model, words, CHOICES, system=system, batch_size=2)
    assert alone.sums == pytest.approx(whole.right_losses, abs=2e-4)
    assert alone.counts == whole.right_counts


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("make", [tiny.model, gpt2])
def test_batched_scores_are_those_of_one_option_at_a_time(make: Any, share_prompt: bool) -> None:
    words = tiny.tokenizer()
    model = make(len(words))
    scores = option_scores(model, words, CHOICES, share_prompt=share_prompt, batch_size=3)
    assert_close(scores.sums, one_at_a_time(model, words, CHOICES))
    assert scores.counts == tuple(tuple(len(option) for option in choice.options) for choice in CHOICES)
    assert scores.right == (1, 0, 3, 1, 2)


@pytest.mark.parametrize("share_prompt", [True, False])
def test_scores_do_not_depend_on_the_batch_size(share_prompt: bool) -> None:
    words = tiny.tokenizer()
    model = tiny.model(len(words))
    made = [option_scores(model, words, CHOICES, share_prompt=share_prompt, batch_size=size) for size in (1, 2, 50)]
    for other in made[1:]:
        assert_close(other.sums, made[0].sums)
        assert other.counts == made[0].counts
        assert other.chosen() == made[0].chosen()


def test_an_adapter_counts_and_the_model_stays_in_its_mode() -> None:
    words = tiny.tokenizer()
    model = tiny.model(len(words))
    plain = option_scores(model, words, CHOICES)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5
    )
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    adapted.train()
    scores = option_scores(adapted, words, CHOICES, batch_size=2)
    assert adapted.training
    assert_close(scores.sums, one_at_a_time(adapted, words, CHOICES))
    assert abs(scores.sums[0][0] - plain.sums[0][0]) > 1e-2
    with adapted.disable_adapter():
        assert_close(option_scores(adapted, words, CHOICES).sums, plain.sums)


def test_options_of_a_single_token_need_no_second_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    words = tiny.tokenizer()
    model = tiny.model(len(words))
    passes: list[int] = []
    forward = multiple_choice.causal_pass

    def counted(*given: Any, **named: Any) -> Any:
        passes.append(1)
        return forward(*given, **named)

    monkeypatch.setattr(multiple_choice, "causal_pass", counted)
    scores = option_scores(model, words, CHOICES[-1:])
    assert len(passes) == 1
    assert_close(scores.sums, one_at_a_time(model, words, CHOICES[-1:]))


def test_a_tokenizer_without_a_chat_template_uses_the_bare_question() -> None:
    words = tiny.tokenizer(chat=False)
    model = tiny.model(len(words))
    assert_close(option_scores(model, words, CHOICES).sums, one_at_a_time(model, words, CHOICES))


def test_progress_counts_questions() -> None:
    words = tiny.tokenizer()
    told: list[tuple[str, int, int | None]] = []
    option_scores(
        tiny.model(len(words)), words, CHOICES, batch_size=2, name="it",
        progress=lambda what, done, total: told.append((what, done, total)),
    )  # fmt: skip
    assert told == [("Measuring it", done, 5) for done in (0, 2, 4, 5)]


# --- what cannot be measured ------------------------------------------------------------------------------


def test_what_cannot_be_measured_is_refused() -> None:
    words = tiny.tokenizer()
    model = tiny.model(len(words))
    with pytest.raises(ConfigError, match="batch_size is 0"):
        option_scores(model, words, CHOICES, batch_size=0)
    with pytest.raises(DataError, match="no questions"):
        option_scores(model, words, [])
    with pytest.raises(DataError, match=r"Question 1 .*without any token"):
        option_scores(model, _forgetting(words, "6"), [CHOICES[0], CHOICES[3]])


def _forgetting(words: Any, text: str) -> Any:
    """A tokenizer that writes one text with no token."""

    class Forgetful:
        chat_template = ""

        def __call__(self, given: str, **named: Any) -> Any:
            return {"input_ids": []} if given == text else words(given, **named)

    return Forgetful()


def test_a_model_without_a_cache_says_what_to_do() -> None:
    words = tiny.tokenizer()

    class Cacheless(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny.model(len(words))

        def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool = False) -> Any:
            return SimpleNamespace(logits=self.inner(input_ids=input_ids, attention_mask=attention_mask).logits)

    model = Cacheless()
    with pytest.raises(UnsupportedError, match=r"Cacheless.*share_prompt=False"):
        option_scores(model, words, CHOICES)
    apart = option_scores(model, words, CHOICES, share_prompt=False)
    assert_close(apart.sums, option_scores(model.inner, words, CHOICES).sums)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((" ", ("a", "b"), 0), "question is empty"),
        (("q", ("a",), 0), "1 options; give at least two"),
        (("q", ("a", " "), 0), "Option 2 is empty"),
        (("q", ("a", "b"), 2), "index 2; give one from 0 to 1"),
        (("q", ("a", "b"), -1), "index -1"),
    ],
)
def test_a_choice_must_be_one(arguments: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Choice(*arguments)


def test_a_choice_is_trained_on_the_right_option() -> None:
    item = CHOICES[0].item
    assert (item.question, item.answer) == ("Which is warm?", "the sun in summer")


# --- statistics -------------------------------------------------------------------------------------------


def test_the_sum_favours_short_options_and_the_mean_does_not() -> None:
    scores = OptionScores(sums=((-3.0, -6.0),), counts=((1, 3),), right=(1,))
    assert scores.chosen() == (1,)
    assert scores.chosen(normalised=False) == (0,)
    assert scores.correct() == (True,)
    assert scores.correct(normalised=False) == (False,)
    assert scores.accuracy().value == 1
    assert scores.accuracy(normalised=False).value == 0


def test_of_equally_likely_options_the_first_is_taken() -> None:
    assert OptionScores(((-2.0, -2.0),), ((1, 1),), (0,)).chosen() == (0,)


def test_losses_of_the_right_options() -> None:
    scores = OptionScores(
        sums=((-1.0, -8.0), (-2.0, -5.0), (-6.0, -1.0)), counts=((1, 4), (2, 2), (3, 1)), right=(0, 0, 0)
    )
    assert scores.right_losses == (1.0, 2.0, 6.0)
    assert scores.right_counts == (1, 2, 3)
    assert scores.right_loss.value == pytest.approx(3.0)
    assert scores.right_loss.error == pytest.approx(statistics.stdev([1, 2, 6]) / math.sqrt(3))
    per_token = ratio(scores.right_losses, scores.right_counts)
    assert per_token.value == pytest.approx(9 / 6)
    # Ratio estimate: residuals 1 − 1.5, 2 − 3, 6 − 4.5; mean number of tokens 2.
    spread = math.sqrt((0.25 + 1 + 2.25) / 2 / 3) / 2
    assert per_token.error == pytest.approx(spread)


def test_a_single_question_has_no_standard_error() -> None:
    assert OptionScores(((-1.0, -2.0),), ((1, 1),), (0,)).right_loss.error == 0
