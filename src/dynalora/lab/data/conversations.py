"""Read data sets, bring every row to one form (a list of chat messages), and hold a part of the rows out."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from dynalora.errors import DataError
from dynalora.evaluation.files import is_text, kind_of, passages, read_rows, some_texts, texts_of
from dynalora.evaluation.tokens import PLAIN, Conversation, Message, is_learned
from dynalora.forgetting.texts import MeasuredText, given_text
from dynalora.lab.data.fields import Fields, find_fields
from dynalora.lab.settings import named_source

logger = logging.getLogger(__name__)


ROLES = ("system", "user", "assistant", "tool", "developer")


def load_conversations(
    source: str | Path,
    *,
    fields: Fields | None = None,
    split: str = "train",
    subset: str | None = None,
    limit: int | None = None,
) -> list[Conversation]:
    """Read a data set and bring every row to one form.

    Args:
        source: A file (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`; `.gz` may follow), a folder of such files or
            one written by `Dataset.save_to_disk`, or the id of a data set on the Hugging Face Hub; or plain text
            (`.txt`), whose passages, parted by empty lines, are learned whole.
        fields: Which fields hold prompt and response, or the messages; None: found by their usual names.
        split: Which split of a Hub data set; in a folder, the files whose name begins with it, or all files
            if none does. A single file has no splits.
        subset: Which configuration of a Hub data set, for those that have several.
        limit: Keep only the first rows; None: all.

    Returns:
        One conversation per row, ending with an assistant's message; a row of plain text is one message of the role
        [`PLAIN`][dynalora.evaluation.tokens.PLAIN]. Rows with an empty response are left out
        and their number is logged as a warning.

    Raises:
        DataError: The source does not exist, cannot be read (with the line number), is empty, lacks the fields,
            or has no row with a response.
    """
    path = Path(source).expanduser()
    if path.suffix == ".txt" and path.is_file():
        numbered = ((f"passage {number}", {"text": text}) for number, text in enumerate(passages(path), start=1))
        return to_conversations(numbered, fields=fields, source=f"'{source}'", limit=limit)
    rows, name = read_rows(source, split=split, subset=subset)
    return to_conversations(rows, fields=fields, source=name, limit=limit)


def load_texts(source: str | Path, *, limit: int | None = None) -> list[str]:
    """Plain texts to measure on.

    Args:
        source: A plain text file, whose passages, parted by empty lines, are the texts; or whatever
            [`load_conversations`][dynalora.lab.data.conversations.load_conversations] reads, of whose rows the first
            of the fields `dynalora.evaluation.files.TEXT_FIELDS` is taken, in the split `train`.
        limit: Keep only the first texts; None: all.

    Raises:
        DataError: The source does not exist, cannot be read, has no such field, or holds no text.
    """
    path = Path(source).expanduser()
    if is_text(path):
        return some_texts(passages(path), limit, f"'{source}'")
    rows, name = read_rows(source, split="train", subset=None)
    return some_texts(texts_of(rows, None, name), limit, f"'{source}'")


def to_conversations(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    *,
    fields: Fields | None = None,
    source: str = "the data",
    limit: int | None = None,
) -> list[Conversation]:
    """Bring rows to conversations, as [`load_conversations`][dynalora.lab.data.conversations.load_conversations] does.

    Each row comes with where it lies, such as `"line 3"`; errors call the data `source`.
    """
    by_names: dict[tuple[str, ...], Fields] = {}  # rows of JSON lines need not all have the same fields
    conversations: list[Conversation] = []
    empty = 0
    first_empty = ""
    for where, row in rows:
        names = tuple(row)
        if names not in by_names:
            expected = fields
            if by_names and fields is not None and fields.input and fields.input not in row:
                expected = replace(fields, input=None)  # an optional input may be absent from single rows
            by_names[names] = find_fields(names, expected, source=f"{source}, {where}" if by_names else source)
        row_fields = by_names[names]
        if not (fields and fields.named) and row_fields.response == "completion" and isinstance(row.get("label"), bool):
            raise DataError(
                f"{source} has completions that 'label' judges as good or bad, which TRL's KTOTrainer learns from; to "
                "learn all of them alike, name prompt_field and response_field."
            )
        conversation = _conversation(row, row_fields, f"{source}, {where}")
        if conversation is None:
            empty += 1
            first_empty = first_empty or where
            continue
        conversations.append(conversation)
        if len(conversations) == limit:
            break
    if not by_names:
        raise DataError(f"{source} is empty; give a data set with at least one row.")
    if not conversations:
        raise DataError(f"{source} has no row with a response: all {empty} are empty in '{row_fields.named[-1]}'.")
    if empty:
        logger.warning(
            "%s: %d of %d rows have an empty response and are left out (the first: %s).",
            source, empty, empty + len(conversations), first_empty,
        )  # fmt: skip
    return conversations


def _conversation(row: Mapping[str, Any], fields: Fields, where: str) -> Conversation | None:
    if fields.text:
        text = text_in(row[fields.text], fields.text, where)
        return [{"role": PLAIN, "content": text}] if text.strip() else None
    if fields.messages:
        return _chat(row[fields.messages], fields.messages, where, row.get("tools"))
    assert fields.prompt is not None  # Fields guarantees both
    assert fields.response is not None
    if _is_chat(row[fields.prompt]) or _is_chat(row[fields.response]):
        return _asked_and_answered(row, fields, where)
    prompt = text_in(row[fields.prompt], fields.prompt, where)
    response = text_in(row[fields.response], fields.response, where)
    extra = text_in(row.get(fields.input), fields.input, where) if fields.input else ""
    if not response.strip():
        return None
    return [question_of(prompt, extra), {"role": "assistant", "content": response}]


def _is_chat(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, Mapping) for v in value)


def _asked_and_answered(row: Mapping[str, Any], fields: Fields, where: str) -> Conversation | None:
    """The chat of a row whose prompt, response or both are messages, as TRL has them; the prompt carries no loss."""

    def turns(name: str | None, role: str) -> Conversation:
        assert name is not None
        if _is_chat(row[name]):
            return turns_in(row[name], name, where)
        text = text_in(row[name], name, where)
        return [cast(Message, {"role": role, "content": text})] if text.strip() else []

    asked = [
        cast(Message, {**turn, "weight": 0}) if turn["role"] == "assistant" else turn
        for turn in turns(fields.prompt, "user")
    ]
    return _ended([*asked, *turns(fields.response, "assistant")], row.get("tools"))


def question_of(prompt: str, extra: str) -> Message:
    """The message that asks a prompt, behind which a further text follows if it is not empty."""
    if not extra.strip():
        return {"role": "user", "content": prompt}
    return {"role": "user", "content": f"{prompt}\n\n{extra}", "instruction": prompt, "input": extra}


def text_in(value: Any, name: str, where: str) -> str:
    """The text of a cell; empty if it is missing.

    Raises:
        DataError: It holds something else, or half of a character.
    """
    if _is_missing(value):
        return ""
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise DataError(
                f"{where}: field '{name}' holds half of a character (a lone surrogate, as of an emoji that was cut in "
                "two), which no tokenizer can read; write the file anew, or take the character out."
            )
        return value
    if isinstance(value, (bool, int, float)):
        return str(value)
    raise DataError(f"{where}: field '{name}' holds {kind_of(value)}, not text; name a field with text.")


def _is_missing(value: Any) -> bool:
    """Whether a cell is empty: null, or NaN, as pandas writes it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


# What a chat's message may have besides role and content, and templates read.
_EXTRAS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking", "weight")

# ShareGPT's names beside the usual ones.
_ROLE_ALIASES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def _json(value: Any) -> Any:
    """A value that a cell of CSV or Parquet may hold as JSON text."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


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
    if not isinstance(value, Sequence) or not all(isinstance(turn, Mapping) for turn in value):
        raise DataError(f"{where}: field '{name}' holds {kind_of(value)}, not a list of messages.")
    chat: Conversation = []
    for number, turn in enumerate(value, start=1):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        extras = {key: turn[key] for key in _EXTRAS if not _is_missing(turn.get(key))}
        if role is None or (_is_missing(content) and not {"tool_calls", "reasoning_content"} & extras.keys()):
            has = ", ".join(f"'{key}'" for key in turn) or "none"
            raise DataError(f"{where}: message {number} in '{name}' needs 'role' and 'content'; its fields are {has}.")
        role = _ROLE_ALIASES.get(str(role), str(role))
        if role not in ROLES:
            raise DataError(
                f"{where}: message {number} in '{name}' has the role '{role}'; known roles are {', '.join(ROLES)}."
            )
        if extras.get("weight", 1) not in (0, 1):
            raise DataError(
                f"{where}: message {number} in '{name}' has the weight {extras['weight']!r}; give 0 (no loss) or 1."
            )
        place = f"{where}, message {number} in '{name}'"
        text = text_in(_of_parts(content, place), "content", place)
        chat.append(cast(Message, {"role": role, "content": text, **extras}))
    return chat


def _of_parts(content: Any, where: str) -> Any:
    """The text of content that is a list of parts of text, as OpenAI's format has it; other content as it is.

    Raises:
        DataError: A part is an image, sound or the like.
    """
    if not _is_chat(content):
        return content
    for part in content:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
            raise DataError(
                f"{where}: 'content' has a part of type {kind!r}, and only text is learned here; leave such rows out, "
                "or train with the adapter under a trainer of your own (docs/integrations.md)."
            )
    return "".join(text_in(part.get("text"), "text", where) for part in content)


def with_tools(chat: Conversation, tools: Any) -> Conversation:
    """A chat whose first message carries the tools that its row offers; they may be JSON text, or missing."""
    if chat and not _is_missing(tools := _json(tools)):
        chat[0]["tools"] = tools
    return chat


def _chat(value: Any, name: str, where: str, tools: Any = None) -> Conversation | None:
    return None if _is_missing(value) else _ended(turns_in(value, name, where), tools)


def _ended(chat: Conversation, tools: Any) -> Conversation | None:
    """A chat from the first question to the last answer that is learned; None if there is none."""
    # An answer to nothing cannot be learned as a response, and turns after the last answer teach nothing.
    while chat and chat[0]["role"] == "assistant":
        chat.pop(0)
    while chat and not is_learned(chat[-1]):
        chat.pop()
    return with_tools(chat, tools) or None


MONITORED_TEXTS = 32
MONITORED_LENGTH = 128
"""The first texts of a source, and the first tokens of each: enough for a curve, and cheap at every measurement."""


def load_named_text(text: str, setting: str) -> tuple[str, list[str]]:
    """The name and the first texts of `NAME=SOURCE`; `setting` is where it was given, for errors.

    Raises:
        ConfigError: It is not of that form.
        DataError: The source.
    """
    name, source = named_source(text, setting)
    return name, load_texts(source, limit=MONITORED_TEXTS)


def measured_text(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> MeasuredText:
    """The beginning of each text as tokens, to measure on."""
    return given_text(texts, tokenizer, max_length=MONITORED_LENGTH)


def split(
    conversations: Sequence[Conversation], fraction: float, *, seed: int = 42
) -> tuple[list[Conversation], list[Conversation]]:
    """Hold a part out: the training part and the held-out part, each in a shuffled order that `seed` fixes.

    Equal conversations always land on the same side, so nothing that is measured was trained on. The fraction is from 0
    (none) up to, but without, 1; above 0 at least one conversation is held out.

    Raises:
        DataError: `fraction` is out of range, or there are too few different conversations to split.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"eval_fraction is {fraction}; give a fraction from 0 up to, but without, 1.")
    if fraction == 0:
        return list(conversations), []
    groups: dict[str, list[Conversation]] = {}
    for conversation in conversations:
        groups.setdefault(json.dumps(conversation, sort_keys=True), []).append(conversation)
    if len(groups) < 2:
        raise DataError(
            f"The data has {len(groups)} distinct row, too few to hold a part out; give more rows, or eval_fraction 0."
        )
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    held = max(1, min(len(order) - 1, round(fraction * len(order))))
    return [item for group in order[held:] for item in group], [item for group in order[:held] for item in group]


def without_repeats(held_out: Sequence[Conversation], training: Sequence[Conversation]) -> list[Conversation]:
    """The held-out conversations that do not also occur in training; warns with the number of those that do.

    Raises:
        DataError: All of them occur in training.
    """
    trained = {json.dumps(conversation, sort_keys=True) for conversation in training}
    fresh = [item for item in held_out if json.dumps(item, sort_keys=True) not in trained]
    if held_out and not fresh:
        raise DataError("Every held-out row is also a training row; give other evaluation data.")
    if len(fresh) < len(held_out):
        logger.warning("%d held-out rows are also training rows and are left out.", len(held_out) - len(fresh))
    return fresh
