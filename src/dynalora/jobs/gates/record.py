"""Reading the documents of domains, recording the gates of an adapter on each, and comparing the domains."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dynalora.common.progress import Progress, silent
from dynalora.errors import DataError, UnsupportedError
from dynalora.evaluation import files
from dynalora.evaluation.tokens import Conversation, tokenize
from dynalora.forgetting.gate_recording import record_gates
from dynalora.forgetting.gates import GateRecord, Separation, depth_separation, gate_separation
from dynalora.jobs.gates.settings import DomainSpec, GatesSpec
from dynalora.lab.adapters import base_tokenizer, load_adapter, read_config
from dynalora.lab.configs import method_name
from dynalora.lab.data.collator import batches_of
from dynalora.lab.data.conversations import load_texts, to_conversations
from dynalora.lab.data.fields import Fields, find_fields
from dynalora.methods import METHODS


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
    fields = Fields(spec.prompt_field, spec.response_field, spec.input_field, spec.messages_field)
    if spec.text_field and fields.named:
        raise DataError(f"Give either a text field ('{spec.text_field}') or the fields of conversations, not both.")
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
    return Domain(texts=tuple(files.some_texts(files.texts_of(whole, text_field, source), spec.limit, source)))


def _text_field(names: Sequence[str], fields: Fields) -> str | None:
    """The field with plain text, if the rows are no conversations."""
    try:
        return find_fields(names, fields).text
    except DataError:
        text_field = files.text_field_of(names)
        if text_field is None or fields.named:
            raise
        return text_field


@dataclass(frozen=True)
class GatesResult:
    """Gates of one adapter over several domains.

    Attributes:
        adapter: As it was named.
        records: Domain → its record; the first is the one the others are compared with.
        counted: Domain → which of its tokens count, in words.
        separations: Pair of domains → area under the ROC curve for every layer.
        depth_separations: Pair of domains → the same by depth group and for all layers.
    """

    adapter: str
    records: dict[str, GateRecord]
    counted: dict[str, str]
    separations: dict[str, list[Separation]]
    depth_separations: dict[str, dict[str, Separation]]


def compare_gates(spec: GatesSpec, *, progress: Progress = silent) -> GatesResult:
    """Record the gates of an adapter on every domain and compare the first domain with the others.

    Raises:
        UnsupportedError: The adapter has no gates.
        CheckpointError: There is no adapter, or it is damaged.
        DataError: A domain cannot be read.
        ConfigError: The base model is unknown or cannot be loaded.
    """
    saved = read_config(spec.adapter)
    if not getattr(saved, "gated", False):
        gated = [name for name, method in METHODS.items() if method.gated]
        raise UnsupportedError(
            f"The adapter '{spec.adapter}' was made by {method_name(saved)}, which has no gates; "
            f"give a {' or '.join(gated)} adapter, or one that was trained with gates=True."
        )
    domains = {name: read_domain(source) for name, source in spec.sources().items()}
    model = load_adapter(spec.adapter, spec.model)
    tokenizer = base_tokenizer(spec.adapter, spec.model)
    records = {}
    for name, domain in domains.items():
        what = f"Recording gates on {name}"
        batches = domain.batches(tokenizer, batch_size=spec.batch_size, max_length=spec.max_length)
        progress(what, 0, len(batches))
        records[name] = record_gates(
            model,
            batches,
            tokenizer,
            batch_size=spec.batch_size,
            max_length=spec.max_length,
            progress=lambda done, total, what=what: progress(what, done, total or None),  # type: ignore[misc]
        )
    first, *others = records
    pairs = {f"{first} / {other}": (records[first], records[other]) for other in others}
    return GatesResult(
        spec.adapter,
        records,
        {name: domain.counted for name, domain in domains.items()},
        {pair: gate_separation(*both) for pair, both in pairs.items()},
        {pair: depth_separation(*both) for pair, both in pairs.items()},
    )
