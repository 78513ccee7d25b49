"""Read data sets, bring every row to one form (a list of chat messages), and hold a part of the rows out."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from dynalora.errors import DataError
from dynalora.evaluation.files import is_text, passages, read_rows, some_texts, texts_of
from dynalora.evaluation.tokens import PLAIN, Conversation, Message, is_learned
from dynalora.forgetting.texts import MeasuredText, given_text
from dynalora.lab.data.fields import Fields, find_fields
from dynalora.lab.data.messages import is_chat, is_missing, text_in, turns_in, with_row
from dynalora.lab.settings import named_source

logger = logging.getLogger(__name__)


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
    empty = unheard = 0
    first_empty = ""
    for where, row in rows:
        names = tuple(row)
        if names not in by_names:
            expected = fields
            if by_names and fields is not None and fields.input and fields.input not in row:
                expected = replace(fields, input=None)  # an optional input may be absent from single rows
            by_names[names] = find_fields(names, expected, source=f"{source}, {where}" if by_names else source)
        row_fields = by_names[names]
        judged = str(row.get("label")).lower() in ("true", "false")
        if judged and row_fields.response == "completion" and not (fields and fields.named):
            raise DataError(
                f"{source} has completions that 'label' judges as good or bad, which TRL's KTOTrainer learns from; to "
                "learn all of them alike, name prompt_field and response_field."
            )
        conversation = _conversation(row, row_fields, f"{source}, {where}")
        if conversation is None:
            empty += 1
            first_empty = first_empty or where
            continue
        unheard += sum(turn["role"] not in ("assistant", PLAIN) and turn.get("weight") == 1 for turn in conversation)
        conversations.append(conversation)
        if len(conversations) == limit:
            break
    if not by_names:
        raise DataError(f"{source} is empty; give a data set with at least one row.")
    if not conversations:
        field = row_fields.named[-1]
        ends = f"none of {empty} ends with an answer in '{field}'"
        lacking = ends if row_fields.messages else f"all {empty} are empty in '{field}'"
        raise DataError(f"{source} has no row with a response ({lacking}); give rows that have one.")
    if empty:
        logger.warning(
            "%s: %d of %d rows have an empty response and are left out (the first: %s).",
            source, empty, empty + len(conversations), first_empty,
        )  # fmt: skip
    if unheard:
        logger.warning(
            "%s: %d messages that are no answers are marked to be learned, and carry no loss: only answers do.",
            source, unheard,
        )  # fmt: skip
    return conversations


def _conversation(row: Mapping[str, Any], fields: Fields, where: str) -> Conversation | None:
    if fields.text:
        text = text_in(row[fields.text], fields.text, where)
        return [{"role": PLAIN, "content": text}] if text.strip() else None
    if fields.messages:
        value = row[fields.messages]
        if is_missing(value) or value == "":  # as CSV has a missing cell
            return None
        return _ended(turns_in(value, fields.messages, where), row, fields, where)
    assert fields.prompt is not None  # Fields guarantees both
    assert fields.response is not None
    if is_chat(row[fields.prompt]) or is_chat(row[fields.response]):
        return _asked_and_answered(row, fields, where)
    prompt = text_in(row[fields.prompt], fields.prompt, where)
    response = text_in(row[fields.response], fields.response, where)
    extra = text_in(row.get(fields.input), fields.input, where) if fields.input else ""
    if not response.strip():
        return None
    chat = [*_history(row, fields, where), question_of(prompt, extra), Message(role="assistant", content=response)]
    return with_row(chat, row, where, fields.named)


def _history(row: Mapping[str, Any], fields: Fields, where: str) -> Conversation:
    """Earlier questions and their answers, which Alpaca's format keeps as pairs; empty if there are none."""
    pairs = None if "history" in fields.named else row.get("history")
    if not isinstance(pairs, Sequence) or isinstance(pairs, str):
        return []
    chat: Conversation = []
    for pair in pairs:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise DataError(f"{where}: field 'history' holds something else than pairs of a question and its answer.")
        question, answer = (text_in(text, "history", where) for text in pair)
        chat += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return chat


def _asked_and_answered(row: Mapping[str, Any], fields: Fields, where: str) -> Conversation | None:
    """The chat of a row whose prompt, response or both are messages, as TRL has them; the prompt carries no loss."""

    def turns(name: str | None, role: str) -> Conversation:
        assert name is not None
        if is_chat(row[name]):
            return turns_in(row[name], name, where)
        text = text_in(row[name], name, where)
        return [cast(Message, {"role": role, "content": text})] if text.strip() else []

    asked = [
        cast(Message, {**turn, "weight": 0}) if turn["role"] == "assistant" else turn
        for turn in turns(fields.prompt, "user")
    ]
    return _ended([*asked, *turns(fields.response, "assistant")], row, fields, where)


def question_of(prompt: str, extra: str) -> Message:
    """The message that asks a prompt, behind which a further text follows if it is not empty."""
    if not extra.strip():
        return {"role": "user", "content": prompt}
    return {"role": "user", "content": f"{prompt}\n\n{extra}", "instruction": prompt, "input": extra}


def _ended(chat: Conversation, row: Mapping[str, Any], fields: Fields, where: str) -> Conversation | None:
    """A chat from the first question to the last answer that is learned; None if there is none."""
    # An answer to nothing cannot be learned as a response, and turns after the last answer teach nothing.
    while chat and chat[0]["role"] == "assistant":
        chat.pop(0)
    while chat and not is_learned(chat[-1]):
        chat.pop()
    return with_row(chat, row, where, fields.named) or None


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
