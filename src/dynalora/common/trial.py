"""Trying in a process of its own what may never end, such as a stranger's pattern or template."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

PATIENCE = 60
"""Seconds of wall-clock time that a trial may take, on a busy machine; programs limit their own processor time."""


def tried(program: str, given: Any, *arguments: str, packages: bool = False) -> tuple[list[str], bool]:
    """Run a program of Python's, apart from this one and from the user's settings.

    Args:
        program: Its text.
        given: What it reads from standard input, in JSON.
        arguments: Its arguments.
        packages: Whether it needs installed packages; without them it starts sooner.

    Returns:
        The words that it has printed, and whether it came to an end, however, before `PATIENCE` was over.
    """
    alone = ["-I"] if packages else ["-I", "-S"]
    try:
        ended = subprocess.run(
            [sys.executable, *alone, "-c", program, *arguments],
            input=json.dumps(given), capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        printed = error.stdout.decode() if isinstance(error.stdout, bytes) else (error.stdout or "")
        return printed.split(), False
    return ended.stdout.split(), True
