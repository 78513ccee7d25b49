"""The machine that something was measured on, and this process's memory there."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from dynalora.lab.run_folder import version_of


def machine() -> dict[str, Any]:
    """What numbers depend on besides the settings: system, processor or GPU, cores, PyTorch's threads, versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "device": gpu or "cpu",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version_of(name) for name in ("dynalora", "transformers", "peft")},
        # With the build, which the installed package's version may leave out.
        "torch": str(torch.__version__),
    }


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


def forget_training_peak() -> None:
    """Begin anew with `training_peak`."""
    forget_peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def training_peak() -> int | None:
    """Most memory that training held, in bytes: on the GPU if there is one; else of this process, weights included."""
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else peak()
