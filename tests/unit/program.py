"""The program as a user starts it, in this process: real arguments, real streams, real exit codes."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from dynalora.cli.main import main


@dataclass(frozen=True)
class Shown:
    code: int
    out: str
    err: str


Program = Callable[..., Shown]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Program]:
    """Run `dynalora` with arguments."""
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    # The program sets up logging and warnings for a process of its own.
    own = logging.getLogger("dynalora")
    handlers, propagate, show = list(own.handlers), own.propagate, warnings.showwarning
    levels = {name: logging.getLogger(name).level for name in ("transformers", "peft", "accelerate", "datasets")}

    def run(*arguments: str) -> Shown:
        monkeypatch.setattr(sys, "argv", ["dynalora", *arguments])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        captured = capsys.readouterr()
        return Shown(code, captured.out, captured.err)

    yield run
    own.handlers[:], own.propagate, warnings.showwarning = handlers, propagate, show
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
