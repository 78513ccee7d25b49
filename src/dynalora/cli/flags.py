"""Flags out of settings classes: names, types, help and defaults are read off the fields, which alone have them."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_origin

import typer
from rich.markup import escape

from dynalora.errors import ConfigError
from dynalora.lab.settings import Described, Settings, at_home, describe, named, named_values, read_yaml, settings_from

Kind = TypeVar("Kind", bound=Settings)

CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        str | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE.yaml",
            help="Read settings from a YAML file; flags override it.",
            show_default=False,
        ),
    ],
)


def signature_of(kind: type[Settings]) -> inspect.Signature:
    """The parameters of a command that takes these settings, as typer reads them; first `--config`."""
    return inspect.Signature([CONFIG, *(_parameter(item) for item in describe(kind).values())])


def settings_of(kind: type[Kind], config: Path | None, flags: Mapping[str, Any]) -> Kind:
    """Settings from a YAML file, overridden by the flags that were given, which are those that hold a value.

    The settings file in a run folder is that folder's, wherever it was moved to.

    Raises:
        ConfigError: The file or a value is wrong, or two flags of which one is the alternative of the other are given.
    """
    config = config or _config_of_folder(kind, flags)
    values = read_yaml(config) if config is not None else {}
    if config is not None and "output" in values and _is_run_folder(config.parent):
        values["output"] = str(config.parent)
    given = {name: value for name, value in flags.items() if value is not None and value != []}
    for name, item in describe(kind).items():
        other = item.setting.instead_of
        if name not in given:
            if other in given:  # which says in another way what the file says
                values.pop(name, None)
            continue
        if other in given:
            raise ConfigError(
                f"{name} is {given[name]} and {other} is {given[str(other)]}, which exclude each other; give one of "
                "them."
            )
        if other is not None and values.get(other) is not None:
            values[other] = None
        value = given[name]
        if isinstance(value, list):
            value = _listed(item, value)
        values[name] = {**(values.get(name) or {}), **value} if item.setting.merge else value
    missing = [item for name, item in describe(kind).items() if item.default is MISSING and values.get(name) is None]
    if missing and config is None:
        words = [next(iter(_spellings(item)), item.setting.metavar or item.name) for item in missing]
        raise ConfigError(f"{' and '.join(words)} must be given; see --help.")
    return settings_from(kind, values, source=f"'{config}' and the flags" if config is not None else "the flags")


def _config_of_folder(kind: type[Settings], flags: Mapping[str, Any]) -> Path | None:
    """The settings file of the run folder that a flag speaks of; None where no such flag is given."""
    flag = next((name for name, item in describe(kind).items() if item.setting.of_folder and flags.get(name)), None)
    if flag is None or not flags.get("output"):
        return None
    file = Path(at_home(str(flags["output"]))) / "config.yaml"
    if not file.exists():
        raise ConfigError(f"output is '{file.parent}', which holds no run to {flag} on (it has no {file.name}).")
    return file


def _listed(item: Described, texts: list[str]) -> Any:
    if item.setting.parse is not None:
        return item.setting.parse(texts)
    if any(get_origin(kind) is dict for kind in item.types):
        return named_values(texts)
    if item.setting.commas:
        return [part.strip() for text in texts for part in text.split(",") if part.strip()]
    return texts


def _is_run_folder(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("run.json", "cells"))


_VERB = r" (?:is|names|uses|must|would|holds|needs|goes)(?= )"
"""What follows the name of a setting that begins a clause."""


def in_flags(message: str, kind: type[Settings], typed: Sequence[str]) -> str:
    """A message on settings in the words of the command line: fields are named by their flags, as they were typed, and
    so are the numbers that they were given.

    Where there is a settings file, fields whose flags were not typed keep their names, as they stand in it.

    Args:
        message: Names fields as settings files do, such as "learning_rate is 0.0; give more than 0."
        kind: The command's settings.
        typed: The program's arguments.
    """
    if re.match(r"Unknown setting |Method '[^']*' has no option ", message):  # names of a file, or of a method
        return message
    in_file = any(_was_typed(flag, typed) for flag in ("--config", "-c"))
    for name, item in describe(kind).items():
        spellings = _spellings(item)
        used = next((flag for flag in spellings if _was_typed(flag, typed)), None)
        if used is None and in_file:
            continue
        called = used or (spellings[0] if spellings else item.setting.metavar or name.upper())
        # A name of one word may be a word of the sentence as well; as a name, it is marked or begins a clause.
        patterns = [f"`{name}`"]
        if "_" in name:
            patterns.append(rf"(?<![\w'./-]){name}(?![\w'/=-])")
        elif used is not None or not spellings:
            patterns.append(rf"(?:\A|(?<= and )){name}(?={_VERB})")
        for pattern in patterns:
            message = re.sub(pattern, called, message)
        for number, text in _numbers_typed(used, typed):
            message = re.sub(rf"(?<={re.escape(called)} is ){re.escape(number)}(?![\d.])", text, message)
    return _begun(message, kind)


def _begun(message: str, kind: type[Settings]) -> str:
    """A message with a capital at its beginning, unless that is the name of a setting, which stays as it is.

    Messages of the library begin in lower case where its users read them behind the name of an error's class.
    """
    word = re.match(rf"([a-z]+)(?P<verb>{_VERB})?(?= )", message)
    if word is None or (word["verb"] and word[1] in describe(kind)):
        return message
    return message[0].upper() + message[1:]


def _numbers_typed(flag: str | None, typed: Sequence[str]) -> list[tuple[str, str]]:
    """The numbers behind a flag: as Python writes them (-1.0) and as they were typed (-1)."""
    if flag is None:
        return []
    words = [word for before, word in itertools.pairwise(typed) if before == flag]
    words += [word.partition("=")[2] for word in typed if word.startswith(f"{flag}=")]
    numbers = []
    for text in (part.strip() for word in words for part in word.split(",")):
        try:
            numbers.append((str(float(text)), text))
        except ValueError:
            continue
    return numbers


def _spellings(item: Described) -> list[str]:
    if item.setting.positional:
        return []
    negative = [_negative(item)] if bool in item.types else []
    return [_flag(item), *([item.setting.alias] if item.setting.alias else []), *negative]


def _was_typed(flag: str, typed: Sequence[str]) -> bool:
    short = not flag.startswith("--")
    return any(word == flag or word.startswith(f"{flag}=") or (short and word.startswith(flag)) for word in typed)


def _parameter(item: Described) -> inspect.Parameter:
    setting = item.setting
    kind = _kind(item)
    number = next((f"<{plain.__name__}>" for plain in (int, float) if kind is str and plain in item.types), None)
    metavar = setting.metavar or ("A,B,…" if setting.commas else "TEXT" if kind == list[str] else number)
    more: dict[str, Any] = {"help": _help(item), "show_default": False, "metavar": metavar}
    if setting.positional:
        info = typer.Argument(**more)
    else:
        flag = _flag(item)
        switch = f"{flag}/{_negative(item)}" if kind is bool else flag
        info = typer.Option(*filter(None, (switch, setting.alias)), rich_help_panel=item.panel, **more)
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info]
    )


def _kind(item: Described) -> Any:
    """The type that typer converts to. Numbers come as text, which the settings read as they read that of a file."""
    if bool in item.types:
        return bool
    several = any(get_origin(kind) in (list, dict) for kind in item.types)
    return list[str] if several and (str not in item.types or item.setting.positional) else str


def _flag(item: Described) -> str:
    return item.setting.name or f"--{item.name.replace('_', '-')}"


def _negative(item: Described) -> str:
    return item.setting.negative or f"--no-{_flag(item).removeprefix('--')}"


def _help(item: Described) -> str:
    """The first sentence of the description, the values, and the default."""
    choices, suggested = named(item.setting.choices), named(item.setting.suggested)
    parts = [
        item.summary,
        f"One of {', '.join(choices)}." if choices else "",
        f"Such as {', '.join(suggested)}." if suggested else "",
        f"[{default}]" if (default := _default(item)) else "",
    ]
    return escape(" ".join(filter(None, parts)))


def _default(item: Described) -> str:
    value = item.default
    if value is MISSING:
        return "required"
    if value is None or value == [] or value == {}:
        return f"default: {item.absent}" if item.absent else ""
    if isinstance(value, bool):
        if not value and item.setting.negative is None:
            return ""  # a switch that is off needs no word
        text = (_flag(item) if value else _negative(item)).removeprefix("--")
    elif isinstance(value, (list, tuple)):
        text = ", ".join(map(str, value))
    else:
        text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"default: {text}"
