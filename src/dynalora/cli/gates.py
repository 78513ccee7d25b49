"""`dynalora gates`."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynalora.cli.shared import (
    AdapterArgument,
    ConfigOption,
    ModelOption,
    after_imports,
    console,
    load_adapted,
    settings,
)

if TYPE_CHECKING:
    from dynalora.experiments.report import Cell, Table
    from dynalora.forgetting.gates import GateStatistics


@dataclass(frozen=True, kw_only=True)
class GatesSpec:
    """Which adapter, on which text."""

    adapter: str
    data: str
    model: str | None = None
    split: str = "train"
    limit: int = 64
    max_length: int = 512
    plot: str | None = None


def gates(
    adapter: AdapterArgument = None,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Conversations, as for finetune.", show_default=False)
    ] = None,
    model: ModelOption = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Which split. \\[train]", show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Use the first rows. \\[64]", show_default=False)
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", help="Longest sequence, in tokens. \\[512]", show_default=False),
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option("--plot", metavar="FILE.png", help="Also draw histograms.", show_default=False),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Show how far a DISeL adapter's gates open on a data set's responses.

    Mean gates by depth and kind of module; 0 is closed, 1 is open.

    [bold]Example[/bold]

    [cyan]dynalora gates runs/first --data held-out.jsonl --plot gates.png[/cyan]
    """
    flags = {"adapter": adapter, "data": data, "model": model, "split": split, "limit": limit}
    spec = settings(GatesSpec, config, {**flags, "max_length": max_length, "plot": plot})
    from dynalora.errors import UnsupportedError
    from dynalora.experiments import data as sets
    from dynalora.experiments.adapters import read_config
    from dynalora.experiments.finetune import load_tokenizer
    from dynalora.experiments.plots import png
    from dynalora.experiments.report import rich_table
    from dynalora.experiments.run_folder import write_atomic
    from dynalora.forgetting.gates import plot_gates, record_gates
    from dynalora.methods import METHODS
    from dynalora.progress import rich_progress

    after_imports()
    saved = read_config(spec.adapter)
    if not getattr(saved, "gated", False):
        method = str(saved.peft_type).rpartition(".")[2].lower()
        gated = [name for name, known in METHODS.items() if known.gated]
        raise UnsupportedError(
            f"The adapter '{spec.adapter}' was made by {method}, which has no gates; "
            f"give a {' or '.join(gated)} adapter, or one that was trained with gates=True."
        )
    conversations = sets.load_conversations(spec.data, split=spec.split, limit=spec.limit)
    adapted = load_adapted(spec.adapter, spec.model)
    tokenizer = load_tokenizer(spec.model or str(saved.base_model_name_or_path))
    tokens = sets.tokenize(conversations, tokenizer, max_length=spec.max_length)
    collator = sets.Collator(tokenizer.pad_token_id or 0)
    batches = [collator(tokens.rows[start : start + 8]) for start in range(0, len(tokens), 8)]
    screen = console()
    with rich_progress(screen) as progress:
        found = record_gates(
            adapted, batches, progress=lambda done, total: progress("Recording gates", done, total or None)
        )
    screen.print(rich_table(_table(found)))
    if spec.plot is not None:
        write_atomic(Path(spec.plot), png(plot_gates({Path(spec.data).name: found})))
        screen.print(f"Written: {spec.plot}", highlight=False, markup=False)


def _table(found: list[GateStatistics]) -> Table:
    from dynalora.experiments.report import Table
    from dynalora.forgetting.gates import depth_group

    layers = max((item.layer for item in found if item.layer is not None), default=-1) + 1
    groups = ("early", "middle", "late")
    kinds: dict[str, list[GateStatistics]] = defaultdict(list)
    for item in found:
        kinds[item.kind].append(item)
    rows: list[list[Cell]] = []
    for kind, members in [*kinds.items(), ("all", found)]:
        cells: list[Cell] = [kind]
        for group in (*groups, None):
            some = [
                item.openness for item in members if group is None or depth_group(item.layer, layers) == group
            ]
            cells.append(f"{sum(some) / len(some):.4f}" if some else None)
        rows.append(cells)
    tokens = max(item.tokens for item in found)
    return Table(
        ["module", *groups, "all layers"], rows, title="Mean gate, 0 closed to 1 open",
        note=f"Over {tokens:,} response tokens; early, middle and late are thirds of the layers.",
    )  # fmt: skip
