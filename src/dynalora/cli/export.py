"""`dynalora export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from dynalora.cli.shared import AdapterArgument, ConfigOption, after_imports, console, settings


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """What to export, and where to."""

    adapter: str
    output: str
    dtype: str | None = None
    max_rank: int | None = None
    tolerance: float | None = None
    ranks_only: bool = False


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
    ranks_only: Annotated[
        bool | None,
        typer.Option(
            "--ranks-only",
            help="Write a JSON file with the ranks alone, as LoraConfig(**...) takes them for a fresh run.",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Write an adapter as a plain PEFT LoRA, which loads where dynalora is not installed.

    The export is exact, and is compared with the adapter before it is kept;
    with --max-rank or --tolerance it is the best of its rank, and its error
    is printed.
    The base model is not needed. DISeL's update depends on the input, so it
    has no exact LoRA and is refused.

    [bold]Example[/bold]

    [cyan]dynalora export runs/first lora-for-serving[/cyan]
    """
    flags = {
        "adapter": adapter, "output": output, "dtype": dtype, "max_rank": max_rank, "tolerance": tolerance,
        "ranks_only": ranks_only,
    }  # fmt: skip
    spec = settings(ExportSpec, config, flags)
    from dynalora.errors import ConfigError
    from dynalora.experiments.adapters import adapter_folder
    from dynalora.experiments.finetune import resolve_dtype
    from dynalora.export.lora import export_adapter_folder, export_ranks

    after_imports()
    if spec.dtype not in (None, "float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype is '{spec.dtype}'; choose one of float32, bfloat16, float16.")
    if spec.ranks_only:
        settled = export_ranks(adapter_folder(spec.adapter), spec.output)
        console().print(
            f"{spec.output}: the ranks of {len(settled['rank_pattern'])} matrices, for LoraConfig.",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
        return
    done = export_adapter_folder(
        adapter_folder(spec.adapter),
        spec.output,
        dtype=None if spec.dtype is None else resolve_dtype(spec.dtype),
        max_rank=spec.max_rank,
        tolerance=spec.tolerance,
    )
    screen = console()
    ranks = sorted(set(done.ranks.values()))
    told = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    screen.print(
        f"{done.path}: a plain LoRA of {done.modules} matrices, {told}, {done.parameters:,} parameters; "
        f"largest relative difference from the adapter {done.max_error:.1e}"
        + (f", largest share of an update cut off {done.lost:.1e}." if done.lost else "."),
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
