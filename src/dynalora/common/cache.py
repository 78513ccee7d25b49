"""Where dynalora keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder: `$DYNALORA_CACHE`, else `$XDG_CACHE_HOME/dynalora`, else `~/.cache/dynalora`.

    It may not exist yet. Everything in it can be deleted at any time.
    """
    folder = os.environ.get("DYNALORA_CACHE")
    if folder:
        return Path(folder).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "dynalora"
