"""Settings of `dynalora serve-check`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dynalora.lab.settings import Setting, Settings


@dataclass(frozen=True, kw_only=True)
class ServeCheckSpec(Settings):
    """Which adapter is to be served.

    Attributes:
        adapter: Run folder, adapter folder or Hub id of an adapter.
    """

    adapter: Annotated[str, Setting(positional=True, metavar="RUN")]
