"""Settings of `dynalora export`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from dynalora.common.files import why_not_written
from dynalora.errors import ConfigError
from dynalora.lab.settings import Setting, Settings


@dataclass(frozen=True, kw_only=True)
class ExportSpec(Settings):
    """Which adapter to export, how, and where to.

    Attributes:
        adapter: Export this adapter: a run folder, an adapter folder, or an id on the Hugging Face Hub.
        output: Write the plain LoRA into this folder, which must be new or empty.
        dtype: Write factors with this data type, float32, bfloat16 or float16; None: as they are.
        max_rank: Cut every update to at most this rank; None: keep all.
        tolerance: Cut each update to the rank that loses at most this share of it, from 0 to 1; None: keep all.
        uniform_rank: Fill all matrices up to this rank with zeros, where 0 takes the largest; None: each has its own
            rank.
        ranks_only: Write a JSON file with the ranks alone, as LoraConfig(**...) takes them for a fresh run.
        calibrate: Hold a DISeL adapter's gates at their means over these conversations.
        measure: Measure what holding the gates costs on these conversations; empty: every other row of `--calibrate`.
        model: Use this base model; None: the one the adapter names.
        split: Read this split of the data.
        limit: Use only this many rows of the data, from the first.
        max_length: Cut sequences after this many tokens.
    """

    adapter: Annotated[str, Setting(positional=True, metavar="ADAPTER", home=True)]
    output: Annotated[str, Setting(positional=True, metavar="OUTPUT", home=True)]
    dtype: Annotated[str | None, Setting(choices=("float32", "bfloat16", "float16"))] = None
    max_rank: Annotated[int | None, Setting(least=1)] = None
    tolerance: Annotated[float | None, Setting(least=0, below=1)] = None
    uniform_rank: Annotated[int | None, Setting(least=0)] = None
    ranks_only: bool = False
    calibrate: Annotated[str | None, Setting(metavar="DATA")] = None
    measure: Annotated[list[str], Setting(metavar="DATA")] = field(default_factory=list)
    model: Annotated[str | None, Setting("-m", home=True, only_with="calibrate")] = None
    split: Annotated[str, Setting(only_with="calibrate")] = "train"
    limit: Annotated[int, Setting(least=1, only_with="calibrate")] = 128
    max_length: Annotated[int, Setting(least=2, only_with="calibrate")] = 512

    def _check(self) -> None:
        super()._check()
        reason = why_not_written(self.output, folder=not self.ranks_only)
        if reason:
            raise ConfigError(f"output is '{self.output}', which {reason}; give another place.")
        if self.ranks_only:
            for name in ("dtype", "max_rank", "tolerance", "uniform_rank", "calibrate"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"ranks_only writes the adapter's ranks as they are, and {name} would change what is written; "
                        "give one or the other."
                    )
        if self.measure and self.calibrate is None:
            raise ConfigError(
                "measure is the text to measure a snapshot on, which needs `calibrate`, text to take the gates from."
            )
