from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from dynalora.common.names import IGNORED_LABEL
from dynalora.errors import DataError
from dynalora.evaluation.tokens import ensure_chat_template, ensure_pad_token, tokenize
from dynalora.lab.data.collator import Collator
from dynalora.lab.data.conversations import load_conversations, load_texts, split, to_conversations, without_repeats
from dynalora.lab.data.fields import Fields, find_fields
from tests.unit import tiny

PAIR = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


def learned(tokens: Any, tokenizer: Any) -> str:
    return tokenizer.decode([label for label in tokens["labels"] if label != IGNORED_LABEL])


# --- reading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "response": "4"},
        {"prompt": "2 + 2?", "completion": "4", "id": 7},
        {"instruction": "2 + 2?", "output": "4"},
        {"instruction": "2 + 2?", "input": "", "output": "4"},
        {"question": "2 + 2?", "answer": 4},
        {"problem": "2 + 2?", "solution": "4", "answer": "no"},
        {"messages": PAIR},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
    ],
    ids=lambda row: "+".join(row),
)
def test_usual_fields_are_found(row: dict[str, Any], tmp_path: Path) -> None:
    assert load_conversations(tiny.write_jsonl(tmp_path / "data.jsonl", [row])) == [PAIR]


def test_input_follows_the_instruction_and_may_be_absent_from_a_row(tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "output": "ok"}, {"instruction": "Add.", "input": "2 + 2", "output": "4"}]
    told = [chat[0]["content"] for chat in load_conversations(tiny.write_jsonl(tmp_path / "data.jsonl", rows))]
    assert told == ["Add.", "Add.\n\n2 + 2"]
    named = Fields(prompt="instruction", input="input", response="output")
    assert len(load_conversations(tiny.write_jsonl(tmp_path / "r.jsonl", rows[::-1]), fields=named)) == 2


@pytest.mark.parametrize(
    "name", ["d.jsonl", "d.json", "d.csv", "d.tsv", "d.jsonl.gz", "d.csv.gz", "d.parquet", "lines.json"]
)
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    rows = [{"q": 'say "hi", then\nstop', "a": "hi; ü"}, {"q": "two", "a": "2"}]
    table, path = datasets.Dataset.from_list(rows), tmp_path / name
    if ".csv" in name:
        table.to_csv(tmp_path / "plain", index=False)
        text = (tmp_path / "plain").read_bytes()
        path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    elif name.endswith(".tsv"):
        table.to_csv(path, index=False, sep="\t")
    elif name.endswith(".parquet"):
        table.to_parquet(path)
    elif name == "d.json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    conversations = load_conversations(path, fields=Fields(prompt="q", response="a"))
    assert [[turn["content"] for turn in chat] for chat in conversations] == [[row["q"], row["a"]] for row in rows]


def test_spreadsheet_csv_with_mark_and_semicolons(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes("\ufeffprompt;response\r\na, b;c\r\n".encode())
    assert load_conversations(tmp_path / "d.csv")[0][0]["content"] == "a, b"


def test_folder_is_read_by_split_name(tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "train-0.jsonl", [{"prompt": "a", "response": "1"}])
    tiny.write_jsonl(tmp_path / "train-1.jsonl", [{"prompt": "b", "response": "2"}])
    tiny.write_jsonl(tmp_path / "test.jsonl", [{"prompt": "c", "response": "3"}])
    (tmp_path / "README.md").write_text("about")
    assert [chat[0]["content"] for chat in load_conversations(tmp_path)] == ["a", "b"]
    assert [chat[0]["content"] for chat in load_conversations(tmp_path, split="test")] == ["c"]


def test_folder_saved_by_datasets(tmp_path: Path) -> None:
    part = datasets.Dataset.from_list([{"prompt": "a", "response": "1"}])
    datasets.DatasetDict(train=part).save_to_disk(tmp_path / "saved")
    assert len(load_conversations(tmp_path / "saved")) == 1
    with pytest.raises(DataError, match="has no split 'test'; its splits are train"):
        load_conversations(tmp_path / "saved", split="test")


def test_rows_without_response_are_counted_not_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "a", "response": " "}, {"prompt": "b", "response": "2"}, {"prompt": "c", "response": None}]
    with caplog.at_level(logging.WARNING):
        assert len(load_conversations(tiny.write_jsonl(tmp_path / "d.jsonl", rows))) == 1
    assert "2 of 3 rows have an empty response and are left out (the first: line 1)" in caplog.text


def test_turns_that_teach_nothing_are_cut() -> None:
    chat = [{"role": "assistant", "content": "Welcome!"}, *PAIR, {"role": "user", "content": "Thanks"}]
    assert to_conversations([("row 1", {"messages": chat})]) == [PAIR]


def test_limit_stops_reading(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\nnot json\n')
    assert len(load_conversations(path, limit=1)) == 1


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", '{"text": "a", "label": 1}\n', "has no fields that are usual .*its fields are 'text', 'label'"),
        ("d.jsonl", '{"prompt": "a", "response": "b"}\n{"prompt": }\n', r"line 2: not valid JSON \(.* at column 12\)"),
        ("d.jsonl", '{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n', "line 2 has no fields .* are 'prompt'"),
        ("d.jsonl", "[1]\n", "line 1: holds a list; each line must be one JSON object"),
        ("d.jsonl", "", "is empty; give a data set with at least one row"),
        ("d.jsonl", '\n{"prompt": "a", "response": ""}\n', r"response \(all 1 are empty in 'response'\); give"),
        ("d.jsonl", '{"prompt": ["a"], "response": "b"}\n', "line 1: field 'prompt' holds a list, not text"),
        ("d.jsonl", '{"messages": "hi"}\n', "line 1: field 'messages' holds text, not a list of messages"),
        ("d.jsonl", '{"messages": [{"text": "hi"}]}\n', "message 1 .* needs 'role' and 'content'; .* are 'text'"),
        ("d.jsonl", '{"messages": [{"role": "king", "content": ""}]}\n', "has the role 'king'; known roles are system"),
        ("d.json", "[1, 2", "line 1: not valid JSON"),
        ("d.json", '{"a": [], "b": []}', r"holds several lists \(a, b\)"),
        ("d.csv", "prompt,response\n", "is empty"),
        ("d.csv", "prompt,response\na,b,c\n", "line 2: more cells than the header .*quote cells that hold a ','"),
        ("d.csv", 'prompt,response\n"a,b\n', "not valid CSV"),
        ("d.docx", "hello", r"is of no known kind \('.docx'\); known are .jsonl"),
        ("d.jsonl.gz", "plain", "is not a complete gzip file"),
        ("d.parquet", "plain", "is not a readable Parquet file"),
    ],
)  # fmt: skip
def test_broken_data_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as told:
        load_conversations(tmp_path / name)
    assert str(tmp_path / name) in str(told.value)


def test_binary_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8 text"):
        load_conversations(tmp_path / "d.jsonl")


def test_missing_named_fields_and_those_that_exist(tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "response": "b"}])
    with pytest.raises(DataError, match=r"has no field 'ask' and 'reply'; its fields are 'prompt', 'response'\."):
        load_conversations(path, fields=Fields(prompt="ask", response="reply"))


@pytest.mark.parametrize("source", ["nowhere.jsonl", "./nowhere", "/no/such/file.csv", "two words"])
def test_path_that_does_not_exist(source: str) -> None:
    with pytest.raises(DataError, match=f"There is no file or folder '{source}'"):
        load_conversations(source)


def test_hub_data_set_that_cannot_be_reached() -> None:
    with pytest.raises(DataError, match=r"The data set 'no/such-set' \(main\), split 'train', cannot be loaded \("):
        load_conversations("no/such-set", subset="main")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no data file"):
        load_conversations(tmp_path)


def test_fields_that_exclude_each_other() -> None:
    with pytest.raises(DataError, match="either a messages field"):
        Fields(messages="m", prompt="p", response="r")
    with pytest.raises(DataError, match=r"The prompt field is given \('p'\) but not the response field"):
        Fields(prompt="p")
    with pytest.raises(DataError, match="Field 'r' is given as prompt and as response"):
        Fields(prompt="r", response="r")
    with pytest.raises(DataError, match="Field 'r' is given as input and as response"):
        Fields(prompt="p", response="r", input="r")
    assert find_fields(["m"], Fields(messages="m")).messages == "m"


# --- splitting --------------------------------------------------------------------------------------------


def test_split_is_fixed_by_the_seed_and_shares_no_row() -> None:
    chats = to_conversations((f"row {i}", row) for i, row in enumerate(tiny.rows(40) + tiny.rows(10)))
    train, held = split(chats, 0.25, seed=3)
    assert (train, held) == split(chats, 0.25, seed=3)
    assert held != split(chats, 0.25, seed=4)[1]
    assert len(train) + len(held) == 50
    assert len({json.dumps(chat) for chat in held}) == 10  # a quarter of the 40 distinct rows
    assert without_repeats(held, train) == held


def test_split_refuses_what_cannot_be() -> None:
    chats = to_conversations([("row 1", tiny.rows(1)[0])])
    assert split(chats, 0.0) == (chats, [])
    with pytest.raises(DataError, match="has 1 distinct row, too few"):
        split(chats * 5, 0.5)
    with pytest.raises(DataError, match="eval_fraction is 1"):
        split(chats, 1)


def test_repeats_are_left_out_of_the_held_out_set(caplog: pytest.LogCaptureFixture) -> None:
    chats = to_conversations((f"row {i}", row) for i, row in enumerate(tiny.rows(4)))
    assert without_repeats(chats, chats[:1]) == chats[1:]
    assert "1 held-out rows are also training rows" in caplog.text
    with pytest.raises(DataError, match="Every held-out row is also a training row"):
        without_repeats(chats, chats)


# --- tokens -----------------------------------------------------------------------------------------------


def test_only_the_response_and_its_end_are_learned() -> None:
    tokenizer = tiny.tokenizer()
    (tokens,) = tokenize([PAIR], tokenizer).rows
    assert learned(tokens, tokenizer) == "4<|im_end|>"
    prompt = tokenizer.apply_chat_template(PAIR[:1], tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokens["input_ids"][: len(prompt_ids)] == prompt_ids
    assert tokens["labels"] == [IGNORED_LABEL] * len(prompt_ids) + tokens["input_ids"][len(prompt_ids) :]


def test_every_answer_of_a_chat_is_learned() -> None:
    tokenizer = tiny.tokenizer()
    chat = [*PAIR, {"role": "user", "content": "3 + 3?"}, {"role": "assistant", "content": "6!"}]
    (tokens,) = tokenize([chat], tokenizer).rows
    assert learned(tokens, tokenizer) == "4<|im_end|>6!<|im_end|>"
    whole = tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n")
    assert tokenizer.decode(tokens["input_ids"]) == whole


def test_no_token_spans_prompt_and_response() -> None:
    # This vocabulary joins the line break that ends the prompt with the "4" that begins the response.
    newline = "\u010a"
    tokenizer = tiny.tokenizer(merges=[(newline, "4")])
    joined = tokenizer.convert_tokens_to_ids(newline + "4")
    prompt = tokenizer.apply_chat_template(PAIR[:1], tokenize=False, add_generation_prompt=True)
    assert joined in tokenizer(prompt + "4", add_special_tokens=False)["input_ids"]
    (tokens,) = tokenize([PAIR], tokenizer).rows
    assert joined not in tokens["input_ids"]
    assert learned(tokens, tokenizer) == "4<|im_end|>"


def test_template_that_rewrites_earlier_turns_still_learns_the_last_answer() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:"
        "{{ m['content'] if loop.last or m['role'] == 'user' else m['content'][-1:] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "think 1"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "think 2"},
    ]
    (tokens,) = tokenize([chat], tokenizer).rows
    assert learned(tokens, tokenizer) == "think 2<|im_end|>"
    assert tokenizer.decode(tokens["input_ids"]).startswith("user:a<|im_end|>assistant:1<|im_end|>")


def test_template_error_becomes_one_sentence() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"rejects a conversation with the roles user.*roles must alternate"):
        tokenize([PAIR], tokenizer)


def test_base_model_without_template_gets_a_plain_one() -> None:
    tokenizer = tiny.tokenizer(chat=False)
    assert ensure_chat_template(tokenizer)
    assert not ensure_chat_template(tokenizer)
    (tokens,) = tokenize([PAIR], tokenizer).rows
    assert tokenizer.decode(tokens["input_ids"]) == "### User:\n2 + 2?\n\n### Assistant:\n4<|im_end|>"
    assert learned(tokens, tokenizer) == "4<|im_end|>"


def test_long_rows_lose_their_end_and_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny.tokenizer()
    long = [{"role": "user", "content": "x" * 100}, PAIR[1]]
    whole = len(tokenize([PAIR], tokenizer).rows[0]["input_ids"])
    made = tokenize([PAIR, long], tokenizer, max_length=whole)
    assert (len(made), made.truncated, made.dropped) == (1, 1, 1)
    assert made.response_tokens == 2
    assert f"1 of 2 conversations are longer than {whole} tokens" in caplog.text
    with pytest.raises(DataError, match=r"No response token is left in any of the 1 conversations at max_length 10"):
        tokenize([PAIR], tokenizer, max_length=10)


def test_collator_pads_to_the_longest_without_loss_or_attention() -> None:
    tokenizer = tiny.tokenizer()
    assert tokenizer.pad_token_id is None
    ensure_pad_token(tokenizer)
    short, long = {"input_ids": [5], "labels": [5]}, {"input_ids": [6, 7, 8], "labels": [IGNORED_LABEL, 7, 8]}
    batch = Collator(tokenizer.pad_token_id)([short, long])
    pad = tokenizer.eos_token_id
    assert batch["input_ids"].tolist() == [[5, pad, pad], [6, 7, 8]]
    assert batch["labels"].tolist() == [[5, IGNORED_LABEL, IGNORED_LABEL], [IGNORED_LABEL, 7, 8]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert Collator(0, pad_to_multiple_of=8)([long])["labels"].shape == torch.Size([1, 8])


def test_texts_are_paragraphs_or_the_field_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One\nof two lines.\n \n\nAnother.\n", encoding="utf-8")
    assert load_texts(tmp_path / "a.txt") == ["One\nof two lines.", "Another."]
    assert load_texts(str(tmp_path / "a.txt"), limit=1) == ["One\nof two lines."]
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"text": ""}\n{"text": NaN}\n{"text": " b "}\n{"text": "c"}\n{"txt": "d"}\n', encoding="utf-8")
    assert load_texts(rows, limit=2) == ["b", "c"]
    with pytest.raises(DataError, match="line 5: there is no text in the field 'text'; its fields are 'txt'"):
        load_texts(rows)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(DataError, match="holds no text"):
        load_texts(tmp_path / "empty.txt")
    with pytest.raises(DataError, match="There is no file or folder"):
        load_texts(tmp_path / "none.txt")


def test_missing_cells_are_missing() -> None:
    nan = float("nan")
    rows = [
        {"instruction": "one", "input": nan, "output": "1"},
        {"instruction": "two", "input": "x", "output": nan},
        {"instruction": "three", "input": None, "output": 3.0},
    ]
    chats = to_conversations([(f"row {i}", row) for i, row in enumerate(rows)])
    assert chats == [
        [{"role": "user", "content": "one"}, {"role": "assistant", "content": "1"}],
        [{"role": "user", "content": "three"}, {"role": "assistant", "content": "3.0"}],
    ]


def test_half_a_character_within_json_text_is_told(tmp_path: Path) -> None:
    half = json.dumps([{"name": "\ud83d"}])
    chat = json.dumps([{**PAIR[0], "name": "\ud83d"}, PAIR[1]])
    for row in ({"messages": PAIR, "tools": half}, {"messages": chat}):
        with pytest.raises(DataError, match=r"line 1: field '(tools|messages)' holds half of a character"):
            load_conversations(tiny.write_jsonl(tmp_path / "d.jsonl", [row]))


@pytest.mark.parametrize("name", ["d.txt", "d.jsonl", "d.csv", "d.jsonl.gz"])
def test_half_a_character_in_bytes_is_told_with_its_line(name: str, tmp_path: Path) -> None:
    lines = [b"a,b" if "csv" in name else b'{"prompt": "a", "response": "b"}'] * 3000
    lines[2500] += "😀".encode()[:2]
    content = b"\n".join(lines)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(DataError, match=rf"{name}', line 2501: not UTF-8 text"):
        load_conversations(tmp_path / name, fields=Fields(prompt="a", response="b") if "csv" in name else None)


def test_half_a_character_is_told_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n" + r'{"prompt": "c", "response": "\ud83d"}')
    with pytest.raises(DataError, match=r"chats.jsonl.*line 2.*'response' holds half of a character"):
        load_conversations(file)


def test_what_else_a_chat_says_is_kept() -> None:
    call = {"type": "function", "function": {"name": "clock", "arguments": {}}}
    chat = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "name": None},
        {"role": "tool", "content": "noon", "tool_call_id": "7"},
        {"role": "assistant", "content": "Noon.", "reasoning_content": "The clock says so.", "weight": 1},
        {"role": "user", "content": "Thanks."},
        {"role": "assistant", "content": "Whatever.", "weight": 0},
    ]
    [made] = to_conversations([("row 1", {"messages": chat, "tools": json.dumps([{"type": "function"}])})])
    assert made == [
        {"role": "user", "content": "What time is it?", "tools": [{"type": "function"}]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "noon", "tool_call_id": "7"},
        {"role": "assistant", "content": "Noon.", "reasoning_content": "The clock says so.", "weight": 1},
    ]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": 0.0}])
def test_answers_that_are_marked_carry_no_loss_whatever_the_mark_is_called(mark: dict[str, Any]) -> None:
    words = tiny.tokenizer()
    chat = [user("a"), assistant("ONE") | mark, user("b"), assistant("TWO") | {"train": True, "loss": None}]
    [tokens] = tokenize(to_conversations([("row 1", {"messages": chat})]), words).rows
    assert learned(tokens, words) == "TWO<|im_end|>"
    assert "ONE" in words.decode(tokens["input_ids"])


def test_marks_that_cannot_be_followed_are_told(caplog: pytest.LogCaptureFixture) -> None:
    def read(turn: dict[str, Any]) -> None:
        to_conversations([("row 1", {"messages": [user("a"), turn, assistant("b")]})])

    for name in ("weight", "loss_weight"):
        with pytest.raises(DataError, match=f"row 1: message 2 in 'messages' has the {name} 0.5; give 0 or false"):
            read(assistant("x") | {name: 0.5})
    with pytest.raises(DataError, match="'train_detail', which marks parts of it"):
        read(assistant("x") | {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]})
    read(user("x") | {"train": False})
    assert not caplog.records
    read(user("x") | {"train": True})
    assert "1 messages that are no answers are marked to be learned, and carry no loss" in caplog.text


CLOCK = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}


@pytest.mark.parametrize(
    "calling",
    [
        [{"role": "assistant", "content": None, "tool_calls": [CLOCK]}],
        [{"role": "assistant", "tool_calls": json.dumps([CLOCK])}],
        [{"role": "assistant", "function_call": {"name": "clock", "arguments": '{"zone": "UTC"}'}}],
        [{"from": "function_call", "value": '{"name": "clock", "arguments": {"zone": "UTC"}}'}],
        [{"role": "tool_call", "content": '{"name": "clock", "arguments": "{\\"zone\\": \\"UTC\\"}"}'}],
    ],
)
def test_calls_of_tools_have_one_form_however_they_are_written(calling: list[dict[str, Any]]) -> None:
    expected = [{"role": "assistant", "content": "", "tool_calls": [CLOCK]}, {"role": "tool", "content": "noon"}]
    for role in ("tool", "function", "observation", "tool_response"):
        chat = [user("When?"), *calling, {"role": role, "content": "noon"}, assistant("Noon.")]
        [made] = to_conversations([("row 1", {"messages": chat})])
        assert made[1:3] == expected


def test_calls_at_once_and_calls_that_cannot_be_read() -> None:
    call = {"role": "tool_call", "content": '{"name": "clock", "arguments": {"zone": "UTC"}}'}
    [made] = to_conversations([("row 1", {"messages": [user("When?"), call, call, assistant("Noon.")]})])
    assert [turn.get("tool_calls") for turn in made] == [None, [CLOCK, CLOCK], None]
    for wrong in ("now", ["clock"], {"arguments": {}}):
        with pytest.raises(DataError, match=r"row 1: message 2 in 'messages' (calls tools by|has a call without)"):
            to_conversations([("row 1", {"messages": [user("a"), {"role": "assistant", "tool_calls": wrong}]})])


def test_arguments_are_text_for_templates_that_join_them_with_text() -> None:
    words = tiny.tokenizer()
    words.chat_template = (
        "{%- for m in messages -%}{{- '[' + m['role'] + ']' -}}{%- for call in m['tool_calls'] or [] -%}"
        "{{- call['function']['name'] + ':' + call['function']['arguments'] -}}{%- endfor -%}"
        "{{- m['content'] + eos_token -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '[assistant]' -}}{%- endif -%}"
    )
    chat = [user("When?"), {"role": "assistant", "tool_calls": [CLOCK]}]
    [tokens] = tokenize(to_conversations([("row 1", {"messages": chat})]), words).rows
    assert learned(tokens, words) == 'clock:{"zone": "UTC"}<|im_end|>'


def test_what_a_row_says_beside_its_chat_is_kept() -> None:
    clock = {"name": "clock", "parameters": {}}
    wrapped = [{"type": "function", "function": clock}]
    row = {"messages": PAIR, "system": "Be brief.", "functions": [clock]}
    expected = [{"role": "system", "content": "Be brief.", "tools": wrapped}, *PAIR]
    assert to_conversations([("row 1", row)]) == [expected]
    assert to_conversations([("row 1", {**row, "functions": None, "tools": json.dumps(wrapped)})]) == [expected]
    assert to_conversations([("row 1", {"messages": expected, "system": "Never."})])[0][0]["content"] == "Be brief."
    pair = {"instruction": "2 + 2?", "output": "4", "system": float("nan"), "history": [["1 + 1?", "2"]]}
    asked = [user("1 + 1?"), assistant("2"), *PAIR]
    assert to_conversations([("row 1", pair)]) == [asked]
    assert to_conversations([("row 1", {**pair, "history": None})]) == [PAIR]
    named = Fields(prompt="system", response="output")
    assert to_conversations([("row 1", {"system": "2 + 2?", "output": "4"})], fields=named) == [PAIR]
    for wrong in ({"tools": "clock"}, {"tools": [1]}, {"history": ["x"]}):
        with pytest.raises(DataError, match=r"row 1: field '(tools|history)' holds"):
            to_conversations([("row 1", {**pair, **wrong})])


def test_nulls_that_parquet_puts_into_objects_are_left_out(tmp_path: Path) -> None:
    def call(**arguments: str) -> dict[str, Any]:
        return {
            "role": "assistant",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
        }

    rows = [{"messages": [user("a"), call(x="1")]}, {"messages": [user("b"), call(y="2")]}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    chats = load_conversations(tmp_path / "d.parquet")
    assert [chat[1]["tool_calls"][0]["function"]["arguments"] for chat in chats] == [{"x": "1"}, {"y": "2"}]


REWRITING = (
    "{%- for m in messages -%}{{- '[' + m['role'] + ']' -}}"
    "{%- if m['role'] == 'assistant' and loop.last -%}{{- '(thought)' -}}{%- endif -%}"
    "{%- if m['tool_calls'] -%}{{- 'CALL' -}}{%- endif -%}{{- m['content'] | trim + eos_token -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '[assistant]' -}}{%- endif -%}"
)


def test_earlier_answers_are_learned_as_they_stand(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = REWRITING

    def learned(*contents: str, **extras: Any) -> str:
        roles = ("user", "assistant") * len(contents)
        chat: Any = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
        chat[1] |= extras
        [row] = tokenize([chat], tokenizer, max_length=500).rows
        whole = tokenizer.apply_chat_template(chat, tokenize=False)
        assert tokenizer.decode(row["input_ids"]) == whole
        return tokenizer.decode([i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label >= 0])

    end = tokenizer.eos_token
    assert learned("a", "one ", "b", "two") == f"one{end}(thought)two{end}"
    assert learned("a", "a", "a", "a", "a", "a") == f"a{end}a{end}(thought)a{end}"
    assert learned("a", "one", "b", "two", weight=0) == f"(thought)two{end}"
    assert not caplog.records
    assert learned("a", "", "b", "two", tool_calls=[{}]) == f"CALL{end}(thought)two{end}"
    assert learned("a", "one", "b", "two", tool_calls=[{}]) == f"CALLone{end}(thought)two{end}"
    assert not caplog.records
    # What is written twice has no place of its own.
    tokenizer.chat_template = REWRITING.replace(
        "m['content'] | trim", "m['content'] * (2 if m['role'] == 'assistant' and not loop.last else 1)"
    )
    assert learned("a", "one", "b", "two") == f"(thought)two{end}"
    assert "1 earlier answers carry no loss" in caplog.text


def said(rows: list[dict[str, Any]]) -> list[list[tuple[str, str]]]:
    numbered = [(f"row {number}", row) for number, row in enumerate(rows, start=1)]
    return [[(turn["role"], turn["content"]) for turn in chat] for chat in to_conversations(numbered)]


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def test_prompts_and_responses_that_are_messages() -> None:
    """As TRL has them: the loss is on the completion, also where the prompt has earlier answers."""
    expected = [[("user", "a"), ("assistant", "b")]]
    assert said([{"prompt": [user("a")], "completion": [assistant("b")]}]) == expected
    assert said([{"prompt": [user("a")], "completion": "b"}]) == expected
    assert said([{"prompt": "a", "completion": [assistant("b")]}]) == expected
    row = {"prompt": [user("a"), assistant("before"), user("c")], "completion": [assistant("after")]}
    words = tiny.tokenizer()
    tokens = tokenize(to_conversations([("row 1", row)]), words).rows[0]
    assert words.decode([i for i, label in zip(*tokens.values(), strict=True) if label != IGNORED_LABEL]).startswith(
        "after"
    )
    assert said([row, {"prompt": [user("a")], "completion": []}]) == said([row])


def test_content_in_parts_of_text_is_one_text_and_other_parts_are_told() -> None:
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": " you"}]
    assert said([{"messages": [user(parts), assistant("b")]}]) == [[("user", "Hi you"), ("assistant", "b")]]
    parts.append({"type": "image_url", "image_url": {"url": "x"}})  # type: ignore[dict-item]
    with pytest.raises(DataError, match=r"row 1, message 1 in 'messages': 'content' has a part of type 'image_url'"):
        said([{"messages": [user(parts), assistant("b")]}])


def test_a_missing_chat_is_an_empty_row() -> None:
    chats = [[user("a"), assistant("b")], None, float("nan"), ""]
    assert len(said([{"messages": chat} for chat in chats])) == 1


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "DPOTrainer.*response_field chosen"),
        ({"chosen": [user("a"), assistant("b")], "rejected": []}, "DPOTrainer.*messages_field chosen"),
        ({"prompt": "a", "completion": "b", "label": False}, "KTOTrainer.*name prompt_field"),
        ({"prompt": "a", "completion": "b", "label": "True"}, "KTOTrainer.*name prompt_field"),
    ],
)
def test_judged_answers_are_not_learned_as_if_all_were_good(row: dict[str, Any], remedy: str) -> None:
    with pytest.raises(DataError, match=remedy):
        said([row])
    fields = Fields(prompt="prompt", response="chosen" if "chosen" in row else "completion")
    if "prompt" in row:
        assert to_conversations([("row 1", row)], fields=fields)[0][-1]["content"] == "b"


def test_passages_of_a_text_file_are_learned_whole(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("One\ngoes on.\n\nTwo.\n")
    assert [turn["content"] for (turn,) in load_conversations(path)] == ["One\ngoes on.", "Two."]
    path.write_text("\n\n")
    with pytest.raises(DataError, match="is empty"):
        load_conversations(path)
