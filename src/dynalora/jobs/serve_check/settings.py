"""Settings of `dynalora serve-check`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dynalora.lab.settings import Setting, Settings


@dataclass(frozen=True, kw_only=True)
class ServeCheckSpec(Settings):
    """Which adapter is to be served.

    Attributes:
        adapter: Check this adapter: a run folder, an adapter folder, or an id on the Hugging Face Hub.
    """

    adapter: Annotated[str, Setting(positional=True, metavar="RUN", home=True)]
