"""`dynalora gates`: what the gates do, as tables, and as a folder with numbers, histograms, plots and a report."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from safetensors.torch import save

from dynalora.common.files import records_csv, write_file
from dynalora.common.progress import rich_progress
from dynalora.common.statistics import Interval
from dynalora.drawing.gates import (
    plot_gate_heatmap,
    plot_gate_means,
    plot_gates,
    plot_gates_by_kind,
    plot_gates_by_part,
    plot_separation,
)
from dynalora.drawing.style import rendered
from dynalora.forgetting.gates import ALL, DEPTHS, PARTS, GateMean, GateRecord, GateStatistics, Separation, part_of
from dynalora.jobs.gates.record import GatesResult, compare_gates
from dynalora.jobs.gates.settings import GatesSpec
from dynalora.lab.report import Cell, Report, Section, Table, save_figures, say, write_report
from dynalora.lab.run_folder import RunFolder
from dynalora.lab.scores import shown_interval


def kinds_table(record: GateRecord, title: str = "Mean gate, 0 closed to 1 open", note: str = "") -> Table:
    """Mean gates by kind of module, of attention and MLP as wholes, and of all (rows), by depth (columns)."""
    kinds = list(dict.fromkeys(row.kind for row in record))
    parts = [part for part in PARTS if any(part_of(row.module) == part for row in record)]
    rows: list[list[Cell]] = []
    for name in (*kinds, *parts, "all"):
        cells: list[Cell] = [name]
        for group in (None, *DEPTHS):
            mean = record.mean(
                lambda row, name=name, group=group: (  # type: ignore[misc]
                    name in (row.kind, part_of(row.module), "all") and group in (None, record.depth(row))
                )
            )
            cells.append(None if mean is None else f"{mean.value:.4f}")
        rows.append(cells)
    return Table(
        ["module", "all layers", *DEPTHS], rows, title=title,
        note=note or f"Over {record.tokens:,} tokens; early, middle and late are thirds of the layers.",
    )  # fmt: skip


def domains_table(result: GatesResult) -> Table:
    """Mean gates by domain (rows) and depth (columns), with intervals."""
    rows: list[list[Cell]] = []
    for name, record in result.records.items():
        means = [record.mean(lambda row, group=group: record.depth(row) == group) for group in DEPTHS]  # type: ignore[misc]  # noqa: B023
        rows.append(
            [name, *map(_interval, [record.mean(), *means]), record.documents, record.tokens, result.counted[name]]
        )
    return Table(
        ["domain", "all layers", *DEPTHS, "documents", "tokens", "counted"], rows,
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
                *(_interval(by_depth.get(group)) for group in (ALL, *DEPTHS)),
                f"{most.auc:.3f} {most.name}",
                f"{least.auc:.3f} {least.name}",
            ]
        )
    error = max(item.bin_error for pair in result.separations for item in _areas(result, pair))
    return Table(
        ["pair", "all layers", *DEPTHS, "most in a layer", "least in a layer"], rows,
        title="Separation: area under the ROC curve of a token's mean gate",
        note="The probability that a token of the first domain opens the gates further than one of the second; 0.5 is "
        f"no difference. 95 % intervals over documents; exact within ±{error:.1g}.",
    )  # fmt: skip


def _interval(value: GateMean | Separation | None) -> Cell:
    if value is None:
        return None
    number, digits = (value.auc, 3) if isinstance(value, Separation) else (value.value, 4)
    low, high = (number if end is None else end for end in (value.low, value.high))
    return shown_interval(Interval(number, low, high), digits)


def write_gates(result: GatesResult, run: RunFolder) -> None:
    """Write tables, tensors, plots and the report.

    `layers.csv`, `ranks.csv` and `separation.csv` hold one number per line and column, `gates.json` the same with
    histograms, `histograms.safetensors` the histograms of every rank component and of tokens' mean gates.
    """
    layers: list[dict[str, Any]] = []
    histograms = {}
    for domain, record in result.records.items():
        for row in record:
            layers.append({"domain": domain, **_layer_row(record, row)})
            histograms[f"{domain}/{row.module}/rank_histogram"] = row.rank_histogram.contiguous()
            histograms[f"{domain}/{row.module}/token_histogram"] = row.token_histogram.sum(0)
    run.write("layers.csv", records_csv(layers))
    run.write("ranks.csv", records_csv(_rank_rows(result)))
    if result.separations:
        areas = [{"pair": pair, **vars(item)} for pair in result.separations for item in _areas(result, pair)]
        run.write("separation.csv", records_csv(areas))
    run.write("gates.json", json.dumps(_plain(result), indent=1) + "\n")
    run.write("histograms.safetensors", save(histograms))
    sections = [
        Section(heading, tables=tables, figures=save_figures(run.write, drawn))
        for heading, tables, drawn in _sections(result)
    ]
    write_report(Report(f"Gates of {result.adapter}", summary(result), sections), run.report)


def summary(result: GatesResult) -> str:
    """What was found: of one domain how far gates open and where most, of several a sentence per pair."""
    if not result.depth_separations:
        (name, record), *_ = result.records.items()
        places: dict[str, GateMean] = {}
        for kind, depth in dict.fromkeys((row.kind, record.depth(row)) for row in record):
            mean = record.mean(lambda row, at=(kind, depth): (row.kind, record.depth(row)) == at)  # type: ignore[misc]
            if mean is not None:
                places[kind if depth not in DEPTHS else f"{kind} of the {depth} layers"] = mean
        most, least = (choose(places, key=lambda place: places[place].value) for choose in (max, min))
        text = f"On {name} the gates are open by {_interval(record.mean())} on average, where 0 is closed and 1 is open"
        if most != least:
            text += f": most in {most} ({places[most].value:.4f}), least in {least} ({places[least].value:.4f})"
        return f"{text}."
    return " ".join(
        f"A token of {pair.replace(' / ', ' opens the gates further than a token of ', 1)} with probability "
        f"{_interval(by_depth[ALL])}."
        for pair, by_depth in result.depth_separations.items()
    )


def _sections(result: GatesResult) -> Iterable[tuple[str, list[Table], dict[str, tuple[Figure, str]]]]:
    """Heading, tables and figures (name → figure and caption) of every section."""
    records = result.records
    yield (
        "How far the gates open",
        [domains_table(result)],
        {
            "gates": (plot_gates(records), "Histograms of all gates by depth; each adds up to 1."),
            "means": (plot_gate_means(records), "Mean gate of every layer, with 95 % intervals over documents."),
        },
    )
    if result.separations:
        drawn = (plot_separation(result.separations), "Area under the ROC curve of every layer.")
        yield ("How well they tell the domains apart", [separation_table(result)], {"separation": drawn})
    kinds, ranks = {}, {}
    for index, (name, record) in enumerate(records.items()):
        place = _file_name(name, index)
        kinds[f"kinds-{place}"] = (
            plot_gates_by_kind(record, f"Gates on {name} by depth and kind of module"),
            f"Histograms by kind of module on {name}.",
        )
        kinds[f"parts-{place}"] = (
            plot_gates_by_part(record, f"Gates on {name} by depth, attention and MLP"),
            f"Histograms of attention and of the MLP on {name}.",
        )
        ranks[f"ranks-{place}"] = (
            plot_gate_heatmap(record, f"Mean gate per rank component on {name}"),
            f"Mean gate of every rank component on {name}.",
        )
    tables = [kinds_table(record, f"Mean gate on {name}") for name, record in records.items()]
    yield "Kinds of module", tables, kinds
    yield "Rank components", [], ranks


def _file_name(name: str, index: int) -> str:
    """A domain's name as part of a file name: anything unusual is replaced, and a number keeps names apart."""
    plain = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
    return plain if plain == name else f"{plain}-{index + 1}"


def _layer_row(record: GateRecord, row: GateStatistics) -> dict[str, Any]:
    mean = record.layer_mean(row)
    return {
        "module": row.module, "layer": row.layer, "kind": row.kind, "depth": record.depth(row), "tokens": row.tokens,
        "documents": record.documents, "mean": mean.value, "low": mean.low, "high": mean.high,
    }  # fmt: skip


def _rank_rows(result: GatesResult) -> Iterable[dict[str, Any]]:
    for domain, record in result.records.items():
        for row in record:
            place = {"domain": domain, "module": row.module, "layer": row.layer, "kind": row.kind}
            numbers = zip(row.mean.tolist(), row.deviation.tolist(), strict=True)
            for index, (mean, deviation) in enumerate(numbers):
                yield {**place, "rank": index, "mean": mean, "deviation": deviation}


def _areas(result: GatesResult, pair: str) -> list[Separation]:
    """The separation of two domains in every layer, and by depth."""
    return [*result.separations[pair], *result.depth_separations[pair].values()]


def _plain(result: GatesResult) -> dict[str, Any]:
    domains = {}
    for name, record in result.records.items():
        layers = [
            {
                **_layer_row(record, row),
                "mean_per_rank": row.mean.tolist(),
                "deviation_per_rank": row.deviation.tolist(),
                "histogram": row.histogram.tolist(),
            }
            for row in record
        ]
        domains[name] = {
            "documents": record.documents, "tokens": record.tokens, "counted": result.counted[name], "layers": layers,
        }  # fmt: skip
    separations = {
        pair: {
            "layers": [vars(item) for item in items],
            "depth": {group: vars(item) for group, item in result.depth_separations[pair].items()},
        }
        for pair, items in result.separations.items()
    }
    return {"adapter": result.adapter, "domains": domains, "separation": separations}


def run_gates(spec: GatesSpec, *, console: Console) -> GatesResult:
    """Record, show and write the gates; see [`compare_gates`][dynalora.jobs.gates.record.compare_gates]."""
    if spec.output is not None:
        RunFolder.check(spec.output, spec.settings())
    with rich_progress(console) as progress:
        result = compare_gates(spec, progress=progress)
    if len(result.records) == 1:
        ((name, record),) = result.records.items()
        note = f"Over {record.tokens:,} {result.counted[name].removeprefix('all ')}"
        note += "; early, middle and late are thirds of the layers."
        say(console, kinds_table(record, note=note))
    else:
        say(console, domains_table(result), separation_table(result), summary(result))
    if spec.plot is not None:
        write_file(Path(spec.plot), rendered(plot_gates(result.records)), replace=False)
        say(console, f"Written: {spec.plot}")
    if spec.output is not None:
        with RunFolder.create(spec.output, spec.settings()) as run:
            write_gates(result, run)
            run.finish()
        say(console, f"Report: {run.report}")
    return result
