"""What the program shows: consoles, its own warnings and errors, and no one else's chatter."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from typing import Any

from rich.console import Console
from rich.text import Text


def console(*, stderr: bool = False) -> Console:
    """A console with colours in a terminal and plain text, wide enough for tables, in a pipe or file."""
    screen = Console(stderr=stderr)
    if not screen.is_terminal and "COLUMNS" not in os.environ:
        screen = Console(stderr=stderr, width=160)
    return screen


def complain(message: str, *, style: str = "bold red") -> None:
    """One sentence on standard error, not wrapped when it goes to a file."""
    console(stderr=True).print(Text(message, style=style), soft_wrap=True)


def quiet() -> None:
    """Show the user dynalora's own warnings, one line each, and no one else's chatter.

    Letters that a stream's encoding lacks are written as their numbers, as Python does on standard error. Progress
    bars of other libraries are left on in a terminal and switched off in a pipe, where they are garbage.
    """
    if sys.stderr is None:  # closed by who started the program; libraries write there without asking
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=rf"({'|'.join(_OTHERS)})(\.|$)")
    warnings.showwarning = _one_line
    for name in (*_OTHERS, "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # its errors are raised as well
    logger = logging.getLogger("dynalora")
    if not logger.handlers:
        logger.addHandler(_Lines())
        logger.propagate = False
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


_OTHERS = ("transformers", "peft", "torch", "datasets", "accelerate", "bitsandbytes", "huggingface_hub")


class _Lines(logging.Handler):
    """Log records as single lines on standard error: errors red, the rest yellow."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno >= logging.ERROR:
            complain(message)
        else:
            complain(f"Warning: {message}" if record.levelno >= logging.WARNING else message, style="yellow")


def _one_line(message: Warning | str, *_: Any, **__: Any) -> None:
    complain(f"Warning: {message}", style="yellow")


def after_imports() -> None:
    """The rest of `quiet`, for libraries that can be told only once they are imported."""
    from transformers.utils import logging as messages

    messages.set_verbosity_error()
    if not sys.stderr.isatty():
        messages.disable_progress_bar()
