"""Settings from YAML files and flags, checked against the fields of a dataclass."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from dynalora.errors import ConfigError

Settings = TypeVar("Settings")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: The file cannot be read, is not YAML (with the line number), or holds something else.
    """
    file = Path(path)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"The settings file '{file}' cannot be read ({error.strerror or error})."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"The settings file '{file}' is not UTF-8 text (byte {error.start}).") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise ConfigError(f"The settings file '{file}'{where} is not valid YAML ({problem}).") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"The settings file '{file}' holds a {type(content).__name__}; write lines of 'name: value'."
        )
    return {str(name): value for name, value in content.items()}


def defaults_of(kind: type[Any]) -> dict[str, Any]:
    """What the fields of a dataclass are by default, those without a default left out.

    Files that an older version has written lack the settings that came later; these had their defaults' effect.
    """
    values = {item.name: item.default for item in fields(kind) if item.default is not MISSING}
    made = {item.name: item.default_factory() for item in fields(kind) if item.default_factory is not MISSING}
    return values | made


def settings_from(
    kind: type[Settings], values: Mapping[str, Any], *, source: str = "the settings"
) -> Settings:
    """Make a settings dataclass from loosely typed values.

    Numbers may come as text (YAML 1.1 reads `2e-4` as text), whole numbers as floats, and lists as tuples.

    Args:
        kind: A dataclass whose fields are annotated with str, int, float, bool, lists of these, dict or unions.
        values: Name → value.
        source: How to call the values in errors.

    Raises:
        ConfigError: An unknown name (with the closest known one), a missing one, or a value of the wrong kind.
    """
    known = {item.name: item for item in fields(kind) if item.init}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ConfigError(f"Unknown setting '{name}' in {source}; {did_you_mean(name, known)}.")
    missing = [
        name
        for name, item in known.items()
        if item.default is MISSING and item.default_factory is MISSING and values.get(name) is None
    ]
    if missing:
        raise ConfigError(
            f"Missing {' and '.join(repr(name) for name in missing)} in {source}; give them a value."
        )
    hints = get_type_hints(kind)
    return kind(**{name: coerce(value, hints[name], name) for name, value in values.items()})


def named_values(pairs: Iterable[str]) -> dict[str, Any]:
    """`["a=1", "b=x"]` as a mapping; each value is read as YAML reads it.

    Raises:
        ConfigError: A pair has no name or no equals sign.
    """
    result: dict[str, Any] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign or not name.strip():
            raise ConfigError(f"The option '{pair}' is not of the form NAME=VALUE.")
        try:
            result[name.strip()] = yaml.safe_load(text)
        except yaml.YAMLError:
            result[name.strip()] = text
    return result


def named_source(text: str, setting: str) -> tuple[str, str]:
    """`NAME=SOURCE` as its two parts.

    Args:
        text: What was given.
        setting: Where, for the error.

    Raises:
        ConfigError: A part is missing.
    """
    name, _, source = (part.strip() for part in text.partition("="))
    if not (name and source):
        raise ConfigError(f"{setting} is '{text}'; write it as NAME=SOURCE.")
    return name, source


def did_you_mean(name: str, known: Mapping[str, Any] | list[str]) -> str:
    """A remedy for an unknown name: the closest known one, then all of them."""
    near = difflib.get_close_matches(name, list(known), n=1)
    listed = ", ".join(sorted(known))
    return f"did you mean '{near[0]}'? Known are {listed}" if near else f"known are {listed}"


def coerce(value: Any, hint: Any, name: str) -> Any:
    """`value` as the annotated type.

    Raises:
        ConfigError: It cannot be that.
    """
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in choices:
        return None
    for choice in choices:
        converted = _as(value, choice)
        if converted is not MISSING:
            return converted
    words = [
        _WORDS.get(get_origin(choice) or choice, str(choice))
        for choice in choices
        if choice is not type(None)
    ]
    wanted = " or ".join(words)
    raise ConfigError(f"{name} must be {wanted}, got {value!r}.")


_WORDS: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping of names to values",
}


def _as(value: Any, kind: Any) -> Any:
    origin = get_origin(kind) or kind
    if origin is Any:
        return value
    if origin is bool:
        return value if isinstance(value, bool) else MISSING
    if origin is dict:
        return dict(value) if isinstance(value, Mapping) else MISSING
    if origin is list:
        if not isinstance(value, (list, tuple, set)):
            return MISSING
        (each,) = get_args(kind) or (str,)
        made = [str(item) if each is str else _as(item, each) for item in value]
        return MISSING if any(item is MISSING for item in made) else made
    if value is None or isinstance(value, (bool, list, tuple, set, Mapping)):
        return MISSING
    if origin is str:
        return str(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return MISSING
    if origin is int:
        return int(number) if math.isfinite(number) and number == int(number) else MISSING
    return number if origin is float else MISSING
