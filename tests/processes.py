"""Running a test's code in two processes that join one group."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_two(worker: str, *arguments: str, timeout: float = 300) -> None:
    """Run a script as two processes, of one thread each, and wait until both have ended well.

    Args:
        worker: The script; its arguments are its rank, `arguments`, and a port that is free.
        arguments: What both are told.
        timeout: Seconds that each may take.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", worker, str(rank), *arguments, str(port)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in workers:
        _, errors = process.communicate(timeout=timeout)
        assert process.returncode == 0, errors[-3000:]
