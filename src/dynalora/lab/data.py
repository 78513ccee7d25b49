"""A user's data set, from wherever it lies to padded batches with the loss on the response tokens only.

Three steps, each usable alone:

1. [`load_conversations`][dynalora.lab.data.load_conversations] reads a Hub data set, a file or a folder and
   brings every row to one form, a list of chat messages;
2. [`split`][dynalora.lab.data.split] holds a part of it out, with a fixed seed and no row on both sides;
3. [`tokenize`][dynalora.lab.data.tokenize] writes each conversation in the model's own chat format and marks
   which tokens are the response.

Whatever is wrong with the data is found in step 1, before a model is loaded.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from dynalora.common.names import IGNORED_LABEL
from dynalora.errors import DataError
from dynalora.evaluation.files import (
    first_line,
    is_text,
    kind_of,
    passages,
    read_rows,
    some_texts,
    texts_of,
)
from dynalora.evaluation.seq2seq import question_room, shortened

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

"""The label of tokens that carry no loss, as torch's cross entropy and transformers have it."""

ROLES = ("system", "user", "assistant", "tool", "developer")

# Used for models that come without a chat template (base models), and saved with the adapter's tokenizer, so that
# generation later sees the very format of training.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and bos_token %}{{ bos_token }}{% endif %}"
    "{{ '### ' + message['role'].capitalize() + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)


class _Message(TypedDict):
    role: str
    content: str


class Message(_Message, total=False):
    """One turn of a conversation: `role` and `content`.

    Where the content was put together from an instruction and an input, both are there, too, for prompt templates that
    set them apart (Alpaca's).
    """

    instruction: str
    input: str


Conversation = list[Message]


@dataclass(frozen=True)
class Fields:
    """Which fields of a row hold what. All None: found by their usual names.

    Attributes:
        prompt: The field with the question or instruction.
        response: The field with the answer to learn.
        input: An optional field whose text follows the prompt after an empty line (as in Alpaca's `input`).
        messages: The field with a chat, a list of `{"role": …, "content": …}`; excludes the other three.
    """

    prompt: str | None = None
    response: str | None = None
    input: str | None = None
    messages: str | None = None

    def __post_init__(self) -> None:
        if self.messages and (self.prompt or self.response or self.input):
            raise DataError(
                f"Give either a messages field ('{self.messages}') or prompt and response fields, not both."
            )
        if bool(self.prompt) != bool(self.response):
            given, missing = ("prompt", "response") if self.prompt else ("response", "prompt")
            raise DataError(
                f"The {given} field is given ('{getattr(self, given)}') but not the {missing} field; name both."
            )
        if self.input and not self.prompt:
            raise DataError(
                f"The input field ('{self.input}') needs the prompt and response fields; name all three."
            )

    @property
    def named(self) -> list[str]:
        """The field names that a row must have."""
        return [name for name in (self.messages, self.prompt, self.input, self.response) if name]


USUAL_FIELDS = (
    Fields(messages="messages"),
    Fields(messages="conversations"),
    Fields(prompt="prompt", response="response"),
    Fields(prompt="prompt", response="completion"),
    Fields(prompt="instruction", response="output", input="input"),
    Fields(prompt="instruction", response="output"),
    Fields(prompt="instruction", response="response", input="input"),
    Fields(prompt="instruction", response="response", input="context"),
    Fields(prompt="instruction", response="response"),
    Fields(prompt="question", response="answer"),
    Fields(prompt="query", response="response"),
    Fields(prompt="query", response="answer"),
    Fields(prompt="problem", response="solution"),
    Fields(prompt="problem", response="answer"),
    Fields(prompt="input", response="output"),
)
"""Fields that are found without being named, the first that fits."""


def find_fields(
    available: Iterable[str], wanted: Fields | None = None, *, source: str = "the data"
) -> Fields:
    """The fields to read, checked against those that exist.

    Args:
        available: The names of the fields that the data has.
        wanted: The fields the user named; None or empty: the first of
            [`USUAL_FIELDS`][dynalora.lab.data.USUAL_FIELDS] that is there.
        source: How to call the data in an error.

    Raises:
        DataError: A named field is missing, or none of the usual ones is there; says which fields there are.
    """
    has = list(available)
    listed = ", ".join(f"'{name}'" for name in has) if has else "none"
    if wanted is not None and wanted.named:
        missing = [name for name in wanted.named if name not in has]
        if missing:
            lacking = " and ".join(f"'{name}'" for name in missing)
            raise DataError(
                f"{source} has no field {lacking}; its fields are {listed}. "
                "Name the right ones with prompt_field and response_field (or messages_field)."
            )
        return wanted
    for usual in USUAL_FIELDS:
        if all(name in has for name in usual.named):
            return usual
    pairs = ", ".join(
        f"{usual.prompt}/{usual.response}" for usual in USUAL_FIELDS if usual.prompt and not usual.input
    )
    raise DataError(
        f"{source} has no fields that are usual for prompts and responses (messages, {pairs}); its fields are "
        f"{listed}. Name yours with prompt_field and response_field (or messages_field)."
    )


# --- reading ----------------------------------------------------------------------------------------------


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
            one written by `Dataset.save_to_disk`, or the id of a data set on the Hugging Face Hub.
        fields: Which fields hold prompt and response, or the messages; None: found by their usual names.
        split: Which split of a Hub data set; in a folder, the files whose name begins with it, or all files
            if none does. A single file has no splits.
        subset: Which configuration of a Hub data set, for those that have several.
        limit: Keep only the first rows; None: all.

    Returns:
        One conversation per row, ending with an assistant's message. Rows with an empty response are left out
        and their number is logged as a warning.

    Raises:
        DataError: The source does not exist, cannot be read (with the line number), is empty, lacks the fields,
            or has no row with a response.
    """
    rows, name = read_rows(source, split=split, subset=subset)
    return to_conversations(rows, fields=fields, source=name, limit=limit)


def load_texts(
    source: str | Path,
    *,
    split: str = "train",
    subset: str | None = None,
    limit: int | None = None,
    text_field: str | None = None,
) -> list[str]:
    """Plain texts to measure on.

    Args:
        source: A plain text file, whose passages, parted by empty lines, are the texts; or whatever
            [`load_conversations`][dynalora.lab.data.load_conversations] reads.
        split: Which split of a Hub data set or folder.
        subset: Which configuration of a Hub data set.
        limit: Keep only the first texts; None: all.
        text_field: The field of a row that is the text; None: the first there is of
            `dynalora.evaluation.files.TEXT_FIELDS`.

    Raises:
        DataError: The source does not exist, cannot be read, has no such field, or holds no text.
    """
    path = Path(source).expanduser()
    if is_text(path):
        return some_texts(passages(path), limit, f"'{source}'")
    rows, name = read_rows(source, split=split, subset=subset)
    return some_texts(texts_of(rows, text_field, name), limit, f"'{source}'")


def to_conversations(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    *,
    fields: Fields | None = None,
    source: str = "the data",
    limit: int | None = None,
) -> list[Conversation]:
    """Bring rows to conversations.

    Args:
        rows: Pairs of where the row lies (such as `"line 3"`) and the row.
        fields: As in [`load_conversations`][dynalora.lab.data.load_conversations].
        source: How to call the data in errors.
        limit: Keep only the first rows; None: all.

    Raises:
        DataError: As `load_conversations`.
    """
    by_names: dict[tuple[str, ...], Fields] = {}  # rows of JSON lines need not all have the same fields
    conversations: list[Conversation] = []
    empty = 0
    first_empty = ""
    for where, row in rows:
        names = tuple(row)
        if names not in by_names:
            wanted = fields
            if by_names and fields is not None and fields.input and fields.input not in row:
                wanted = replace(fields, input=None)  # an optional input may be absent from single rows
            by_names[names] = find_fields(names, wanted, source=f"{source}, {where}" if by_names else source)
        found = by_names[names]
        conversation = _conversation(row, found, f"{source}, {where}")
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
        raise DataError(f"{source} has no row with a response: all {empty} are empty in '{found.named[-1]}'.")
    if empty:
        logger.warning(
            "%s: %d of %d rows have an empty response and are left out (the first: %s).",
            source, empty, empty + len(conversations), first_empty,
        )  # fmt: skip
    return conversations


def _conversation(row: Mapping[str, Any], fields: Fields, where: str) -> Conversation | None:
    if fields.messages:
        return _chat(row[fields.messages], fields.messages, where)
    assert fields.prompt is not None  # Fields guarantees both
    assert fields.response is not None
    prompt = _text(row[fields.prompt], fields.prompt, where)
    response = _text(row[fields.response], fields.response, where)
    extra = _text(row.get(fields.input), fields.input, where) if fields.input else ""
    if not response.strip():
        return None
    asked: Message = {"role": "user", "content": prompt}
    if extra.strip():
        asked = {"role": "user", "content": f"{prompt}\n\n{extra}", "instruction": prompt, "input": extra}
    return [asked, {"role": "assistant", "content": response}]


def _text(value: Any, name: str, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)):
        return str(value)
    raise DataError(f"{where}: field '{name}' holds a {kind_of(value)}, not text; name a field with text.")


# ShareGPT's names beside the usual ones.
_ROLE_ALIASES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def _chat(value: Any, name: str, where: str) -> Conversation | None:
    if isinstance(value, str):
        try:  # CSV has no lists: a chat in a CSV cell is JSON text
            value = json.loads(value)
        except ValueError:
            raise DataError(f"{where}: field '{name}' holds text, not a list of messages.") from None
    if not isinstance(value, Sequence) or not all(isinstance(turn, Mapping) for turn in value):
        raise DataError(f"{where}: field '{name}' holds a {kind_of(value)}, not a list of messages.")
    chat: Conversation = []
    for number, turn in enumerate(value, start=1):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role is None or content is None:
            has = ", ".join(f"'{key}'" for key in turn) or "none"
            raise DataError(
                f"{where}: message {number} in '{name}' needs 'role' and 'content'; its fields are {has}."
            )
        role = _ROLE_ALIASES.get(str(role), str(role))
        if role not in ROLES:
            raise DataError(
                f"{where}: message {number} in '{name}' has the role '{role}'; known roles are {', '.join(ROLES)}."
            )
        chat.append(
            {"role": role, "content": _text(content, "content", f"{where}, message {number} in '{name}'")}
        )
    # An answer to nothing cannot be learned as a response, and turns after the last answer teach nothing.
    while chat and chat[0]["role"] == "assistant":
        chat.pop(0)
    while chat and (chat[-1]["role"] != "assistant" or not chat[-1]["content"].strip()):
        chat.pop()
    return chat or None


# --- splitting --------------------------------------------------------------------------------------------


def split(
    conversations: Sequence[Conversation], fraction: float, *, seed: int = 42
) -> tuple[list[Conversation], list[Conversation]]:
    """Hold a part out for measuring.

    Equal conversations always land on the same side, so nothing that is measured was trained on.

    Args:
        conversations: All of them.
        fraction: The part to hold out, 0 (none) up to but without 1; at least one conversation if above 0.
        seed: Fixes the choice.

    Returns:
        The training part and the held-out part, each in a shuffled order that `seed` fixes.

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
    return [item for group in order[held:] for item in group], [
        item for group in order[:held] for item in group
    ]


def without_repeats(held_out: Sequence[Conversation], training: Sequence[Conversation]) -> list[Conversation]:
    """The held-out conversations that do not also occur in training; warns with the number of those that do.

    Raises:
        DataError: All of them occur in training.
    """
    seen = {json.dumps(conversation, sort_keys=True) for conversation in training}
    kept = [item for item in held_out if json.dumps(item, sort_keys=True) not in seen]
    if held_out and not kept:
        raise DataError("Every held-out row is also a training row; give other evaluation data.")
    if len(kept) < len(held_out):
        logger.warning("%d held-out rows are also training rows and are left out.", len(held_out) - len(kept))
    return kept


# --- tokens -----------------------------------------------------------------------------------------------


class Tokens(TypedDict):
    """A tokenised conversation: ids and labels, each of length T; a label is `IGNORED_LABEL` without a loss."""

    input_ids: list[int]
    labels: list[int]


@dataclass
class TokenizedSet:
    """Tokenised conversations, usable as a map-style torch data set.

    Attributes:
        rows: The tokenised conversations.
        truncated: How many were cut to the maximum length.
        dropped: How many had no response token left after the cut, and are not among `rows`.
    """

    rows: list[Tokens] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tokens:
        return self.rows[index]

    @property
    def response_tokens(self) -> int:
        """Number of tokens that carry loss."""
        return sum(label != IGNORED_LABEL for row in self.rows for label in row["labels"])


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give a tokenizer without a chat template a plain one, so that base models can be tuned too.

    Returns:
        True if the tokenizer had none and now has the plain one.

    Raises:
        DataError: The tokenizer has no end-of-text token, without which a model cannot learn to stop.
    """
    if tokenizer.chat_template:
        return False
    if not tokenizer.eos_token:
        raise DataError(
            "The tokenizer has neither a chat template nor an end-of-text token; set its eos_token."
        )
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    logger.warning(
        "The model has no chat template; a plain one is used and saved with the adapter's tokenizer."
    )
    return True


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Set a padding token where there is none. Padding carries no loss and no attention, so any token will do."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token


def tokenize(
    conversations: Iterable[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 512,
    on_progress: Callable[[int], None] | None = None,
) -> TokenizedSet:
    """Write conversations in the model's chat format and mark the response tokens.

    The loss falls on every assistant's turn and its end-of-turn token, and on nothing else. The ids before a
    response are exactly those the model is given when it generates that response.

    Without a chat template, as encoder-decoders have none, the last answer is learned, and all that was said before it
    is the question, its messages a blank line apart. Both are encoded for themselves with the tokenizer's own special
    tokens. A question that is longer than the tokenizer's `model_max_length` loses its end, with a warning that counts
    them; the answer stays whole.

    Args:
        conversations: As [`load_conversations`][dynalora.lab.data.load_conversations] returns them.
        tokenizer: With a chat template (see
            [`ensure_chat_template`][dynalora.lab.data.ensure_chat_template]), or an encoder-decoder's.
        max_length: Longest sequence in tokens; longer ones lose their end, with a warning that counts them.
        on_progress: Called with the number of conversations done so far.

    Returns:
        The tokenised set.

    Raises:
        DataError: The chat template rejects a conversation, or no response token is left in any of them.
    """
    if max_length < 2:
        raise DataError(f"max_length is {max_length}; give at least 2 tokens.")
    result = TokenizedSet()
    done = shortened_ones = 0
    for done, conversation in enumerate(conversations, start=1):
        if tokenizer.chat_template:
            tokens = _encode(conversation, tokenizer)
        else:
            tokens, whole = _pair(conversation, tokenizer)
            shortened_ones += not whole
        if len(tokens["input_ids"]) > max_length:
            result.truncated += 1
            tokens = {"input_ids": tokens["input_ids"][:max_length], "labels": tokens["labels"][:max_length]}
        if all(label == IGNORED_LABEL for label in tokens["labels"][1:]):
            result.dropped += 1
        else:
            result.rows.append(tokens)
        if on_progress is not None:
            on_progress(done)
    if done and not result.rows:
        raise DataError(
            f"No response token is left in any of the {done} conversations at max_length {max_length}; "
            "raise max_length."
        )
    if shortened_ones:
        logger.warning(
            "%d of %d questions are longer than the %d tokens that the model reads and lose their end.",
            shortened_ones, done, tokenizer.model_max_length,
        )  # fmt: skip
    if result.truncated:
        logger.warning(
            "%d of %d conversations are longer than %d tokens (max_length or the model's window) and lose their end%s.",
            result.truncated, done, max_length,
            f"; {result.dropped} of them have no response left and are left out" if result.dropped else "",
        )  # fmt: skip
    return result


def _pair(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[Tokens, bool]:
    """Ids and labels of a question for an encoder and the answer for a decoder, and whether the question is whole."""
    *before, last = conversation
    asked = "\n\n".join(message["content"] for message in before)
    question = list(tokenizer(asked, verbose=False)["input_ids"])
    answer = list(tokenizer(text_target=last["content"])["input_ids"])
    kept = shortened(question, question_room(tokenizer))
    tokens: Tokens = {"input_ids": kept + answer, "labels": [IGNORED_LABEL] * len(kept) + answer}
    return tokens, len(kept) == len(question)


def _encode(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Ids and labels of one conversation, cut into what the model is given and what it has to say."""
    parts = _parts(conversation, tokenizer)
    whole = "".join(text for text, _ in parts)
    ids = _ids(tokenizer, whole)
    labels: list[int] = []
    upto = ""
    for text, learned in parts:
        upto += text
        head = ids if len(upto) == len(whole) else _ids(tokenizer, upto)
        if ids[: len(head)] != head or len(head) < len(labels):
            break  # a token spans the boundary
        labels += ids[len(labels) : len(head)] if learned else [IGNORED_LABEL] * (len(head) - len(labels))
    else:
        return {"input_ids": ids, "labels": labels}
    # A token that spans prompt and response never occurs in generation, where the prompt is encoded alone.
    pieces = [(_ids(tokenizer, text), learned) for text, learned in parts]
    return {
        "input_ids": [token for piece, _ in pieces for token in piece],
        "labels": [token if learned else IGNORED_LABEL for piece, learned in pieces for token in piece],
    }


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # The template writes the special tokens itself.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _parts(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The conversation as text in alternating parts, each with whether the model has to learn it."""
    whole = _render(tokenizer, conversation, False)
    parts: list[tuple[str, bool]] = []
    position = 0
    for index, message in enumerate(conversation):
        if message["role"] != "assistant" or not message["content"]:
            continue
        before = _render(tokenizer, conversation[:index], True)
        after = _render(tokenizer, conversation[: index + 1], False)
        # Templates that rewrite earlier turns (dropping their reasoning, say) break this; see below.
        if len(before) < position or not whole.startswith(before) or not whole.startswith(after):
            parts = []
            break
        end = _end_of_turn(after, len(before), tokenizer)
        parts += [(whole[position : len(before)], False), (whole[len(before) : end], True)]
        position = end
    if parts:
        return parts
    # Then only the last answer is learned, as the model would say it after exactly this prompt.
    before = _render(tokenizer, conversation[:-1], True)
    if whole.startswith(before):
        return [(before, False), (whole[len(before) : _end_of_turn(whole, len(before), tokenizer)], True)]
    return [(before, False), (conversation[-1]["content"] + (tokenizer.eos_token or ""), True)]


def _end_of_turn(text: str, start: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where the turn that begins at `start` ends: after its end-of-turn token, without the line break behind it."""
    body = text[start:].rstrip()
    ends = [token for token in tokenizer.all_special_tokens if token and body.endswith(token)]
    return start + len(body) if ends else len(text)


def _render(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, add_generation_prompt: bool
) -> str:
    if not conversation:
        return ""
    turns: list[Any] = [dict(message) for message in conversation]
    try:
        text = tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # templates raise jinja2's errors with the template author's words
        roles = " → ".join(message["role"] for message in conversation)
        raise DataError(
            f"The model's chat template rejects a conversation with the roles {roles} ({first_line(error)})."
        ) from error
    return str(text)


@dataclass(frozen=True)
class Collator:
    """Pads tokenised conversations to the longest of a batch.

    Args:
        pad_token_id: What to pad the ids with; it gets no attention and no loss.
        pad_to_multiple_of: Round the padded length up to a multiple of this (8 suits tensor cores).
        last_logits: Pad on the left, so that all responses end together, and ask the model for the logits of the last
            positions alone. For a loss on the responses only, prompts then cost no output layer. The model must take
            `logits_to_keep`, `position_ids` and `shift_labels`. False: pad on the right.

    Returns (when called with a list of B rows):
        `input_ids`, `attention_mask` and `labels`, each (B, T), int64. With `last_logits` also `position_ids` (B, T),
        `logits_to_keep` (K,), the positions from the first one that predicts a label on, and `shift_labels` (B, K),
        what they predict.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1
    last_logits: bool = False

    def __call__(self, rows: Sequence[Tokens]) -> dict[str, torch.Tensor]:
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        ids = torch.full((len(rows), length), self.pad_token_id, dtype=torch.long)
        labels = torch.full((len(rows), length), IGNORED_LABEL, dtype=torch.long)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for index, row in enumerate(rows):
            size = len(row["input_ids"])
            place = slice(length - size, length) if self.last_logits else slice(size)
            ids[index, place] = torch.tensor(row["input_ids"])
            labels[index, place] = torch.tensor(row["labels"])
            mask[index, place] = 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if not self.last_logits:
            return batch
        labelled = (labels[:, 1:] != IGNORED_LABEL).any(dim=0).nonzero()
        first = int(labelled[0]) if len(labelled) else length - 1
        return {
            **batch,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            # Positions and not their number: the output layer then gets a contiguous input, and multiplies once for the
            # batch and not once for every row.
            "logits_to_keep": torch.arange(first, length),
            # The last position predicts what would come after the end.
            "shift_labels": torch.nn.functional.pad(labels[:, first + 1 :], (0, 1), value=IGNORED_LABEL),
        }
