"""How long jobs say where they are, without knowing who listens."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich import progress as bars
    from rich.console import Console

T = TypeVar("T")
Progress = Callable[[str, int, int | None], None]
"""Called as `progress(what, done, total)`: a short description, units done so far, units in all or None if unknown.

A job calls it first with `done = 0` and last with `done = total`; a new description is a new job.
"""


_PLAIN_EVERY = 10.0  # seconds between lines where nothing can be animated
_PATIENCE = 2.0  # seconds that a library call may take without a word


def silent(what: str, done: int, total: int | None) -> None:
    """A listener that does nothing: the default everywhere."""


_DAY = 86400.0


def duration(seconds: float) -> str:
    """A time in words, in the largest unit of which there are two or more."""
    for unit, length in (("years", 365.25 * _DAY), ("days", _DAY), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}" if unit != "h" else f"{seconds / length:.1f} h"
    return f"{seconds:.0f} s"


def counted(items: Collection[T], what: str, progress: Progress) -> Iterator[T]:
    """Items one after the other, of which those done are told to a listener."""
    progress(what, 0, len(items))
    for done, item in enumerate(items, start=1):
        yield item
        progress(what, done, len(items))


@contextmanager
def rich_progress(console: Console | None) -> Iterator[Progress]:
    """Show jobs on a console: one live line for each, with bar, count, elapsed and remaining time.

    A line is live only from a job's first call to its last, so other displays may use the console in between. Where
    the console is no terminal, a job prints a plain line now and then and one when it is done.

    Example:
        ```python
        with rich_progress(Console()) as progress:
            generate(model, tokenizer, prompts, progress=progress)
        ```
    """
    if console is None:
        yield silent
        return
    shown = _Shown(console)
    try:
        yield shown
    finally:
        shown.stop()


@contextmanager
def late_progress() -> Iterator[Progress]:
    """Show a library call's job on standard error, once it has taken two seconds; without rich, show nothing."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:  # a plain installation
        yield silent
        return
    shown = _Shown(Console(stderr=True))
    began = time.monotonic()

    def once_late(what: str, done: int, total: int | None) -> None:
        if time.monotonic() - began > _PATIENCE:
            shown(what, done, total)

    try:
        yield once_late
    finally:
        shown.stop()


def live_bar(console: Console, field: str | None = None) -> bars.Progress:
    """A line with bar, count, elapsed and remaining time, and with a field of the task's between if one is named."""
    from rich import progress as bars  # a plain installation lacks it

    between = [] if field is None else [bars.TextColumn(f"{{task.fields[{field}]}}")]
    return bars.Progress(
        bars.TextColumn("[bold]{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn(), *between,
        bars.TimeElapsedColumn(), bars.TextColumn("left"), bars.TimeRemainingColumn(), console=console,
    )  # fmt: skip


class _Shown:
    """The listener behind `rich_progress`: at most one job is live at a time."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._what: str | None = None
        self._began = 0.0
        self._told = 0.0
        self._bars: bars.Progress | None = None

    def __call__(self, what: str, done: int, total: int | None) -> None:
        if what != self._what:
            self.stop()
            self._begin(what)
        if self._bars is not None:
            self._bars.update(self._bars.task_ids[0], completed=done, total=total)
        elif (total is None or done < total) and time.monotonic() - self._told >= _PLAIN_EVERY:
            self._told = time.monotonic()
            count = f"{done}" if total is None else f"{done} of {total}"
            self.console.print(f"{what}: {count}", highlight=False, markup=False)
        if total is not None and done >= total:
            seconds = time.monotonic() - self._began
            self.stop()
            if not self.console.is_terminal and seconds >= 1:
                self.console.print(f"{what}: done in {seconds:.0f} s", highlight=False, markup=False)

    def _begin(self, what: str) -> None:
        self._what, self._began = what, time.monotonic()
        self._told = self._began
        if not self.console.is_terminal:
            return
        self._bars = live_bar(self.console)
        self._bars.add_task(what, total=None)
        self._bars.start()

    def stop(self) -> None:
        self._what = None
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
