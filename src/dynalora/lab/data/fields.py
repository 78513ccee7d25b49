"""Which fields of a data set's rows hold the prompt, the response and the messages."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from dynalora.errors import DataError
from dynalora.evaluation.files import TEXT_FIELDS


@dataclass(frozen=True)
class Fields:
    """Which fields of a row hold what. All None: found by their usual names.

    Attributes:
        prompt: The field with the question or instruction.
        response: The field with the answer to learn.
        input: An optional field whose text follows the prompt after an empty line (as in Alpaca's `input`).
        messages: The field with a chat, a list of `{"role": …, "content": …}`; excludes all others.
        text: The field with plain text, which is learned whole; excludes all others.
    """

    prompt: str | None = None
    response: str | None = None
    input: str | None = None
    messages: str | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        if self.messages and (self.prompt or self.response or self.input):
            raise DataError(
                f"Give either a messages field ('{self.messages}') or prompt and response fields, not both."
            )
        if self.text and (self.prompt or self.response or self.input or self.messages):
            raise DataError(
                f"Give either a text field ('{self.text}'), which is learned whole, or fields of prompts and responses "
                "or messages, not both."
            )
        if bool(self.prompt) != bool(self.response):
            present, missing = ("prompt", "response") if self.prompt else ("response", "prompt")
            raise DataError(
                f"The {present} field is given ('{getattr(self, present)}') but not the {missing} field; name both."
            )
        if self.input and not self.prompt:
            raise DataError(f"The input field ('{self.input}') needs the prompt and response fields; name all three.")
        roles = {"prompt": self.prompt, "input": self.input, "response": self.response}
        for (name, column), (other, same) in itertools.combinations(roles.items(), 2):
            if column and column == same:
                raise DataError(
                    f"Field '{column}' is given as {name} and as {other}; name a field of its own for each."
                )

    @property
    def named(self) -> list[str]:
        """The field names that a row must have."""
        return [name for name in (self.text, self.messages, self.prompt, self.input, self.response) if name]


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


def find_fields(available: Iterable[str], fields: Fields | None = None, *, source: str = "the data") -> Fields:
    """The fields to read, checked against those that exist.

    Args:
        available: The names of the fields that the data has.
        fields: The fields the user named; None or empty: the first entry of
            [`USUAL_FIELDS`][dynalora.lab.data.fields.USUAL_FIELDS] whose fields are all available, else the only field
            if it is one of plain text.
        source: How to call the data in an error.

    Raises:
        DataError: A named field is missing, or none of the usual ones is there; says which fields there are.
    """
    has = list(available)
    listed = ", ".join(f"'{name}'" for name in has) if has else "none"
    if fields is not None and fields.named:
        missing = [name for name in fields.named if name not in has]
        if missing:
            lacking = " and ".join(f"'{name}'" for name in missing)
            raise DataError(
                f"{source} has no field {lacking}; its fields are {listed}. "
                "Name the right ones with prompt_field and response_field (or messages_field)."
            )
        return fields
    for usual in USUAL_FIELDS:
        if all(name in has for name in usual.named):
            return usual
    if len(has) == 1 and has[0] in TEXT_FIELDS:
        return Fields(text=has[0])
    if {"chosen", "rejected"} <= set(has):
        how = "prompt_field prompt and response_field chosen" if "prompt" in has else "messages_field chosen"
        raise DataError(
            f"{source} has preference pairs ('chosen' and 'rejected'), which TRL's DPOTrainer learns from; to learn "
            f"the chosen answers as they are, name them with {how}."
        )
    pairs = ", ".join(f"{usual.prompt}/{usual.response}" for usual in USUAL_FIELDS if usual.prompt and not usual.input)
    raise DataError(
        f"{source} has no fields that are usual for prompts and responses (messages, {pairs}); its fields are "
        f"{listed}. Name yours with prompt_field and response_field (or messages_field, or text_field for plain text)."
    )
