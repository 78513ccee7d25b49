"""Reading the text of domains."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from dynalora.errors import ConfigError, DataError
from dynalora.jobs.gates.record import read_domain
from dynalora.jobs.gates.settings import DomainSpec, GatesSpec
from tests.unit import tiny


def test_a_text_file_is_read_passage_by_passage(tmp_path: Path) -> None:
    content = "\n\nFirst\nof two lines\n \nSecond\n\n\nThird, without an end"
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    expected = ("First\nof two lines", "Second", "Third, without an end")
    found = read_domain(DomainSpec(data=str(tmp_path / "a.txt")))
    assert (found.texts, found.conversations, found.counted) == (expected, (), "all tokens")
    with gzip.open(tmp_path / "b.py.gz", "wt", encoding="utf-8") as file:
        file.write(content)
    assert read_domain(DomainSpec(data=str(tmp_path / "b.py.gz"), limit=2)).texts == expected[:2]


def test_rows_are_conversations_if_they_can_be_and_else_text(tmp_path: Path) -> None:
    both = tiny.write_jsonl(
        tmp_path / "both.jsonl", [{"text": "t", "question": "q?", "answer": f"a{i}"} for i in range(3)]
    )
    found = read_domain(DomainSpec(data=str(both), limit=2))
    assert [chat[-1]["content"] for chat in found.conversations] == ["a0", "a1"]
    assert (found.texts, found.counted) == ((), "response tokens")
    assert read_domain(DomainSpec(data=str(both), text_field="text")).texts == ("t",) * 3
    plain = tiny.write_jsonl(tmp_path / "plain.jsonl", [{"text": "x"}, {"text": " "}, {"text": "y"}])
    assert read_domain(DomainSpec(data=str(plain))).texts == ("x", "y")
    named = tiny.write_jsonl(tmp_path / "named.jsonl", [{"task": "T", "solution_code": "S"}])
    found = read_domain(DomainSpec(data=str(named), prompt_field="task", response_field="solution_code"))
    assert [turn["content"] for turn in found.conversations[0]] == ["T", "S"]


@pytest.mark.parametrize(
    ("name", "content", "options", "words"),
    [
        ("a.jsonl", '{"other": 1}\n', {}, "has no fields that are usual"),
        ("a.jsonl", '{"text": 1}\n', {}, "line 1: there is no text in the field 'text'"),
        ("a.jsonl", '{"text": "x"}\n', {"text_field": "body"}, "no text in the field 'body'; its fields are 'text'"),
        ("a.jsonl", "", {}, "is empty"),
        ("a.txt", "x", {"text_field": "body"}, "is plain text and has no fields"),
        ("a.jsonl", "{}", {"text_field": "a", "messages_field": "b"}, "Give either a text field"),
        ("a.txt", "x", {"limit": 0}, "limit is 0"),
        ("a.bin", "\udcff", {}, "not UTF-8 text"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(name: str, content: str, options: dict[str, object], words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=words):
        read_domain(DomainSpec(data=str(tmp_path / name), **options))  # type: ignore[arg-type]


def test_a_domain_inherits_what_it_does_not_say() -> None:
    spec = GatesSpec(
        adapter="a", limit=7, split="test", domains={"x": "file.txt", "y": {"data": "h", "limit": 9, "subset": "s"}}
    )  # fmt: skip
    assert spec.sources() == {
        "x": DomainSpec(data="file.txt", limit=7, split="test"),
        "y": DomainSpec(data="h", limit=9, split="test", subset="s"),
    }
    assert list(GatesSpec(adapter="a", data="folder/rows.jsonl").sources()) == ["rows.jsonl"]
    with pytest.raises(ConfigError, match="Missing 'data' in the domain 'x'"):
        GatesSpec(adapter="a", domains={"x": {"limit": 3}}).sources()
