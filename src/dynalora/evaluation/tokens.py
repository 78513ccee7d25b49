"""Write conversations in a model's own chat format, and mark which tokens are the response."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypedDict, cast

from dynalora.common.names import IGNORED_LABEL
from dynalora.errors import DataError, first_line
from dynalora.evaluation.seq2seq import question_room, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


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
    set them apart (Alpaca's). What else a chat's message has, the template gets as it is.

    Attributes:
        tool_calls, tool_call_id, name, reasoning_content: As in OpenAI's format.
        weight: 0 for an answer that carries no loss; 1 otherwise.
        tools: On the first message: the tools that the conversation offers.
    """

    instruction: str
    input: str
    tool_calls: list[dict[str, Any]]
    tool_call_id: str
    name: str
    reasoning_content: str
    weight: int
    tools: list[dict[str, Any]]


Conversation = list[Message]

PLAIN = "text"
"""The role of a conversation's only message if it is no conversation but plain text, which is learned whole."""


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

    def with_prompts(self) -> TokenizedSet:
        """The same conversations with a loss on every token, prompts included."""
        rows: list[Tokens] = [{**row, "labels": list(row["input_ids"])} for row in self.rows]
        return replace(self, rows=rows)

    def packed(self, length: int) -> TokenizedSet:
        """The same tokens in pieces of a length, one text behind the other, so that none loses its end."""
        ids = [token for row in self.rows for token in row["input_ids"]]
        labels = [label for row in self.rows for label in row["labels"]]
        # A piece of one token has nothing to predict.
        starts = range(0, max(len(ids) - 1, 1), length)
        pieces: list[Tokens] = [
            {"input_ids": ids[start : start + length], "labels": labels[start : start + length]} for start in starts
        ]
        return replace(self, rows=pieces if self.rows else [])

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
        raise DataError("The tokenizer has neither a chat template nor an end-of-text token; set its eos_token.")
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    logger.warning("The model has no chat template; a plain one is used and saved with the adapter's tokenizer.")
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

    The loss falls on every assistant's turn and its end-of-turn token, and on nothing else; turns of weight 0 carry
    none. The ids before a response are exactly those the model is given when it generates that response. Where a
    template writes earlier answers otherwise than the last one (without their reasoning, say), earlier answers are
    learned as they stand in the whole conversation; what cannot be found there carries no loss, with a warning that
    counts it. Of plain text (role [`PLAIN`][dynalora.evaluation.tokens.PLAIN]) all tokens are learned, as they stand.

    Without a chat template, as encoder-decoders have none, the last answer is learned, and all that was said before it
    is the question, its messages a blank line apart. Both are encoded for themselves with the tokenizer's own special
    tokens. A question that is longer than the tokenizer's `model_max_length` loses its end, with a warning that counts
    them; the answer stays whole.

    Args:
        conversations: As [`load_conversations`][dynalora.lab.data.conversations.load_conversations] returns them.
        tokenizer: With a chat template (see
            [`ensure_chat_template`][dynalora.evaluation.tokens.ensure_chat_template]), or an encoder-decoder's.
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
    done = shortened_ones = unlearned = 0
    for done, conversation in enumerate(conversations, start=1):
        if conversation and conversation[0]["role"] == PLAIN:
            tokens = _plain(conversation[0]["content"], tokenizer)
        elif tokenizer.chat_template:
            tokens, lost = _encode(conversation, tokenizer)
            unlearned += lost
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
    if unlearned:
        logger.warning(
            "%d earlier answers carry no loss, since the chat template writes them otherwise in the conversation than "
            "when the model gives them.",
            unlearned,
        )
    if result.truncated:
        logger.warning(
            "%d of %d conversations are longer than %d tokens (max_length or the model's window) and lose their end%s.",
            result.truncated, done, max_length,
            f"; {result.dropped} of them have no response left and are left out" if result.dropped else "",
        )  # fmt: skip
    return result


def _plain(text: str, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Plain text with the tokenizer's own special tokens and its end-of-text token, all of which carry loss."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return {"input_ids": ids, "labels": list(ids)}


def prompt_ids(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, *, plain: bool = False) -> list[int]:
    """What a model is given so that it writes the next answer of a conversation, or goes on with plain text.

    Args:
        conversation: Its messages, the last of which is not the assistant's.
        tokenizer: The model's. Without a chat template the messages stand a blank line apart.
        plain: Whether to leave out the chat template in any case.

    Raises:
        DataError: The chat template rejects the conversation.
    """
    if not plain and tokenizer.chat_template and all(message["role"] != PLAIN for message in conversation):
        return _ids(tokenizer, _render(tokenizer, conversation, True))
    text = "\n\n".join(message["content"] for message in conversation)
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    # A tokenizer may end every text with its end token, behind which nothing comes.
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _pair(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[Tokens, bool]:
    """Ids and labels of a question for an encoder and the answer for a decoder, and whether the question is whole."""
    *before, last = conversation
    asked = "\n\n".join(message["content"] for message in before)
    question = list(tokenizer(asked, verbose=False)["input_ids"])
    answer = list(tokenizer(text_target=last["content"])["input_ids"])
    fitted = shortened(question, question_room(tokenizer))
    tokens: Tokens = {"input_ids": fitted + answer, "labels": [IGNORED_LABEL] * len(fitted) + answer}
    return tokens, len(fitted) == len(question)


def _encode(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[Tokens, int]:
    """Ids and labels of one conversation, and how many answers carry no loss though they should."""
    parts, lost = _parts(conversation, tokenizer)
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
        return {"input_ids": ids, "labels": labels}, lost
    # A token that spans prompt and response never occurs in generation, where the prompt is encoded alone.
    pieces = [(_ids(tokenizer, text), learned) for text, learned in parts]
    return {
        "input_ids": [token for piece, _ in pieces for token in piece],
        "labels": [token if learned else IGNORED_LABEL for piece, learned in pieces for token in piece],
    }, lost


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # The template writes the special tokens itself.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def is_learned(message: Message) -> bool:
    """Whether a message is an answer that carries loss."""
    says = bool(message["content"].strip() or message.get("tool_calls"))
    return message["role"] == "assistant" and says and message.get("weight", 1) != 0


def _parts(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[list[tuple[str, bool]], int]:
    """The conversation as text in parts, each with whether the model has to learn it, and how many answers are lost."""
    whole = _render(tokenizer, conversation, False)
    last = len(conversation) - 1
    parts: list[tuple[str, bool]] = []
    position = lost = 0
    for index, message in enumerate(conversation):
        if not is_learned(message):
            continue
        before = _render(tokenizer, conversation[:index], True)
        after = whole if index == last else _render(tokenizer, conversation[: index + 1], False)
        if whole.startswith(before) and whole.startswith(after):
            span: tuple[int, int] | None = (len(before), _end_of_turn(after, len(before), tokenizer))
        elif index == last:
            # It is learned as the model would say it after exactly this prompt, and earlier answers are not.
            alone = message["content"] + (tokenizer.eos_token or "")
            return [(before, False), (alone, True)], lost + sum(map(is_learned, conversation[:-1]))
        else:
            span = _place(conversation, index, whole, tokenizer)
        if span is None or span[0] < position:
            lost += 1
            continue
        parts += [(whole[position : span[0]], False), (whole[span[0] : span[1]], True)]
        position = span[1]
    return parts, lost


def _place(
    conversation: Conversation, index: int, whole: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int] | None:
    """Where an answer stands in a conversation whose template writes it otherwise than at the end, or None.

    Another answer is put in its place: what is alike around the two is not the answer, and what is not is, its calls of
    tools included. Its end-of-turn token counts to it.
    """
    mark = "ANSWER" + "X" * len(whole)  # occurs nowhere in it
    marked: Message = {**conversation[index], "content": mark}
    marked.pop("tool_calls", None)  # they belong to the answer, and stand where the mark is
    other = _render(tokenizer, [*conversation[:index], marked, *conversation[index + 1 :]], False)
    head, found, tail = other.partition(mark)
    start, stop = len(head), len(whole) - len(tail)
    if not found or start >= stop or not (whole.startswith(head) and whole.endswith(tail)):
        return None
    ends = [token for token in tokenizer.all_special_tokens if token and tail.startswith(token)]
    return start, stop + max(map(len, ends), default=0)


def _end_of_turn(text: str, start: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where the turn that begins at `start` ends: after its end-of-turn token, without the line break behind it."""
    body = text[start:].rstrip()
    ends = [token for token in tokenizer.all_special_tokens if token and body.endswith(token)]
    return start + len(body) if ends else len(text)


def _render(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, add_generation_prompt: bool) -> str:
    if not conversation:
        return ""
    ours = ("weight", "tools")
    turns: list[Any] = [{key: value for key, value in turn.items() if key not in ours} for turn in conversation]

    def rendered(turns: list[Any]) -> str:
        tools = cast(Any, conversation[0].get("tools"))
        return str(
            tokenizer.apply_chat_template(
                turns, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    try:
        try:
            return rendered(turns)
        except TypeError:  # some templates join text and the arguments of a call, which have to be text then
            return rendered([_with_arguments_as_text(turn) for turn in turns])
    except Exception as error:  # templates raise jinja2's errors with the template author's words
        roles = " → ".join(message["role"] for message in conversation)
        raise DataError(
            f"The model's chat template rejects a conversation with the roles {roles} ({first_line(error)})."
        ) from error


def _with_arguments_as_text(turn: dict[str, Any]) -> dict[str, Any]:
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(arguments, ensure_ascii=False)}}
        if isinstance(arguments := call.get("function", {}).get("arguments"), dict)
        else call
        for call in turn.get("tool_calls", ())
    ]
    return {**turn, "tool_calls": calls} if calls else turn
