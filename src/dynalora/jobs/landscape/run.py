"""`dynalora landscape`: how much rank adapters, or differences of full models, use."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console

from dynalora.common.files import records_csv, write_files
from dynalora.common.progress import Progress, rich_progress
from dynalora.drawing.landscape import plot_rank_landscape
from dynalora.drawing.style import rendered
from dynalora.evaluation.tokens import tokenize
from dynalora.export.lora import load_without_base
from dynalora.forgetting.defaults import QUANTITIES
from dynalora.forgetting.effects import narrow_moments
from dynalora.forgetting.full_models import model_landscape
from dynalora.forgetting.gate_recording import record_gates
from dynalora.forgetting.landscape import TAUS, LandscapeRow, check_tau, energy_table, landscape_records, rank_landscape
from dynalora.jobs.landscape.settings import LandscapeSpec, plot_files
from dynalora.lab.adapters import adapter_folder, base_tokenizer, load_adapter, model_folder, read_config
from dynalora.lab.configs import method_name
from dynalora.lab.data.collator import batches_of
from dynalora.lab.data.conversations import load_conversations
from dynalora.lab.report import Cell, Table, say
from dynalora.methods import METHODS

Landscapes = dict[str, list[LandscapeRow]]


def run_landscape(spec: LandscapeSpec, *, console: Console) -> None:
    """Measure, show and write the landscapes."""
    thresholds = spec.thresholds or list(TAUS)
    for number in (spec.tau, *thresholds):
        check_tau(number)
    names = short_names(spec.sources)
    gates: dict[str, str] = {}
    with rich_progress(console) as progress:
        if spec.against is not None:
            landscapes = _of_models(spec, names, progress)
        else:
            landscapes, gates = _of_adapters(spec, names, progress)
    say(console, landscape_table(landscapes, spec.tau, gates), energy_by_threshold(landscapes, thresholds))
    if written := _write(spec, landscapes):
        say(console, f"Written: {', '.join(map(str, written))}")


def short_names(sources: list[str]) -> dict[str, str]:
    """Each source by the shortest end of its path that tells it from the others."""
    paths = {source: (Path(source).resolve() if Path(source).exists() else Path(source)).parts for source in sources}
    longest = max(map(len, paths.values()), default=1)
    for length in range(1, longest + 1):
        names = {"/".join(parts[-length:]): source for source, parts in paths.items()}
        if len(names) == len(paths):
            return names
    return {source: source for source in paths}


def _of_models(spec: LandscapeSpec, names: Mapping[str, str], progress: Progress) -> Landscapes:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    original = model_folder(str(spec.against))
    return {
        name: model_landscape(
            model_folder(source), original, spec.tau, modules=spec.modules, device=device, progress=progress
        )
        for name, source in names.items()
    }


def _of_adapters(
    spec: LandscapeSpec, names: Mapping[str, str], progress: Progress
) -> tuple[Landscapes, dict[str, str]]:
    """The landscapes, and for each gated adapter how its gates were counted."""
    configs = {name: read_config(source) for name, source in names.items()}
    gates = {name: "all gates open" for name, saved in configs.items() if getattr(saved, "gated", False)}
    landscapes: Landscapes = {}
    for name, source in names.items():
        record = effects = None
        if spec.data is not None:
            adapted: Any = load_adapter(source, spec.model)
            batches = _batches(spec, source)
            effects = narrow_moments(adapted, batches, progress=progress)
            if name in gates:
                record = record_gates(adapted, batches, progress=partial(_recording, progress))
                gates[name] = f"mean gates on {Path(spec.data).name}"
        elif method_name(configs[name]) in METHODS:
            adapted = load_without_base(adapter_folder(source))
        else:
            adapted = load_adapter(source, spec.model)
        landscapes[name] = rank_landscape(adapted, tau=spec.tau, gates=record, effects=effects)
    return landscapes, gates


def _recording(progress: Progress, done: int, total: int) -> None:
    progress("Recording gates", done, total or None)


def _batches(spec: LandscapeSpec, source: str) -> list[dict[str, torch.Tensor]]:
    """The conversations as an adapter's tokenizer has them; their responses count."""
    conversations = load_conversations(str(spec.data), split=spec.split, limit=spec.limit)
    tokenizer = base_tokenizer(source, spec.model)
    tokens = tokenize(conversations, tokenizer, max_length=spec.max_length)
    return batches_of(tokens.rows, tokenizer.pad_token_id)


def _write(spec: LandscapeSpec, landscapes: Landscapes) -> list[Path]:
    """Write what is wanted, all of it or nothing, so that the same command can be given again."""
    contents: dict[Path, str | bytes] = {}
    if spec.csv is not None:
        contents[Path(spec.csv)] = records_csv(landscape_records(landscapes))
    if spec.json is not None:
        lines = map(json.dumps, landscape_records(landscapes, spectra=True))
        contents[Path(spec.json)] = "[\n" + ",\n".join(lines) + "\n]\n"
    if spec.plot is not None:
        shown = landscapes if len(landscapes) > 1 else next(iter(landscapes.values()))
        files = plot_files(spec.plot)
        rows = [row for landscape in landscapes.values() for row in landscape]
        for quantity, png, svg in zip(QUANTITIES, files[::2], files[1::2], strict=True):
            if any(getattr(row, quantity) is None for row in rows):  # the effect, which takes data
                continue
            figure = plot_rank_landscape(shown, quantity=quantity)
            contents[png], contents[svg] = rendered(figure, "png"), rendered(figure, "svg")
    return write_files(contents, replace=False)


def landscape_table(landscapes: Mapping[str, Sequence[LandscapeRow]], tau: float, gates: Mapping[str, str]) -> Table:
    """Ranks, nuclear norms and energies by kind of module; `gates` says how those of gated adapters were counted."""
    several = len(landscapes) > 1
    measured = any(row.effect is not None for rows in landscapes.values() for row in rows)
    cells: list[list[Cell]] = []
    for run, rows in landscapes.items():
        kinds: dict[str, list[LandscapeRow]] = defaultdict(list)
        for row in rows:
            kinds[row.kind].append(row)
        for kind, members in [*kinds.items(), ("all", list(rows))]:
            ranks = [row.effective_rank for row in members]
            cells.append(
                [
                    *([run] if several else []), kind, len(members), f"{fmean(ranks):.2f}", min(ranks), max(ranks),
                    f"{fmean([row.rank for row in members]):.1f}",
                    f"{fmean([row.nuclear_norm for row in members]):.4f}",
                    f"{fmean([row.energy for row in members]):.4f}",
                    f"{fmean([row.entropy_rank for row in members]):.2f}",
                    f"{fmean([row.stable_rank for row in members]):.2f}",
                    f"{fmean([row.energy_rank for row in members]):.2f}",
                    *([_mean_effect(members)] if measured else []),
                ]
            )  # fmt: skip
    note = f"effective rank: singular values of s·ΔW above {tau:g}; energy: their share of the sum of squares."
    note += " By entropy, stable, 99 % of the energy: measures of rank that do not change when the update is scaled."
    if measured:
        note += " 99 % of the effect: how many directions hold 99 % of what the update does on the data's responses."
    for counted in dict.fromkeys(gates.values()):
        which = ", ".join(name for name, how in gates.items() if how == counted)
        most = ", the most that the update can be" if counted == "all gates open" else ""
        note += f" {which}: with {counted}{most}."
    columns = [
        "module",
        "matrices",
        "effective rank",
        "least",
        "most",
        "rank",
        "nuclear norm",
        "energy",
        "by entropy",
        "stable",
        "99 %",
        *(["99 % of the effect"] if measured else []),
    ]
    return Table(
        [*(["run"] if several else []), *columns], cells, title="Rank landscape (means over the matrices)", note=note
    )  # fmt: skip


def _mean_effect(rows: Sequence[LandscapeRow]) -> str | None:
    """The mean rank of the effect over the matrices of which it was measured."""
    ranks = [row.effect_rank for row in rows if row.effect_rank is not None]
    return f"{fmean(ranks):.2f}" if ranks else None


def energy_by_threshold(landscapes: Mapping[str, Sequence[LandscapeRow]], taus: Sequence[float]) -> Table:
    """Energy and mean effective rank above each of several thresholds."""
    tables = {run: energy_table(rows, taus) for run, rows in landscapes.items()}
    cells: list[list[Cell]] = [
        [
            f"{tau:g}",
            *(
                cell
                for table in tables.values()
                for cell in (f"{100 * table[place].energy:.2f}", f"{table[place].effective_rank:.2f}")
            ),
        ]
        for place, tau in enumerate(taus)
    ]
    columns = [
        f"{run}: {what}" if len(tables) > 1 else what
        for run in tables
        for what in ("energy (%)", "mean effective rank")
    ]
    note = "Over all matrices together: squares of the singular values above τ, as a share of all squares."
    return Table(["τ", *columns], cells, title="Energy above thresholds", note=note)
