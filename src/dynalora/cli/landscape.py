"""`dynalora landscape`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynalora.cli.shared import (
    ConfigOption,
    ModelOption,
    after_imports,
    console,
    load_adapted,
    settings,
)

if TYPE_CHECKING:
    from dynalora.common.progress import Progress
    from dynalora.forgetting.landscape import LandscapeRow
    from dynalora.lab.report import Cell, Table


@dataclass(frozen=True, kw_only=True)
class LandscapeSpec:
    """Which adapters or models, and what to make of them."""

    adapter: list[str] | str
    model: str | None = None
    against: str | None = None
    modules: str | None = None
    data: str | None = None
    split: str = "train"
    limit: int = 64
    max_length: int = 512
    tau: float = 1e-3
    taus: list[str] = field(default_factory=list)
    plot: str | None = None
    csv: str | None = None
    json: str | None = None

    @property
    def sources(self) -> list[str]:
        """The adapters or models."""
        return [self.adapter] if isinstance(self.adapter, str) else list(self.adapter)


def landscape(
    adapter: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ADAPTER...",
            help="Run folders, adapter folders or Hub ids; full models with --against.",
            show_default=False,
        ),
    ] = None,
    model: ModelOption = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="MODEL",
            help="Compare full models with this one: the difference of weights.",
            show_default=False,
        ),
    ] = None,
    modules: Annotated[
        str | None,
        typer.Option(
            "--modules", metavar="REGEX", help="Of full models, only these matrices.", show_default=False
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="Conversations: count gated adapters with their mean gates.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Which split of them. \\[train]", show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Use the first rows. \\[64]", show_default=False)
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", help="Longest sequence, in tokens. \\[512]", show_default=False),
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option("--tau", help="A singular value counts above this. \\[0.001]", show_default=False),
    ] = None,
    taus: Annotated[
        str | None,
        typer.Option(
            "--taus",
            help="Thresholds of the energy table, with commas. \\[0.01 to 0.0001]",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option("--plot", metavar="FILE.png", help="Also draw it, layer by layer.", show_default=False),
    ] = None,
    csv: Annotated[
        str | None,
        typer.Option("--csv", metavar="FILE", help="Also write a line per matrix.", show_default=False),
    ] = None,
    json: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="The same with all singular values.", show_default=False),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Show how much rank adapters really use, per kind of module, side by side.

    Effective rank, nuclear norm and energy, exact from the adapters' factors;
    the base model is needed for PEFT's LoRA and with --data only. Of full
    models, the difference of their weights is measured, streamed from disk.

    [bold]Examples[/bold]

    [cyan]dynalora landscape runs/first runs/second --plot landscape.png[/cyan]
    [cyan]dynalora landscape ./tuned --against ./original --csv landscape.csv[/cyan]
    """
    flags: dict[str, Any] = {
        "adapter": adapter or None,
        "model": model,
        "against": against,
        "modules": modules,
    }
    flags |= {"data": data, "split": split, "limit": limit, "max_length": max_length, "tau": tau}
    flags |= {"taus": None if taus is None else taus.split(","), "plot": plot, "csv": csv, "json": json}
    spec = settings(LandscapeSpec, config, flags)
    from dynalora.common.files import records_csv, write_file
    from dynalora.common.progress import rich_progress
    from dynalora.drawing.landscape import plot_rank_landscape
    from dynalora.drawing.style import save
    from dynalora.errors import ConfigError
    from dynalora.forgetting.landscape import (
        QUANTITIES,
        TAUS,
        check_tau,
        landscape_records,
    )
    from dynalora.lab.report import rich_table

    after_imports()
    if spec.against is not None and (spec.data is not None or spec.model is not None):
        raise ConfigError(
            "--against compares full models; --data and --model belong to adapters, so leave them out."
        )
    if spec.against is None and spec.modules is not None:
        raise ConfigError("--modules chooses matrices of full models; give --against, or leave it out.")
    thresholds = _numbers(spec.taus) or list(TAUS)
    for number in (spec.tau, *thresholds):
        check_tau(number)
    names = _names(spec.sources)
    screen = console()
    with rich_progress(screen) as progress:
        if spec.against is not None:
            runs = _of_models(spec, names, progress)
            gated: dict[str, str] = {}
        else:
            runs, gated = _of_adapters(spec, names, progress)
    screen.print(rich_table(_table(runs, spec.tau, gated)))
    screen.print(rich_table(_energies(runs, thresholds)))
    written = []
    if spec.csv is not None:
        written.append(write_file(Path(spec.csv), records_csv(landscape_records(runs))))
    if spec.json is not None:
        written.append(write_file(Path(spec.json), _as_json(landscape_records(runs, spectra=True))))
    if spec.plot is not None:
        for quantity in QUANTITIES:
            made = plot_rank_landscape(
                runs if len(runs) > 1 else next(iter(runs.values())), quantity=quantity
            )
            place = Path(spec.plot)
            if quantity != QUANTITIES[0]:
                place = place.with_name(f"{place.stem}-{quantity}{place.suffix}")
            written += save(made, place)
    if written:
        screen.print(
            f"Written: {', '.join(map(str, written))}", highlight=False, markup=False, soft_wrap=True
        )


def _numbers(given: list[str]) -> list[float]:
    from dynalora.errors import ConfigError

    try:
        return [float(part) for part in given if part.strip()]
    except ValueError as error:
        raise ConfigError(
            f"taus must be numbers ({error}); write them with commas, such as 0.01,0.001."
        ) from None


def _names(sources: list[str]) -> dict[str, str]:
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


def _of_models(
    spec: LandscapeSpec, names: Mapping[str, str], progress: Progress
) -> dict[str, list[LandscapeRow]]:
    import torch

    from dynalora.forgetting.full_models import model_landscape
    from dynalora.lab.adapters import model_folder

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
) -> tuple[dict[str, list[LandscapeRow]], dict[str, str]]:
    """The landscapes, and for each gated adapter how its gates were counted."""
    from dynalora.errors import UnsupportedError
    from dynalora.export.lora import load_without_base
    from dynalora.forgetting.landscape import rank_landscape
    from dynalora.lab.adapters import adapter_folder, read_config
    from dynalora.methods import METHODS

    configs = {name: read_config(source) for name, source in names.items()}
    methods = {name: str(saved.peft_type).rpartition(".")[2].lower() for name, saved in configs.items()}
    gated = {name: "all gates open" for name, saved in configs.items() if getattr(saved, "gated", False)}
    if spec.data is not None and not gated:
        raise UnsupportedError("None of the adapters has gates, so --data has no use; leave it out.")
    runs: dict[str, list[LandscapeRow]] = {}
    for name, source in names.items():
        gates = None
        if name in gated and spec.data is not None:
            adapted: Any = load_adapted(source, spec.model)
            gates = _gates(spec, adapted, source, progress)
            gated[name] = f"mean gates on {Path(spec.data).name}"
        elif methods[name] in METHODS:
            adapted = load_without_base(adapter_folder(source))
        else:
            adapted = load_adapted(source, spec.model)
        runs[name] = rank_landscape(adapted, tau=spec.tau, gates=gates)
    return runs, gated


def _gates(spec: LandscapeSpec, adapted: Any, source: str, progress: Progress) -> Any:
    from dynalora.evaluation.tokens import tokenize
    from dynalora.forgetting.gate_recording import record_gates
    from dynalora.lab.adapters import read_config
    from dynalora.lab.data.collator import Collator
    from dynalora.lab.data.conversations import load_conversations
    from dynalora.lab.models import load_tokenizer

    conversations = load_conversations(str(spec.data), split=spec.split, limit=spec.limit)
    tokenizer = load_tokenizer(spec.model or str(read_config(source).base_model_name_or_path))
    tokens = tokenize(conversations, tokenizer, max_length=spec.max_length)
    collator = Collator(tokenizer.pad_token_id or 0)
    batches = [collator(tokens.rows[start : start + 8]) for start in range(0, len(tokens), 8)]
    return record_gates(
        adapted, batches, progress=lambda done, total: progress("Recording gates", done, total or None)
    )


def _as_json(records: list[dict[str, Any]]) -> str:
    import json

    return "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n"


def _table(runs: Mapping[str, list[LandscapeRow]], tau: float, gated: Mapping[str, str]) -> Table:
    from dynalora.lab.report import Table

    cells: list[list[Cell]] = []
    for run, rows in runs.items():
        kinds: dict[str, list[LandscapeRow]] = defaultdict(list)
        for row in rows:
            kinds[row.kind].append(row)
        for kind, members in [*kinds.items(), ("all", rows)]:
            ranks = [row.effective_rank for row in members]
            cells.append(
                [
                    *([run] if len(runs) > 1 else []),
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
    for how in dict.fromkeys(gated.values()):
        which = ", ".join(name for name, counted in gated.items() if counted == how)
        most = ", the most that the update can be" if how == "all gates open" else ""
        note += f" {which}: with {how}{most}."
    columns = ["module", "matrices", "effective rank", "least", "most", "rank", "nuclear norm", "energy"]
    title = "Rank landscape (means over the matrices)"
    return Table([*(["run"] if len(runs) > 1 else []), *columns], cells, title=title, note=note)


def _energies(runs: Mapping[str, list[LandscapeRow]], taus: list[float]) -> Table:
    from dynalora.forgetting.landscape import energy_table
    from dynalora.lab.report import Table

    tables = {run: energy_table(rows, taus) for run, rows in runs.items()}
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
    several = len(tables) > 1
    columns = [
        f"{run}: {what}" if several else what
        for run in tables
        for what in ("energy (%)", "mean effective rank")
    ]
    note = "Over all matrices together: squares of the singular values above τ, as a share of all squares."
    return Table(["τ", *columns], cells, title="Energy above thresholds", note=note)
