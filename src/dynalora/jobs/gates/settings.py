"""Settings of `dynalora gates`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from dynalora.errors import ConfigError
from dynalora.lab.settings import PICTURES, Setting, Settings, settings_from


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


def _domains(texts: list[str]) -> dict[str, str]:
    """`["math=file.jsonl"]` as a mapping.

    Raises:
        ConfigError: A text is not of that form, or a name is given twice.
    """
    domains: dict[str, str] = {}
    for text in texts:
        name, sign, source = (part.strip() for part in text.partition("="))
        if not (name and sign and source):
            raise ConfigError(f"The domain '{text}' is not of the form NAME=SOURCE.")
        if name in domains:
            raise ConfigError(f"The domain '{name}' is given twice; give each name once.")
        domains[name] = source
    return domains


@dataclass(frozen=True, kw_only=True)
class GatesSpec(Settings):
    """Of which adapter the gates are recorded, and over which text.

    Attributes:
        adapter: Show the gates of this DISeL adapter: a run folder, an adapter folder, or an id on the Hugging Face
            Hub.
        domains: Measure gates on this text of a domain, and give the flag again for more; the first, the domain of the
            fine-tuning, is compared with the others. In a file, a name → a source, or → the fields of
            [`DomainSpec`][dynalora.jobs.gates.settings.DomainSpec].
        data: Measure gates on this text of a single domain, which then needs no name.
        model: Use this base model; None: the one the adapter names.
        output: Write tables, plots and a report into this folder, which must be new or empty; None: only the tables are
            shown.
        split: Read this split of the data, where a domain does not say.
        limit: Use only this many rows or passages per domain, from the first, where a domain does not say.
        max_length: Cut documents after this many tokens.
        batch_size: Process this many documents at once. A smaller number takes less memory.
        plot: Draw histograms by depth into this PNG file, and beside it an SVG.
    """

    adapter: Annotated[str, Setting(positional=True, metavar="ADAPTER", home=True)]
    domains: Annotated[dict[str, Any], Setting(name="--domain", metavar="NAME=SOURCE", parse=_domains)] = field(
        default_factory=dict
    )
    data: Annotated[str | None, Setting("-d")] = None
    model: Annotated[str | None, Setting("-m", home=True)] = None
    output: Annotated[str | None, Setting("-o", recorded=False, home=True)] = None
    split: str = "train"
    limit: Annotated[int, Setting(least=1)] = 64
    max_length: Annotated[int, Setting(least=2)] = 512
    batch_size: Annotated[int, Setting("-b", least=1)] = 8
    plot: Annotated[str | None, Setting(metavar="FILE.png", recorded=False, writes="file", endings=PICTURES)] = None

    def _check(self) -> None:
        super()._check()
        if bool(self.domains) == bool(self.data):
            number = "both are given" if self.data else "neither is given"
            raise ConfigError(
                f"Name the text either as domains or as data ({number}): --domain NAME=SOURCE, or --data SOURCE."
            )

    def sources(self) -> dict[str, DomainSpec]:
        """The domains with all their settings.

        Raises:
            ConfigError: A setting that there is not.
        """
        named: Mapping[str, Any] = self.domains if self.data is None else {Path(self.data).name or self.data: self.data}
        common = {"split": self.split, "limit": self.limit}
        return {
            str(name): settings_from(
                DomainSpec,
                {**common, **(value if isinstance(value, Mapping) else {"data": value})},
                source=f"the domain '{name}'",
            )
            for name, value in named.items()
        }
