"""Tables of landscapes, side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from dynalora.forgetting.landscape import LandscapeRow, energy_table
from dynalora.lab.report import Cell, Table


def landscape_table(
    landscapes: Mapping[str, Sequence[LandscapeRow]], tau: float, gates: Mapping[str, str]
) -> Table:
    """Ranks, nuclear norms and energies by kind of module.

    Args:
        landscapes: The matrices of each adapter or model, by its name.
        tau: Threshold of the effective ranks.
        gates: How the gates of each gated adapter were counted, in words.
    """
    several = len(landscapes) > 1
    cells: list[list[Cell]] = []
    for run, rows in landscapes.items():
        kinds: dict[str, list[LandscapeRow]] = defaultdict(list)
        for row in rows:
            kinds[row.kind].append(row)
        for kind, members in [*kinds.items(), ("all", list(rows))]:
            ranks = [row.effective_rank for row in members]
            cells.append(
                [
                    *([run] if several else []), kind, len(members), f"{_mean(ranks):.2f}", min(ranks), max(ranks),
                    f"{_mean([row.rank for row in members]):.1f}",
                    f"{_mean([row.nuclear_norm for row in members]):.4f}",
                    f"{_mean([row.energy for row in members]):.4f}",
                ]
            )  # fmt: skip
    note = (
        f"effective rank: singular values of s·ΔW above {tau:g}; energy: their share of the sum of squares."
    )
    for counted in dict.fromkeys(gates.values()):
        which = ", ".join(name for name, how in gates.items() if how == counted)
        most = ", the most that the update can be" if counted == "all gates open" else ""
        note += f" {which}: with {counted}{most}."
    columns = ["module", "matrices", "effective rank", "least", "most", "rank", "nuclear norm", "energy"]
    return Table(
        [*(["run"] if several else []), *columns], cells, title="Rank landscape (means over the matrices)", note=note
    )  # fmt: skip


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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
