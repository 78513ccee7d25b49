"""Shared set-up: no network, few threads, a fixed seed, and a runner for fresh Python processes."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# One thread here and in every process that a test starts: with more, some processors sum in another order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Thousands of tiny matrices are decomposed; none of them belongs on the user's disk.
os.environ.setdefault("DYNALORA_DECOMPOSITION_CACHE_GIB", "0")

import pytest
import torch
from hypothesis import HealthCheck, settings

# It warns of a missing optional kernel at import, which pytest would print after its own last line.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
import dynalora  # noqa: E402, F401  registers the methods with PEFT before any test loads an adapter

ROOT = Path(__file__).resolve().parents[1]

# DYNALORA_FUZZ=10 has the tests of hostile files try ten times as many cases, drawn anew, or by --hypothesis-seed.
FUZZ = int(os.environ.get("DYNALORA_FUZZ", "0"))
settings.register_profile(
    "dynalora",
    deadline=None,
    max_examples=15,
    derandomize=not FUZZ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("dynalora")

PythonRunner = Callable[..., str]


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """One thread and one seed for every test, so that neither order nor the machine's size changes a result."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def _collect_between_modules() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture(scope="session")
def run_python() -> PythonRunner:
    """Run a script in a fresh interpreter and return its standard output; a failure shows its error output.

    ``without_dynalora=True`` makes any import of the package fail there, as where it is not installed.
    """

    def run(script: str, *arguments: str, without_dynalora: bool = False, timeout: float = 400.0) -> str:
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        environment = dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1")
        script = textwrap.dedent(script)
        if without_dynalora:
            script = "import sys; sys.modules['dynalora'] = None\n" + script
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run
