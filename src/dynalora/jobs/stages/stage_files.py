"""What a stage leaves: its adapter, its rank landscape and its result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dynalora.common.files import write_file
from dynalora.errors import CheckpointError
from dynalora.forgetting.landscape import LandscapeRow

LANDSCAPE = "landscape.json"
RESULT = "result.json"
ADAPTER = "adapter"


def stage_folder(run: Path, seed: int, stage: str) -> Path:
    """Where a stage's files are."""
    return run / f"seed-{seed}" / stage


def write_landscape(folder: Path, rows: Sequence[LandscapeRow]) -> None:
    """Write a landscape with all its singular values."""
    write_file(folder / LANDSCAPE, json.dumps([asdict(row) for row in rows]) + "\n")


def read_landscape(folder: Path) -> list[LandscapeRow]:
    """A landscape that was written.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    try:
        rows = json.loads((folder / LANDSCAPE).read_text(encoding="utf-8"))
        return [LandscapeRow(**{**row, "singular_values": tuple(row["singular_values"])}) for row in rows]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"'{folder / LANDSCAPE}' cannot be read ({type(error).__name__}); run the stage again."
        ) from error
