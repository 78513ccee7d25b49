"""The other side of [`sandbox`][dynalora.evaluation.sandbox]: locks its own process up, then runs a program.

Started as a script in a fresh, isolated interpreter (`python -I -S`), so it imports the standard library only. It
reads one JSON object from standard input, applies the limits, and says on standard output, a socket that only it still
holds, how far it came: `ready` once locked up, and the caller's token once the program has run to its end. A program
with tests has two such processes: one runs it and answers the calls of the tests, the other runs those to their end.
Only the latter has a token.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import math
import os
import platform
import resource
import socket
import struct
import sys
import time
from typing import Any

# --- system call filter (seccomp) -----------------------------------------------------------------------------
#
# A list of what is allowed; everything else fails with EPERM, so that a program sees an ordinary PermissionError.
# There is no socket, fork, clone, execve, ptrace, mount, chmod, setrlimit, shared memory or io_uring on it.

_ALLOWED = {
    "x86_64": (
        0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 18, 19, 20, 21, 22, 23, 24, 25, 28, 32, 33, 35, 39,
        63, 74, 75, 77, 78, 79, 80, 81, 89, 95, 96, 97, 98, 99, 100, 102, 104, 107, 108, 110,
        111, 115, 118, 120, 124, 131, 158, 186, 201, 202, 204, 213, 217, 218, 228, 229, 230, 231, 232, 233, 262,
        267, 269, 270, 271, 273, 281, 290, 291, 292, 293, 295, 296, 309, 318, 324, 327, 328, 332, 334, 436,
        439, 60,
    ),
    "aarch64": (
        17, 19, 20, 21, 22, 23, 24, 46, 48, 49, 50, 57, 59, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70,
        72, 73, 78, 79, 80, 82, 83, 93, 94, 96, 98, 99, 101, 113, 114, 115, 123, 124, 132, 133, 134, 135, 136, 137,
        139, 148, 150, 153, 158, 160, 163, 165, 168, 169, 172, 173, 174, 175, 176, 177, 178, 179, 214, 215, 216, 222,
        226, 227, 232, 233, 278, 283, 286, 287, 291, 293, 436, 439,
    ),
}  # fmt: skip
# What removes files: unlink, unlinkat, rename, renameat, renameat2. Allowed where the caller can be asked first.
_REMOVING = {"x86_64": (82, 87, 263, 264, 316), "aarch64": (35, 38, 276)}
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Allowed with conditions on an argument: (name → number).
_SPECIAL = {
    "x86_64": {"open": 2, "openat": 257, "ioctl": 16, "fcntl": 72, "prlimit64": 302, "kill": 62, "tgkill": 234},
    "aarch64": {"openat": 56, "ioctl": 29, "fcntl": 25, "prlimit64": 261, "kill": 129, "tgkill": 131},
}
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_O_TRUNC, _WRITING, _O_TMPFILE = 0o1000, 0o3, 0o20000000
# By their second argument: isatty, window size, close-on-exec (twice), bytes to read; and duplicating, flags and
# locks of a file. What is left out of fcntl can make the kernel send signals to other processes.
_COMMANDS = {"ioctl": (0x5401, 0x5413, 0x5450, 0x5451, 0x541B), "fcntl": (0, 1, 2, 3, 4, 5, 6, 7, 1030)}

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_DUMPABLE = 38, 22, 24, 4


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]


def _statement(code: int, value: int, true: int = 0, false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, true, false, value)


_LOAD, _EQUAL, _BOTH, _BACK = 0x20, 0x15, 0x54, 0x06
_ALLOW, _ASK, _DENY, _NO_SUCH_FILES = 0x7FFF0000, 0x7FC00000, 0x00050000 | 1, 0x00050000 | 95  # EPERM, EOPNOTSUPP


def asking_program(machine: str) -> bytes:
    """The filter that has the listener asked before a file is removed, as BPF instructions; see `seccomp_program`."""
    numbers = _REMOVING[machine]
    code = [_statement(_LOAD, 0)]
    code += [_statement(_EQUAL, number, len(numbers) - at, 0) for at, number in enumerate(numbers)]
    return b"".join([*code, _statement(_BACK, _ALLOW), _statement(_BACK, _ASK)])


def seccomp_program(machine: str, process: int, removing: bool) -> bytes:
    """The filter as BPF instructions of 8 bytes each.

    Args:
        machine: `x86_64` or `aarch64`.
        process: Process id: the only one that may be sent a signal.
        removing: Whether files may be removed.
    """
    load, equal, both, back = _LOAD, _EQUAL, _BOTH, _BACK
    allow, deny = _ALLOW, _DENY
    special = _SPECIAL[machine]
    code = [
        _statement(load, 4),  # the architecture the call was made for
        _statement(equal, _AUDIT_ARCH[machine], 1, 0),
        _statement(back, deny),
        _statement(load, 0),  # its number
    ]
    for number in _ALLOWED[machine] + (_REMOVING[machine] if removing else ()):
        code += [_statement(equal, number, 0, 1), _statement(back, allow)]

    def argument(index: int) -> bytes:
        return _statement(load, 16 + 8 * index)  # its lower half; both machines are little-endian

    for name, number in special.items():
        if name in ("open", "openat"):
            flags = argument(1 if name == "open" else 2)
            # A file that never had a name is in no folder. Python then makes one with a name and removes that.
            # O_TRUNC without a writing mode truncates, and Landlock's first versions do not see it.
            body = [
                flags, _statement(both, _O_TMPFILE), _statement(equal, 0, 1, 0), _statement(back, _NO_SUCH_FILES),
                flags, _statement(both, _O_TRUNC), _statement(equal, 0, 3, 0),
                flags, _statement(both, _WRITING), _statement(equal, 0, 1, 0),
                _statement(back, allow), _statement(back, deny),
            ]  # fmt: skip
        elif name in _COMMANDS:
            count = len(_COMMANDS[name])
            body = [argument(1)]
            body += [_statement(equal, asked, count - at, 0) for at, asked in enumerate(_COMMANDS[name])]
            body += [_statement(back, deny), _statement(back, allow)]
        elif name == "prlimit64":  # reading one's own limits; the third argument (the new limit) must be null
            body = [
                argument(0), _statement(equal, 0, 0, 5), argument(2), _statement(equal, 0, 0, 3),
                _statement(load, 16 + 8 * 2 + 4), _statement(equal, 0, 0, 1),
                _statement(back, allow), _statement(back, deny),
            ]  # fmt: skip
        else:  # signals, to itself only (abort uses tgkill)
            body = [argument(0), _statement(equal, process, 0, 1), _statement(back, allow), _statement(back, deny)]
        code += [_statement(equal, number, 0, len(body)), *body]
    return b"".join([*code, _statement(back, deny)])


def _filter(code: bytes) -> tuple[_Filter, Any]:
    """The structure that the kernel takes, and the memory it points to, which must be kept as long."""
    memory = ctypes.create_string_buffer(code)
    return _Filter(len(code) // 8, ctypes.cast(memory, ctypes.c_void_p)), memory


def _failed(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


def _libc() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    return library


def lock_files(libc: Any, readable: list[str], work: str) -> None:
    """Landlock: read under `readable`, anything under `work`, nothing elsewhere.

    Raises:
        OSError: The kernel has no Landlock, or it is switched off.
    """
    version = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    if version < 1:
        raise _failed("Landlock is not available")
    # Rights known to each version: 13 for files from the start, then REFER, TRUNCATE and IOCTL_DEV; binding and
    # connecting, which the system call filter forbids altogether, are not handled here.
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    ruleset = libc.syscall(_LANDLOCK_CREATE, struct.pack("=Q", handled), ctypes.c_size_t(8), ctypes.c_uint(0))
    if ruleset < 0:
        raise _failed("Landlock refuses")
    execute, write, read, read_folder, truncate = 1, 2, 4, 8, 1 << 14
    making = 1 << 5 | 1 << 8  # removing and making files; no folders, so that cleaning up is simple
    rules = [(path, execute | read | read_folder) for path in readable]
    rules.append((work, (write | read | read_folder | making | truncate) & handled))
    for path, rights in rules:
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # a library folder that this system does not have
        try:
            if not os.path.isdir(path):
                rights &= execute | write | read
            rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, handle))
            if libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0):
                raise _failed(f"Landlock refuses '{path}'")
        finally:
            os.close(handle)
    if libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0):
        raise _failed("Landlock refuses")
    os.close(ruleset)


def drop_capabilities(libc: Any) -> None:
    """Give up what makes root more than a user, for good."""
    for capability in range(64):
        if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0):
            break  # beyond the last one, or not allowed to (then there is nothing to give up)
    header = struct.pack("=Ii", 0x20080522, 0)
    if libc.capset(ctypes.create_string_buffer(header), ctypes.create_string_buffer(24)):
        raise _failed("The capabilities cannot be dropped")


def lock_calls(libc: Any, channel: int) -> None:
    """Install the system call filters, and send the listener of the first to the caller.

    Where the kernel gives no listener (a container's own may already be there), the program cannot remove files.

    Args:
        libc: The C library.
        channel: The socket to the caller.

    Raises:
        OSError: The kernel cannot, or the machine is neither x86-64 nor ARM64.
    """
    machine = platform.machine().replace("arm64", "aarch64").replace("AMD64", "x86_64")
    if sys.platform != "linux" or machine not in _ALLOWED or struct.calcsize("P") != 8:
        raise OSError(f"no system call filter is known for {sys.platform} on {machine}")
    asking, _code = _filter(asking_program(machine))
    listener = libc.syscall(_SECCOMP[machine], 1, 8, ctypes.byref(asking))  # a filter, with a new listener
    if listener >= 0:
        with socket.socket(fileno=os.dup(channel)) as connection:
            socket.send_fds(connection, [b"\n"], [listener])
        os.close(listener)
    program, _code = _filter(seccomp_program(machine, os.getpid(), removing=listener >= 0))
    if libc.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0):
        raise _failed("The system call filter cannot be installed")


def limit(seconds: float, memory: int, file_size: int) -> None:
    """Resource limits of this process, which the program cannot raise."""
    limits = [
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_STACK, 8 << 20),
        (resource.RLIMIT_AS, memory),
    ]
    # What the interpreter itself has used by now counts, too.
    used = math.ceil(time.process_time() + seconds)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    if most == resource.RLIM_INFINITY or most > used:
        resource.setrlimit(resource.RLIMIT_CPU, (used, used + 1))
    for which, value in limits:
        _, most = resource.getrlimit(which)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        try:
            resource.setrlimit(which, (value, value))
        except (OSError, ValueError):
            if which != resource.RLIMIT_AS:  # macOS has none that works
                raise


def forbid_in_python(work: str, readable: list[str]) -> None:
    """Where the kernel gives no guarantee: stop what goes through Python itself. Malice can get around it."""
    roots = tuple(os.path.join(os.path.realpath(path), "") for path in (work, *readable))
    forbidden = ("socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill",
                 "os.chmod", "os.chown",
                 "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.listdir", "os.scandir", "ctypes.",
                 "shutil.", "_thread.start_new_thread", "pty.", "resource.", "signal.")  # fmt: skip

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(forbidden):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not (path + os.sep).startswith(roots) and path != os.devnull:
                raise PermissionError(f"'{path}' is not to be opened here")
        if event in ("os.remove", "os.rename", "os.truncate"):
            for path in arguments[:2]:
                if isinstance(path, (str, bytes)) and not (os.path.realpath(os.fsdecode(path)) + os.sep).startswith(
                    roots[:1]
                ):
                    raise PermissionError(f"'{os.fsdecode(path)}' is not to be changed here")

    sys.addaudithook(watch)


def _load(path: str) -> Any:
    """A module from its file; this interpreter finds none beside this script."""
    spec = importlib.util.spec_from_file_location(os.path.basename(path).partition(".")[0], path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Read the job, lock up, run the program, say so."""
    job = json.loads(sys.stdin.buffer.read())
    channel = os.dup(1)
    os.set_inheritable(channel, False)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(nothing, stream)
    os.close(nothing)
    os.chdir(job["work"])
    # Compiled and imported before the walls are up: what the interpreter needs of itself.
    import encodings.idna
    import linecache
    import traceback

    del encodings.idna, linecache
    calls: Any = _load(job["calls"]) if job["line"] is not None else None
    line = calls.Line(job["line"]) if calls is not None else None
    readable: list[str] = job["readable"]
    sys.path[:] = job["path"]
    sys.dont_write_bytecode = True
    os.environ.clear()
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    os.environ.update({"PATH": "", "HOME": job["work"], "TMPDIR": job["work"], "LC_ALL": "C.UTF-8", **threads})
    for name, folder in job["packages"].items():
        sys.path.append(folder)  # for now only: what else lies there is not for the program
        importlib.import_module(name)
        sys.path.remove(folder)
    if calls is not None and job["tests"] is not None:
        calls.require_shapes(sys.modules.get("numpy"))
    # Tests may hold whole numbers of more digits than Python reads by default; the time limit guards against abuse.
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    libc = _libc() if sys.platform == "linux" else None
    limit(job["seconds"], job["memory"], job["file_size"])
    strong = False
    reason = "only Linux has the kernel's means"
    if libc is not None and not job["pretend_weak"]:
        try:
            libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
            if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
                raise _failed("no_new_privs cannot be set")
            drop_capabilities(libc)
            lock_files(libc, readable, job["work"])
            lock_calls(libc, channel)
            strong = True
        except OSError as error:
            reason = str(error.strerror or error)
    if not strong:
        if not job["allow_weak"]:
            os.write(channel, json.dumps({"refused": reason}).encode() + b"\n")
            return
        forbid_in_python(job["work"], readable)
    os.write(channel, b'{"ready": true}\n')
    program, words = job["program"], [json.dumps({"token": job.pop("token")}).encode() + b"\n"]
    checks = (job["given"], job["tests"], job["entries"]) if job["tests"] is not None else None
    job.clear()
    names = {"__name__": "__main__", "__builtins__": __builtins__}

    def ends() -> bool:
        if checks is not None:
            calls.run_tests(*checks, line)
            return True
        exec(compile(program, "<generated>", "exec"), names)
        if calls is not None:
            calls.serve(names, line)
            os._exit(0)
        return True

    try:
        # Arguments are evaluated in order: while the program runs, its last words are on this frame's stack of values
        # only, which no frame, no name and no list of objects shows to it. If it raises, they are lost with the stack.
        os.write(channel, (words.pop(), ends())[0])
    except BaseException as error:
        # Memory may be what ran out: what is said about it is short, and saying it may fail.
        kind = type(error).__name__
        try:
            description = f"{kind}: {error}" if str(error) else kind
            if isinstance(error, AssertionError) and not str(error):
                description = f"{kind} in {traceback.extract_tb(error.__traceback__)[-1].lineno}"
        except BaseException:
            description = kind
        os.write(channel, json.dumps({"error": description[:500]}).encode() + b"\n")
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
