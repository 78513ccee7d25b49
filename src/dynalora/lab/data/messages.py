"""Messages of chats as people's files have them, brought to the one form that chat templates read."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from dynalora.errors import DataError
from dynalora.evaluation.files import kind_of, refuse_halves
from dynalora.evaluation.tokens import Conversation, Message

ROLES = ("system", "user", "assistant", "tool", "developer")

# Names of roles in ShareGPT's format, in OpenAI's before tools, and in ms-swift's and LLaMA-Factory's.
_ROLE_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
_CALLING_ROLES = ("function_call", "tool_call")  # their content is the call, as JSON

# What a chat's message may have besides role and content, and templates read.
_EXTRAS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")
_INSTEAD_OF_CONTENT = {"tool_calls", "reasoning_content", "reasoning", "thinking"}

# Whether a message is to be learned: OpenAI's name, axolotl's two, ms-swift's, LLaMA-Factory's.
_MARKS = ("weight", "train", "training", "loss", "loss_weight")

SYSTEM_FIELDS = ("system", "system_prompt")
"""Fields of a row, beside its prompt or its chat, that hold the system's message."""


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: null, or NaN, as pandas writes it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, Mapping) for v in value)


def text_in(value: Any, name: str, where: str) -> str:
    """The text of a cell; empty if it is missing.

    Raises:
        DataError: It holds something else, or half of a character.
    """
    if is_missing(value):
        return ""
    if isinstance(value, str):
        refuse_halves(value, where, name)
        return value
    if isinstance(value, (bool, int, float)):
        return str(value)
    raise DataError(f"{where}: field '{name}' holds {kind_of(value)}, not text; name a field with text.")


def turns_in(value: Any, name: str, where: str) -> Conversation:
    """All messages of a cell that holds a chat; may be empty.

    Raises:
        DataError: It holds something else, or a message lacks something.
    """
    if isinstance(value, str):
        try:  # CSV has no lists: a chat in a CSV cell is JSON text
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(f"{where}: field '{name}' holds text, not a list of messages.") from None
        refuse_halves(value, where, name)
    if not is_chat(value):
        raise DataError(f"{where}: field '{name}' holds {kind_of(value)}, not a list of messages.")
    chat: Conversation = []
    joins = False
    for number, turn in enumerate(value, start=1):
        message = _message(turn, f"message {number} in '{name}'", where)
        calls = turn.get("role", turn.get("from")) in _CALLING_ROLES
        if calls and joins:  # calls made at once, each of which has a message of its own
            chat[-1]["tool_calls"] += message["tool_calls"]
        else:
            chat.append(message)
        joins = calls
    return chat


def _message(turn: Mapping[str, Any], place: str, where: str) -> Message:
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    extras = {key: turn[key] for key in _EXTRAS if not is_missing(turn.get(key))}
    calls = _json(extras.get("tool_calls"), where, "tool_calls")
    if not is_missing(turn.get("function_call")):
        calls = _json(turn["function_call"], where, "function_call")
    elif role in _CALLING_ROLES:
        role, calls, content = "assistant", _json(content, where, place), None
    if calls:
        extras["tool_calls"] = _calls(calls, f"{where}: {place}")
    if is_missing(role) or (is_missing(content) and not _INSTEAD_OF_CONTENT & extras.keys()):
        has = ", ".join(f"'{key}'" for key in turn) or "none"
        raise DataError(f"{where}: {place} needs 'role' and 'content'; its fields are {has}.")
    role = _ROLE_ALIASES.get(str(role), str(role))
    if role not in ROLES:
        raise DataError(f"{where}: {place} has the role '{role}'; known roles are {', '.join(ROLES)}.")
    weight = _weight(turn, f"{where}: {place}")
    text = text_in(_of_parts(content, f"{where}, {place}"), "content", f"{where}, {place}")
    if weight is not None:
        extras["weight"] = weight
    return cast(Message, {"role": role, "content": text, **extras})


def _weight(turn: Mapping[str, Any], place: str) -> int | None:
    """Whether a message is to be learned (1) or not (0), whatever the field is called; None if it does not say.

    Raises:
        DataError: It says something in between, or marks parts of its text.
    """
    marks = {key: turn[key] for key in _MARKS if not is_missing(turn.get(key))}
    for key, value in marks.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise DataError(f"{place} has the {key} {value!r}; give 0 or false (no loss), or 1 or true.")
    if turn.get("train_detail"):
        raise DataError(
            f"{place} has 'train_detail', which marks parts of it, and only whole messages can be left out here; mark "
            'those with "train": false.'
        )
    return int(all(marks.values())) if marks else None


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Calls of tools in the form that templates read: a list of functions, each with its arguments as an object.

    OpenAI's format writes arguments as JSON text, which most templates would write as a text within quotes.

    Raises:
        DataError: They are no calls.
    """
    listed = [calls] if isinstance(calls, Mapping) else calls
    if not is_chat(listed):
        raise DataError(f"{place} calls tools by {kind_of(calls)}; give a list of objects with name and arguments.")
    made: list[dict[str, Any]] = []
    for call in listed:
        call = dict(call) if "function" in call else {"type": "function", "function": call}
        function = call["function"]
        if not isinstance(function, Mapping) or is_missing(function.get("name")):
            raise DataError(f"{place} has a call without the name of a function; give each call its name.")
        arguments = _json(function.get("arguments"), place, "arguments")
        if isinstance(arguments, Mapping):
            call["function"] = {**function, "arguments": arguments}
        made.append(call)
    return made


def _json(value: Any, where: str, name: str) -> Any:
    """A value that a cell of CSV or Parquet may hold as JSON text."""
    if not isinstance(value, str):
        return value
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(value)
    refuse_halves(value, where, name)
    return value


def _of_parts(content: Any, where: str) -> Any:
    """The text of content that is a list of parts of text, as OpenAI's format has it; other content as it is.

    Raises:
        DataError: A part is an image, sound or the like.
    """
    if not is_chat(content):
        return content
    for part in content:
        if part.get("type", "text") != "text":
            raise DataError(
                f"{where}: 'content' has a part of type {part.get('type')!r}, and only text is learned here; leave "
                "such rows out, or train with the adapter under a trainer of your own (docs/integrations.md)."
            )
    return "".join(text_in(part.get("text"), "text", where) for part in content)


def with_row(chat: Conversation, row: Mapping[str, Any], where: str, named: Sequence[str] = ()) -> Conversation:
    """A chat with what its row says beside it: the system's message, and on its first message the tools it offers.

    Args:
        chat: The chat.
        row: Its row. Tools may be JSON text, and the functions of OpenAI's older format; all of it may be missing.
        where: Where the row lies, for errors.
        named: Fields that hold something else, since the user says so.
    """
    if not chat:
        return chat
    said = [text_in(row[name], name, where) for name in SYSTEM_FIELDS if name in row and name not in named]
    if chat[0]["role"] not in ("system", "developer") and (system := next(filter(str.strip, said), "")):
        chat = [{"role": "system", "content": system}, *chat]
    tools = next((row[name] for name in ("tools", "functions") if not is_missing(row.get(name))), None)
    if tools := _json(tools, where, "tools"):
        listed = [tools] if isinstance(tools, Mapping) else tools
        if not is_chat(listed):
            raise DataError(
                f"{where}: field 'tools' holds {kind_of(tools)}; give a list of objects, one for each tool."
            )
        described: list[dict[str, Any]] = [dict(tool) for tool in listed]
        chat[0]["tools"] = [
            {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool
            for tool in described
        ]
    return chat
