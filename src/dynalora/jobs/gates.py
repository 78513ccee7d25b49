"""Gates over text of several domains: reading the domains, recording, and a folder with all that was found."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save

from dynalora.common.files import records_csv
from dynalora.common.progress import Progress, silent
from dynalora.drawing import runs as plots
from dynalora.drawing.gates import (
    plot_gate_heatmap,
    plot_gate_means,
    plot_gates,
    plot_gates_by_kind,
    plot_separation,
)
from dynalora.errors import ConfigError, DataError, UnsupportedError
from dynalora.evaluation import files
from dynalora.forgetting.gates import (
    ALL,
    DEPTHS,
    GateMean,
    GateRecord,
    Separation,
    depth_separation,
    gate_separation,
    record_gates,
)
from dynalora.jobs.finetune import load_tokenizer
from dynalora.lab import data
from dynalora.lab.adapters import load_adapter, read_config
from dynalora.lab.report import Cell, Report, Section, Table, render_html
from dynalora.lab.report import Figure as Picture
from dynalora.lab.run_folder import RunFolder
from dynalora.lab.settings import settings_from
from dynalora.methods import METHODS

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase


# --- domains ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DomainSpec:
    """Where a domain's text comes from.

    Attributes:
        data: A file, a folder or a Hub id, as for
            [`load_conversations`][dynalora.lab.data.load_conversations]; any other file is plain text, whose
            passages are separated by blank lines.
        split: Which split.
        subset: Which configuration of a Hub data set.
        limit: Use only the first rows or passages; None: all.
        text_field: Read this field of each row as plain text.
        prompt_field: The field with the prompt, and so on, as in [`Fields`][dynalora.lab.data.Fields]; None:
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


@dataclass(frozen=True)
class Domain:
    """A domain's documents: conversations, of which the responses count, or plain texts, of which all tokens count.

    Attributes:
        conversations: Empty for plain text.
        texts: Empty for conversations.
    """

    conversations: tuple[data.Conversation, ...] = ()
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
        rows = data.tokenize(self.conversations, tokenizer, max_length=max_length).rows
        collator = data.Collator(tokenizer.pad_token_id or 0)
        return [collator(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def read_domain(spec: DomainSpec) -> Domain:
    """Read a domain's documents.

    Raises:
        DataError: The source does not exist, cannot be read, is empty, or has no fields that are known.
    """
    if spec.limit is not None and spec.limit < 1:
        raise DataError(f"limit is {spec.limit}; give 1 or more.")
    fields = data.Fields(
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
        return Domain(texts=tuple(data.load_texts(path, limit=spec.limit)))
    rows, told = files.read_rows(spec.data, split=spec.split, subset=spec.subset)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{told} is empty; give a data set with at least one row.")
    whole = itertools.chain([first], rows)
    text_field = spec.text_field or _text_field(list(first[1]), fields)
    if text_field is None:
        found = data.to_conversations(
            whole, fields=fields if fields.named else None, source=told, limit=spec.limit
        )
        return Domain(conversations=tuple(found))
    return Domain(texts=tuple(files.some_texts(files.texts_of(whole, text_field, told), spec.limit, told)))


def _text_field(names: Sequence[str], fields: data.Fields) -> str | None:
    """The field with plain text, if the rows are no conversations."""
    try:
        data.find_fields(names, fields)
    except DataError:
        found = files.text_field_of(names)
        if found is None or fields.named:
            raise
        return found
    return None


# --- recording --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GatesSpec:
    """What `dynalora gates` can be told.

    Attributes:
        adapter: Run folder, adapter folder or Hub id of a DISeL adapter.
        domains: Name → source, or → the fields of [`DomainSpec`][dynalora.jobs.gates.DomainSpec]. The first one
            is what the others are compared with: the domain of the fine-tuning.
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


def compare_gates(
    spec: GatesSpec,
    *,
    progress: Progress = silent,
    load: Callable[..., Any] = load_adapter,
) -> GatesResult:
    """Record the gates of an adapter on every domain and compare the first domain with the others.

    Args:
        spec: Which adapter, on which text.
        progress: Called with the documents (or batches) done, domain by domain.
        load: Loads the adapter, as [`load_adapter`][dynalora.lab.adapters.load_adapter].

    Raises:
        UnsupportedError: The adapter has no gates.
        CheckpointError: There is no adapter, or it is damaged.
        DataError: A domain cannot be read.
        ConfigError: The base model is unknown or cannot be loaded.
    """
    saved = read_config(spec.adapter)
    method = str(saved.peft_type).rpartition(".")[2].lower()
    if not getattr(saved, "gated", False):
        gated = [name for name, known in METHODS.items() if known.gated]
        raise UnsupportedError(
            f"The adapter '{spec.adapter}' was made by {method}, which has no gates; "
            f"give a {' or '.join(gated)} adapter, or one that was trained with gates=True."
        )
    domains = {name: read_domain(source) for name, source in spec.sources().items()}
    model = load(spec.adapter, spec.model)
    tokenizer = load_tokenizer(spec.model or str(saved.base_model_name_or_path))
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


# --- tables -----------------------------------------------------------------------------------------------


def kinds_table(record: GateRecord, title: str = "Mean gate, 0 closed to 1 open", note: str = "") -> Table:
    """Mean gates by kind of module (rows) and depth (columns)."""
    kinds = list(dict.fromkeys(row.kind for row in record))
    rows: list[list[Cell]] = []
    for kind in (*kinds, None):
        cells: list[Cell] = [kind or "all"]
        for group in (*DEPTHS, None):
            mean = record.mean(
                lambda row, kind=kind, group=group: (  # type: ignore[misc]
                    kind in (None, row.kind) and group in (None, record.depth(row))
                )
            )
            cells.append(None if mean is None else f"{mean.value:.4f}")
        rows.append(cells)
    return Table(
        ["module", *DEPTHS, "all layers"], rows, title=title,
        note=note or f"Over {record.tokens:,} tokens; early, middle and late are thirds of the layers.",
    )  # fmt: skip


def domains_table(result: GatesResult) -> Table:
    """Mean gates by domain (rows) and depth (columns), with intervals."""
    rows: list[list[Cell]] = []
    for name, record in result.records.items():
        means = [record.mean(lambda row, group=group: record.depth(row) == group) for group in DEPTHS]  # type: ignore[misc]  # noqa: B023
        rows.append(
            [
                name,
                *map(_interval, [*means, record.mean()]),
                record.documents,
                record.tokens,
                result.counted[name],
            ]
        )
    return Table(
        ["domain", *DEPTHS, "all layers", "documents", "tokens", "counted"], rows,
        title="Mean gate, 0 closed to 1 open",
        note="With 95 % intervals over documents; early, middle and late are thirds of the layers.",
    )  # fmt: skip


def separation_table(result: GatesResult) -> Table:
    """Areas under the ROC curve by pair of domains (rows) and depth (columns), and their extremes over layers."""
    rows: list[list[Cell]] = []
    for pair, by_depth in result.depth_separations.items():
        layers = result.separations[pair]
        least, most = min(layers, key=lambda item: item.auc), max(layers, key=lambda item: item.auc)
        rows.append(
            [
                pair,
                *(_interval(by_depth.get(group)) for group in (*DEPTHS, ALL)),
                f"{most.auc:.3f} {most.name}",
                f"{least.auc:.3f} {least.name}",
            ]
        )
    error = max(
        item.bin_error
        for pair in result.separations
        for item in (*result.separations[pair], *result.depth_separations[pair].values())
    )
    return Table(
        ["pair", *DEPTHS, "all layers", "most in a layer", "least in a layer"], rows,
        title="Separation: area under the ROC curve of a token's mean gate",
        note="The probability that a token of the first domain opens the gates further than one of the second; 0.5 is "
        f"no difference. 95 % intervals over documents; exact within ±{error:.1g}.",
    )  # fmt: skip


def _interval(value: GateMean | Separation | None) -> Cell:
    if value is None:
        return None
    if isinstance(value, Separation):
        number, digits = value.auc, 3
    else:
        number, digits = value.value, 4
    text = f"{number:.{digits}f}"
    return text if value.low is None else f"{text} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


# --- the folder -------------------------------------------------------------------------------------------


def write_gates(result: GatesResult, run: RunFolder) -> None:
    """Write tables, tensors, plots and the report.

    `layers.csv`, `ranks.csv` and `separation.csv` hold one number per line and column, `gates.json` the same with
    histograms, `histograms.safetensors` the histograms of every rank component and of tokens' mean gates.

    Args:
        result: What was found.
        run: An open folder.
    """
    run.write("layers.csv", records_csv(_layer_rows(result)))
    run.write("ranks.csv", records_csv(_rank_rows(result)))
    if result.separations:
        run.write("separation.csv", records_csv(_separation_rows(result)))
    run.write("gates.json", json.dumps(_plain(result), indent=1) + "\n")
    run.write(
        "histograms.safetensors",
        save(
            {
                f"{domain}/{row.module}/{name}": value.contiguous()
                for domain, record in result.records.items()
                for row in record
                for name, value in (
                    ("rank_histogram", row.rank_histogram),
                    ("token_histogram", row.token_histogram.sum(0)),
                )
            }
        ),
    )
    sections = []
    for heading, text, tables, drawn in _sections(result):
        pictures = []
        for name, made, caption in drawn:
            pictures.append(Picture(plots.save_figure(run, name, made), caption))
        sections.append(Section(heading, text, tables=tables, figures=pictures))
    run.write("report.html", render_html(Report(f"Gates of {result.adapter}", summary(result), sections)))


def summary(result: GatesResult) -> str:
    """What was found, in a sentence per pair of domains."""
    if not result.depth_separations:
        (name, record), *_ = result.records.items()
        return f"On {name}, the mean gate is {_interval(record.mean())}."
    sentences = []
    for pair, by_depth in result.depth_separations.items():
        first, _, second = pair.partition(" / ")
        sentences.append(
            f"A token of {first} opens the gates further than a token of {second} with probability "
            f"{_interval(by_depth[ALL])}."
        )
    return " ".join(sentences)


_Drawn = tuple[str, "Figure", str]


def _sections(result: GatesResult) -> Iterable[tuple[str, str, list[Table], list[_Drawn]]]:
    records = result.records
    yield (
        "How far the gates open",
        "",
        [domains_table(result)],
        [
            ("gates", plot_gates(records), "Histograms of all gates by depth; each adds up to 1."),
            (
                "means",
                plot_gate_means(records),
                "Mean gate of every layer, with 95 % intervals over documents.",
            ),
        ],
    )
    if result.separations:
        yield (
            "How well they tell the domains apart",
            "",
            [separation_table(result)],
            [("separation", plot_separation(result.separations), "Area under the ROC curve of every layer.")],
        )
    tables = [kinds_table(record, f"Mean gate on {name}") for name, record in records.items()]
    drawn = [
        (
            f"kinds-{_file_name(name, index)}",
            plot_gates_by_kind(record, title=f"Gates on {name} by depth and kind of module"),
            f"Histograms by kind of module on {name}.",
        )
        for index, (name, record) in enumerate(records.items())
    ]
    yield "Kinds of module", "", tables, drawn
    drawn = [
        (
            f"ranks-{_file_name(name, index)}",
            plot_gate_heatmap(record, title=f"Mean gate per rank component on {name}"),
            f"Mean gate of every rank component on {name}.",
        )
        for index, (name, record) in enumerate(records.items())
    ]
    yield "Rank components", "", [], drawn


def _file_name(name: str, index: int) -> str:
    """A domain's name as part of a file name: anything unusual is replaced, and a number keeps names apart."""
    plain = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
    return plain if plain == name else f"{plain}-{index + 1}"


def _layer_rows(result: GatesResult) -> Iterable[dict[str, Any]]:
    for domain, record in result.records.items():
        for row in record:
            mean = record.mean(lambda other, row=row: other is row)  # type: ignore[misc]
            assert mean is not None
            yield {
                "domain": domain, "module": row.module, "layer": row.layer, "kind": row.kind,
                "depth": record.depth(row), "tokens": row.tokens, "documents": record.documents,
                "mean": mean.value, "low": mean.low, "high": mean.high,
            }  # fmt: skip


def _rank_rows(result: GatesResult) -> Iterable[dict[str, Any]]:
    for domain, record in result.records.items():
        for row in record:
            for index, (mean, deviation) in enumerate(
                zip(row.mean.tolist(), row.deviation.tolist(), strict=True)
            ):
                yield {
                    "domain": domain, "module": row.module, "layer": row.layer, "kind": row.kind,
                    "rank": index, "mean": mean, "deviation": deviation,
                }  # fmt: skip


def _separation_rows(result: GatesResult) -> Iterable[dict[str, Any]]:
    for pair in result.separations:
        for item in (*result.separations[pair], *result.depth_separations[pair].values()):
            yield {"pair": pair, **vars(item)}


def _plain(result: GatesResult) -> dict[str, Any]:
    domains = {}
    for name, record in result.records.items():
        layers = {row["module"]: row for row in _layer_rows(result) if row["domain"] == name}
        domains[name] = {
            "documents": record.documents,
            "tokens": record.tokens,
            "counted": result.counted[name],
            "layers": [
                {
                    **{key: value for key, value in layers[row.module].items() if key != "domain"},
                    "mean_per_rank": row.mean.tolist(),
                    "deviation_per_rank": row.deviation.tolist(),
                    "histogram": row.histogram.tolist(),
                }
                for row in record
            ],
        }
    separations = {
        pair: {
            "layers": [vars(item) for item in items],
            "depth": {group: vars(item) for group, item in result.depth_separations[pair].items()},
        }
        for pair, items in result.separations.items()
    }
    return {"adapter": result.adapter, "domains": domains, "separation": separations}
