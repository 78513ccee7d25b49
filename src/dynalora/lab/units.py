"""Units of work: each leaves one file, and is not run again where that file is there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynalora.errors import RunFolderError


def as_json(content: Mapping[str, Any]) -> str:
    """A result as the text of its file."""
    return json.dumps(content, indent=1) + "\n"


def read_result(path: Path) -> dict[str, Any] | None:
    """The content of a result file; None if there is none.

    Raises:
        RunFolderError: It is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"'{path}' cannot be read ({error}); delete it to measure anew.") from error
    if not isinstance(content, dict):
        raise RunFolderError(f"'{path}' holds no result; delete it to measure anew.")
    return content
