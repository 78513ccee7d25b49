"""Units of work: each leaves one file, written whole, and is not run again where that file is there.

A comparison's cells, the stages of an experiment on forgetting, recoveries and trainings of a transfer matrix are
units. What a unit is and what it does is the job's affair; here is what all of them need: where the result is, whether
it belongs to the same settings, and who is working on it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import filelock

from dynalora.common.files import plain, write_file
from dynalora.errors import RunFolderError


class Unit(Protocol):
    """A piece of work with a result."""

    @property
    def name(self) -> str:
        """Its place in the folder of results, without the ending."""


U = TypeVar("U", bound=Unit)


class UnitStore(Generic[U]):
    """The results of units, one JSON file each.

    Args:
        folder: Where the files are.
        ending: What follows a unit's name in its file's path.
        shared: Whether several processes may work on the folder at once, so that a unit is locked while one of them
            works on it. A run folder is locked as a whole.
    """

    def __init__(self, folder: str | os.PathLike[str], *, ending: str = ".json", shared: bool = False) -> None:
        self.folder, self.ending, self.shared = Path(folder), ending, shared

    def file(self, unit: U) -> Path:
        """Where a unit's result is, or will be."""
        return self.folder / f"{unit.name}{self.ending}"

    def verify(self, unit: U, content: Mapping[str, Any]) -> None:
        """Make sure that a result that was read is this unit's; stores that several settings may use say how.

        Raises:
            RunFolderError: It was made with other settings.
        """

    def content(self, unit: U, result: Mapping[str, Any]) -> dict[str, Any]:
        """What a unit's file holds: its result, and what `verify` will ask for."""
        return dict(result)

    def read(self, unit: U) -> dict[str, Any] | None:
        """A unit's file; None if the unit has not been completed.

        Raises:
            RunFolderError: The file is damaged, or was made with other settings.
        """
        content = read_result(self.file(unit))
        if content is not None:
            self.verify(unit, content)
        return content

    def write(self, unit: U, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write a unit's file, whole or not at all, and return what it holds."""
        content: dict[str, Any] = plain(self.content(unit, result))
        write_file(self.file(unit), json.dumps(content) + "\n")
        return content

    def complete(self, unit: U, work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """A unit's file: read where it is there; else the work is done and written, with the seconds it took.

        Raises:
            filelock.Timeout: Another process works on the unit.
            RunFolderError: As `read`.
        """
        with self.lock(unit) if self.shared else nullcontext():
            content = self.read(unit)
            if content is None:
                began = time.perf_counter()
                result = work()
                content = self.write(unit, {**result, "seconds": time.perf_counter() - began})
        return content

    def lock(self, unit: U) -> filelock.BaseFileLock:
        """A lock that belongs to the process that works on the unit, and to nobody once that process is dead."""
        file = self.file(unit)
        file.parent.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(f"{file}.lock", timeout=0)

    def taken(self, unit: U) -> bool:
        """Whether a live process works on the unit."""
        lock = self.lock(unit)
        try:
            lock.acquire()
        except filelock.Timeout:
            return True
        lock.release()
        return False


def read_result(path: Path) -> dict[str, Any] | None:
    """The content of a result file; None if there is none.

    Raises:
        RunFolderError: It is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"'{path}' cannot be read ({error}); delete it to measure anew.") from error
    if not isinstance(content, dict):
        raise RunFolderError(f"'{path}' holds no result; delete it to measure anew.")
    return content
