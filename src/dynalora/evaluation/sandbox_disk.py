"""How much of the disk a program in the [sandbox][dynalora.evaluation.sandbox] takes, removed files included.

A file that is removed while it is open, or mapped into memory, keeps its room until the program lets go of it. So the
kernel stops the program at every call that can remove a file and asks here first (a listener of seccomp, Linux 5.5).
While the program stands still, every file that it has made is put under watch (inotify), and the kernel tells when
the last hold on a file is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import struct
import time
from collections.abc import Sequence

_RECEIVE, _ANSWER = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV and _SEND
_QUESTION_BYTES = 80
_CONTINUE = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE
_IN_DELETE_SELF, _IN_IGNORED = 0x400, 0x8000
_SMALLEST = 4096  # bytes that a file without content is counted as


class Disk:
    """The files of one program.

    Args:
        folder: Where it may make files; it cannot make folders.
        most: Bytes that all of them may take together.
        file_size: Bytes of the largest file it can make. A removed file counts as one of these, because whoever holds
            it open can still write.

    Attributes:
        listener: Where the kernel asks; None before it is there.
    """

    def __init__(self, folder: str, most: int, file_size: int) -> None:
        self._folder, self._most, self._file_size = folder, most, file_size
        self.listener: int | None = None
        self._inotify: int | None = None
        self._held: dict[int, int] = {}  # inode → number of its watch, of files that exist
        self._unwatched = 0  # removed files that the system had no watch left for; they count to the end

    def listen(self, listener: int) -> None:
        """Answer the kernel's questions from now on.

        Args:
            listener: The file descriptor that the program's launcher got from the kernel; closed by `close`.
        """
        self.listener = listener
        with contextlib.suppress(OSError):
            self._inotify = _libc_call("inotify_init1", os.O_NONBLOCK | os.O_CLOEXEC)

    def exceeded(self) -> bool:
        """Whether the files take more than they may."""
        total = 0
        with contextlib.suppress(OSError), os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    total += _SMALLEST + entry.stat(follow_symlinks=False).st_size
        return total + self._removed() > self._most

    def close(self) -> None:
        """Stop listening; a program that still waits for an answer gets an error."""
        for handle in (self.listener, self._inotify):
            if handle is not None:
                os.close(handle)
        self.listener = self._inotify = None

    def answer(self) -> bool:
        """Answer one question; False where the program is to stay as it is, for it has used too much."""
        question = bytearray(_QUESTION_BYTES)
        listener = self.listener
        assert listener is not None
        with contextlib.suppress(OSError):  # it was killed while it waited
            fcntl.ioctl(listener, _RECEIVE, question)
            (number,) = struct.unpack_from("=Q", question)
            self._watch_all()
            if self._removed() > self._most:
                return False
            fcntl.ioctl(listener, _ANSWER, struct.pack("=QqiI", number, 0, 0, _CONTINUE))
        return True

    def _watch_all(self) -> None:
        """Watch every file that there is; the program stands still."""
        self._forget_the_gone()
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.inode() in self._held:
                    continue
                try:
                    if self._inotify is None:
                        raise OSError("no watches are left")
                    name = os.fsencode(entry.path)
                    self._held[entry.inode()] = _libc_call("inotify_add_watch", self._inotify, name, _IN_DELETE_SELF)
                except OSError:
                    self._unwatched += 1

    def _forget_the_gone(self) -> None:
        if self._inotify is None:
            return
        gone = set()
        with contextlib.suppress(BlockingIOError):
            while events := os.read(self._inotify, 65536):
                at = 0
                while at < len(events):
                    watch, mask, _, length = struct.unpack_from("=iIII", events, at)
                    at += 16 + length
                    if mask & (_IN_DELETE_SELF | _IN_IGNORED):
                        gone.add(watch)
        self._held = {inode: watch for inode, watch in self._held.items() if watch not in gone}

    def _removed(self) -> int:
        """Bytes that files take, at most, which are in no folder and yet not gone."""
        if self.listener is None:
            return 0
        with os.scandir(self._folder) as entries:
            named = {entry.inode() for entry in entries}
        self._forget_the_gone()
        return (len(self._held.keys() - named) + self._unwatched) * (_SMALLEST + self._file_size)


def wait(disks: Sequence[Disk], seconds: float) -> None:
    """Let programs run for so long, and answer what is asked meanwhile; shorter once one has ended or used too much."""
    until = time.monotonic() + seconds
    poll = select.poll()
    listening = {disk.listener: disk for disk in disks if disk.listener is not None}
    for listener in listening:
        poll.register(listener, select.POLLIN)
    while (left := until - time.monotonic()) > 0:
        for listener, event in poll.poll(left * 1000):
            if not event & select.POLLIN:  # the program has ended
                time.sleep(min(left, 0.001))
                return
            if not listening[listener].answer():
                return


def _libc_call(name: str, *arguments: int | bytes) -> int:
    result: int = getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
