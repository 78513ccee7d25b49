"""`dynalora export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    from peft import PeftModel

    from dynalora.forgetting.gates import GateStatistics
    from dynalora.lab.report import Cell, Table


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """What to export, and where to."""

    adapter: str
    output: str
    dtype: str | None = None
    max_rank: int | None = None
    tolerance: float | None = None
    uniform_rank: int | None = None
    ranks_only: bool = False
    calibrate: str | None = None
    measure: list[str] = field(default_factory=list)
    model: str | None = None
    split: str = "train"
    limit: int = 128
    max_length: int = 512


def export(
    adapter: AdapterArgument = None,
    output: Annotated[
        str | None,
        typer.Argument(metavar="OUTPUT", help="Folder to write: new or empty.", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Of the written factors: float32, bfloat16 or float16. \\[as they are]"),
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option("--max-rank", help=r"Cut every update to at most this rank. \[keep all]")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            help=r"Cut each update to the rank that loses at most this share of it, 0 to 1. \[keep all]",
        ),
    ] = None,
    uniform_rank: Annotated[
        int | None,
        typer.Option(
            "--uniform-rank",
            help=r"Fill all matrices up to this rank with zeros; 0 takes the largest. \[their own ranks]",
        ),
    ] = None,
    ranks_only: Annotated[
        bool | None,
        typer.Option(
            "--ranks-only",
            help="Write a JSON file with the ranks alone, as LoraConfig(**...) takes them for a fresh run.",
            show_default=False,
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate",
            metavar="DATA",
            show_default=False,
            help="Hold a DISeL adapter's gates at their means over these conversations.",
        ),
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            "--measure",
            metavar="DATA",
            show_default=False,
            help=r"Measure the price of that on these, repeatable. \[every other row of --calibrate]",
        ),
    ] = None,
    model: ModelOption = None,
    split: Annotated[
        str | None, typer.Option("--split", help=r"Which split of the data. \[train]", show_default=False)
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", help=r"Use the first rows of the data. \[128]", show_default=False),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", help=r"Longest sequence, in tokens. \[512]", show_default=False),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Write an adapter as a plain PEFT LoRA, which loads where dynalora is not installed.

    The export is exact, and is compared with the adapter before it is kept;
    with --max-rank or --tolerance it is the best of its rank, and its error
    is printed.
    The base model is not needed. DISeL's update depends on the input, so it
    has no exact LoRA: with --calibrate a snapshot is written, and its price
    measured with the base model.
    The last lines say which servers take the result.

    [bold]Example[/bold]

    [cyan]dynalora export runs/first lora-for-serving[/cyan]
    """
    flags = {
        "adapter": adapter, "output": output, "dtype": dtype, "max_rank": max_rank, "tolerance": tolerance,
        "uniform_rank": uniform_rank, "ranks_only": ranks_only, "calibrate": calibrate, "measure": measure or None,
        "model": model, "split": split, "limit": limit, "max_length": max_length,
    }  # fmt: skip
    spec = settings(ExportSpec, config, flags)
    from dynalora.errors import ConfigError
    from dynalora.export.lora import export_adapter_folder, export_lora, export_ranks
    from dynalora.lab.adapters import adapter_folder
    from dynalora.lab.precision import resolve_dtype
    from dynalora.lab.report import rich_table

    after_imports()
    if spec.dtype not in (None, "float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype is '{spec.dtype}'; choose one of float32, bfloat16, float16.")
    if spec.ranks_only:
        cuts = ("dtype", "max_rank", "tolerance", "uniform_rank", "calibrate")
        if given := [name for name in cuts if getattr(spec, name) is not None]:
            raise ConfigError(
                f"ranks_only writes the adapter's ranks as they are, and {given[0]} would change what is written; "
                "give one or the other."
            )
        settled = export_ranks(adapter_folder(spec.adapter), spec.output)
        console().print(
            f"{spec.output}: the ranks of {len(settled['rank_pattern'])} matrices, for LoraConfig.",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
        return
    options: Any = {
        "dtype": None if spec.dtype is None else resolve_dtype(spec.dtype),
        "max_rank": spec.max_rank,
        "tolerance": spec.tolerance,
        "uniform_rank": spec.uniform_rank,
    }
    screen = console()
    if spec.calibrate is None:
        if spec.measure:
            raise ConfigError(
                "measure is the text to measure a snapshot on, which needs calibrate, the text to take the gates from."
            )
        done = export_adapter_folder(adapter_folder(spec.adapter), spec.output, **options)
    else:
        adapted, record, prices = _snapshot(spec, spec.calibrate)
        done = export_lora(adapted, spec.output, gates=record, **options)
        screen.print(rich_table(prices))
    ranks = sorted(set(done.ranks.values()))
    told = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    screen.print(
        f"{done.path}: a plain LoRA of {done.modules} matrices, {told}, {done.parameters:,} parameters; "
        f"largest relative difference from the adapter {done.max_error:.1e}"
        + (f", largest share of an update cut off {done.lost:.1e}." if done.lost else "."),
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    for server in done.serving:
        screen.print(str(server), highlight=False, markup=False, soft_wrap=True)


def _snapshot(spec: ExportSpec, calibrate: str) -> tuple[PeftModel, Sequence[GateStatistics], Table]:
    """The adapter on its base model, its gates over the calibration text, and what holding them there costs."""
    from dynalora.errors import ConfigError
    from dynalora.evaluation.tokens import tokenize
    from dynalora.export.snapshot import snapshot_price
    from dynalora.forgetting.gate_recording import record_gates
    from dynalora.lab.adapters import read_config
    from dynalora.lab.data.collator import Collator
    from dynalora.lab.data.conversations import load_conversations
    from dynalora.lab.models import load_tokenizer
    from dynalora.lab.report import Table

    texts = {
        source: load_conversations(source, split=spec.split, limit=spec.limit)
        for source in dict.fromkeys([calibrate, *spec.measure])
    }
    if not spec.measure:
        if len(texts[calibrate]) < 2:
            raise ConfigError(
                f"{calibrate} has one row only, and the price is measured on rows that the gates were not taken "
                "from; give more, or name others with measure."
            )
        texts = {calibrate: texts[calibrate][::2], f"{calibrate}, other rows": texts[calibrate][1::2]}
    adapted = load_adapted(spec.adapter, spec.model)
    saved = read_config(spec.adapter)
    tokenizer = load_tokenizer(spec.model or str(saved.base_model_name_or_path))
    collator = Collator(tokenizer.pad_token_id or 0)
    batches = {}
    for source, conversations in texts.items():
        tokens = tokenize(conversations, tokenizer, max_length=spec.max_length)
        batches[source] = [collator(tokens.rows[start : start + 8]) for start in range(0, len(tokens), 8)]
    record = record_gates(adapted, batches[calibrate])
    measured = spec.measure or [source for source in texts if source != calibrate]
    rows: list[list[Cell]] = []
    for source in measured:
        price = snapshot_price(adapted, record, batches[source])
        rows.append(
            [
                Path(source).name, price.tokens,
                f"{price.kl:.4f}", f"{price.base_loss:.4f}", f"{price.gated_loss:.4f}",
                f"{price.snapshot_loss:.4f}",
            ]
        )  # fmt: skip
    table = Table(
        ["text", "tokens", "KL(gated ‖ snapshot)", "loss: base", "gated", "snapshot"], rows,
        title="The price of holding the gates at their means",
        note=f"Nats per response token; the gates are means over {record[0].tokens:,} response tokens of "
        f"{Path(calibrate).name}.",
    )  # fmt: skip
    return adapted, record, table
