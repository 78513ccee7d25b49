"""The folder of a comparison: where cells are kept and taken."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import filelock
import yaml

from dynalora.common.files import write_file
from dynalora.errors import RunFolderError
from dynalora.jobs.compare.contestants import Cell
from dynalora.jobs.compare.settings import CompareSpec
from dynalora.lab.run_folder import CONFIG
from dynalora.lab.settings import defaults_of, read_yaml
from dynalora.lab.units import read_result

CELLS = "cells"


_GROWS = (
    "tasks", "output", "methods", "variants", "reference", "learning_rates", "learning_rate", "seeds", "all_rates",
    "jobs", "threads",
)  # fmt: skip
"""Settings that may differ between calls on the same folder: what more to run, and how many at once."""


def shared_settings(spec: CompareSpec) -> dict[str, Any]:
    """The settings that all cells of a folder have in common, as JSON holds them."""
    kept = {name: value for name, value in spec.settings().items() if name not in _GROWS}
    for name in ("r", "alpha", "dropout", "target_modules", "quantization", "match_parameters"):
        kept.pop(name)  # each cell says its own
    plain: dict[str, Any] = json.loads(json.dumps(kept))
    return plain


class CellStore:
    """Where cells are kept and taken.

    Args:
        folder: The comparison's folder.
        shared: What all cells have in common.
    """

    def __init__(self, folder: str | os.PathLike[str], shared: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.shared = dict(shared)

    def file(self, cell: Cell) -> Path:
        """Where a cell's result is, or will be."""
        return self.folder / CELLS / f"{cell.name}.json"

    def log(self, cell: Cell) -> Path:
        """Where a cell says what it does."""
        return self.folder / "logs" / f"{cell.name}.log"

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """A cell's result; None if it has not been run.

        Raises:
            RunFolderError: The file is damaged, or the cell was run with other settings.
        """
        file = self.file(cell)
        found = read_result(file)
        if found is None:
            return None
        wanted = {**self.shared, **json.loads(json.dumps(asdict(cell)))}
        there = {**defaults_of(CompareSpec), **found.get("settings", {}), **found.get("cell", {})}
        # The same files may lie elsewhere, as on another machine.
        differing = [
            f"{name} was {there.get(name)!r}, now {value!r}"
            for name, value in wanted.items()
            if there.get(name) != value and name not in ("task", "data", "model", "texts")
        ]
        if differing:
            raise RunFolderError(
                f"The cell '{file}' was run with other settings ({'; '.join(differing)}); take the same ones, choose "
                "another output folder, or delete the cell to run it anew."
            )
        return found

    def write(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """Keep a cell's result, all of it or nothing."""
        content = {"settings": self.shared, "cell": asdict(cell), **result}
        write_file(self.file(cell), json.dumps(content) + "\n")

    def lock(self, cell: Cell) -> filelock.BaseFileLock:
        """A lock that belongs to whoever runs the cell, and to nobody once that process is dead."""
        file = self.file(cell)
        file.parent.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(f"{file}.lock", timeout=0)

    def taken(self, cell: Cell) -> bool:
        """Whether a live process runs the cell."""
        lock = self.lock(cell)
        try:
            lock.acquire()
        except filelock.Timeout:
            return True
        lock.release()
        return False

    def check(self) -> None:
        """Make sure that the folder is new or holds cells of a comparison; changes nothing.

        Raises:
            RunFolderError: It is a file or holds something else.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise RunFolderError(f"The output '{self.folder}' is a file; choose another folder.")
        there = sorted(entry.name for entry in self.folder.iterdir()) if self.folder.exists() else []
        there = [name for name in there if not name.endswith((".tmp", ".lock"))]
        if there and not {CONFIG, CELLS} & set(there):
            raise RunFolderError(
                f"The folder '{self.folder}' is not empty and holds no comparison (found {', '.join(there[:3])}); "
                "choose another output folder."
            )
        if there and "tasks" not in (read_yaml(self.folder / CONFIG) if CONFIG in there else {"tasks": []}):
            raise RunFolderError(
                f"The folder '{self.folder}' holds another kind of run; choose another output folder."
            )

    def open(self, settings: Mapping[str, Any]) -> None:
        """Make the folder, and write the settings of whoever came last.

        Raises:
            RunFolderError: As `check`, or it cannot be written.
        """
        self.check()
        try:
            (self.folder / CELLS).mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(json.loads(json.dumps(dict(settings))), sort_keys=False, allow_unicode=True)
            write_file(self.folder / CONFIG, text)
        except OSError as error:
            raise RunFolderError(
                f"The folder '{self.folder}' cannot be written ({error.strerror or error}); choose another."
            ) from error
