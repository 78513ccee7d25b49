"""Tasks, generation and scores, on models of a few kilobytes."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dynalora.common import statistics
from dynalora.common.progress import rich_progress
from dynalora.errors import ConfigError, DataError, UnsupportedError
from dynalora.evaluation import generation, scoring, tasks
from dynalora.evaluation.tasks import Item, check_disjoint, load_task
from dynalora.evaluation.tokens import Tokens, tokenize

from . import tiny

# --- tasks ------------------------------------------------------------------------------------------------


def test_a_task_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    pytest.importorskip("reasoning_gym")
    first = load_task("spell_backward", train_size=40, held_out_size=20, seed=3)
    again = load_task("spell_backward", train_size=40, held_out_size=20, seed=3)
    other = load_task("spell_backward", train_size=40, held_out_size=20, seed=4)
    assert first == again
    assert first.train != other.train
    assert first.held_out != other.held_out
    assert len(first.train) == 40
    assert len(first.held_out) == 20


def test_no_question_is_in_both_sets_or_twice_in_one() -> None:
    # Sums of two digits: few different questions, so that repeats are certain.
    pytest.importorskip("reasoning_gym")
    options = {"min_digits": 1, "max_digits": 1, "min_terms": 2, "max_terms": 2}
    made = load_task("chain_sum", train_size=60, held_out_size=40, options=options)
    questions = [item.question for item in (*made.train, *made.held_out)]
    assert len(set(questions)) == 100


def test_neighbouring_seeds_would_repeat_questions_and_ours_are_far_apart() -> None:
    gym = pytest.importorskip("reasoning_gym")
    near = [gym.create_dataset("spell_backward", seed=seed, size=30) for seed in (0, 1)]
    assert near[0][1]["question"] == near[1][0]["question"], "the reason for distant seeds is gone"
    assert tasks._MOST_DRAWS < tasks.SEED_DISTANCE


def test_the_held_out_set_does_not_depend_on_the_training_size() -> None:
    pytest.importorskip("reasoning_gym")
    small = load_task("spell_backward", train_size=5, held_out_size=20)
    large = load_task("spell_backward", train_size=300, held_out_size=20)
    assert small.held_out == large.held_out
    assert small.train == large.train[:5]


@pytest.mark.parametrize(
    ("train", "held_out", "found"),
    [
        ([("a?", "1")], [("b?", "1"), ("A? ", "2")], "in the training and the held-out set"),
        ([("a?", "1"), ("a?", "1")], [("b?", "1")], "twice in the training set"),
        ([("a?", "1")], [("b?", "1"), ("b?", "1")], "twice in the held-out set"),
    ],
)
def test_the_check_for_repeats_finds_them(train: Any, held_out: Any, found: str) -> None:
    with pytest.raises(DataError, match=found):
        check_disjoint([Item(*pair) for pair in train], [Item(*pair) for pair in held_out])


def test_a_task_with_too_few_questions_says_so() -> None:
    pytest.importorskip("reasoning_gym")
    options = {"min_digits": 1, "max_digits": 1, "min_terms": 2, "max_terms": 2}
    with pytest.raises(DataError, match=r"chain_sum.*different questions.*5000 are needed"):
        load_task("chain_sum", train_size=5000, held_out_size=5, options=options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "no_such_task"}, r"There is no task 'no_such_task'; there are \d+, such as"),
        ({"train_size": 0}, "train_size is 0"),
        ({"held_out_size": -1}, "held_out_size is -1"),
        ({"seed": -5}, "seed is -5"),
        ({"options": {"no_such_option": 1}}, "rejects the options"),
        ({"options": {"min_word_len": 9, "max_word_len": 3}}, "rejects the options"),
        ({"options": {"seed": 1}}, "'seed' is set by load_task"),
    ],
)
def test_bad_task_settings_are_one_sentence(arguments: dict[str, Any], message: str) -> None:
    pytest.importorskip("reasoning_gym")
    given = {"name": "spell_backward", "train_size": 4, "held_out_size": 4, **arguments}
    with pytest.raises(ConfigError, match=message):
        load_task(**given)


def test_without_reasoning_gym_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'dynalora\[demo\]'"):
        load_task("spell_backward", train_size=4, held_out_size=4)


def test_majority_is_the_share_of_the_training_sets_most_frequent_answer() -> None:
    def items(answers: str) -> tuple[Item, ...]:
        return tuple(Item(f"{answers}{index}", answer) for index, answer in enumerate(answers))

    made = tasks.Task("t", {}, 0, items("aab"), items("abba"))
    assert made.majority == 0.5


# --- generation -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words() -> Any:
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def model(words: Any) -> Any:
    return tiny.model(len(words)).eval()


QUESTIONS = ["Say 1.", "What?", "A much longer question than the others, to force padding.", "Hm", "Say 22."]


def reference_greedy(model: Any, ids: list[int], new: int, ends: set[int]) -> list[int]:
    """One sequence, no cache, no padding: the definition."""
    made: list[int] = []
    for _ in range(new):
        logits = model(input_ids=torch.tensor([ids + made])).logits[0, -1]
        made.append(int(logits.argmax()))
        if made[-1] in ends:
            break
    return made


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_generation_is_greedy_decoding_whatever_the_batch(model: Any, words: Any, batch_size: int) -> None:
    expected = []
    for question in QUESTIONS:
        prompt = generation.chat_prompt(words, question)
        made = reference_greedy(model, prompt, 6, generation.end_ids(model, words))
        expected.append(words.decode(made, skip_special_tokens=True).strip())
    seen: list[tuple[int, int | None]] = []
    found = generation.generate(
        model, words, QUESTIONS, max_new_tokens=6, batch_size=batch_size,
        progress=lambda what, done, total: seen.append((done, total)),
    )  # fmt: skip
    assert found == expected
    assert len(set(expected)) > 1, "the model says the same to everything, so order could not be told"
    assert seen[0] == (0, 5)
    assert seen[-1] == (5, 5)


@torch.no_grad()
def test_beams_find_likelier_answers(model: Any, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    monkeypatch.setattr(generation, "end_ids", lambda *_: set())  # answers of one length, so that they can be compared

    def likelihood(prompt: list[int], answer: list[int]) -> float:
        logs = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        return sum(float(logs[len(prompt) + place - 1, token]) for place, token in enumerate(answer))

    said: list[list[list[int]]] = []
    real = generation.continued
    monkeypatch.setattr(generation, "continued", lambda *a, **k: said[-1].extend((t := real(*a, **k)).tolist()) or t)
    for beams in (1, 4):
        said.append([])
        generation.generate(model, words, QUESTIONS, max_new_tokens=5, batch_size=1, beams=beams)
    order = sorted(range(5), key=lambda i: -len(generation.chat_prompt(words, QUESTIONS[i])))
    prompts = [generation.chat_prompt(words, QUESTIONS[place]) for place in order]
    greedy, searched = ([likelihood(p, a) for p, a in zip(prompts, answers, strict=True)] for answers in said)
    assert all(far >= near - 1e-4 for near, far in zip(greedy, searched, strict=True))
    assert any(far > near + 0.1 for near, far in zip(greedy, searched, strict=True))
    alone = said[1]
    said.append([])
    generation.generate(model, words, QUESTIONS, max_new_tokens=5, batch_size=5, beams=4)
    assert said[2] == alone  # whatever the batch


def test_generation_stops_at_the_end_of_turn(model: Any, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = generation.chat_prompt(words, "Hm")
    usual = reference_greedy(model, prompt, 4, {words.eos_token_id})
    monkeypatch.setattr(model.generation_config, "eos_token_id", usual[1])
    (found,) = generation.generate(model, words, [prompt], max_new_tokens=4)
    assert found == words.decode(usual[:2], skip_special_tokens=True).strip()


def test_evaluation_leaves_mode_and_cache_setting_as_they_were(model: Any, words: Any) -> None:
    model.train()
    model.model.layers[0].eval()
    model.config.use_cache = False
    try:
        generation.generate(model, words, ["Hm"], max_new_tokens=2)
        assert model.training
        assert not model.model.layers[0].training
        assert model.model.layers[1].training
        assert model.config.use_cache is False
    finally:
        model.eval()
        model.config.use_cache = True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"beams": 0}, "beams is 0"),
    ],
)
def test_bad_generation_settings(model: Any, words: Any, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generation.generate(model, words, ["Hm"], **arguments)


def test_an_empty_prompt_is_refused(model: Any, words: Any) -> None:
    with pytest.raises(ConfigError, match="Prompt 1 is empty"):
        generation.generate(model, words, [[1, 2], []])


def test_without_a_chat_template_the_question_itself_is_the_prompt() -> None:
    plain = tiny.tokenizer(chat=False)
    assert generation.chat_prompt(plain, "Hm") == plain("Hm")["input_ids"]


# --- scores -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(words: Any) -> list[Tokens]:
    items = [
        Item(question, answer) for question, answer in zip(QUESTIONS, ["one", "two", "three", "four", "5"], strict=True)
    ]
    return tokenize([item.conversation() for item in items], words).rows


def reference_loss(model: Any, row: Any) -> tuple[float, int]:
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
    total, count = 0.0, 0
    for place, label in enumerate(row["labels"]):
        if label != -100:
            total -= float(logits[place - 1].log_softmax(-1)[label])
            count += 1
    return total, count


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@torch.no_grad()
def test_answer_loss_is_the_sum_over_the_answers_tokens(model: Any, rows: Any, batch_size: int) -> None:
    found = scoring.answer_loss(model, rows, batch_size=batch_size)
    for row, total, count in zip(rows, found.sums, found.counts, strict=True):
        expected, tokens = reference_loss(model, row)
        assert total == pytest.approx(expected, rel=1e-5)
        assert count == tokens
    assert found.mean == pytest.approx(sum(found.sums) / sum(found.counts))


def test_an_item_is_right_exactly_if_greedy_decoding_says_its_answer(model: Any, words: Any) -> None:
    """Both ways: answers made by greedy decoding are all right, and one changed token makes them wrong."""
    right, wrong = [], []
    for question in QUESTIONS:
        prompt = generation.chat_prompt(words, question)
        made = reference_greedy(model, prompt, 3, set())
        labels = [-100] * len(prompt)
        right.append({"input_ids": prompt + made, "labels": labels + made})
        for place in range(len(made)):
            other = list(made)
            other[place] = (other[place] + 1) % len(words)
            wrong.append({"input_ids": prompt + other, "labels": labels + other})
    assert all(scoring.answer_loss(model, right, batch_size=3).greedy)
    assert not any(scoring.answer_loss(model, wrong, batch_size=4).greedy)


def test_evaluate_gives_accuracy_loss_and_samples(model: Any, words: Any, rows: Any) -> None:
    score = scoring.evaluate(model, words, rows, samples=2)
    longest = max(sum(label != -100 for label in row["labels"]) for row in rows)
    assert list(score.samples) == generation.generate(model, words, QUESTIONS[:2], max_new_tokens=longest)
    assert score.answer_loss == scoring.answer_loss(model, rows).mean
    assert score.accuracy == statistics.wilson(sum(score.correct), len(rows))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "Row 0 has no"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "Row 0 has no prompt"),
    ],
)
def test_rows_without_prompt_or_answer_are_refused(model: Any, words: Any, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        scoring.evaluate(model, words, [row])


def test_no_rows_are_refused(model: Any, words: Any) -> None:
    with pytest.raises(DataError, match="no held-out items"):
        scoring.evaluate(model, words, [])


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # Values of R's prop.test(x, n, correct = FALSE).
    [(0, 10, 0.0, 0.2775328), (5, 10, 0.2365931, 0.7634069), (95, 100, 0.8882475, 0.9784560)],
)
def test_wilson(correct: int, total: int, low: float, high: float) -> None:
    found = statistics.wilson(correct, total)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-5), pytest.approx(high, abs=1e-5))


@given(total=st.integers(1, 500), data_=st.data())
def test_wilson_stays_inside_and_solves_its_equation(total: int, data_: Any) -> None:
    correct = data_.draw(st.integers(0, total))
    found = statistics.wilson(correct, total)
    assert 0 <= found.low <= found.value <= found.high <= 1
    z = 1.959963984540054
    for end in (found.low, found.high):
        # The ends are where the score test is exactly at its critical value.
        assert (found.value - end) ** 2 == pytest.approx(z * z * end * (1 - end) / total, abs=1e-9)


@pytest.mark.parametrize(("correct", "total"), [(1, 0), (-1, 3), (4, 3)])
def test_wilson_refuses_what_is_no_share(correct: int, total: int) -> None:
    with pytest.raises(ConfigError, match="is no share"):
        statistics.wilson(correct, total)


def flags(both: int, lost: int, gained: int, neither: int) -> tuple[list[bool], list[bool]]:
    first = [True] * both + [True] * lost + [False] * gained + [False] * neither
    second = [True] * both + [False] * lost + [True] * gained + [False] * neither
    return first, second


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    # R: binom.test(min, lost + gained)$p.value
    [(0, 0, 1.0), (1, 5, 0.21875), (2, 12, 0.01293945), (5, 5, 1.0)],
)
def test_mcnemar(lost: int, gained: int, p: float) -> None:
    first, second = flags(7, lost, gained, 3)
    assert statistics.mcnemar(first, second) == pytest.approx(p, rel=1e-6)
    assert statistics.mcnemar(second, first) == pytest.approx(p, rel=1e-6)


def test_paired_difference_has_its_sign_and_covers() -> None:
    first, second = flags(30, 4, 20, 46)
    found = statistics.paired_difference(first, second)
    assert found.value == pytest.approx(0.16)
    plus, minus, n = 21 / 102, 5 / 102, 102
    half = 1.959963984540054 * math.sqrt((plus + minus - (plus - minus) ** 2) / n)
    assert (found.low, found.high) == (pytest.approx(plus - minus - half), pytest.approx(plus - minus + half))
    turned = statistics.paired_difference(second, first)
    assert (turned.low, turned.high) == (pytest.approx(-found.high), pytest.approx(-found.low))


def test_pairs_of_different_length_are_refused() -> None:
    with pytest.raises(DataError, match="2 and 1 items"):
        statistics.mcnemar([True, False], [True])


# --- progress ---------------------------------------------------------------------------------------------


def test_progress_in_a_pipe_is_a_plain_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("dynalora.common.progress.time.monotonic", lambda: now[0])
    said = io.StringIO()
    with rich_progress(Console(file=said, width=80)) as progress:
        for what, steps in (("slow", 25), ("quick", 1)):
            for step in range(steps + 1):
                progress(what, step, steps)
                now[0] += 0.9
    assert said.getvalue().splitlines() == ["slow: 12 of 25", "slow: 24 of 25", "slow: done in 22 s"]


def test_progress_in_a_terminal_is_live_only_while_a_job_runs() -> None:
    said = io.StringIO()
    console = Console(file=said, width=80, force_terminal=True)

    def live() -> bool:
        # A live display hides the cursor until it is gone.
        return said.getvalue().count("\x1b[?25l") > said.getvalue().count("\x1b[?25h")

    with rich_progress(console) as progress:
        progress("first", 0, 3)
        assert live()
        progress("first", 3, 3)
        assert not live()
        progress("second", 0, None)
        assert live()
    assert not live(), "an unfinished job's display outlives its context"
    assert "3/3" in said.getvalue()


@pytest.mark.parametrize("before", [True, False])
def test_the_kernel_that_is_wrong_for_padding_is_left_out_while_a_model_is_measured(before: bool) -> None:
    usual = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before)
    try:
        with generation.evaluating(torch.nn.Linear(1, 1)):
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.cudnn_sdp_enabled() is before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(usual)
