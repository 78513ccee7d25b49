"""The papers' prompt formats, and exactly which tokens carry the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dynalora.common.names import IGNORED_LABEL
from dynalora.errors import ConfigError, DataError
from dynalora.evaluation.generation import chat_prompt
from dynalora.evaluation.prompts import TEMPLATES, use_template
from dynalora.evaluation.tokens import tokenize
from dynalora.lab.data.conversations import load_conversations

from . import tiny

HEAD = "Below is an instruction that describes a task"
REST = "Write a response that appropriately completes the request."
WRITTEN = {
    "none": ("Add 1.", "Add 1.\n\n2 3"),
    "alpaca": (
        f"{HEAD}. {REST}\n\n### Instruction:\nAdd 1.\n\n### Response:",
        f"{HEAD}, paired with an input that provides further context. {REST}\n\n### Instruction:\nAdd 1.\n\n"
        "### Input:\n2 3\n\n### Response:",
    ),
    "metamath": (
        f"{HEAD}. {REST}\n\n### Instruction:\nAdd 1.\n\n### Response: Let's think step by step.",
        f"{HEAD}. {REST}\n\n### Instruction:\nAdd 1.\n\n2 3\n\n### Response: Let's think step by step.",
    ),
    "magicoder": (
        "You are an exceptionally intelligent coding assistant that consistently delivers accurate and reliable "
        "responses to user instructions.\n\n@@ Instruction\nAdd 1.\n\n@@ Response\n",
        "You are an exceptionally intelligent coding assistant that consistently delivers accurate and reliable "
        "responses to user instructions.\n\n@@ Instruction\nAdd 1.\n\n2 3\n\n@@ Response\n",
    ),
    "llm-adapters": (
        f"""{HEAD}. {REST}  

                ### Instruction:
                Add 1.
                
                ### Response:
                """,  # noqa: W291, W293
        f"""{HEAD}, paired with an input that provides further context. {REST} 

                ### Instruction:
                Add 1.
                
                ### Input:
                2 3
                
                ### Response:
                """,  # noqa: W291, W293
    ),
}


def learned(tokenizer: Any, row: Any) -> tuple[str, str]:
    """What the model is given and what carries loss, as text."""
    given = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == IGNORED_LABEL]
    answer = [label for label in row["labels"] if label != IGNORED_LABEL]
    return tokenizer.decode(given), tokenizer.decode(answer)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_the_loss_falls_on_the_response_and_its_end_and_on_nothing_else(name: str, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(chat=False)
    use_template(tokenizer, name)
    file = tiny.write_jsonl(
        tmp_path / "data.jsonl",
        [
            {"instruction": "Add 1.", "input": "", "output": "It is 4."},
            {"instruction": "Add 1.", "input": "2 3", "output": "3 4"},
        ],
    )
    rows = tokenize(load_conversations(file), tokenizer, max_length=2000).rows
    for row, prompt, answer in zip(rows, WRITTEN[name], ("It is 4.", "3 4"), strict=True):
        assert learned(tokenizer, row) == (prompt, f"{answer}<|im_end|>")
        # All labels stand in one piece at the end and repeat the ids there.
        start = row["labels"].index(next(label for label in row["labels"] if label != IGNORED_LABEL))
        assert row["labels"][start:] == row["input_ids"][start:]
    # Generation is given the very ids that training saw before the response.
    first = rows[0]
    assert chat_prompt(tokenizer, "Add 1.") == first["input_ids"][: -len("It is 4.") - 1]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_the_prompt_as_text_is_the_same(name: str) -> None:
    assert TEMPLATES[name].prompt("Add 1.") == WRITTEN[name][0]
    assert TEMPLATES[name].prompt("Add 1.", "2 3") == WRITTEN[name][1]


def test_braces_and_quotes_in_a_question_stay_as_they_are() -> None:
    odd = 'Print "{{ x }}" and {instruction} or {input}, {% if %}'
    tokenizer = tiny.tokenizer(chat=False)
    use_template(tokenizer, "alpaca")
    assert odd in tokenizer.decode(chat_prompt(tokenizer, odd))
    assert odd in TEMPLATES["alpaca"].prompt(odd)
    assert TEMPLATES["alpaca"].prompt(odd, "{instruction}").count(odd) == 1


def test_the_models_own_chat_template_stays_by_default() -> None:
    tokenizer = tiny.tokenizer()
    use_template(tokenizer, "chat")
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE


def test_a_first_special_token_is_written_once() -> None:
    tokenizer = tiny.tokenizer(chat=False)
    tokenizer.bos_token = "<|im_start|>"
    use_template(tokenizer, "magicoder")
    assert tokenizer.decode(chat_prompt(tokenizer, "Hi")).count("<|im_start|>") == 1


def test_what_a_template_cannot_say() -> None:
    tokenizer = tiny.tokenizer(chat=False)
    with pytest.raises(ConfigError, match="no prompt template 'alpacca'; choose one of chat, none, alpaca"):
        use_template(tokenizer, "alpacca")
    use_template(tokenizer, "alpaca")
    talk: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes"},
    ]
    with pytest.raises(DataError, match="alpaca knows the roles user and assistant only"):
        tokenize([talk], tokenizer)
