"""Settings of `dynalora compact`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dynalora.lab.settings import Setting, Settings


@dataclass(frozen=True, kw_only=True)
class CompactSpec(Settings):
    """Which adapter to make smaller, and where to write the smaller one.

    Attributes:
        adapter: Run folder, adapter folder or Hub id of an adapter.
        output: Folder to write, new or empty.
        threshold: Components of at most this share of the largest singular value are dead.
        rewrite: Rewrite factors to singular components where that removes more.
    """

    adapter: Annotated[str, Setting(positional=True, metavar="ADAPTER")]
    output: Annotated[str, Setting(positional=True, metavar="OUTPUT", writes="folder")]
    threshold: float = 1e-4
    rewrite: bool = True
