"""What the commands share: consoles, quiet third-party output, settings from a file and flags.

Nothing here imports torch itself: what a command does not need is not loaded for its `--help`.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, TypeVar

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from peft import PeftModel

Settings = TypeVar("Settings")

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE.yaml",
        help="Read settings from a YAML file; flags override it.",
        show_default=False,
    ),
]
AdapterArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="ADAPTER", help="Run folder, adapter folder or Hub id of an adapter.", show_default=False
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Base model; by default the one the adapter names.", show_default=False
    ),
]


def console(*, stderr: bool = False) -> Console:
    """A console with colours in a terminal and plain text, wide enough for tables, in a pipe or file."""
    made = Console(stderr=stderr)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made = Console(stderr=stderr, width=160)
    return made


def complain(message: str, *, style: str = "bold red") -> None:
    """One sentence on standard error, not wrapped when it goes to a file."""
    console(stderr=True).print(Text(message, style=style), soft_wrap=True)


def quiet() -> None:
    """Show the user dynalora's own warnings, one line each, and no one else's chatter.

    Progress bars of other libraries are left on in a terminal and switched off in a pipe, where they are garbage.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module=_OTHERS)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=_OTHERS)
    warnings.filterwarnings("ignore", category=UserWarning, module=_OTHERS)
    warnings.showwarning = _one_line
    for name in (
        "transformers",
        "peft",
        "accelerate",
        "datasets",
        "bitsandbytes",
        "httpx",
        "huggingface_hub",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    own = logging.getLogger("dynalora")
    if not own.handlers:
        own.addHandler(_Yellow())
        own.propagate = False
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


_OTHERS = r"(transformers|peft|torch|datasets|accelerate|bitsandbytes|huggingface_hub)(\.|$)"


class _Yellow(logging.Handler):
    """Log records as single yellow lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(
            f"Warning: {record.getMessage()}" if record.levelno >= logging.WARNING else record.getMessage(),
            style="yellow",
        )


def _one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    complain(f"Warning: {message}", style="yellow")


def after_imports() -> None:
    """The rest of `quiet`, for libraries that can be told only once they are imported."""
    from transformers.utils import logging as said

    said.set_verbosity_error()
    if not sys.stderr.isatty():
        said.disable_progress_bar()


def settings(kind: type[Settings], config: Path | None, flags: Mapping[str, Any]) -> Settings:
    """Settings from a YAML file, overridden by the flags that were given.

    Args:
        kind: The dataclass to make.
        config: The YAML file; None: none.
        flags: Flag values by the dataclass's field names; None where the flag was not given.

    Raises:
        ConfigError: The file or a value is wrong.
    """
    from dynalora.lab.settings import read_yaml, settings_from

    values = read_yaml(config) if config is not None else {}
    given = {name: value for name, value in flags.items() if value is not None}
    source = f"'{config}' and the flags" if config is not None else "the flags"
    return settings_from(kind, {**values, **given}, source=source)


def method_options(config: Path | None, pairs: list[str] | None) -> dict[str, Any] | None:
    """What `--option NAME=VALUE` says, over a settings file's own; None, for the file's alone, if nothing is given."""
    from dynalora.lab.settings import named_values, read_yaml

    if not pairs:
        return None
    kept = (read_yaml(config).get("method_options") or {}) if config is not None else {}
    return {**kept, **named_values(pairs)}


def load_adapted(adapter: str | None, model: str | None, *, dtype: str = "auto") -> PeftModel:
    """An adapter on its base model; the adapter's files are checked before the base model is loaded.

    Args:
        adapter: A run folder, an adapter folder or a Hub id.
        model: The base model; None: the one the adapter names.
        dtype: Of the base model's weights.

    Raises:
        ConfigError: No adapter is named, or its base model is unknown or cannot be loaded.
        CheckpointError: There is no adapter, or it is damaged.
    """
    from dynalora.lab.adapters import load_adapter

    after_imports()
    return load_adapter(adapter, model, dtype=dtype)


@contextmanager
def or_resume(command: str, output: str) -> Iterator[None]:
    """Say, when the user interrupts a run, how it is continued.

    Args:
        command: The command's name.
        output: Its run folder.
    """
    try:
        yield
    except KeyboardInterrupt:
        file = Path(output) / "config.yaml"
        if file.exists():
            complain(f"Interrupted; continue with: dynalora {command} --config {file} --resume")
        raise typer.Exit(130) from None
