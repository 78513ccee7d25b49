"""Reading the commonsense files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dynalora.errors import DataError
from dynalora.evaluation.commonsense import choice_from
from dynalora.evaluation.files import file_rows
from dynalora.evaluation.multiple_choice import Choice
from dynalora.evaluation.sources import Source

from . import tiny


def load_choices(path: Path) -> list[Choice]:
    return [choice_from(row, f"'{path}', {where}") for where, row in file_rows(path)]


def row(*options: str, answer: int = 1, word: str = "answer", question: str = "Why: how?") -> dict[str, Any]:
    listed = " ".join(f"{word.title()}{number}: {text}" for number, text in enumerate(options, start=1))
    labels = "/".join(f"{word}{number}" for number in range(1, len(options) + 1))
    return {
        "instruction": f"Please choose the correct answer to the question: {question}\n\n{listed}\n\n"
        f"Answer format: {labels}",
        "input": "",
        "output": f"the correct answer is {word}{answer}",
        "answer": f"{word}{answer}",
    }


@pytest.mark.parametrize("number", [2, 3, 4, 5, 12])
def test_rows_of_any_number_of_options(number: int) -> None:
    options = tuple(f"the {index}th: one / two" for index in range(number))
    for right in range(number):
        choice = choice_from(row(*options, answer=right + 1))
        assert choice.question == "Why: how?"
        assert choice.options == options
        assert choice.right == right


@pytest.mark.parametrize(
    ("text", "question", "options"),
    [
        (  # PIQA
            "Please choose the correct solution to the question: Open it?\n\nSolution1: Pull.\n\nSolution2: Push.\n\n"
            "Answer format: solution1/solution2",
            "Open it?",
            ("Pull.", "Push."),
        ),
        (  # WinoGrande
            "Please choose the correct answer to fill in the blank to complete the given sentence: The _ ran.\n\n"
            "Option1: dog Option2: cat Answer format: option1/option2",
            "The _ ran.",
            ("dog", "cat"),
        ),
        ("What?\nAnswer1: a Answer2: b\nAnswer format: answer1/answer2", "What?", ("a", "b")),
    ],
)
def test_the_other_files_spellings(text: str, question: str, options: tuple[str, ...]) -> None:
    label = text.rsplit("/", 1)[1]
    choice = choice_from({"instruction": text, "answer": label})
    assert (choice.question, choice.options, choice.right) == (question, options, 1)


def test_a_label_inside_a_text_is_no_option() -> None:
    choice = choice_from(row("see Answer2, he said", "myAnswer2: no"))
    assert choice.options == ("see Answer2, he said", "myAnswer2: no")


@pytest.mark.parametrize("packed", [True, False])
def test_a_file_with_and_without_gzip(tmp_path: Path, packed: bool) -> None:
    rows = [row("a", "b"), row("c", "d", "e", answer=3)]
    file = tiny.write_jsonl(tmp_path / "some.jsonl", rows)
    if packed:
        file = tmp_path / "some.jsonl.gz"
        file.write_bytes(gzip.compress((tmp_path / "some.jsonl").read_bytes()))
    first, second = load_choices(file)
    assert first.options == ("a", "b")
    assert second.item.answer == "e"


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in row("a", "b").items() if key != name}


def changed(old: str, new: str) -> dict[str, Any]:
    made = row("a", "b")
    return {**made, "instruction": made["instruction"].replace(old, new)}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (without("instruction"), "no text in the field 'instruction'"),
        (without("answer"), "no text in the field 'answer'"),
        ({**row("a", "b"), "answer": 1}, "no text in the field 'answer'"),
        ({**row("a", "b"), "answer": "answer3"}, "the answer 'answer3', which is none of answer1, answer2"),
        (changed("Answer format: answer1/answer2", ""), "does not end in 'Answer format: …'"),
        (changed("Answer2:", "Answer 2:"), "lists no option 'Answer2: …'"),
        (changed("Answer1: a Answer2: b", "Answer2: b Answer1: a"), "lists no option 'Answer2: …'"),
        (row("a", ""), "option 2 is empty"),
        (row("a"), "1 options"),
        (changed("Why: how?", " "), "question is empty"),
    ],
)
def test_a_malformed_row_is_named_with_file_row_and_remedy(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    file = tiny.write_jsonl(tmp_path / "some.jsonl", [row("a", "b"), bad])
    with pytest.raises(DataError, match=r"leave (it|this one) out") as caught:
        load_choices(file)
    assert f"'{file}', line 2" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no row"),
        (b"\n\n", "holds no row"),
        (b'{"instruction": ', r"line 1: not valid JSON .* must be one JSON object"),
        (b"[1, 2]\n", r"line 1: holds a list; each line must be one JSON object"),
        (b"\xff\xfe", r"line 1: not UTF-8 text .* convert the file to UTF-8"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "some.test.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        Source("some").rows(folder=tmp_path)


def test_a_missing_or_cut_off_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl.*cannot be read \(No such file"):
        load_choices(tmp_path / "none.jsonl")
    packed = gzip.compress(json.dumps(row("a", "b")).encode())
    for number, content in enumerate((packed[: len(packed) // 2], b"no gzip", packed[:12] + b"\xff" * 40)):
        file = tmp_path / f"{number}.jsonl.gz"
        file.write_bytes(content)
        with pytest.raises(DataError, match="not a complete gzip file"):
            load_choices(file)


def test_blank_lines_count_as_rows_but_hold_none(tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    file.write_text(json.dumps(row("a", "b")) + "\n\n{}\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 3 has no text"):
        load_choices(file)
