"""Files and folders that appear whole or not at all (written beside their place, then moved there), and the cache."""

from __future__ import annotations

import csv
import io
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any


def why_not_written(path: str | os.PathLike[str], *, folder: bool = False) -> str | None:
    """Why a command may not write its output there; None if it may. Changes nothing.

    This is the one rule for all outputs: a file is new, a folder is new or empty, and the place can be written.

    Args:
        path: Where the output is to be.
        folder: Whether it is a folder and not a file.

    Returns:
        A clause that follows the path in a sentence, such as "exists already".
    """
    target = Path(path)
    if (reason := _why_no_name(target)) is not None:
        return reason
    try:
        if folder and target.is_dir():
            if any(target.iterdir()):
                return "is not an empty folder"
        elif target.is_dir():
            return "is a folder and not the name of a file"
        elif os.path.lexists(target):
            return "exists already"
    except OSError as error:
        return f"cannot be written ({error.strerror or error})"
    return why_no_place(target if folder else target.absolute().parent)


def why_no_place(folder: str | os.PathLike[str]) -> str | None:
    """Why files cannot be made in a folder, which need not be there yet; None if they can. Changes nothing.

    Returns:
        A clause that follows the path in a sentence.
    """
    if (reason := _why_no_name(Path(folder))) is not None:
        return reason
    place = next(place for place in (Path(folder), *Path(folder).absolute().parents) if os.path.lexists(place))
    if not place.is_dir():
        return f"cannot be made because '{place}' is a file"
    try:
        # Permissions do not say it all: a disk may be read-only, or hold no files at all.
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return f"cannot be written ({error.strerror or error})"


def _why_no_name(path: Path) -> str | None:
    """Why nothing can be called so, whether or not it is there."""
    try:
        str(path).encode()
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeEncodeError:  # libraries that write files there take nothing else
        return "has bytes in its name that are not UTF-8"
    except ValueError:  # a null character
        return "cannot be the name of a file"
    except OSError as error:
        return f"cannot be written ({error.strerror or error})"
    return None


@contextmanager
def file_beside(path: str | os.PathLike[str], *, replace: bool = True) -> Iterator[Path]:
    """An empty file to write, which takes the place of `path` when the block ends without an error.

    A reader, or a crash, sees the old content or the new one and nothing between. The file follows the user's umask.
    Its folder is made if needed.

    Args:
        path: The file to replace or to make.
        replace: Whether a file that is there gives way; otherwise it stays, even if it came only while the block ran.

    Raises:
        FileExistsError: There is a file, and it must not be replaced.
        OSError: It cannot be written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        beside.chmod(0o666 & ~_umask())  # mkstemp makes it private
        if not replace:
            _reserve(beside, target)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def _reserve(beside: Path, target: Path) -> None:
    """Make `target` appear with the content of `beside`, unless there is something."""
    try:
        os.link(beside, target)
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links: an empty file is there for a moment
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))


def write_file(path: str | os.PathLike[str], content: str | bytes, *, replace: bool = True) -> Path:
    """Write text (as UTF-8) or bytes whole or not at all, and return the path; its folder is made if needed.

    With `replace=False` a file that is there stays, and FileExistsError is raised.
    """
    with file_beside(path, replace=replace) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)


def write_files(contents: Mapping[Path, str | bytes], *, replace: bool = True) -> list[Path]:
    """Write several files, each as `write_file` does, and none where one cannot be written; returns the paths."""
    with ExitStack() as open_files:
        for path, content in contents.items():
            beside = open_files.enter_context(file_beside(path, replace=replace))
            beside.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(contents)


@contextmanager
def folder_beside(path: str | os.PathLike[str], *, replace: bool = True) -> Iterator[Path]:
    """A fresh folder to fill, which takes the place of `path` when the block ends without an error.

    Args:
        path: The folder to replace or to make.
        replace: Whether a folder that holds something gives way; otherwise only an empty one does.

    Yields:
        An empty folder on the same disk.

    Raises:
        OSError: `path` holds something and must not be replaced, or cannot be written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp") as beside:
        fresh = Path(beside) / "new"
        fresh.mkdir()
        yield fresh
        if not replace and target.exists():
            target.rmdir()
        elif target.exists():
            # A folder cannot be replaced by os.replace unless it is empty: move the old one aside first.
            os.replace(target, Path(beside) / "old")
        os.replace(fresh, target)


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as CSV; None is an empty cell."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()


def records_csv(records: Iterable[Mapping[str, Any]]) -> str:
    """Records with the same names as CSV; empty without any."""
    rows = list(records)
    return csv_text(list(rows[0]), [list(row.values()) for row in rows]) if rows else ""


def plain(value: Any, *, finite: bool = False) -> Any:
    """`value` in terms that JSON and YAML hold: paths and dates as text, tuples and sets as lists.

    Args:
        value: Mappings and sequences of these, and single ones.
        finite: Make None of NaN and infinities, for which JSON has no word.

    Raises:
        TypeError: There are no such terms for a value.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item, finite=finite) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item, finite=finite) for item in value)
    if isinstance(value, (list, tuple)):
        return [plain(item, finite=finite) for item in value]
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) or not finite else None
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return plain(value.item(), finite=finite)  # a NumPy or torch scalar
    if isinstance(value, (os.PathLike, date)):
        return str(value)
    raise TypeError(f"A {type(value).__name__} cannot be written as JSON or YAML.")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def cache_folder() -> Path:
    """The user's cache folder: `$DYNALORA_CACHE`, else `$XDG_CACHE_HOME/dynalora`, else `~/.cache/dynalora`.

    It may not exist yet. Everything in it can be deleted at any time.
    """
    folder = os.environ.get("DYNALORA_CACHE")
    if folder:
        return Path(folder).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "dynalora"
