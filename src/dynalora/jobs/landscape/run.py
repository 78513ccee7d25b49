"""Measure how much rank adapters, or differences of full models, use; show tables, write files and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dynalora.common.files import records_csv, write_file
from dynalora.common.progress import Progress, rich_progress
from dynalora.drawing.landscape import plot_rank_landscape
from dynalora.drawing.style import save
from dynalora.errors import UnsupportedError
from dynalora.evaluation.tokens import tokenize
from dynalora.export.lora import load_without_base
from dynalora.forgetting.full_models import model_landscape
from dynalora.forgetting.gate_recording import record_gates
from dynalora.forgetting.gates import GateRecord
from dynalora.forgetting.landscape import (
    QUANTITIES,
    TAUS,
    LandscapeRow,
    check_tau,
    landscape_records,
    rank_landscape,
)
from dynalora.jobs.landscape.settings import LandscapeSpec
from dynalora.jobs.landscape.tables import energy_by_threshold, landscape_table
from dynalora.lab.adapters import adapter_folder, load_adapter, model_folder, read_config
from dynalora.lab.data.collator import batches_of
from dynalora.lab.data.conversations import load_conversations
from dynalora.lab.models import load_tokenizer
from dynalora.lab.report import rich_table
from dynalora.methods import METHODS

Landscapes = dict[str, list[LandscapeRow]]


def run_landscape(spec: LandscapeSpec, *, console: Console) -> None:
    """Measure, show and write the landscapes.

    Args:
        spec: What to measure, and which files to write.
        console: Where the tables are shown.

    Raises:
        ConfigError: A threshold, or a model that cannot be loaded.
        CheckpointError: There is no adapter, or it is damaged.
        UnsupportedError: Data are given, and no adapter has gates.
    """
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
    console.print(rich_table(landscape_table(landscapes, spec.tau, gates)))
    console.print(rich_table(energy_by_threshold(landscapes, thresholds)))
    if written := _write(spec, landscapes):
        console.print(
            f"Written: {', '.join(map(str, written))}", highlight=False, markup=False, soft_wrap=True
        )


def short_names(sources: list[str]) -> dict[str, str]:
    """Each source by the shortest end of its path that tells it from the others."""
    paths = {
        source: (Path(source).resolve() if Path(source).exists() else Path(source)).parts
        for source in sources
    }
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
    if spec.data is not None and not gates:
        raise UnsupportedError("None of the adapters has gates, so --data has no use; leave it out.")
    landscapes: Landscapes = {}
    for name, source in names.items():
        record = None
        if name in gates and spec.data is not None:
            adapted: Any = load_adapter(source, spec.model)
            record = _mean_gates(spec, adapted, source, progress)
            gates[name] = f"mean gates on {Path(spec.data).name}"
        elif str(configs[name].peft_type).rpartition(".")[2].lower() in METHODS:
            adapted = load_without_base(adapter_folder(source))
        else:
            adapted = load_adapter(source, spec.model)
        landscapes[name] = rank_landscape(adapted, tau=spec.tau, gates=record)
    return landscapes, gates


def _mean_gates(spec: LandscapeSpec, adapted: Any, source: str, progress: Progress) -> GateRecord:
    conversations = load_conversations(str(spec.data), split=spec.split, limit=spec.limit)
    tokenizer = load_tokenizer(spec.model or str(read_config(source).base_model_name_or_path))
    tokens = tokenize(conversations, tokenizer, max_length=spec.max_length)
    return record_gates(
        adapted,
        batches_of(tokens.rows, tokenizer.pad_token_id),
        progress=lambda done, total: progress("Recording gates", done, total or None),
    )


def _write(spec: LandscapeSpec, landscapes: Landscapes) -> list[Path]:
    written = []
    if spec.csv is not None:
        written.append(write_file(Path(spec.csv), records_csv(landscape_records(landscapes))))
    if spec.json is not None:
        lines = map(json.dumps, landscape_records(landscapes, spectra=True))
        written.append(write_file(Path(spec.json), "[\n" + ",\n".join(lines) + "\n]\n"))
    if spec.plot is not None:
        shown = landscapes if len(landscapes) > 1 else next(iter(landscapes.values()))
        for quantity in QUANTITIES:
            figure = plot_rank_landscape(shown, quantity=quantity)
            place = Path(spec.plot)
            if quantity != QUANTITIES[0]:
                place = place.with_name(f"{place.stem}-{quantity}{place.suffix}")
            written += save(figure, place)
    return written
