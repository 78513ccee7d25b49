"""Regular expressions in configurations, which may come from a stranger: does matching them ever end?

Python's matching tries all ways to divide a text among nested repetitions, so a short pattern can take longer than
anybody waits, and nothing in the process can stop it. Patterns that repeat something are therefore tried first, on the
model's own names, in a process of its own with a limit on its time. Lists that are far longer than a model has
modules are refused, for every entry is compared with every module.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from dynalora.common.names import shown
from dynalora.common.trial import tried
from dynalora.errors import ConfigError

T = TypeVar("T")

#: How PEFT matches a module's name with what names blocks, and modules that are trained in full.
_AROUND = {"layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\..*", "modules_to_save": r"(^|.*\.){}($|\..*)"}
_SECONDS = 3
_LONGEST = 100_000  # characters: three times what lists all matrices of a model with 80 blocks
_MOST_EXPRESSIONS = 10_000  # keys of a pattern that are no plain names; compiling them takes seconds
_MOST_CHARACTERS = 300_000  # of those together
_MOST_KEYS = 2_000  # of a pattern, unless the model has more modules: PEFT compares each with each that it adapts
_PLAIN = re.compile(r"\^?(?:[\w.\-]|\\[.\-])*\$?")  # names as users and saving write them, which always compile
MOST_NAMES = 512
"""How many modules to train in full, blocks or embeddings may be named: as many expressions as Python remembers, for
PEFT has it compile each of them for each module."""
_TRY = """
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]), int(sys.argv[1]) + 1))
except ImportError:
    pass
patterns, names = json.load(sys.stdin)
for field, pattern in patterns:
    print(field, flush=True)
    for name in names:
        re.fullmatch(pattern, name)
print("done")
"""


def as_matched(pattern: str) -> str:
    """The expression that PEFT matches a module's whole name with, for a key of a pattern such as `rank_pattern`."""
    return rf"(.*\.)?({pattern})$"


def compiles(pattern: str) -> bool:
    """Whether a key of a pattern is a regular expression, and not so long that compiling it takes seconds."""
    if len(pattern) > _LONGEST:
        return False
    if _PLAIN.fullmatch(pattern):
        return True
    try:
        re.compile(as_matched(pattern))
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def too_many(keys: Iterable[str]) -> bool:
    """Whether the keys of a pattern are so many regular expressions that compiling them takes more than seconds."""
    sizes = [len(key) for key in keys if not _PLAIN.fullmatch(key)]
    return len(sizes) > _MOST_EXPRESSIONS or sum(sizes) > _MOST_CHARACTERS


def of_module(pattern: Mapping[str, T], name: str, default: T) -> T:
    """What a pattern such as `rank_pattern` says of a module, as PEFT reads it: by the first key that matches.

    PEFT's own `get_pattern_key` asks `re` for every key anew, which keeps few expressions: with a rank for each of 560
    matrices that took 9 seconds.

    Args:
        pattern: Values by name or regular expression.
        name: The module's name.
        default: The value of modules that no key matches.
    """
    for key, expression in zip(pattern, _expressions(tuple(pattern)), strict=True):
        if expression.match(name):
            return pattern[key]
    return pattern.get(name, default)


@functools.lru_cache(maxsize=8)
def _expressions(keys: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(as_matched(key)) for key in keys)


def check_patterns(config: Any, names: Iterable[str], experts: int = 0) -> None:
    """Refuse patterns of a configuration that do not come to an end on a model's names.

    Args:
        config: An adapter's configuration, of any of dynalora's methods.
        names: The names of the model's modules.
        experts: How many matrices the model has besides, in parameters.

    Raises:
        ConfigError: Matching one takes too long.
    """
    names = list(names)
    most = max(_MOST_KEYS, len(names) + experts)
    for field in ("rank_pattern", "alpha_pattern", "scaling_ranks"):
        if (count := len(getattr(config, field))) > most:
            raise ConfigError(
                f"{type(config).__name__}: {field} has {count:,} entries, and the model {len(names) + experts:,} "
                "modules; leave out those that mean none, or write one regular expression for several."
            )
    patterns = []
    for field in ("target_modules", "exclude_modules"):
        value = getattr(config, field)
        if isinstance(value, str):
            patterns.append((field, value))
    for field in ("rank_pattern", "alpha_pattern", "scaling_ranks"):
        patterns += [(field, as_matched(key)) for key in getattr(config, field) if _repeats(key)]
    for field, around in _AROUND.items():
        value = getattr(config, field)
        keys = [value] if isinstance(value, str) else value or ()
        patterns += [(field, around.format(key)) for key in keys if _repeats(key)]
    patterns = [(field, pattern) for field, pattern in patterns if _repeats(pattern, more_than=1)]
    if not patterns:
        return
    limit = _SECONDS + len(patterns) // 100
    reached, _ = tried(_TRY, [patterns, names], str(limit))
    if reached and reached[-1] != "done":
        field = reached[-1]
        raise ConfigError(
            f"{type(config).__name__}: {field}={shown(getattr(config, field))} takes too long to match the names "
            "of the model's modules; write it without a repetition inside another, or list the names."
        )


def _repeats(pattern: str, more_than: int = 0) -> bool:
    return sum(pattern.count(mark) for mark in "*+{") > more_than
