"""Settings of jobs: dataclasses whose fields say everything of a setting once, read from YAML files and flags.

A field has its name, its type and its default as in any dataclass; the class's docstring describes it under
`Attributes:`. What is not said by these stands in a [`Setting`][dynalora.lab.settings.Setting] inside `Annotated`:
a short flag, bounds, the group of flags in `--help`. The command line, the checks and the file `config.yaml` of a
run folder all come from there.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import operator
import os
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

from dynalora.common.files import why_not_written
from dynalora.common.names import did_you_mean, shown
from dynalora.errors import ConfigError

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Setting:
    """What a field of a settings class needs beyond its name, type, default and description.

    Attributes:
        alias: A second flag, such as `-m` or `--lr`.
        name: The flag's name; None: the field's, with hyphens.
        panel: Heading in `--help`; None: that of the class that declares the field.
        metavar: What stands for the value in `--help`; None: what the type suggests.
        positional: Whether it is an argument instead of a flag.
        negative: The flag that switches it off; None: `--no-` and its name.
        commas: Whether a list may be written with commas.
        parse: Makes the value of the texts that were given; None: by the type.
        merge: Whether flags add to what the settings file holds, instead of replacing it.
        recorded: Whether it belongs into `config.yaml`; what does not change the result is left out.
        least: The smallest number allowed.
        most: The largest number allowed.
        above: All numbers above this one are allowed.
        below: All numbers below this one are allowed.
        blank: Whether an empty text is a value of its own; elsewhere it is a mistake, such as of an unset variable.
        place: Whether it names a model or data: a file or folder that is there is written with its whole path, so that
            what is recorded holds from every folder.
        home: Whether it names a file or folder otherwise: `~` at its beginning is the user's home, as a shell has it
            where it is neither quoted nor behind an equals sign. So it is of all places and of all that is written.
        instead_of: Another setting of which this one is the alternative: not both can be given.
        only_with: Another setting without which this one would have no effect: given alone, it is refused.
        writes: Whether it is where a command writes: `file` or `folder`, or for a file that is written together with
            others a function that names them all. What is there already is never overwritten.
        endings: Of a file that is written, the endings its name may have; a name without one gets the first.
        of_folder: Whether, where it is given without a settings file, the settings are those of the run folder that the
            output names.
        choices: The values allowed, or a function that names them.
        suggested: Values that `--help` names where others are allowed too, or a function that names them.
    """

    alias: str | None = None
    name: str | None = None
    panel: str | None = None
    metavar: str | None = None
    positional: bool = False
    negative: str | None = None
    commas: bool = False
    parse: Callable[[list[str]], Any] | None = None
    merge: bool = False
    recorded: bool = True
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    blank: bool = False
    place: bool = False
    home: bool = False
    instead_of: str | None = None
    only_with: str | None = None
    writes: str | Callable[[str], Sequence[Path]] | None = None
    endings: Sequence[str] = ()
    of_folder: bool = False
    choices: Sequence[str] | Callable[[], Sequence[str]] = ()
    suggested: Sequence[str] | Callable[[], Sequence[str]] = ()

    def refusal(self, name: str, value: Any) -> str | None:
        """Why a single value of a field is not allowed, with the remedy; None if it is allowed."""
        choices = named(self.choices)
        if choices and value not in choices:
            return f"{name} is '{value}'; choose one of {', '.join(choices)}."
        bounds = (
            ("at least", self.least, operator.ge),
            ("at most", self.most, operator.le),
            ("more than", self.above, operator.gt),
            ("less than", self.below, operator.lt),
        )
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return None
        limits = [(words, limit, allows) for words, limit, allows in bounds if limit is not None]
        if isinstance(value, int) and value > MOST_WHOLE and self.most is None and self.below is None:
            limits.append(("at most", MOST_WHOLE, operator.le))  # what counters of all libraries can hold
        finite = isinstance(value, int) or math.isfinite(value)  # whole numbers may be too large for a float
        if finite and all(allows(value, limit) for _, limit, allows in limits):
            return None
        wanted = [f"{words} {_number(limit)}" for words, limit, _ in limits]
        if not finite:
            wanted.insert(0, "a finite number")
        too_long = isinstance(value, int) and abs(value) >= _BY_SIZE
        shown = f"about 1e{math.log10(abs(value)):.0f}" if too_long else value
        return f"{name} is {shown}; give {' and '.join(wanted)}."


MOST_WHOLE = 2**31 - 1
"""The largest whole number that a setting without a limit of its own can be."""
_BY_SIZE = 10**30
"""The first whole number that a message shows by its size, and not digit by digit."""


def _number(value: float) -> str:
    """A limit in digits: whole numbers in full."""
    return str(int(value)) if value == int(value) else f"{value:g}"


SEED = Setting(least=0, most=2**32 - 1)
"""A seed, as NumPy takes it."""


PICTURES = (".png", ".svg")
"""Endings of pictures, of which both kinds are written."""


def named(values: Sequence[str] | Callable[[], Sequence[str]]) -> Sequence[str]:
    """Values, or what a function that names them returns."""
    return values() if callable(values) else values


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all settings classes.

    `panel=` in the class statement names the heading of its flags in `--help`. `like=` names another settings class
    whose descriptions, bounds and flags hold for fields of the same name; where such a field is None, its value comes
    from elsewhere, which `absent=` says in words.
    """

    unused: ClassVar[Mapping[str, Any]] = {}
    """Settings of older versions that had no effect, with the values at which files may still hold them."""
    _panel: ClassVar[str | None] = None
    _like: ClassVar[type[Settings] | None] = None
    _absent: ClassVar[str | None] = None

    def __init_subclass__(
        cls, *, panel: str | None = None, like: type[Settings] | None = None, absent: str | None = None
    ) -> None:
        super().__init_subclass__()
        cls._panel, cls._like, cls._absent = panel, like, absent

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:
        """Refuse what cannot be; classes with rules of their own call `super()._check()` first.

        Raises:
            ConfigError: A value, named in one sentence with the remedy.
        """
        for name, described in describe(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, str) and not value.strip() and not described.setting.blank:
                needed = described.default is MISSING
                raise ConfigError(f"{name} is empty; give it a value{'' if needed else ', or leave it out'}.")
            if described.setting.place and isinstance(value, str):
                object.__setattr__(self, name, whole_path(value))
            elif described.setting.home or described.setting.writes is not None:
                object.__setattr__(self, name, _at_home(name, value))
            other = described.setting.only_with
            if other is not None and value != described.default and not getattr(self, other):
                raise ConfigError(f"{name} is {value}, which counts with `{other}` only; give both, or leave it out.")
            several = value if isinstance(value, (list, tuple)) else [value]
            for place, single in enumerate(several):
                if described.setting.commas and single in several[:place]:
                    raise ConfigError(f"{name} names {single} twice; name it once.")
                if single is None or isinstance(single, Mapping):
                    continue
                refusal = described.setting.refusal(name, single)
                if refusal:
                    raise ConfigError(refusal)
        self._check_outputs()

    def _check_outputs(self) -> None:
        """Refuse outputs that would overwrite something, or each other, or that cannot be written."""
        written: dict[Path, str] = {}
        for name, described in describe(type(self)).items():
            writes, value = described.setting.writes, getattr(self, name)
            if writes is None or value is None:
                continue
            if writes != "folder" and Path(value).name in ("", ".."):
                raise ConfigError(
                    f"{name} is '{value}', which is a folder and not the name of a file; give another place."
                )
            ending, allowed = Path(value).suffix.lower(), described.setting.endings
            if allowed and ending not in ("", *allowed):
                raise ConfigError(f"{name} is '{value}', whose ending is unknown; give one of {', '.join(allowed)}.")
            for path in writes(value) if callable(writes) else [Path(value)]:
                reason = why_not_written(path, folder=writes == "folder")
                if reason:
                    raise ConfigError(f"{name} is '{path}', which {reason}; give another place.")
                if (other := written.setdefault(path.absolute(), name)) != name:
                    raise ConfigError(f"{name} is '{path}', and so is {other}; give each a file of its own.")

    def settings(self) -> dict[str, Any]:
        """What `config.yaml` holds: everything but what does not change the result; its own settings come first."""
        return {
            name: getattr(self, name) for name, described in describe(type(self)).items() if described.setting.recorded
        }


def whole_path(source: str) -> str:
    """A file or folder that is there with its whole path; anything else, such as an id on the Hub, as it is."""
    try:
        path = Path(source).expanduser()
    except RuntimeError:  # the home of somebody who is not there
        return source
    return str(path.absolute()) if source.strip() and os.path.exists(path) else source


def at_home(path: str) -> str:
    """A path with the user's home for `~` at its beginning; another one as it is."""
    return os.path.expanduser(path) if path.startswith("~") else path


def _at_home(name: str, value: Any) -> Any:
    """The value of a setting that names a place, or places, with the user's home for `~`.

    Raises:
        ConfigError: It is the home of somebody who is not there.
    """
    if isinstance(value, list):
        return [_at_home(name, item) for item in value]
    if not isinstance(value, str):
        return value
    path = at_home(value)
    if path.startswith("~") and not os.path.lexists(path):
        raise ConfigError(f"{name} is '{value}', and there is no such user; write ./{value} for what is called so.")
    return path


@dataclass(frozen=True)
class Described:
    """A field of a settings class with all that its declaration says.

    Attributes:
        name: The field's name.
        hint: Its type, without `Annotated`.
        setting: What `Annotated` adds.
        text: Its description, from the docstring.
        panel: Heading in `--help`.
        default: Its default; `dataclasses.MISSING` if it must be given.
        absent: What None stands for, in words; None if nothing says.
    """

    name: str
    hint: Any
    setting: Setting
    text: str
    panel: str | None
    default: Any
    absent: str | None

    @property
    def types(self) -> tuple[Any, ...]:
        """The types that a value may have, without None."""
        return tuple(kind for kind in alternatives(self.hint) if kind is not type(None))

    @property
    def summary(self) -> str:
        """The description, without what None stands for, and without sentences that only link elsewhere."""
        first = _first_sentence(self.text)
        text = _NONE.sub("", first) + self.text.removeprefix(first)
        return _LINK.sub(r"\1", _SEE.sub("", text)).replace("`", "").strip()


_LINK = re.compile(r"\[([^\[\]]+)\]\[[\w.]+\]")
_SEE = re.compile(r"\s*See \[[^\[\]]+\]\[[\w.]+\]\.")
_NONE = re.compile(r";\s*None: ([^;]*?)(?=;|\.?$)")


def describe(kind: type[Any]) -> dict[str, Described]:
    """The fields of a settings class: those of the class itself first, then those of its bases.

    A subclass that changes only a default keeps the description, the bounds and the flags of its base.
    """
    return _describe(cast(Any, kind))  # a class is hashable, which mypy denies where its instances define a hash


@functools.cache
def _describe(kind: type[Any]) -> dict[str, Described]:
    declared = {item.name: item for item in fields(kind) if item.init}
    annotated = get_type_hints(kind)
    like = getattr(kind, "_like", None)
    described = {}
    for name in dict.fromkeys(name for base in kind.__mro__ for name in _declared(base) if name in declared):
        declaring = [base for base in kind.__mro__ if name in _declared(base)]
        borrowed = [base for base in getattr(like, "__mro__", ()) if name in _declared(base)]
        sources = declaring + borrowed
        setting = next((extra for base in sources if (extra := _setting(base, name))), Setting())
        text = next((texts[name] for base in sources if name in (texts := _descriptions(base))), "")
        none = _NONE.search(_first_sentence(text))
        described[name] = Described(
            name=name,
            hint=annotated[name],
            setting=setting,
            text=text,
            panel=setting.panel or getattr(sources[-1], "_panel", None),
            default=_default(declared[name]),
            absent=kind._absent if borrowed else none and none[1].strip(),
        )
    return described


def _declared(kind: type[Any]) -> dict[str, Any]:
    return inspect.get_annotations(kind)


def _setting(kind: type[Any], name: str) -> Setting | None:
    extras = getattr(_hints(cast(Any, kind))[name], "__metadata__", ())
    return next((extra for extra in extras if isinstance(extra, Setting)), None)


@functools.cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    """Kept, since the hints of a class are evaluated all at once and every one of its fields asks."""
    return get_type_hints(kind, include_extras=True)


@functools.cache
def _descriptions(kind: type[Any]) -> dict[str, str]:
    """The texts below `Attributes:` in a class's docstring, each on one line."""
    _, _, section = inspect.cleandoc(kind.__dict__.get("__doc__") or "").partition("\nAttributes:\n")
    texts: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        start = re.match(r"    (\w+): (.*)", line)
        if line and not line.startswith(" "):
            break
        if start:
            name, texts[start[1]] = start[1], start[2]
        elif name and line.strip():
            texts[name] += " " + line.strip()
    return texts


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=\.)\s+(?=[A-Z`])", text, maxsplit=1)[0]


_LONGEST = 10**6
"""Characters of a settings file; it may be a device that has no end. Aliases may write out as many values."""


class _Loader(yaml.SafeLoader):
    """YAML's plain values, where a name that stands twice is an error: YAML itself takes the last, in silence.

    Aliases of aliases, with which a few lines mean more values than anything could look at, are an error, too.
    """

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _count(node, {}) > _LONGEST:
            raise yaml.constructor.ConstructorError(
                problem=f"its aliases repeat more than {_LONGEST} values", problem_mark=node.start_mark
            )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"it names '{key.value}' twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _count(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node has with those that aliases repeat; infinitely many where it holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        known[id(node)] = 1 + sum(_count(part, known) for part in inner)
    return known[id(node)]


def parse_yaml(text: str) -> Any:
    """What a text in YAML holds, in plain values.

    Raises:
        yaml.YAMLError: It is none, names something twice, or means endlessly many values.
        ValueError: It holds a date that is none.
        RecursionError: It holds lists in lists without end.
    """
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: The file cannot be read, is not YAML (with the line number), or holds something else.
    """
    file = Path(path)
    try:
        with open(file, encoding="utf-8") as opened:
            text = opened.read(_LONGEST + 1)
        content = parse_yaml(text) if len(text) <= _LONGEST else None
    except OSError as error:
        raise ConfigError(f"The settings file '{file}' cannot be read ({error.strerror or error}).") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"The settings file '{file}' is not UTF-8 text (byte {error.start}).") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates that are none; lists in lists without end
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise ConfigError(f"The settings file '{file}'{where} is not valid YAML ({problem}).") from None
    if len(text) > _LONGEST:
        raise ConfigError(f"The settings file '{file}' has more than {_LONGEST} characters; give a file of settings.")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"The settings file '{file}' holds {_word_of(content)}; write lines of 'name: value'.")
    return {str(name): value for name, value in content.items()}


def defaults_of(kind: type[Any]) -> dict[str, Any]:
    """What the fields of a dataclass are by default, those without a default left out.

    Files that an older version has written lack the settings that came later; these had their defaults' effect.
    """
    return {item.name: value for item in fields(kind) if (value := _default(item)) is not MISSING}


def _default(item: Field[Any]) -> Any:
    """The default of a dataclass's field; MISSING if it must be given."""
    return item.default if item.default_factory is MISSING else item.default_factory()


def settings_from(kind: type[Kind], values: Mapping[str, Any], *, source: str = "the settings") -> Kind:
    """Make a settings dataclass from loosely typed values.

    Numbers may come as text (YAML 1.1 reads `2e-4` as text), whole numbers as floats, and lists as tuples.

    Args:
        kind: A dataclass whose fields are annotated with str, int, float, bool, lists of these, dict or unions.
        values: Name → value.
        source: How to call the values in errors.

    Raises:
        ConfigError: An unknown name (with the closest known one), a missing one, or a value of the wrong kind.
    """
    allowed = {item.name: item for item in fields(kind) if item.init}  # type: ignore[arg-type]
    unused: Mapping[str, Any] = getattr(kind, "unused", {})
    for name in unused.keys() & values.keys():
        if values[name] != unused[name]:
            raise ConfigError(
                f"{name} is {values[name]}, and this experiment does not use it: its runs are measured and saved at "
                "their end; leave it out."
            )
    values = {name: value for name, value in values.items() if name not in unused}
    for name in values:
        if name not in allowed:
            meant = _with_flag(kind, name)
            remedy = f"write it as '{meant}'" if meant else did_you_mean(name, allowed)
            raise ConfigError(f"Unknown setting '{name}' in {source}; {remedy}.")
    missing = [name for name, item in allowed.items() if _default(item) is MISSING and values.get(name) is None]
    if missing:
        raise ConfigError(f"Missing {' and '.join(repr(name) for name in missing)} in {source}; give them a value.")
    hints = get_type_hints(kind)
    return kind(**{name: coerce(value, hints[name], name) for name, value in values.items()})


def _with_flag(kind: type[Any], name: str) -> str | None:
    """The field of a settings class whose flag is `--NAME`; None if there is none."""
    if not issubclass(kind, Settings):
        return None
    flag = f"--{name.replace('_', '-')}"
    fields_of = describe(kind).items()
    return next((field for field, item in fields_of if flag in (item.setting.name, item.setting.alias)), None)


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
            result[name.strip()] = parse_yaml(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            result[name.strip()] = text
    return result


def named_source(text: str, setting: str) -> tuple[str, str]:
    """`NAME=SOURCE` as its two parts; `setting` is where it was given, for the error.

    Raises:
        ConfigError: A part is missing.
    """
    name, _, source = (part.strip() for part in text.partition("="))
    if not (name and source):
        raise ConfigError(f"{setting} is '{text}'; write it as NAME=SOURCE.")
    return name, source


def coerce(value: Any, hint: Any, name: str) -> Any:
    """`value` as the annotated type.

    Raises:
        ConfigError: It cannot be that.
    """
    choices = alternatives(hint)
    if value is None and type(None) in choices:
        return None
    for choice in choices:
        converted = _as(value, choice)
        if converted is not MISSING:
            return converted
    for choice in choices:  # a list of which only some items are wrong: these are named
        if get_origin(choice) is list and isinstance(value, (list, tuple)):
            (each,) = get_args(choice) or (str,)
            wrong = [item for item in value if _as(item, each) is MISSING]
            if each in _WORDS and wrong:
                raise ConfigError(f"{name} holds {shown(wrong[0])}; give {_SEVERAL[each]}.")
    words = [_WORDS.get(get_origin(choice) or choice, str(choice)) for choice in choices if choice is not type(None)]
    raise ConfigError(f"{name} must be {' or '.join(words)}, got {shown(value)}.")


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that a union names; of another type, itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


_WORDS: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping of names to values",
}


_SEVERAL: dict[Any, str] = {int: "whole numbers", float: "numbers", bool: "true or false", str: "texts"}


def _word_of(content: Any) -> str:
    """What a YAML file holds instead of settings, in words."""
    return {str: "text", bool: "true or false"}.get(type(content)) or _WORDS.get(type(content), "something else")


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
        items = [str(item) if each is str else _as(item, each) for item in value]
        return MISSING if any(item is MISSING for item in items) else items
    if value is None or isinstance(value, (bool, list, tuple, set, Mapping)):
        return MISSING
    if origin is str:
        return str(value)
    if origin is int:  # as typed, also where a float would round it
        with contextlib.suppress(TypeError, ValueError):
            if isinstance(value, (int, str)):
                return int(value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return MISSING
    if origin is int:
        return int(number) if math.isfinite(number) and number == int(number) else MISSING
    return number if origin is float else MISSING


def names_or_pattern(targets: list[str] | str) -> list[str] | str:
    """Module names written with commas as a list; `all-linear` and regular expressions stay as they are."""
    if isinstance(targets, str) and targets != "all-linear" and re.fullmatch(r"[\w.\-]+(\s*,\s*[\w.\-]+)*,?", targets):
        return [name.strip() for name in targets.split(",") if name.strip()]
    return targets
