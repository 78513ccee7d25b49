"""`dynalora compact`."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from dynalora.cli.shared import AdapterArgument, ConfigOption, after_imports, console, settings

if TYPE_CHECKING:
    from dynalora.adapter.compaction import CompactedMatrix, Compaction
    from dynalora.lab.report import Cell, Table


@dataclass(frozen=True, kw_only=True)
class CompactSpec:
    """What to compact, and where to."""

    adapter: str
    output: str
    threshold: float = 1e-4
    rewrite: bool = True


def compact(
    adapter: AdapterArgument = None,
    output: Annotated[
        str | None,
        typer.Argument(metavar="OUTPUT", help="Folder to write: new or empty.", show_default=False),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            help=r"Components of at most this share of the largest singular value are dead. \[1e-4]",
            show_default=False,
        ),
    ] = None,
    rewrite: Annotated[
        bool | None,
        typer.Option(
            "--rewrite/--no-rewrite",
            help=r"Rewrite factors to singular components where that removes more. \[--rewrite]",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Remove an adapter's dead components: a smaller adapter of the same method.

    What DiRA has brought to nothing is left out, so that the adapter takes
    less memory and time. The base model is not needed.

    [bold]Example[/bold]

    [cyan]dynalora compact runs/first smaller[/cyan]
    """
    flags = {"adapter": adapter, "output": output, "threshold": threshold, "rewrite": rewrite}
    spec = settings(CompactSpec, config, flags)
    from dynalora.export.compaction import compact_adapter_folder
    from dynalora.lab.adapters import adapter_folder
    from dynalora.lab.report import rich_table

    after_imports()
    done = compact_adapter_folder(
        adapter_folder(spec.adapter), spec.output, spec.threshold, rewrite=spec.rewrite
    )
    screen = console()
    screen.print(rich_table(_table(done)))
    screen.print(
        f"{spec.output}: {done.removed} components removed; {done.parameters_after:,} of "
        f"{done.parameters_before:,} parameters are left.",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def _table(done: Compaction) -> Table:
    from dynalora.lab.report import Table

    kinds: dict[str, list[CompactedMatrix]] = defaultdict(list)
    for matrix in done.matrices:
        kinds[matrix.module.rpartition(".")[2]].append(matrix)
    rows: list[list[Cell]] = []
    for kind, members in [*kinds.items(), ("all", list(done.matrices))]:
        after = [matrix.after for matrix in members]
        rows.append(
            [
                kind, len(members), f"{sum(matrix.before for matrix in members) / len(members):.2f}",
                f"{sum(after) / len(after):.2f}", min(after), max(after),
                f"{max(matrix.lost for matrix in members):.1e}",
            ]
        )  # fmt: skip
    return Table(
        ["module", "matrices", "rank before", "rank after", "least", "most", "lost"], rows,
        title="Compaction (ranks: means over the matrices)",
        note=f"lost: the largest share of an update that is gone; the largest singular value of s·ΔW is "
        f"{done.largest:.4g}, the smallest component kept for its size {done.smallest:.4g}.",
    )  # fmt: skip
