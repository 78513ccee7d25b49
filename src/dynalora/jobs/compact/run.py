"""`dynalora compact`: an adapter without its dead components, and what was removed by kind of module."""

from __future__ import annotations

from collections import defaultdict

from rich.console import Console

from dynalora.adapter.compaction import CompactedMatrix, Compaction
from dynalora.export.compaction import compact_adapter_folder
from dynalora.jobs.compact.settings import CompactSpec
from dynalora.lab.adapters import adapter_folder
from dynalora.lab.report import Cell, Table, say


def run_compact(spec: CompactSpec, *, console: Console) -> None:
    """Write the smaller adapter, and show what was removed."""
    result = compact_adapter_folder(adapter_folder(spec.adapter), spec.output, spec.threshold, rewrite=spec.rewrite)
    left = f"{result.parameters_after:,} of {result.parameters_before:,} parameters are left"
    say(console, compaction_table(result), f"{spec.output}: {result.removed} components removed; {left}.")


def compaction_table(result: Compaction) -> Table:
    """Ranks before and after, by kind of module."""
    kinds: dict[str, list[CompactedMatrix]] = defaultdict(list)
    for matrix in result.matrices:
        kinds[matrix.module.rpartition(".")[2]].append(matrix)
    rows: list[list[Cell]] = []
    for kind, members in [*kinds.items(), ("all", list(result.matrices))]:
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
        f"{result.largest:.4g}, the smallest component kept for its size {result.smallest:.4g}.",
    )  # fmt: skip
