"""Rows of plain text, which are learned whole, from the file to the labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dynalora.errors import DataError
from dynalora.evaluation.tokens import PLAIN, tokenize
from dynalora.jobs.finetune.prepare import prepare
from dynalora.jobs.finetune.settings import FinetuneSpec
from dynalora.lab.configs import method_names, method_options
from dynalora.lab.data.conversations import load_conversations, split
from dynalora.lab.data.fields import Fields
from tests.unit import tiny
from tests.unit.program import Program, program

__all__ = ["program"]  # a fixture


@pytest.mark.parametrize("field", ["text", "content", "document"])
def test_a_lone_text_is_learned_whole(field: str, tmp_path: Path) -> None:
    file = tiny.write_jsonl(tmp_path / "x.jsonl", [{field: f"Number {n} ends."} for n in range(6)] + [{field: "  "}])
    conversations = load_conversations(file)
    assert conversations[2] == [{"role": PLAIN, "content": "Number 2 ends."}]
    assert len(conversations) == 6
    training, held_out = split(conversations, 0.4)
    assert len(training) + len(held_out) == 6
    words = tiny.tokenizer()
    rows = tokenize(conversations, words).rows
    expected = [*words("Number 2 ends.")["input_ids"], words.eos_token_id]
    assert rows[2] == {"input_ids": expected, "labels": expected}  # no chat format, and nothing without loss


def test_longer_text_loses_its_end() -> None:
    words = tiny.tokenizer()
    cut = tokenize([[{"role": PLAIN, "content": "abcdef"}]], words, max_length=3)
    assert (cut.rows[0]["input_ids"], cut.truncated) == (words("abc")["input_ids"], 1)


def test_packed_texts_lose_nothing() -> None:
    words = tiny.tokenizer()
    texts = ["abcdef", "gh", "ijklm"]
    rows = tokenize([[{"role": PLAIN, "content": text}] for text in texts], words)
    stream = [token for text in texts for token in (*words(text)["input_ids"], words.eos_token_id)]
    packed = rows.packed(4)
    assert [row["input_ids"] for row in packed.rows] == [stream[at : at + 4] for at in range(0, 16, 4)]
    assert all(row["labels"] == row["input_ids"] for row in packed.rows)
    assert len(rows.packed(5).rows[-1]["input_ids"]) == 5  # a last token alone has nothing to predict
    assert [len(row["input_ids"]) for row in rows.packed(100).rows] == [16]


def test_packing_is_for_plain_text(tmp_path: Path) -> None:
    model = tiny.saved_model(tmp_path / "model")
    file = tmp_path / "book.txt"
    file.write_text("\n\n".join("x" * (7 * number + 1) for number in range(8)))

    def prepared(data: Path, **settings: Any) -> Any:
        return prepare(
            FinetuneSpec(model=str(model), data=str(data), output=str(tmp_path / "run"), max_length=16, **settings)
        )

    plain, packed = prepared(file), prepared(file, packing=True)
    assert plain.training.truncated
    assert (packed.training.truncated, packed.training.dropped) == (0, 0)
    assert {len(row["input_ids"]) for row in packed.training.rows[:-1]} == {16}
    assert packed.training.response_tokens + packed.held_out.response_tokens >= sum(7 * n + 2 for n in range(8)) - 2
    with pytest.raises(DataError, match="`packing` puts plain texts one behind the other, and the data are chats"):
        prepared(tiny.write_jsonl(tmp_path / "chats.jsonl", tiny.rows(8)), packing=True)


def test_text_beside_other_fields_must_be_named(tmp_path: Path) -> None:
    file = tiny.write_jsonl(tmp_path / "x.jsonl", [{"text": "a", "label": 0}])
    with pytest.raises(DataError, match="or text_field for plain text"):
        load_conversations(file)
    assert load_conversations(file, fields=Fields(text="text")) == [[{"role": PLAIN, "content": "a"}]]
    with pytest.raises(DataError, match="Give either a text field"):
        Fields(text="text", prompt="a", response="b")
    with pytest.raises(DataError, match="has no field 'body'"):
        load_conversations(file, fields=Fields(text="body"))


@pytest.mark.parametrize("method", method_names())
def test_help_lists_the_options_of_a_method(method: str) -> None:
    listed = [name for name, _, _ in method_options(method)]
    assert listed
    assert not {"r", "target_modules", "task_type"} & set(listed)


def test_help_of_a_method_ends_with_its_options(program: Program) -> None:
    shown = program("finetune", "--method", "disel", "--help")
    assert shown.code == 0
    assert "gate_bias_init" in shown.out.partition("Options of disel")[2]
    assert "Options of" not in program("finetune", "--help").out
    assert "Options of" not in program("finetune", "--method", "no-such", "--help").out
