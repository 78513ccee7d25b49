"""`dynalora landscape`."""

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
    from dynalora.forgetting.landscape import LandscapeRow


@dataclass(frozen=True, kw_only=True)
class LandscapeSpec:
    """Which adapter, and what to make of it."""

    adapter: str
    model: str | None = None
    tau: float = 1e-3
    plot: str | None = None


def landscape(
    adapter: AdapterArgument = None,
    model: ModelOption = None,
    tau: Annotated[
        float | None,
        typer.Option("--tau", help="A singular value counts above this. \\[0.001]", show_default=False),
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option("--plot", metavar="FILE.png", help="Also draw it, layer by layer.", show_default=False),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Show how much rank an adapter really uses, per kind of module.

    Effective rank, nuclear norm and energy, exact from the adapter's factors;
    the base model is needed for PEFT's LoRA only.

    [bold]Example[/bold]

    [cyan]dynalora landscape runs/first --plot landscape.png[/cyan]
    """
    spec = settings(LandscapeSpec, config, {"adapter": adapter, "model": model, "tau": tau, "plot": plot})
    from dynalora.experiments.adapters import adapter_folder, read_config
    from dynalora.experiments.plots import png
    from dynalora.experiments.report import rich_table
    from dynalora.experiments.run_folder import write_atomic
    from dynalora.export.lora import load_without_base
    from dynalora.forgetting.landscape import plot_rank_landscape, rank_landscape
    from dynalora.methods import METHODS

    after_imports()
    saved = read_config(spec.adapter)
    method = str(saved.peft_type).rpartition(".")[2].lower()
    if method in METHODS:
        adapted = load_without_base(adapter_folder(spec.adapter))
    else:
        adapted = load_adapted(spec.adapter, spec.model)
    rows = rank_landscape(adapted, tau=spec.tau)
    screen = console()
    screen.print(rich_table(_table(rows, spec.tau, gated=getattr(saved, "gated", False))))
    if spec.plot is not None:
        write_atomic(Path(spec.plot), png(plot_rank_landscape(rows)))
        screen.print(f"Written: {spec.plot}", highlight=False, markup=False)


def _table(rows: list[LandscapeRow], tau: float, *, gated: bool) -> Table:
    from dynalora.experiments.report import Table

    kinds: dict[str, list[LandscapeRow]] = defaultdict(list)
    for row in rows:
        kinds[row.kind].append(row)
    cells: list[list[Cell]] = []
    for kind, members in [*kinds.items(), ("all", rows)]:
        ranks = [row.effective_rank for row in members]
        cells.append(
            [
                kind,
                len(members),
                f"{sum(ranks) / len(ranks):.2f}",
                min(ranks),
                max(ranks),
                f"{sum(row.rank for row in members) / len(members):.1f}",
                f"{sum(row.nuclear_norm for row in members) / len(members):.4f}",
                f"{sum(row.energy for row in members) / len(members):.4f}",
            ]
        )
    note = (
        f"effective rank: singular values of s·ΔW above {tau:g}; energy: their share of the sum of squares."
    )
    if gated:
        note += " With all gates open, the most that the update can be."
    columns = ["module", "matrices", "effective rank", "least", "most", "rank", "nuclear norm", "energy"]
    return Table(columns, cells, title="Rank landscape (means over the matrices)", note=note)
