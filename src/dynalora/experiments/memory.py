"""Memory of this process: what it holds and the most it has held."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def resident() -> int:
    """Bytes of memory that this process holds now; where that is not known, the most it has held."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux
        return peak() or 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak() -> int | None:
    """The most memory that this process has held, in bytes, since `forget_peak` if that works; None: not known."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def forget_peak() -> None:
    """Begin anew with `peak`, where the system can: on Linux, if it is allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
