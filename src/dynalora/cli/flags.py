"""Flags out of settings classes: names, types, help and defaults are read off the fields, which alone have them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_origin

import typer
from rich.markup import escape

from dynalora.lab.settings import Described, Settings, describe, named, named_values, read_yaml, settings_from

Kind = TypeVar("Kind", bound=Settings)

CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None,
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

    Raises:
        ConfigError: The file or a value is wrong.
    """
    values = read_yaml(config) if config is not None else {}
    for name, item in describe(kind).items():
        value = flags.get(name)
        if value is None or value == []:
            continue
        if isinstance(value, list):
            value = _listed(item, value)
        values[name] = {**(values.get(name) or {}), **value} if item.setting.merge else value
    return settings_from(kind, values, source=f"'{config}' and the flags" if config is not None else "the flags")


def _listed(item: Described, texts: list[str]) -> Any:
    if item.setting.parse is not None:
        return item.setting.parse(texts)
    if any(get_origin(kind) is dict for kind in item.types):
        return named_values(texts)
    if item.setting.commas:
        return [part.strip() for text in texts for part in text.split(",") if part.strip()]
    return texts


def _parameter(item: Described) -> inspect.Parameter:
    setting = item.setting
    kind = _kind(item)
    metavar = setting.metavar or ("A,B,…" if setting.commas else "TEXT" if kind == list[str] else None)
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
    """The type that typer converts to; what is more than one value comes as texts."""
    plain = [kind for kind in (bool, int, float) if kind in item.types]
    if plain:
        return plain[0]
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
