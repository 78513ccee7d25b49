"""Prompts to be answered: rows as those to train on, whose responses may be missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynalora.errors import DataError
from dynalora.evaluation.files import TEXT_FIELDS, is_text, passages, read_rows
from dynalora.evaluation.tokens import PLAIN, Conversation
from dynalora.lab.data.conversations import question_of
from dynalora.lab.data.fields import USUAL_FIELDS
from dynalora.lab.data.messages import text_in, turns_in, with_row


@dataclass(frozen=True)
class PromptFields:
    """Which fields of a row hold what. None: found by their usual names.

    Attributes:
        prompt: The field with the prompt.
        response: The field with a response, which the answer can be compared with.
        input: An optional field whose text follows the prompt after an empty line.
        messages: The field with a chat; excludes all others.
        text: The field with plain text to go on with; excludes all others.
    """

    prompt: str | None = None
    response: str | None = None
    input: str | None = None
    messages: str | None = None
    text: str | None = None

    @property
    def named(self) -> list[str]:
        """The names that were given."""
        return [name for name in (self.messages, self.text, self.prompt, self.input, self.response) if name]


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        conversation: The messages up to the answer; plain text is one message of the role
            [`PLAIN`][dynalora.evaluation.tokens.PLAIN].
        response: The answer that the row has; None if it has none.
    """

    conversation: Conversation
    response: str | None = None


def load_prompts(
    source: str | Path,
    *,
    fields: PromptFields | None = None,
    split: str = "train",
    subset: str | None = None,
    limit: int | None = None,
) -> list[Prompt]:
    """Read prompts.

    Args:
        source: As of [`load_conversations`][dynalora.lab.data.conversations.load_conversations], or a text file, whose
            passages, parted by empty lines, are gone on with.
        fields: Which fields hold what; None: found by their usual names.
        split: As of `load_conversations`.
        subset: Likewise.
        limit: Keep only the first rows; None: all.

    Raises:
        DataError: The source does not exist, cannot be read, has no prompts, or a row has none.
    """
    path = Path(source).expanduser()
    if is_text(path):
        prompts = [Prompt([{"role": PLAIN, "content": text}]) for text in passages(path)][:limit]
    else:
        prompts = []
        rows, name = read_rows(source, split=split, subset=subset)
        for where, row in rows:
            prompts.append(_prompt(row, fields or PromptFields(), f"{name}, {where}"))
            if len(prompts) == limit:
                break
    if not prompts:
        raise DataError(f"{source} is empty; give at least one prompt.")
    return prompts


def _prompt(row: Mapping[str, Any], fields: PromptFields, where: str) -> Prompt:
    fields = _found(row, fields, where)
    if fields.messages:
        turns = with_row(turns_in(row[fields.messages], fields.messages, where), row, where, fields.named)
        answered = bool(turns) and turns[-1]["role"] == "assistant"
        response = turns.pop()["content"] if answered else None
        if not turns:
            raise DataError(f"{where}: field '{fields.messages}' asks nothing; give a message before the answer.")
        return Prompt(turns, response)
    asked = fields.text or fields.prompt
    assert asked is not None  # `_found` sees to it
    text = text_in(row[asked], asked, where)
    if not text.strip():
        raise DataError(f"{where}: field '{asked}' is empty; give every row a prompt.")
    if fields.text:
        return Prompt([{"role": PLAIN, "content": text}])
    extra = text_in(row.get(fields.input), fields.input, where) if fields.input else ""
    response = text_in(row.get(fields.response), fields.response, where) if fields.response else ""
    asked_for = with_row([question_of(text, extra)], row, where, fields.named)
    return Prompt(asked_for, response if response.strip() else None)


def _found(row: Mapping[str, Any], fields: PromptFields, where: str) -> PromptFields:
    """The fields of a row that hold what a prompt needs."""
    if fields.named:
        missing = [name for name in (fields.messages, fields.text, fields.prompt) if name and name not in row]
        if missing or not (fields.messages or fields.text or fields.prompt):
            wanted = f"'{missing[0]}'" if missing else "for the prompt among those named"
            raise DataError(f"{where} has no field {wanted}; its fields are {_listed(list(row))}.")
        return fields
    # Whole pairs first, so that `question` beside `answer` is not taken for the `input` beside `output`.
    for usual in USUAL_FIELDS:
        if all(name in row for name in usual.named):
            return PromptFields(usual.prompt, usual.response, usual.input, usual.messages)
    for usual in USUAL_FIELDS:
        if usual.prompt in row:
            return PromptFields(usual.prompt, None, usual.input if usual.input in row else None)
    for name in TEXT_FIELDS:
        if name in row:
            return PromptFields(text=name)
    raise DataError(
        f"{where} has no field that is usual for prompts (messages, prompt, instruction, question, query, problem, "
        f"input, text); its fields are {_listed(list(row))}. Name yours with prompt_field, messages_field or "
        "text_field."
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"
