"""Names and labels that several rooms agree on."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's modules."""

IGNORED_LABEL = -100
"""The label of tokens without a loss, as transformers has it."""


def plain_name(name: str) -> str:
    """A module's name in the base model: without what PEFT puts before it."""
    return name.removeprefix(PREFIX)


_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxstring, _SHOWN.maxother, _SHOWN.maxlong = 4, 200, 200, 200
_SHOWN.maxlist = _SHOWN.maxtuple = _SHOWN.maxset = _SHOWN.maxfrozenset = _SHOWN.maxdict = 20


def shown(value: Any) -> str:
    """A value as Python writes it, for a message: of one that would fill the screen, its beginning.

    A list in which others are repeated through aliases can be small and take for ever to write.
    """
    text = _SHOWN.repr(value)
    return text if len(text) <= 250 else f"{text[:200]} …"


_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def is_path(source: str) -> bool:
    """Whether a source can only be a place on this machine, so that the Hugging Face Hub need not be asked for it.

    Ids on the Hub are NAME or OWNER/NAME. What is written in another way is a path, and so is what begins with a folder
    that is there, or is a link here, even one that leads nowhere.
    """
    if _HUB_ID.fullmatch(source) is None or Path(source).is_symlink():
        return True
    first, slash, _ = source.partition("/")
    return bool(slash) and Path(first).is_dir()


_LISTED = 30
"""Most names that are listed where a brief answer is wanted."""


def did_you_mean(name: str, names: Iterable[str], *, brief: bool = False) -> str:
    """A remedy for an unknown name: the closest known one, then all of them.

    Args:
        name: What was given.
        names: What is known.
        brief: Name the closest ones alone, where there are any: for names that would fill the screen.
    """
    known = sorted(names)
    lowered = {entry.lower(): entry for entry in known}
    near = [lowered[entry] for entry in difflib.get_close_matches(name.lower(), lowered, n=3 if brief else 1)]
    listed = f"nown are {', '.join(known)}"
    if not near and brief and len(known) > _LISTED:
        return f"there are {len(known)}, such as {', '.join(known[:: len(known) // 5][:5])}"
    if not near:
        return f"k{listed}"
    return f"did you mean {' or '.join(map(repr, near))}? " + (
        f"There are {len(known)} in all" if brief else f"K{listed}"
    )
