"""Reading the documents of a domain: conversations or plain text."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dynalora.errors import DataError
from dynalora.evaluation import files
from dynalora.evaluation.tokens import Conversation, tokenize
from dynalora.jobs.gates.settings import DomainSpec
from dynalora.lab.data.collator import batches_of
from dynalora.lab.data.conversations import load_texts, to_conversations
from dynalora.lab.data.fields import Fields, find_fields


@dataclass(frozen=True)
class Domain:
    """A domain's documents: conversations, of which the responses count, or plain texts, of which all tokens count.

    Attributes:
        conversations: Empty for plain text.
        texts: Empty for conversations.
    """

    conversations: tuple[Conversation, ...] = ()
    texts: tuple[str, ...] = ()

    @property
    def counted(self) -> str:
        """Which tokens count, in words."""
        return "response tokens" if self.conversations else "all tokens"

    def batches(
        self, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 8, max_length: int = 512
    ) -> Sequence[Any]:
        """What [`record_gates`][dynalora.record_gates] takes: padded batches of conversations, or the texts.

        Raises:
            DataError: No response token is left at `max_length`.
        """
        if not self.conversations:
            return self.texts
        rows = tokenize(self.conversations, tokenizer, max_length=max_length).rows
        return batches_of(rows, tokenizer.pad_token_id, batch_size=batch_size)


def read_domain(spec: DomainSpec) -> Domain:
    """Read a domain's documents.

    Raises:
        DataError: The source does not exist, cannot be read, is empty, or has no fields that are known.
    """
    if spec.limit is not None and spec.limit < 1:
        raise DataError(f"limit is {spec.limit}; give 1 or more.")
    fields = Fields(
        prompt=spec.prompt_field,
        response=spec.response_field,
        input=spec.input_field,
        messages=spec.messages_field,
    )
    if spec.text_field and fields.named:
        raise DataError(
            f"Give either a text field ('{spec.text_field}') or the fields of conversations, not both."
        )
    path = Path(spec.data).expanduser()
    if files.is_text(path):
        if spec.text_field or fields.named:
            raise DataError(
                f"'{path}' is plain text and has no fields; leave the field names out, or give a data file "
                f"({', '.join(files.FILE_KINDS)})."
            )
        return Domain(texts=tuple(load_texts(path, limit=spec.limit)))
    rows, source = files.read_rows(spec.data, split=spec.split, subset=spec.subset)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{source} is empty; give a data set with at least one row.")
    whole = itertools.chain([first], rows)
    text_field = spec.text_field or _text_field(list(first[1]), fields)
    if text_field is None:
        conversations = to_conversations(
            whole, fields=fields if fields.named else None, source=source, limit=spec.limit
        )
        return Domain(conversations=tuple(conversations))
    return Domain(
        texts=tuple(files.some_texts(files.texts_of(whole, text_field, source), spec.limit, source))
    )


def _text_field(names: Sequence[str], fields: Fields) -> str | None:
    """The field with plain text, if the rows are no conversations."""
    try:
        find_fields(names, fields)
    except DataError:
        text_field = files.text_field_of(names)
        if text_field is None or fields.named:
            raise
        return text_field
    return None
