"""One folder per run, which no other run can overwrite.

Layout::

    runs/my-run/
      config.yaml     what was asked for; `dynalora finetune --config` accepts it again
      run.json        when, with which versions, and whether the run finished
      metrics.jsonl   one JSON object per line, flushed line by line
      retention.jsonl likewise, what a monitor of retention measured
      adapter/        the trained adapter, as `save_pretrained` writes it
      plots/          PNG files
      report.html     everything above on one page, self-contained
      run.lock        held by the process that is writing the folder
"""

from __future__ import annotations

import json
import os
import platform
import socket
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import yaml

from dynalora.common.files import folder_beside, plain, why_no_place, write_file
from dynalora.common.names import shown
from dynalora.common.processes import process_count
from dynalora.errors import RunFolderError
from dynalora.lab.settings import parse_yaml

CONFIG = "config.yaml"
STATUS = "run.json"
METRICS = "metrics.jsonl"
RETENTION = "retention.jsonl"
REPORT = "report.html"
LOCK = "run.lock"
_OWN_BEFORE_START = {LOCK}
_RECORDS = (METRICS, RETENTION)
_VERSIONS_OF = ("dynalora", "torch", "transformers", "peft", "accelerate", "datasets")


class RunFolder:
    """A run's folder, locked for as long as the object is open.

    Make one with [`RunFolder.create`][dynalora.lab.run_folder.RunFolder.create], use it as a context
    manager or call `close()`. The lock belongs to the process, so the lock of a process that died, however it
    died, is free again.

    Attributes:
        path: The folder.
        config: The settings that were written to `config.yaml`.
        resumed: Whether the folder already held this run and is being continued.
    """

    def __init__(self, path: Path, config: dict[str, Any], lock: filelock.BaseFileLock | None, resumed: bool) -> None:
        self.path = path
        self.config = config
        self.resumed = resumed
        self._lock = lock
        self._metrics_file: Any = None

    # --- opening and closing -------------------------------------------------------------------------------

    @classmethod
    def check(
        cls,
        path: str | os.PathLike[str],
        config: Mapping[str, Any],
        *,
        resume: bool = False,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """Raise what `create` would raise, and change nothing: for use before anything expensive is loaded.

        Raises:
            RunFolderError: As [`create`][dynalora.lab.run_folder.RunFolder.create].
        """
        folder = Path(path)
        if os.path.exists(folder) and not folder.is_dir():
            raise RunFolderError(f"The run folder '{folder}' is a file; choose another output folder.")
        reason = why_no_place(folder)
        if reason is not None:
            raise RunFolderError(f"The run folder '{folder}' {reason}; choose another output folder.")
        if (folder / LOCK).exists():
            lock = _lock_of(folder)
            lock.release()
        cls._refuse_what_is_there(folder, plain(config), resume, plain(defaults or {}))

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        config: Mapping[str, Any],
        *,
        resume: bool = False,
        defaults: Mapping[str, Any] | None = None,
        main_process: bool = True,
    ) -> RunFolder:
        """Make a new run folder, or continue the run that it holds.

        Args:
            path: An empty folder or one that does not exist yet; with `resume`, one that holds this very run.
            config: The run's settings, made of what YAML can hold; written to `config.yaml`.
            resume: Continue the run in `path`, which must have been made with an equal `config`.
            defaults: What the settings are that its `config.yaml` lacks, because an older version has written it.
            main_process: False on all but one process of a distributed run: such a folder writes nothing.

        Returns:
            The open, locked folder.

        Raises:
            RunFolderError: The folder holds another run or files that belong to no run, is being written by a
                live process, cannot be written, or (with `resume`) holds no run or one with other settings.
        """
        folder = Path(path)
        settings = plain(config)
        if not main_process:
            return cls(folder, settings, None, resume)
        cls.check(folder, settings, resume=resume, defaults=defaults)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(
                f"The run folder '{folder}' cannot be made ({error.strerror or error}); choose another output folder."
            ) from error
        lock = _lock_of(folder)
        try:
            # Looked at again under the lock: two processes may both have passed the first look.
            cls._refuse_what_is_there(folder, settings, resume, plain(defaults or {}))
            run = cls(folder, settings, lock, resume)
            run._start()
        except BaseException:
            lock.release()
            raise
        return run

    @staticmethod
    def recorded(path: str | os.PathLike[str]) -> dict[str, Any]:
        """The settings that a folder's run was started with; none where there is no readable `config.yaml`."""
        return _read_config(Path(path))

    @staticmethod
    def has_finished(path: str | os.PathLike[str]) -> bool:
        """Whether the run in a folder reached its end."""
        return bool(_status(Path(path)).get("finished"))

    @staticmethod
    def _refuse_what_is_there(folder: Path, config: dict[str, Any], resume: bool, defaults: Mapping[str, Any]) -> None:
        entries = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        entries = [name for name in entries if name not in _OWN_BEFORE_START and not name.endswith(".tmp")]
        if resume:
            if CONFIG not in entries:
                raise RunFolderError(
                    f"There is no run to resume in '{folder}' (it has no {CONFIG}); start it without `resume`."
                )
            if _status(folder).get("finished"):
                raise RunFolderError(f"The run in '{folder}' has finished; there is nothing to resume.")
            added = {name: value for name, value in defaults.items() if name in config}
            differing = _differences({**added, **_read_config(folder)}, config)
            if differing:
                raise RunFolderError(
                    f"The run in '{folder}' was started with other settings ({'; '.join(differing)}); "
                    "resume with the same settings or choose another output folder."
                )
            return
        if not entries or _came_to_nothing(folder):
            return
        if CONFIG in entries and STATUS in entries:
            raise RunFolderError(
                f"The run folder '{folder}' already holds a run ({_describe(folder)}); choose another output folder"
                + ("." if _status(folder).get("finished") else ", or resume that run with the same settings.")
            )
        listed = ", ".join(entries[:3]) + (f" and {len(entries) - 3} more" if len(entries) > 3 else "")
        raise RunFolderError(
            f"The run folder '{folder}' is not empty and holds no run (found {listed}); choose another output folder."
        )

    def _start(self) -> None:
        if not self.resumed:
            for name in _RECORDS:  # of a run that came to nothing
                (self.path / name).unlink(missing_ok=True)
            # The status first: a configuration without one is somebody's, not that of a run killed here.
            self._write_status({"started": _now(), "finished": None, "processes": process_count()})
            write_file(self.path / CONFIG, yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))
        else:
            status = self.status()
            self._write_status({**status, "finished": None, "resumed": [*status.get("resumed", []), _now()]})

    def _write_status(self, status: Mapping[str, Any]) -> None:
        process = {"process": os.getpid(), "host": socket.gethostname(), "python": platform.python_version()}
        versions = {name: version_of(name) for name in _VERSIONS_OF}
        write_file(self.path / STATUS, json.dumps({**status, **process, "versions": versions}, indent=2) + "\n")

    def finish(self) -> None:
        """Record in `run.json` that the run reached its end."""
        if self.writable:
            self._write_status({**self.status(), "finished": _now()})

    def close(self) -> None:
        """Close the metrics file and give up the lock. Safe to call twice."""
        if self._metrics_file is not None:
            self._metrics_file.close()
            self._metrics_file = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, Exception) and not self.resumed:
            self._discard_nothing()
        self.close()

    def _discard_nothing(self) -> None:
        """Make the folder free again if nothing came of the run: a mistake in its settings must not block it."""
        if not self.writable or not _came_to_nothing(self.path):
            return
        if self._metrics_file is not None:
            self._metrics_file.close()
            self._metrics_file = None
        for entry in self.path.iterdir():
            if entry.name != LOCK and not entry.name.endswith(".tmp"):
                entry.rmdir() if entry.is_dir() else entry.unlink()

    # --- what is in it -------------------------------------------------------------------------------------

    @property
    def writable(self) -> bool:
        """Whether this process is the one that writes the folder."""
        return self._lock is not None

    @property
    def adapter(self) -> Path:
        """Where the trained adapter is saved."""
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Where the trainer keeps what it needs to continue a killed run."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """The self-contained report."""
        return self.path / REPORT

    def status(self) -> dict[str, Any]:
        """The content of `run.json`, empty if the file is missing or damaged."""
        return _status(self.path)

    # --- metrics -------------------------------------------------------------------------------------------

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record to `metrics.jsonl` and flush it, so that a killed run keeps what it measured.

        Numbers that JSON cannot hold (NaN, infinities) are written as null.
        """
        if not self.writable:
            return
        if self._metrics_file is None:
            self._metrics_file = _continued(self.path / METRICS)
        self._metrics_file.write(json.dumps(plain(record, finite=True), allow_nan=False) + "\n")
        self._metrics_file.flush()

    def metrics(self) -> list[dict[str, Any]]:
        """All records so far. A last line cut short by a kill is left out."""
        return list(read_metrics(self.path))

    def forget_metrics_after(self, step: int, *, again: Collection[str] = ()) -> None:
        """Drop what a resumed run is going to record again.

        Args:
            step: Records of later optimizer steps are dropped.
            again: And those that have one of these keys, whatever their step: measured when training has ended.
        """
        self._rewrite_metrics(
            record
            for record in self.metrics()
            if int(record.get("step") or 0) <= step and record.keys().isdisjoint(again)
        )

    def forget_metrics_behind(self, key: str) -> None:
        """Drop the records behind the last one that has a key: of a piece of work that was killed before its result."""
        records = self.metrics()
        while records and key not in records[-1]:
            records.pop()
        self._rewrite_metrics(records)

    def _rewrite_metrics(self, records: Iterable[Mapping[str, Any]]) -> None:
        if not self.writable:
            return
        text = "".join(json.dumps(record) + "\n" for record in records)
        if self._metrics_file is not None:
            self._metrics_file.close()
            self._metrics_file = None
        write_file(self.path / METRICS, text)

    # --- files ---------------------------------------------------------------------------------------------

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file of the run, atomically; `name` is relative to the folder."""
        target = self.path / name
        return write_file(target, content) if self.writable else target

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """A fresh folder to fill, which takes the place of `name` when the block ends without an error.

        On processes that do not write the run, the folder is a temporary one and goes away again.

        Example:
            ```python
            with run.replacing("adapter") as folder:
                model.save_pretrained(folder)
            ```
        """
        if self.writable:
            with folder_beside(self.path / name) as fresh:
                yield fresh
        else:
            with tempfile.TemporaryDirectory() as scratch:
                yield Path(scratch)


def read_metrics(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Records of a run's `metrics.jsonl`, oldest first; none where a folder has no metrics."""
    return read_records(Path(path) / METRICS)


def read_records(file: Path) -> Iterator[dict[str, Any]]:
    """Records of a file with a JSON object per line, oldest first; none where there is no file."""
    if not file.exists():
        return
    with open(file, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue  # the one line that a kill may have cut short
            if isinstance(record, dict):
                yield record


def _continued(file: Path) -> Any:
    """A file of records, open to append; a record that a kill cut short gets a line of its own."""
    with open(file, "ab+") as opened:
        if opened.tell() and (opened.seek(-1, os.SEEK_END), opened.read())[1] != b"\n":
            opened.write(b"\n")
    return open(file, "a", encoding="utf-8")


def _lock_of(folder: Path) -> filelock.BaseFileLock:
    lock = filelock.FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise RunFolderError(
            f"The run folder '{folder}' is in use by {_owner(folder)}; "
            "wait for it to end or choose another output folder."
        ) from None
    except OSError as error:
        raise RunFolderError(
            f"The run folder '{folder}' cannot be locked ({error.strerror or error}); choose another output folder."
        ) from error
    return lock


def _status(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _came_to_nothing(folder: Path) -> bool:
    """Whether a folder holds a run that ended, however it did, before its first step, and nothing else."""
    status = _status(folder)
    if "started" not in status or status.get("finished"):
        return False
    for entry in folder.iterdir():
        written = entry.name in {CONFIG, STATUS, LOCK, *_RECORDS} or entry.name.endswith(".tmp")
        if not written and not (entry.is_dir() and not any(entry.iterdir())):
            return False
    return not any(record.get("step") for name in _RECORDS for record in read_records(folder / name))


def _owner(folder: Path) -> str:
    status = _status(folder)
    return f"process {status['process']} on {status.get('host')}" if "process" in status else "another process"


def _describe(folder: Path) -> str:
    status, config = _status(folder), _read_config(folder)
    began = str(status.get("started") or "at an unknown time")[:16].replace("T", " ")
    named = [f"{name} {config[name]}" for name in ("method", "model") if config.get(name)]
    return ", ".join([*named, f"started {began}", "finished" if status.get("finished") else "not finished"])


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        content = parse_yaml((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    missing = object()

    def same(before: Any, now: Any) -> bool:
        # Older versions recorded the paths of files as they were typed.
        typed = isinstance(before, str) and isinstance(now, str) and os.path.isabs(now)
        return bool(before == now or (typed and os.path.abspath(before) == now))

    return [
        f"{name} was {shown(old.get(name))}, now {shown(new.get(name))}"
        for name in dict.fromkeys([*old, *new])
        # The folder may have been moved, or be called from elsewhere.
        if name != "output" and not same(old.get(name, missing), new.get(name, missing))
    ]


def version_of(name: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
