"""Failures of the machine and not of the program: a full disk, a folder without permission, too little memory."""

from __future__ import annotations

import errno
import re

from dynalora.errors import DynaloraError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# `torch.save` says no more of it, each at another moment.
_FULL_TO_TORCH = ("PytorchStreamWriter failed writing", "inline_container", "basic_ios::clear: iostream error")


class MachineError(DynaloraError, OSError):
    """The machine lacks something: room on a disk, a permission, memory."""


def of_the_machine(error: BaseException) -> str | None:
    """What the machine lacks, with the remedy, in a clause; None if the error says something else.

    Libraries report a full disk and too little memory each in their own way; what they have in common are words.
    """
    cause: BaseException | None = error
    while cause is not None:
        reason = _reason(cause)
        if reason is not None:
            return reason
        cause = cause.__cause__ or cause.__context__
    return None


def _reason(error: BaseException) -> str | None:
    if isinstance(error, DynaloraError):
        return None
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        number: int | None = error.errno
    else:
        number = error.errno if isinstance(error, OSError) else None
        # safetensors hands on what Rust says of a system error.
        if match := re.search(r"\bcode: (\d+)|\(os error (\d+)\)", text):
            number = int(match[1] or match[2])
    place = f"'{error.filename}'" if isinstance(error, OSError) and error.filename else "a file"
    if number in _DISK or any(words in text for words in _FULL_TO_TORCH):
        return f"There is no room left on the disk to write {place}; make room"
    if isinstance(error, OSError) and number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{place} cannot be read or written ({error.strerror}); give another place, or the permission"
    if isinstance(error, OSError) and number in (errno.EMFILE, errno.ENFILE):
        return f"{place} cannot be opened ({error.strerror}); allow more open files (ulimit -n), or close some"
    if isinstance(error, OSError) and number in (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP):
        return f"{place} cannot be opened ({error.strerror}); give another place"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return (
            "There is not enough memory; take a smaller batch_size, max_length or rank, gradient_checkpointing or a "
            "quantised base model"
        )
    return None
