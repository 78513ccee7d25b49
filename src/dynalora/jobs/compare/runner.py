"""Run the open cells of a comparison: each in a new process, or all in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import torch

from dynalora.common.progress import duration
from dynalora.errors import DynaloraError
from dynalora.jobs.compare.cell import run_cell
from dynalora.jobs.compare.contestants import Cell
from dynalora.jobs.compare.grid import Grid

if TYPE_CHECKING:
    from rich.console import Console


TAKEN = 75
"""Exit status of a cell that another process has taken."""


class Runner:
    """Runs the grid's open cells, each in a new process, several at a time.

    Args:
        grid: The cells.
        console: Where progress is shown; None: nowhere.
    """

    def __init__(self, grid: Grid, console: Console | None) -> None:
        self.grid, self.console = grid, console
        self.jobs = grid.spec.jobs or max(1, len(_devices()))
        self.failed: list[tuple[Cell, str]] = []
        self._running: dict[str, tuple[Cell, subprocess.Popen[bytes], int]] = {}
        self._seconds: list[float] = []

    def run(self) -> list[tuple[Cell, str]]:
        """Run until nothing is left; returns the cells that failed, each with why."""
        live = self.console is not None and self.console.is_terminal
        with self.console.status("Starting …") if self.console is not None and live else nullcontext() as status:
            try:
                while self._go_on():
                    if status is not None:
                        status.update(self._now())
                    # Where none runs here, other processes run all that is left.
                    time.sleep(1.0 if self._running else 2.0)
            finally:
                for _, process, _ in self._running.values():
                    process.terminate()
                for _, process, _ in self._running.values():
                    process.wait()
        return self.failed

    def _go_on(self) -> bool:
        """Take what has ended, start what there is room for; returns whether anything is left."""
        self._collect()
        self._start()
        return bool(self._running or self._waiting())

    def _now(self) -> str:
        """What the running cells say at this moment."""
        from rich.markup import escape

        if not self._running:
            return "Other processes run what is left …"
        lines = [f"{cell.title}: {_last_line(self.grid.store.log(cell))}" for cell, _, _ in self._running.values()]
        return escape("\n".join(lines))

    def _waiting(self) -> list[Cell]:
        """Cells that have no result, have not failed and do not run here."""
        gone = {cell.name for cell, _ in self.failed} | set(self._running)
        return [cell for cell in self.grid.open_cells() if cell.name not in gone]

    def _start(self) -> None:
        for cell in self._waiting() if len(self._running) < self.jobs else ():
            if len(self._running) >= self.jobs:
                break
            if self.grid.store.taken(cell):
                continue
            slot = min(set(range(self.jobs)) - {slot for _, _, slot in self._running.values()})
            self._running[cell.name] = (cell, self._process(cell, slot), slot)
            self._say(f"{cell.title}: started")

    def _process(self, cell: Cell, slot: int) -> subprocess.Popen[bytes]:
        log = self.grid.store.log(cell)
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, "-m", "dynalora.cli.cell", json.dumps(self.grid.spec.settings()),
            json.dumps(asdict(cell)),
        ]  # fmt: skip
        environment = dict(os.environ)
        if devices := _devices():
            environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        with open(log, "wb") as output:
            return subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
            )

    def _collect(self) -> None:
        for name, (cell, process, _) in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[name]
            result = self.grid.result(cell)
            if result is not None:
                self._finished(cell, result)
            elif code != TAKEN:
                log = self.grid.store.log(cell)
                self._failed(cell, f"{_last_line(log) or f'exit status {code}'} (all of it: {log})")

    def _finished(self, cell: Cell, result: Mapping[str, Any]) -> None:
        self._seconds.append(result.get("seconds", 0.0))
        self._say(f"{cell.title}: {result_line(result)}{self._left()}")

    def _failed(self, cell: Cell, why: str) -> None:
        self.failed.append((cell, why))
        self._say(f"{cell.title}: failed: {why}", style="red")

    def _left(self) -> str:
        """How long the rest will take, from the cells so far."""
        remaining = self.grid.total - self.grid.done() - len(self.failed)
        if remaining <= 0 or not self._seconds:
            return ""
        seconds = remaining * sum(self._seconds) / len(self._seconds) / self.jobs
        return f" (about {duration(seconds)} left)"

    def _say(self, line: str, style: str | None = None) -> None:
        if self.console is not None:
            head = f"[{self.grid.done()}/{self.grid.total}] "
            self.console.print(head + line, highlight=False, markup=False, style=style, soft_wrap=True)


class InProcessRunner(Runner):
    """Runs the cells in this process."""

    def run(self) -> list[tuple[Cell, str]]:
        """Run one cell after the other; returns those that failed, each with why."""
        while cells := self._waiting():
            cell = cells[0]
            self._say(f"{cell.title}: started")
            try:
                result = run_cell(self.grid.spec, cell, console=self.console)
            except filelock.Timeout:
                time.sleep(2.0)
            except DynaloraError as error:
                self._failed(cell, str(error))
            except Exception as error:  # no cell may take the others with it
                self._failed(cell, f"{type(error).__name__}: {error}")
            else:
                self._finished(cell, result)
        return self.failed


def result_line(result: Mapping[str, Any]) -> str:
    """A cell's result in a line."""
    score = result["test"]
    parts = [] if score["accuracy"] is None else [f"accuracy {100 * score['accuracy']:.1f} %"]
    parts.append(f"loss {score['loss']:.4f}")
    parts += [f"KL {name} {retained['kl']:.4f}" for name, retained in (result.get("retention") or {}).items()]
    return f"{', '.join(parts)}, {duration(result.get('seconds', 0.0))}"


def _devices() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named and count else [str(index) for index in range(count)]


def _last_line(log: Path) -> str:
    """What a log says last; only its end is read, since a live display asks again and again."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().decode("utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1][:300] if lines else ""
