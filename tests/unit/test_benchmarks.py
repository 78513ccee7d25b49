"""Benchmarks by name: reading, scoring, and measuring tiny models of which the answer is known."""

from __future__ import annotations

import math
import os
import sys
import types
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dynalora.common.statistics import Interval, bootstrap, item_interval
from dynalora.errors import ConfigError, DataError, UnsupportedError
from dynalora.evaluation import metrics
from dynalora.evaluation.benchmarks import BENCHMARKS, GROUPS, benchmark
from dynalora.evaluation.generation import chat_prompt, generate
from dynalora.evaluation.harness import FORGETTING_SUITE
from dynalora.evaluation.kinds.base import Subject
from dynalora.evaluation.kinds.classify import class_logits, classes
from dynalora.evaluation.kinds.code import CODE
from dynalora.evaluation.kinds.masked import sentences
from dynalora.evaluation.masked_lm import mask_text, mask_windows, masked_lm_perplexity
from dynalora.evaluation.metrics import boxed, first_keyword, letter, math_form
from dynalora.evaluation.multiple_choice import option_scores
from dynalora.evaluation.numbers import final_number, last_number, number, same_number, stated_number
from dynalora.evaluation.perplexity import perplexity, windows
from dynalora.evaluation.results import TaskResult
from dynalora.evaluation.run import group_mean, measure, prepare, task_list
from dynalora.evaluation.sources import Source
from dynalora.lab.tasks.loading import load_experiment_task
from dynalora.lab.tasks.task import AnswerTask

from . import benchmark_files, tiny

QUICK = {"run_code": True, "weak_sandbox": True}
NOBODY = Subject(torch.nn.Identity(), tiny.tokenizer())
"""Executing what was said needs no model."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return benchmark_files.write(tmp_path_factory.mktemp("data"))


def perfect(name: str, folder: Path, **options: Any) -> dict[str, float]:
    """A task's numbers for a model that says the responses it would be trained on."""
    prepared = prepare(name, data=folder, **options)
    result = prepared.scored([item.response for item in prepared.items])
    return {key: score.value for key, score in result.scores.items()}


# --- entries ----------------------------------------------------------------------------------------------


def test_every_entry_is_whole() -> None:
    names = """
        boolq piqa social_i_qa hellaswag winogrande arc_easy arc_challenge openbookqa
        gsm8k math aqua svamp multiarith addsub singleeq mawps humaneval humaneval_plus mbpp mbpp_plus
        cola sst2 mrpc qqp stsb mnli qnli rte wnli convai2 xsum squad_v2 squad_v2_spans wikitext2 wikitext2_masked
        bookcorpus_masked cc_news_masked
    """
    wanted = set(names.split())
    assert set(BENCHMARKS) == wanted
    assert {name for group in GROUPS.values() for name in group} <= wanted
    for entry in BENCHMARKS.values():
        assert entry.main
        assert entry.source.file.count("/") == 1


def test_names_are_found_however_they_are_spelled() -> None:
    assert benchmark("ARC-Easy").name == "arc_easy"
    assert benchmark("SQuAD v2").name == "squad_v2"
    assert task_list(["glue", "cola", "lm_eval:sciq"]) == [*GROUPS["glue"], "lm_eval:sciq"]
    with pytest.raises(ConfigError, match="no task 'gsm9k'; did you mean 'gsm8k'"):
        task_list(["gsm9k"])
    with pytest.raises(ConfigError, match="No task is named"):
        task_list([])


@pytest.mark.parametrize(
    ("name", "row", "instruction", "answer"),
    [
        (
            "boolq",
            {"question": "is ice cold", "answer": True, "passage": "…"},
            "Please answer the following question with true or false, question: is ice cold?\n\n"
            "Answer format: true/false",
            "true",
        ),
        (
            "piqa",
            {"goal": "Open it?", "sol1": "Pull.", "sol2": "Push.", "label": 1},
            "Please choose the correct solution to the question: Open it?\n\nSolution1: Pull.\n\nSolution2: Push.\n\n"
            "Answer format: solution1/solution2",
            "solution2",
        ),
        (
            "social_i_qa",
            {"context": "Al ran.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
            "Please choose the correct answer to the question: Al ran. Why?\n\nAnswer1: a Answer2: b Answer3: c\n\n"
            "Answer format: answer1/answer2/answer3",
            "answer3",
        ),
        (
            "hellaswag",
            {"activity_label": "Roofs", "ctx": "A man", "endings": ["a", "b", "c", "d"], "label": "0"},
            "Please choose the correct ending to complete the given sentence: Roofs: A man\n\n"
            "Ending1: a Ending2: b Ending3: c Ending4: d\n\nAnswer format: ending1/ending2/ending3/ending4",
            "ending1",
        ),
        (
            "winogrande",
            {"sentence": "The _ ran.", "option1": "dog", "option2": "cat", "answer": "2"},
            "Please choose the correct answer to fill in the blank to complete the given sentence: The _ ran.\n\n"
            "Option1: dog Option2: cat Answer format: option1/option2",
            "option2",
        ),
        (
            "arc_easy",
            {"question": "Which?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "2"},
            "Please choose the correct answer to the question: Which?\n\nAnswer1: a Answer2: b Answer3: c\n\n"
            "Answer format: answer1/answer2/answer3",
            "answer2",
        ),
        (
            "openbookqa",
            {"question_stem": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
            "Please choose the correct answer to the question: Which?\n\nAnswer1: a Answer2: b\n\n"
            "Answer format: answer1/answer2",
            "answer2",
        ),
    ],
)  # fmt: skip
def test_the_original_rows_become_the_papers_prompts(
    name: str, row: dict[str, Any], instruction: str, answer: str
) -> None:
    (item,) = benchmark(name).read(row, "the row")
    assert (item.prompt, item.reference, item.response) == (instruction, answer, f"the correct answer is {answer}")
    assert item.choice is not None
    again = {"instruction": instruction, "answer": answer, "output": item.response}
    assert benchmark(name).read(again, "the row") == [item]


def test_splits_of_a_folder(folder: Path) -> None:
    source = benchmark("arc_easy").source
    assert source.rows(folder=folder)[0] == "dev"
    assert source.rows("train", folder=folder)[0] == "train"
    assert len(source.rows("train", folder=folder, limit=3)[1]) == 3
    assert benchmark("wikitext2").source.rows("valid", folder=folder)[0] == "dev"
    assert prepare("arc_easy", data=folder, limit=3).items[2].reference == "answer2"


def test_the_union_is_trained_on_with_rows_held_out(folder: Path) -> None:
    task = load_experiment_task("commonsense_union -> svamp", data=folder, by_generation=True)
    train, held = task.validation(7)
    assert isinstance(held, AnswerTask)
    assert (len(train.items), len(held.held_out)) == (23, 7)
    assert {item.question for item in train.items}.isdisjoint(item.question for item in held.held_out)
    assert task.validation(7) == (train, held)
    first = held.held_out[0].conversation()
    assert [turn["role"] for turn in first] == ["user", "assistant"]
    assert first[1]["content"].startswith("the correct answer is")
    with pytest.raises(ConfigError, match=r"120 questions .* cannot be set aside of the 30"):
        task.validation(120)


# --- answers out of texts -----------------------------------------------------------------------------------


def test_the_first_keyword_decides() -> None:
    words = ["answer1", "answer2"]
    assert first_keyword("I say Answer2, not answer1.", words) == "answer2"
    assert first_keyword("the second", words) is None


@pytest.mark.parametrize(
    ("text", "final", "last"),
    [
        ("2+2=4\n#### 4", "4", "4"),
        ("It is so.\n#### 72", "72", "72"),
        ("#### 1,234.", "1234", "1234"),
        ("#### -3.50 apples", "-3.50", "-3.50"),
        ("#### $18", "18", "18"),
        ("#### $-3.50 dollars", "-3.50", "-3.50"),
        ("#### -$3.50 dollars", "-3.50", "3.50"),
        ("####18\n#### 20", "18", "20"),
        ("So 3 and then 7.", None, "7"),
        ("The answer is: 0.5", None, "0.5"),
        ("#### none, of 12", None, "12"),
        ("#### ,.", None, None),
        ("nothing", None, None),
        ("1,000 and 2,500,000", None, "2500000"),
    ],
)
def test_numbers(text: str, final: str | None, last: str | None) -> None:
    assert final_number(text) == (None if final is None else Decimal(final))
    assert last_number(text) == (None if last is None else Decimal(last))


def test_numbers_are_compared_as_numbers() -> None:
    assert same_number(number("18.00"), number(" $18 "))
    assert same_number(number("0.333"), number("0.3339"))
    assert not same_number(number("0.333"), number("0.3341"))
    assert not same_number(number("no"), number("no"))
    assert number(None) is None
    assert number("nan") is None
    assert metrics.STRICT.score(["so #### 18", "18"], ["18.00", "18"])[1] == {"strict": (1.0, 0.0)}
    assert metrics.FLEXIBLE.score(["#### 4, no 5", "18"], ["4", "18"])[1] == {"flexible": (0.0, 1.0)}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The answer is (D).", "D"),
        ("The answer is B", "B"),
        ("A: 3 + 4 = 7. The answer is C.", "C"),
        ("(E)", "E"),
        ("C", "C"),
        ("Answer: D", "D"),
        ("All of them", None),
    ],
)
def test_letters(text: str, wanted: str | None) -> None:
    assert letter(text) == wanted


@pytest.mark.parametrize(
    ("said", "wanted", "same"),
    [
        (r"\frac{1}{2}", r"\dfrac12", True),
        ("1/2", r"\frac{1}{2}", True),
        (".5", "0.5", True),
        ("1,000", "1000", True),
        (r"10\%", "10", True),
        (r"\$5", "5", True),
        (r"x = 3", "3", True),
        (r"\left( 1, 2 \right)", "(1,2)", True),
        (r"5 \text{ cm}", "5", True),
        (r"\text{east}", "east", True),
        (r"90^\circ", "90", True),
        (r"\sqrt3", r"\sqrt{3}", True),
        ("3", "4", False),
        ("(1,2)", "12", False),
        (r"\frac{1}{3}", r"\frac{1}{2}", False),
    ],
)
def test_answers_of_math(said: str, wanted: str, same: bool) -> None:
    assert (math_form(said) == math_form(wanted)) is same


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("2 + 3 = 5.\nThe answer is: 5", "5"),
        ("The answer is: 5. No.\nThe answer is: $1,200.00.", "1200"),
        ("the answer is -7 apples", "-7"),
        ("#### 4\nThe answer is: 5", "4"),
        ("The answer is: 5\n#### none", None),
        ("The answer is: x", None),
        ("5", None),
    ],
)
def test_the_number_that_is_stated(text: str, wanted: str | None) -> None:
    assert same_number(stated_number(text), number(wanted)) == (wanted is not None)
    assert (stated_number(text) is None) == (wanted is None)


@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        ("so it is half.\nThe answer is: \\frac{1}{2}", r"\dfrac12", 1.0),
        (r"The answer is: $\frac{1}{2}$.", "1/2", 1.0),
        (r"\boxed{3}. The answer is: 4", "3", 1.0),
        ("The answer is: 4\nThe answer is: 5", "5", 1.0),
        ("The answer is: 4", "5", 0.0),
        ("5", "5", 0.0),
    ],
)
def test_math_reads_what_metamathqa_teaches(text: str, reference: str, right: float) -> None:
    assert metrics.MATH.score([text], [reference])[1] == {"accuracy": (right,)}


def test_the_last_box() -> None:
    assert boxed(r"first \boxed{1}, then \boxed{\frac{2}{3}} it is") == r"\frac{2}{3}"
    assert boxed(r"$\boxed 7$") == "7"
    assert boxed(r"\fbox{9}") == "9"
    assert boxed("none") is None
    assert boxed(r"\boxed{open") is None


def test_squad_by_hand() -> None:
    found = metrics.SQUAD.score(["The dog!", "a big dog", "unanswerable.", "Rex"], [["a dog"], ["dog"], [], []])[0]
    assert found["exact"].value == pytest.approx(2 / 4)
    assert found["f1"].value == pytest.approx((1 + 2 / 3 + 1 + 0) / 4)  # "a" is no word: big dog, dog
    assert found["HasAns_f1"].value == pytest.approx((1 + 2 / 3) / 2)
    assert found["NoAns_exact"].value == pytest.approx(1 / 2)


# --- metrics ------------------------------------------------------------------------------------------------


def test_intervals() -> None:
    shares = item_interval([1.0, 0.0, 1.0, 1.0])
    assert shares.value == 0.75
    assert 0.3 < shares.low < 0.31  # Wilson's
    mean = item_interval([1.0, 2.0, 3.0])
    assert (mean.value, mean.high) == (2.0, pytest.approx(2 + 4.3026527 / math.sqrt(3)))
    drawn = bootstrap(lambda a, r: sum(a) / len(a), list(range(100)), [0] * 100)
    assert drawn.value == 49.5
    assert drawn.high - drawn.low == pytest.approx(2 * 1.96 * 28.87 / 10, rel=0.15)
    assert bootstrap(lambda a, r: sum(a), [1, 2, 3], [0] * 3) == bootstrap(lambda a, r: sum(a), [1, 2, 3], [0] * 3)


def test_classes_by_hand() -> None:
    pytest.importorskip("sklearn")
    predicted, wanted = [1, 1, 0, 0, 1], [1, 0, 0, 1, 1]
    tp, fp, fn, tn = 2, 1, 1, 1
    assert metrics.F1.score(predicted, wanted)[0]["f1"].value == pytest.approx(2 * tp / (2 * tp + fp + fn))
    by_hand = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert metrics.MATTHEWS.score(predicted, wanted)[0]["matthews"].value == pytest.approx(by_hand)
    x, y = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 3.0, 3.5])
    expected = float(torch.corrcoef(torch.stack([x, y]))[0, 1])
    assert metrics.PEARSON.score(x.tolist(), y.tolist())[0]["pearson"].value == pytest.approx(expected)
    assert metrics.PEARSON.score([1.0, 1.0], [1.0, 2.0])[0]["pearson"].value == 0


def test_texts_by_hand() -> None:
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    found = metrics.ROUGE.score(["a cat sat"], ["a cat ran"])[0]
    assert found["rouge1"].value == pytest.approx(2 / 3)
    assert found["rouge2"].value == pytest.approx(1 / 2)
    assert found["rougeL"].value == pytest.approx(2 / 3)
    same = ["the quick brown fox jumps", "over the lazy dog today"]
    assert metrics.BLEU.score(same, same)[0]["bleu"].value == pytest.approx(1)
    assert metrics.BLEU.score(["a b c d"], ["e f g h"])[0]["bleu"].value < 0.2


def test_a_missing_package_is_told_before_anything_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"rouge1 needs the package rouge-score.*dynalora\[eval\]"):
        prepare("xsum", data=folder)
    with pytest.raises(UnsupportedError, match=r"task sciq needs the package lm-eval,.*dynalora\[eval\]"):
        prepare("lm_eval:sciq")
    chosen = prepare("squad_v2", data=folder, metrics=["f1"])
    assert chosen.metrics == (metrics.SQUAD,)


def test_a_metric_without_items_or_references() -> None:
    with pytest.raises(DataError, match="accuracy of 0 answers"):
        metrics.ACCURACY.score([], [])
    with pytest.raises(DataError, match="accuracy of 1 answers and 2 references"):
        metrics.ACCURACY.score([1], [1, 2])


# --- a model that answers right gets full marks ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("boolq", {"accuracy": 1}),
        ("arc_easy", {"accuracy": 1}),
        ("gsm8k", {"strict": 1, "flexible": 1}),
        ("math", {"accuracy": 1}),
        ("svamp", {"accuracy": 0}),  # its response says 3, its reference 2
        ("squad_v2_spans", {"f1": 1, "exact": 1, "HasAns_f1": 1, "HasAns_exact": 1, "NoAns_f1": 1, "NoAns_exact": 1}),
        ("squad_v2", {"f1": 1, "exact": 1, "HasAns_f1": 1, "HasAns_exact": 1, "NoAns_f1": 1, "NoAns_exact": 1}),
    ],
)  # fmt: skip
def test_right_answers_score_one(name: str, expected: dict[str, float], folder: Path) -> None:
    assert perfect(name, folder) == expected


def test_a_dialogue_is_one_item_per_turn(folder: Path) -> None:
    pytest.importorskip("sacrebleu")
    first, second = prepare("convai2", data=folder, metrics=["bleu"]).items
    assert (first.reference, second.reference) == ("hello there", "he is called rex")
    assert second.prompt.startswith("Your persona:\ni like tea.\ni have a dog.\n\n")
    assert second.prompt.endswith("User: hi\nYou: hello there\nUser: and your dog ?")


def test_generated_code_passes_or_fails(folder: Path) -> None:
    humaneval = prepare("humaneval", data=folder, **QUICK)  # type: ignore[arg-type]
    answers = ["    return 2 * x\n", "    return x\n", "", "```python\nwhile True\n```"]
    assert [CODE.judged(NOBODY, humaneval, [answer])[0] for answer in answers] == [True, *[False] * 3]
    item = humaneval.items[0]
    assert item.prompt == (
        'Write a solution to the following problem:\n```python\ndef twice(x):\n    """Two times x."""\n```'
    )
    assert item.prefix == '```python\ndef twice(x):\n    """Two times x."""\n'
    assert item.response == '```python\ndef twice(x):\n    """Two times x."""\n    return 2 * x\n```'
    mbpp = prepare("mbpp", data=folder, **QUICK)  # type: ignore[arg-type]
    assert CODE.judged(NOBODY, mbpp, ["def inc(x):\n    return x + 1\n"]) == [True]
    assert CODE.judged(NOBODY, mbpp, ["def inc(x):\n    return 2\n"]) == [False]


def test_the_plus_versions_ask_the_same_and_test_more(folder: Path) -> None:
    half = prepare("humaneval+", data=folder, **QUICK)  # type: ignore[arg-type]
    assert half.task.title == "HumanEval+"
    for answer, right in (("    return x / 2\n", True), ("    return x // 2\n", False), ("", False)):
        assert CODE.judged(NOBODY, half, [answer]) == [right]
    add = prepare("MBPP+", data=folder, **QUICK)  # type: ignore[arg-type]
    plain = prepare("mbpp", data=folder, **QUICK)  # type: ignore[arg-type]
    assert add.items[0].prompt == plain.items[0].prompt
    # The second passes the assertion that the prompt shows, and not the others.
    for answer, right in (("def inc(x):\n    return x + 1\n", True), ("def inc(x):\n    return 2\n", False)):
        assert CODE.judged(NOBODY, add, [answer]) == [right]


def test_code_is_not_executed_unless_allowed(folder: Path) -> None:
    for name in GROUPS["code"]:
        with pytest.raises(ConfigError, match=rf"{name} executes code that the model writes; allow it.*--run-code"):
            prepare(name, data=folder)


# --- bad input ----------------------------------------------------------------------------------------------


def test_bad_data_is_told_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'math/gsm8k' has no split 'train' in '.*' \(there is dev\); name another"):
        prepare("gsm8k", data=folder, split="train")
    with pytest.raises(DataError, match=r"no split test or dev in .*there is none of its files.*hellaswag.test.jsonl"):
        prepare("hellaswag", data=folder)
    with pytest.raises(DataError, match="There is no folder"):
        prepare("gsm8k", data=tmp_path / "nowhere")
    with pytest.raises(DataError, match="'math/AddSub' has no usual place on the Hub; give a folder"):
        prepare("addsub")
    with pytest.raises(DataError, match="has no split 'dev'; its splits are train, test"):
        prepare("gsm8k", split="dev")
    with pytest.raises(ConfigError, match="limit is 0"):
        prepare("gsm8k", data=folder, limit=0)
    with pytest.raises(ConfigError, match="gsm8k has no options to compare"):
        prepare("gsm8k", data=folder, likelihood=True)
    with pytest.raises(ConfigError, match="gsm8k has no metric 'bleu'; its metrics are strict, flexible"):
        prepare("gsm8k", data=folder, metrics=["bleu"])


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("gsm8k", {"question": "1?", "answer": ""}, "line 1 has no text in the field 'answer'"),
        ("gsm8k", {"question": "1?", "answer": "one"}, "line 1 has an answer without a number after '####'"),
        ("gsm8k", {"answer": "#### 1"}, "line 1 has no text in the field 'question'"),
        ("math", {"problem": "1?", "solution": "one"}, r"line 1 has no .boxed"),
        ("aqua", {"instruction": "1?", "answer": "F"}, "line 1 has the answer 'F'; it must be a letter"),
        ("svamp", {"instruction": "1?", "answer": "one"}, "line 1 has the answer 'one', which is no number"),
        ("boolq", {"instruction": "1?", "answer": "maybe"}, "line 1 has the answer 'maybe'"),
        ("cola", {"text": "a", "label": -1}, "line 1 has no label"),
        ("xsum", {"document": "a", "summary": " "}, "line 1 has no text in the field 'summary'"),
        ("convai2", {"personality": [], "utterances": [{"candidates": [""], "history": []}]}, "empty response"),
        ("mbpp", {"text": "a", "test_list": []}, "line 1 has no test"),
    ],
)  # fmt: skip
def test_bad_rows_are_told_with_their_place(name: str, row: dict[str, Any], told: str, tmp_path: Path) -> None:
    pytest.importorskip("rouge_score")
    path = tmp_path / f"{benchmark(name).source.file}.dev.jsonl"
    path.parent.mkdir()
    tiny.write_jsonl(path, [row])
    options: dict[str, Any] = {"metrics": ["bleu"]} if name == "convai2" else {}
    with pytest.raises(DataError, match=told):
        prepare(name, data=tmp_path, **options, **QUICK)  # type: ignore[arg-type]


def test_the_hub_out_of_reach_is_told() -> None:
    source = Source("x/y", "no-such-owner/no-such-data", splits={"test": "test"})
    with pytest.raises(DataError, match=r"'no-such-owner/no-such-data', split 'test', cannot be loaded .*'x/y"):
        source.rows()


# --- measuring ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    tokenizer = tiny.tokenizer()
    model = tiny.model(len(tokenizer)).eval()
    model.config.max_position_embeddings = 1024
    return model, tokenizer


def test_greedy_answers_do_not_depend_on_the_batch(small: tuple[Any, Any], folder: Path) -> None:
    model, tokenizer = small
    prompts = ["a", "Tell me more about it.", "x y", "?", "What is the sum of two and three?", "no"]
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert len(set(alone)) > 1
    for batch_size in (1, 2, 4, 6):
        assert generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=batch_size) == alone
    choices = [item.choice for item in prepare("arc_easy", data=folder).items]
    found = [option_scores(model, tokenizer, choices, batch_size=size) for size in (1, 3, 7)]
    assert found[0].chosen() == found[1].chosen() == found[2].chosen()
    results = [
        measure(model, tokenizer, prepare("gsm8k", data=folder), batch_size=size, max_new_tokens=8).answers
        for size in (1, 2)
    ]
    assert results[0] == results[1]


def test_an_answer_ends_before_a_stop_text(small: tuple[Any, Any]) -> None:
    model, tokenizer = small
    (whole,) = generate(model, tokenizer, ["Tell me"], max_new_tokens=16, strip=False)
    assert len(whole) > 6
    stop = whole[4:6]
    (cut,) = generate(model, tokenizer, ["Tell me"], max_new_tokens=16, strip=False, stop=[stop])
    assert cut == whole[: whole.find(stop)]


def test_commonsense_is_measured_both_ways(small: tuple[Any, Any], folder: Path) -> None:
    model, tokenizer = small
    prepared = prepare("arc_easy", data=folder)
    said = measure(model, tokenizer, prepared, max_new_tokens=4)
    keywords = [f"answer{n}" for n in range(1, 6)]
    by_hand = [
        float(first_keyword(text, keywords) == item.reference)
        for text, item in zip(said.answers, prepared.items, strict=True)
    ]
    assert said.values["accuracy"] == tuple(by_hand)
    likely = measure(model, tokenizer, prepare("arc_easy", data=folder, likelihood=True))
    expected = option_scores(model, tokenizer, [item.choice for item in prepared.items])
    assert likely.values["accuracy"] == tuple(map(float, expected.correct()))
    assert likely.scores["right_loss"].value == pytest.approx(expected.right_loss.value)
    boolq = measure(model, tokenizer, prepare("boolq", data=folder, likelihood=True))
    assert boolq.items == 2
    record = likely.record()
    assert record["scores"]["accuracy"]["value"] == likely.scores["accuracy"].value


def test_prompts_beyond_the_window_count_as_wrong_and_are_counted(
    small: tuple[Any, Any], folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = small
    prepared = prepare("gsm8k", data=folder)
    lengths = [len(chat_prompt(tokenizer, item.prompt)) for item in prepared.items]
    assert lengths[0] < lengths[1]
    monkeypatch.setattr(model.config, "max_position_embeddings", lengths[1] + 3)
    with caplog.at_level("WARNING"):
        result = measure(model, tokenizer, prepared, max_new_tokens=4)
    assert result.too_long == 1
    assert result.answers[1] == ""
    assert result.values["strict"][1] == 0
    assert f"1 of 2 prompts of GSM8K are longer than the {lengths[1] - 1} tokens that" in caplog.text
    assert "count as wrong" in caplog.text
    monkeypatch.setattr(model.config, "max_position_embeddings", 20)
    with pytest.raises(DataError, match="All 2 prompts of GSM8K are longer than the model's window"):
        measure(model, tokenizer, prepared, max_new_tokens=4)


def test_code_is_generated_behind_its_beginning_and_run(
    small: tuple[Any, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = small
    seen: list[list[int]] = []

    def say(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> list[str]:
        seen.extend(prompts)
        assert options["strip"] is False
        return ["    return x + x\n"] * len(prompts)

    monkeypatch.setattr("dynalora.evaluation.kinds.generate.generate", say)
    prepared = prepare("humaneval", data=folder, **QUICK)  # type: ignore[arg-type]
    result = measure(model, tokenizer, prepared)
    assert result.scores["pass@1"].value == 1
    assert result.main == "pass@1"
    assert tokenizer.decode(seen[0]).endswith(
        '<|im_start|>assistant\n```python\ndef twice(x):\n    """Two times x."""\n'
    )


def test_perplexity_by_hand(small: tuple[Any, Any], folder: Path) -> None:
    model, tokenizer = small
    text = (folder / "text" / "wikitext2.valid.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = [ids[start : start + 32] for start in range(0, len(ids) - 31, 32)]
    with torch.no_grad():
        losses = [float(model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss) for row in rows]
    expected = math.exp(sum(losses) / len(losses))
    result = measure(model, tokenizer, prepare("wikitext2", data=folder), window=32, batch_size=3)
    assert result.items == len(rows)
    assert result.scores["perplexity"].value == pytest.approx(expected, rel=1e-4)
    assert result.scores["perplexity"].low < expected < result.scores["perplexity"].high
    assert result.percent == ()
    assert perplexity(model, rows, batch_size=1).value == pytest.approx(expected, rel=1e-4)
    with pytest.raises(DataError, match="1 tokens"):
        windows(tokenizer, "a", 8)


def encoder(labels: int | None = None) -> tuple[Any, Any]:
    tokenizer = tiny.tokenizer(chat=False)
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "mask_token": "[MASK]"})
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, initializer_range=0.5, pad_token_id=tokenizer.pad_token_id, num_labels=labels or 2,
    )  # fmt: skip
    kind = transformers.BertForMaskedLM if labels is None else transformers.BertForSequenceClassification
    return kind(config).eval(), tokenizer


def test_masked_perplexity_by_hand(folder: Path) -> None:
    model, tokenizer = encoder()
    prepared = prepare("wikitext2_masked", data=folder)
    text = "".join(item.prompt for item in prepared.items)
    masked = mask_windows(windows(tokenizer, text, 32), tokenizer)
    losses = []
    for row, hidden in zip(masked.rows, masked.masked, strict=True):
        ids = torch.tensor([[tokenizer.mask_token_id if i in hidden else t for i, t in enumerate(row)]])
        with torch.no_grad():
            logs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
        losses += [-float(logs[i, row[i]]) for i in hidden]
    result = measure(model, tokenizer, prepared, window=32, batch_size=3)
    assert result.items == len(masked.rows)
    assert result.scores["perplexity"].value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert result.scores["perplexity"].low < result.scores["perplexity"].value
    assert result.percent == ()


def test_masked_perplexity_on_sentences_that_are_drawn(folder: Path) -> None:
    model, tokenizer = encoder()
    drawn = sentences(
        ["One two three four five. No! A b c d e f.\nHe said: 'it is not so.' (Or so it seemed to me.)"], 9
    )
    assert drawn == ["One two three four five.", "A b c d e f.", "He said: 'it is not so.'", "(Or so it seemed to me.)"]
    some = sentences([f"This is the sentence number {n}." for n in range(50)], 20)
    assert some == sentences([f"This is the sentence number {n}." for n in range(50)], 20)
    assert (len(some), len(set(some))) == (20, 20)
    assert some == sorted(some, key=lambda text: int(text.split()[-1][:-1]))
    for name, count in (("bookcorpus_masked", 9), ("cc_news_masked", 2)):
        prepared = prepare(name, data=folder)
        assert prepared.split == "dev"
        text = mask_text(sentences([item.prompt for item in prepared.items], 2000), tokenizer, max_length=62)
        result = measure(model, tokenizer, prepared)
        assert result.items == count
        assert result.scores["perplexity"].value == pytest.approx(masked_lm_perplexity(model, text).perplexity)
    assert measure(model, tokenizer, prepare("bookcorpus_masked", data=folder, limit=4)).items == 4
    (folder / "text" / "wikitext2.test.txt").write_text("No text.", encoding="utf-8")
    try:
        assert prepare("wikitext2_masked", data=folder).split == "dev"
        assert prepare("wikitext2", data=folder).split == "test"
    finally:
        (folder / "text" / "wikitext2.test.txt").unlink()


def test_classification(folder: Path) -> None:
    pytest.importorskip("sklearn")
    model, tokenizer = encoder(2)
    prepared = prepare("mrpc", data=folder)
    logits, cut = class_logits(model, tokenizer, prepared.items, batch_size=2)
    expected = []
    for item in prepared.items:
        made = tokenizer(item.prompt, item.second, return_tensors="pt")
        with torch.no_grad():
            expected.append(model(**made).logits[0])
    torch.testing.assert_close(logits, torch.stack(expected))
    assert (classes(logits), cut) == ([int(row.argmax()) for row in expected], 0)
    result = measure(model, tokenizer, prepare("cola", data=folder))
    assert set(result.scores) == {"matthews", "accuracy"}
    assert result.main == "matthews"
    values, _ = class_logits(*encoder(1), prepare("stsb", data=folder).items)
    assert classes(values) == values[:, 0].tolist()


def test_what_does_not_fit_the_model_is_told(small: tuple[Any, Any], folder: Path) -> None:
    pytest.importorskip("sklearn")
    model, tokenizer = small
    with pytest.raises(ConfigError, match=r"cola needs a model with a classification head .* is a LlamaForCausalLM"):
        measure(model, tokenizer, prepare("cola", data=folder))
    classifier, words = encoder(3)
    with pytest.raises(ConfigError, match="gsm8k needs a causal language model"):
        measure(classifier, words, prepare("gsm8k", data=folder))
    with pytest.raises(ConfigError, match="cola has 2 classes, and the model's head has 3"):
        measure(classifier, words, prepare("cola", data=folder))
    words.pad_token = None
    with pytest.raises(ConfigError, match="has no padding token"):
        class_logits(classifier, words, prepare("cola", data=folder).items)
    with pytest.raises(ConfigError, match="needs a masked language model"):
        measure(model, tokenizer, prepare("wikitext2_masked", data=folder))


def test_generated_tasks_by_name(small: tuple[Any, Any]) -> None:
    pytest.importorskip("reasoning_gym")
    model, tokenizer = small
    prepared = prepare("reasoning_gym:chain_sum", limit=3)
    assert len(prepared.items) == 3
    assert all(int(item.reference) is not None for item in prepared.items)
    result = measure(model, tokenizer, prepared, max_new_tokens=2)
    assert result.scores["accuracy"].value == 0
    right = prepared.scored([f" {item.reference}\n" for item in prepared.items])
    assert right.scores["accuracy"].value == 1
    with pytest.raises(ConfigError, match="no task 'sums'"):
        prepare("reasoning_gym:sums")


def test_harness_tasks_by_name(small: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness is stood in for by modules with its interface: what is tested is how it is called and read."""
    asked: dict[str, Any] = {}

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        asked.update(options)
        return {
            "results": {"sciq": {"alias": "sciq", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.25,
                                 "acc_norm_stderr,none": "N/A"}},
            "n-samples": {"sciq": {"original": 100, "effective": 25}},
        }  # fmt: skip

    package = types.ModuleType("lm_eval")
    package.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    package.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    tasks, models, hf = (types.ModuleType(name) for name in ("tasks", "models", "huggingface"))
    tasks.TaskManager = lambda: types.SimpleNamespace(all_tasks=["sciq", "humaneval"])  # type: ignore[attr-defined]
    hf.HFLM = lambda **options: options  # type: ignore[attr-defined]
    for name, module in (
        ("lm_eval", package), ("lm_eval.tasks", tasks), ("lm_eval.models", models), ("lm_eval.models.huggingface", hf),
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    model, tokenizer = small
    result = measure(model, tokenizer, prepare("lm_eval:sciq", limit=25), batch_size=4)
    assert (asked["tasks"], asked["limit"]) == (["sciq"], 25)
    assert asked["num_fewshot"] is None
    measure(model, tokenizer, prepare("lm_eval:sciq", shots=5))
    assert asked["num_fewshot"] == 5
    measure(model, tokenizer, prepare("lm_eval:sciq", max_length=512))
    assert asked["model"]["max_length"] == 512
    with pytest.raises(ConfigError, match="max_length is 0"):
        prepare("lm_eval:sciq", max_length=0)
    with pytest.raises(ConfigError, match="shots is -1"):
        prepare("lm_eval:sciq", shots=-1)
    measure(model, tokenizer, prepare("lm_eval:sciq", limit=25), batch_size=4)
    assert asked["model"] == {
        "pretrained": model, "tokenizer": tokenizer, "batch_size": 4, "max_length": None, "backend": "causal",
    }  # fmt: skip
    assert result.scores["acc"] == Interval(0.5, pytest.approx(0.304, abs=1e-3), pytest.approx(0.696, abs=1e-3))
    assert result.scores["acc_norm"] == Interval(0.25, 0.25, 0.25)
    assert (result.items, result.main) == (25, "acc")
    with pytest.raises(ConfigError, match="no task 'sciqq'"):
        prepare("lm_eval:sciqq")
    with pytest.raises(ConfigError, match="would execute the code of 'humaneval' without a sandbox"):
        prepare("lm_eval:humaneval", run_code=True)
    assert task_list(["lm_eval:forgetting"]) == [f"lm_eval:{name}" for name in FORGETTING_SUITE]


def test_the_mean_of_a_group() -> None:
    def result(name: str, value: float, half: float) -> TaskResult:
        score = {"accuracy": Interval(value, value - half, value + half)}
        return TaskResult(name, name, "test", 5, "accuracy", score, ("accuracy",))

    mean = group_mean([result("a", 0.2, 0.03), result("b", 0.6, 0.04)])
    assert mean.value == pytest.approx(0.4)
    assert mean.high - mean.value == pytest.approx(0.05 / 2)
    with pytest.raises(DataError, match="no results"):
        group_mean([])


# --- a real folder ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif("DYNALORA_BENCHMARK_DATA" not in os.environ, reason="DYNALORA_BENCHMARK_DATA names no folder")
def test_a_real_folder() -> None:
    data = Path(os.environ["DYNALORA_BENCHMARK_DATA"])
    read = 0
    for name in BENCHMARKS:
        if name in ("convai2", "xsum"):
            continue
        try:
            prepared = prepare(name, data=data, **QUICK)  # type: ignore[arg-type]
        except DataError as error:
            if "has no split" not in str(error):
                raise
            continue
        read += 1
        assert prepared.items
        if name == "gsm8k":
            assert perfect(name, data) == {"strict": 1, "flexible": 1}
        if prepared.task.source.file.startswith("commonsense/"):
            assert perfect(name, data) == {"accuracy": 1}
        if name == "humaneval":
            import gzip
            import json

            with gzip.open(next((data / "code").glob("humaneval.*")), "rt", encoding="utf-8") as file:
                solutions = [json.loads(line)["canonical_solution"] for line in file]
            assert all(CODE.judged(NOBODY, prepared, solutions))
    assert read
