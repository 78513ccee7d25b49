"""Settings of `dynalora merge`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dynalora.lab.choices import DTYPES
from dynalora.lab.settings import Setting, Settings


@dataclass(frozen=True, kw_only=True)
class MergeSpec(Settings):
    """Which adapter to merge into its base model, and where the whole model goes.

    Attributes:
        adapter: Merge this adapter: a run folder, an adapter folder, or an id on the Hugging Face Hub.
        output: Write the merged model into this folder, which must be new or empty.
        model: Use this base model; None: the one the adapter names.
        dtype: Write weights with this data type; None: as in the base model's files.
    """

    adapter: Annotated[str, Setting(positional=True, metavar="RUN", home=True)]
    output: Annotated[str, Setting("-o", writes="folder")]
    model: Annotated[str | None, Setting("-m", place=True)] = None
    dtype: Annotated[str | None, Setting(choices=DTYPES)] = None
