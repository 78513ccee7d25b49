"""The options of a method, which `dynalora COMMAND --method NAME --help` shows below the flags."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from dynalora.cli.screen import console
from dynalora.lab.choices import is_config_file, method_names


def show_method_options(words: list[str]) -> None:
    """Show the options of the method that a program's arguments name, if they do."""
    method = _named(words)
    if method is None or is_config_file(method) or method.lower() not in method_names():
        return
    import importlib

    importlib.import_module("dynalora").register_methods()  # the package has left it to this program
    from dynalora.lab.configs import method_options

    table = Table(title=f"Options of {method}, as -O NAME=VALUE", title_justify="left", box=None, pad_edge=False)
    for column in ("name", "default", "what it is"):
        table.add_column(column, overflow="fold")
    for name, default, text in method_options(method):
        table.add_row(Text(name), Text(default), Text(text))
    console().print(table)


def _named(words: list[str]) -> str | None:
    """The value of `--method` among a program's arguments; None: it is not given."""
    for place, word in enumerate(words):
        if word.startswith("--method="):
            return word.partition("=")[2]
        if word == "--method" and place + 1 < len(words):
            return words[place + 1]
    return None
