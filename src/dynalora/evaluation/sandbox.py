"""Running generated programs where they can do no harm.

Each program runs in a process of its own, an isolated Python interpreter in an empty temporary directory, with

- a limit on processor time, and a longer one on wall-clock time, after which it is killed with its process group;
- a limit on memory (its address space), on the size of each file and of all files together, those included that it
  removed and still holds open;
- no network, no further process or thread, no signal to any other process: a filter on system calls (seccomp) knows
  only what a calculation needs;
- no file outside its directory but the Python library and the packages that it is given, read-only (Landlock): no
  home, no data, no devices;
- no privilege, not even root's, no environment variables, no open files of the caller's.

A program with tests of its own (`Program`) runs in one such process and the tests in another, which it cannot reach.
What it returns comes there as plain values, so that nothing but right answers passes. A source alone shares its process
with whatever tests stand in it, and could change them or step over them; give a `Program` where the verdict counts.

The kernel enforces all of it; it takes Linux 5.13 or newer, on x86-64 or ARM64, with Landlock switched on (it is, in
the usual distributions), and no privileges. Where that is missing, nothing runs, unless the caller asks for
`weak=True`: then time, memory and file size are limited all the same, but files, processes and network are guarded by
hooks inside Python only, which keep out accidents and not attacks. What is not guarded against either way: errors of
the kernel itself, that other processes' existence and load can be felt (timing), and that names and sizes of files
can be asked for (`os.stat`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynalora.errors import ConfigError, UnsupportedError
from dynalora.evaluation.sandbox_disk import Disk, wait

_CHILD = Path(__file__).with_name("sandbox_child.py")
_CALLS = Path(__file__).with_name("sandbox_calls.py")
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo")
_DEVICES = ("/dev/null", "/dev/urandom")
_LOOK_EVERY = 0.05  # seconds
_LAST_WORDS = 1.0  # seconds that a process whose connection is closed may take to end
_START_UP = 60.0  # seconds that an interpreter may take to start, before its time counts


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: Processor time, in steps of a second.
        patience: Wall-clock time, as a multiple of `seconds`; above 1, so that a busy machine fails no program.
        memory: Address space in bytes, the interpreter's own ~30 MB included.
        file_size: Bytes of one file.
        disk: Bytes of all its files together, looked at 20 times a second. A file that was removed and is still open
            counts with `file_size`.

    Raises:
        ConfigError: A limit is too small to run anything.
    """

    seconds: float = 5.0
    patience: float = 4.0
    memory: int = 512 << 20
    file_size: int = 1 << 20
    disk: int = 16 << 20

    def __post_init__(self) -> None:
        for name, value, least in (
            ("seconds", self.seconds, 0.05),
            ("patience", self.patience, 1),
            ("memory", self.memory, 64 << 20),
            ("file_size", self.file_size, 0),
            ("disk", self.disk, 0),
        ):
            if not value >= least:
                raise ConfigError(f"The sandbox's limit {name} is {value}; give at least {least}.")


@dataclass(frozen=True)
class Program:
    """A program and its tests, which are kept apart.

    Attributes:
        solution: The program's source.
        tests: The source of the tests. Names that they read and do not define are the program's.
        given: Source of what the task itself defines, run before the tests and not trusted to the program.
        entries: Names that mean the program's even where `given`, or Python, has the same name.
    """

    solution: str
    tests: str
    given: str = ""
    entries: Sequence[str] = ()


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: Whether its tests, or a source alone, ran to their end without an exception and without ending the
            process themselves.
        reason: Why not, in a few words: the exception, `"timed out"`, `"too much disk"`, or how the process died.
        seconds: Wall-clock time from the start of the program.
    """

    passed: bool
    reason: str
    seconds: float


def run_program(
    program: str | Program, limits: Limits | None = None, *, weak: bool = False, packages: Sequence[str] = ()
) -> Outcome:
    """Run a Python program in the sandbox.

    Args:
        program: Its source, which is only run: it may end well however it likes; or its source and that of its tests,
            which then run in a process of their own and decide whether it passed.
        limits: What it may use; None: the defaults.
        weak: Run it even where the kernel cannot guarantee the walls.
        packages: Names of installed modules that it finds imported, such as `numpy`; the folder of their package
            can be read, and nothing that lies beside it.

    Returns:
        How it ended.

    Raises:
        ConfigError: One of `packages` is not installed.
        UnsupportedError: The walls cannot be guaranteed here and `weak` is False.
    """
    if os.name != "posix":
        raise UnsupportedError(
            f"Generated code is not executed on {sys.platform}; run it on Linux, in a container or virtual machine."
        )
    limits = limits or Limits()
    outcome = _run(program, limits, weak=weak, packages=packages)
    if isinstance(outcome, Outcome):
        return outcome
    raise UnsupportedError(
        f"Generated code is not executed, because this system cannot contain it ({outcome}); run it on Linux 5.13 or "
        "newer with Landlock, in a container or virtual machine of its own, or accept weaker protection with weak=True "
        "(--weak-sandbox)."
    )


def check_sandbox(*, weak: bool = False, packages: Sequence[str] = ()) -> None:
    """Make sure that programs can run here, with an empty one.

    Raises:
        ConfigError: One of `packages` is not installed.
        UnsupportedError: They cannot; says why.
    """
    outcome = run_program("pass", Limits(seconds=10), weak=weak, packages=packages)
    if not outcome.passed:
        raise UnsupportedError(
            f"Generated code cannot be executed here: even an empty program fails in the sandbox ({outcome.reason})."
        )


def _run(
    program: str | Program, limits: Limits, *, weak: bool, packages: Sequence[str], pretend_weak: bool = False
) -> Outcome | str:
    """The outcome, or in words why nothing was run."""
    installed = _folders(packages)
    path = [entry for entry in _isolated_path() if entry]
    shared = os.path.join(sys.base_prefix, "lib")
    job: dict[str, Any] = {
        "seconds": limits.seconds, "memory": limits.memory, "file_size": limits.file_size, "allow_weak": weak,
        "pretend_weak": pretend_weak, "calls": str(_CALLS), "line": None, "tests": None,
        "readable": sorted({*_library(), shared, *path, *_LIBRARIES, *_DEVICES, *installed}),
        "path": path,
        "packages": {name: os.path.dirname(at) for name, at in zip(packages, installed, strict=True)},
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        if isinstance(program, str):
            alone = _Guarded({**job, "program": program}, limits, None, believed=True)
            return _follow([stack.enter_context(alone)], limits)
        one, other = socket.socketpair()
        with one, other:
            tests = {"program": "", "given": program.given, "tests": program.tests, "entries": [*program.entries]}
            guarded = [
                stack.enter_context(_Guarded({**job, **tests}, limits, one, believed=True)),
                stack.enter_context(_Guarded({**job, "program": program.solution}, limits, other, believed=False)),
            ]
        return _follow(guarded, limits)


def _follow(guarded: Sequence[_Guarded], limits: Limits) -> Outcome | str:
    """Until the first of the processes ends: the tests, or the program that is alone."""
    began = time.monotonic()
    running = False
    ended = 0.0
    while True:
        results = [each.look() for each in guarded]
        for result in results:
            if isinstance(result, str):
                return result
        if not running and all(each.ready for each in guarded):
            running, began = True, time.monotonic()
        seconds = time.monotonic() - began
        first, other = results[0], results[-1]
        if isinstance(first, Outcome):
            if not first.reason.startswith("NoAnswerError"):
                return first
            # The program's process ended under the tests; how it ended says more, and is known in a moment.
            if isinstance(other, Outcome):
                return other
            ended = ended or time.monotonic()
            if time.monotonic() - ended > _LAST_WORDS:
                return first
        if seconds > (limits.seconds * limits.patience if running else _START_UP):
            return Outcome(False, "timed out", seconds)
        wait([each.disk for each in guarded], min(_LOOK_EVERY, 0.002 + seconds / 4))


class _Guarded(contextlib.AbstractContextManager["_Guarded"]):
    """One process inside the walls, with a folder of its own; killed and cleaned up on leaving.

    Args:
        job: What it is to do.
        limits: What it may use.
        line: Its end of the connection between a program and its tests; None: a program alone.
        believed: Whether it may say that it has passed. The process of a program with tests may not: no token is the
            right one.

    Attributes:
        ready: Whether the walls are up.
        disk: What its files take.
    """

    def __init__(self, job: dict[str, Any], limits: Limits, line: socket.socket | None, *, believed: bool) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dynalora-sandbox-", ignore_cleanup_errors=True)
        work = self._folder.name
        self._token = secrets.token_hex(16) if believed else None
        self.ready, self._began = False, time.monotonic()
        self._said, self._result = b"", None  # type: tuple[bytes, Outcome | str | None]
        self.disk = Disk(work, limits.disk, limits.file_size)
        handles = () if line is None else (line.fileno(),)
        self._channel, its_end = socket.socketpair()
        with its_end:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(_CHILD)],
                stdin=subprocess.PIPE, stdout=its_end.fileno(), stderr=subprocess.DEVNULL, cwd=work, env={},
                start_new_session=True, close_fds=True, pass_fds=handles,
            )  # fmt: skip
        self._channel.setblocking(False)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(
                json.dumps({**job, "work": work, "token": self._token, "line": next(iter(handles), None)}).encode()
            )

    def look(self) -> Outcome | str | None:
        """How it ended, or in words why nothing was run; None while it runs. Killed where it took too much disk."""
        if self._result is not None:
            return self._result
        ended = self._process.poll() is not None
        # A few small messages come from the launcher; anything longer is not its own.
        while len(self._said) < 65536 and (piece := _receive(self._channel, None if self.ready else self.disk)):
            self._said += piece
        if not self.ready and b'{"ready": true}\n' in self._said:
            self.ready, self._began = True, time.monotonic()
        seconds = time.monotonic() - self._began
        if ended:
            self._result = _verdict(self._said, self._token, self._process.returncode, self.ready, seconds)
        elif self.ready and self.disk.exceeded():
            self._result = Outcome(False, "too much disk", seconds)
            _kill(self._process)
        return self._result

    def __exit__(self, *_: object) -> None:
        _kill(self._process)
        self.disk.close()
        self._channel.close()
        self._folder.cleanup()


def _receive(channel: socket.socket, disk: Disk | None) -> bytes:
    """What has come, if anything; a file descriptor that comes along is the listener for `disk`."""
    try:
        if disk is None:
            return channel.recv(4096)
        piece, handles, _, _ = socket.recv_fds(channel, 4096, 1)
    except OSError:  # nothing has come, or the process has died
        return b""
    for handle in handles:
        disk.listen(handle)
    return piece


def _verdict(said: bytes, token: str | None, code: int, ready: bool, seconds: float) -> Outcome | str:
    messages: list[dict[str, Any]] = []
    for line in said.splitlines():
        # What the program itself may write there can be anything.
        with contextlib.suppress(ValueError, RecursionError):
            message = json.loads(line)
            messages += [message] if isinstance(message, dict) else []
    # The launcher refuses before the program has begun; whatever comes after `ready` may be the program's.
    if not ready:
        for message in messages:
            if "refused" in message:
                return str(message["refused"])
    if token is not None and code == 0 and any(message.get("token") == token for message in messages):
        return Outcome(True, "", seconds)
    for message in messages:
        if "error" in message:
            return Outcome(False, str(message["error"]), seconds)
    if not ready:
        return f"its interpreter ended with code {code} before the walls were up"
    if code == -signal.SIGXCPU:
        return Outcome(False, "timed out", seconds)
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        return Outcome(False, f"killed by {name}", seconds)
    return Outcome(False, f"ended its process with code {code}", seconds)


def _folders(packages: Sequence[str]) -> list[str]:
    """The folder of each module's top package."""
    folders = []
    for name in packages:
        spec = importlib.util.find_spec(name.partition(".")[0])
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(f"A program in the sandbox needs the package '{name}', which is not installed.")
        folders.append(next(iter(spec.submodule_search_locations)))
    return folders


def _library() -> set[str]:
    """The folders of Python's own library; of a virtual environment, those of the Python behind it."""
    behind = {"platbase": sys.base_exec_prefix}
    return {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib", vars=behind)}


def _isolated_path() -> list[str]:
    """Where an interpreter without site-packages looks for its library."""
    folders = _library()
    folders |= {os.path.join(folder, "lib-dynload") for folder in folders}
    return sorted(folder for folder in folders if os.path.isdir(folder))


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The process and everything in its session's group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
