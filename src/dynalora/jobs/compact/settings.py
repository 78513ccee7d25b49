"""Settings of `dynalora compact`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dynalora.lab.settings import Setting, Settings


@dataclass(frozen=True, kw_only=True)
class CompactSpec(Settings):
    """Which adapter to make smaller, and where to write the smaller one.

    Attributes:
        adapter: Use this adapter: a run folder, an adapter folder, or an id on the Hugging Face Hub.
        output: Write the smaller adapter into this folder, which must be new or empty.
        threshold: Call components dead that have at most this share of the largest singular value.
        rewrite: Rewrite factors to singular components where that removes more.
    """

    adapter: Annotated[str, Setting(positional=True, metavar="ADAPTER", home=True)]
    output: Annotated[str, Setting(positional=True, metavar="OUTPUT", writes="folder")]
    threshold: Annotated[float, Setting(least=0, below=1)] = 1e-4
    rewrite: bool = True
