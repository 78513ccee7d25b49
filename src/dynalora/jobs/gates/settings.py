"""Settings of `dynalora gates`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynalora.errors import ConfigError
from dynalora.lab.settings import settings_from


@dataclass(frozen=True, kw_only=True)
class DomainSpec:
    """Where a domain's text comes from.

    Attributes:
        data: A file, a folder or a Hub id, as for
            [`load_conversations`][dynalora.lab.data.conversations.load_conversations]; any other file is plain
            text, whose passages are separated by blank lines.
        split: Which split.
        subset: Which configuration of a Hub data set.
        limit: Use only the first rows or passages; None: all.
        text_field: Read this field of each row as plain text.
        prompt_field: The field with the prompt, and so on, as in [`Fields`][dynalora.lab.data.fields.Fields]; None:
            found by their usual names. Rows with neither prompts and responses nor messages are plain text, in a
            field called text, content or document.
        response_field: The field with the response.
        input_field: An optional field whose text follows the prompt.
        messages_field: The field with chat messages.
    """

    data: str
    split: str = "train"
    subset: str | None = None
    limit: int | None = 64
    text_field: str | None = None
    prompt_field: str | None = None
    response_field: str | None = None
    input_field: str | None = None
    messages_field: str | None = None


@dataclass(frozen=True, kw_only=True)
class GatesSpec:
    """What `dynalora gates` can be told.

    Attributes:
        adapter: Run folder, adapter folder or Hub id of a DISeL adapter.
        domains: Name → source, or → the fields of [`DomainSpec`][dynalora.jobs.gates.settings.DomainSpec]. The
            first one is what the others are compared with: the domain of the fine-tuning.
        data: A single domain without a name.
        model: Base model; None: the one the adapter names.
        output: Folder for all results; None: only the tables are shown.
        split: Which split, where a domain does not say.
        limit: Rows or passages per domain, where a domain does not say.
        max_length: Tokens at which a document is cut.
        batch_size: Documents per forward pass.
        plot: PNG file for the histograms by depth.
    """

    adapter: str
    domains: dict[str, Any] = field(default_factory=dict)
    data: str | None = None
    model: str | None = None
    output: str | None = None
    split: str = "train"
    limit: int = 64
    max_length: int = 512
    batch_size: int = 8
    plot: str | None = None

    def __post_init__(self) -> None:
        if bool(self.domains) == bool(self.data):
            given = "both are given" if self.data else "neither is given"
            raise ConfigError(
                f"Name the text either as domains or as data ({given}): --domain NAME=SOURCE, or --data SOURCE."
            )
        for name in ("limit", "max_length", "batch_size"):
            if getattr(self, name) < (2 if name == "max_length" else 1):
                raise ConfigError(f"{name} is {getattr(self, name)}; give a larger number.")

    def sources(self) -> dict[str, DomainSpec]:
        """The domains with all their settings.

        Raises:
            ConfigError: A setting that there is not.
        """
        named: Mapping[str, Any] = (
            self.domains if self.data is None else {Path(self.data).name or self.data: self.data}
        )
        common = {"split": self.split, "limit": self.limit}
        return {
            str(name): settings_from(
                DomainSpec,
                {**common, **(value if isinstance(value, Mapping) else {"data": value})},
                source=f"the domain '{name}'",
            )
            for name, value in named.items()
        }

    def settings(self) -> dict[str, Any]:
        """The settings as written to the folder."""
        return {name: value for name, value in vars(self).items() if name not in ("output", "plot")}
