"""What a cell's file must hold, so that tables and plots can be made of it: names, kinds of values, and their bounds.

Cells may come from another machine, or have been written by hand. What is only handed on is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dynalora.common.names import shown

Form = Any
"""A test of single values; a list of one form, for lists; a mapping of forms by name, of which those that end in `?`
may be missing, and `*` stands for all names; a tuple with None, for what may be null."""


def number(value: Any) -> bool:
    """A finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 and value == value


def loss(value: Any) -> bool:
    """A number that is not below zero, but for rounding."""
    return number(value) and value > -1e-3


def share(value: Any) -> bool:
    """A number from 0 to 1."""
    return number(value) and 0 <= value <= 1


def count(value: Any) -> bool:
    """A whole number of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def text(value: Any) -> bool:
    """A text."""
    return isinstance(value, str)


def anything(value: Any) -> bool:
    """Any value."""
    return True


_LOSSES = {"loss": loss, "loss_error": loss, "losses": [number], "counts": [count]}
_SCORE = {
    "accuracy": (None, share), "accuracy_low": (None, share), "accuracy_high": (None, share), **_LOSSES,
    "questions": count, "correct": [count], "metrics?": {"*": number}, "too_long?": count,
}  # fmt: skip
_KL = {"*": {"kl": number, "kl_error": loss}}
_MATRIX = {
    "module": text, "layer": (None, number), "kind": text, "rank": number, "effective_rank": number,
    "nuclear_norm": loss,
}  # fmt: skip
CELL: Form = {
    "version?": text,
    "settings": {"*": anything},
    "cell": {
        "label": text, "method": text, "task": text, "place": text, "learning_rate": number, "seed": number,
        "r?": count, "options?": {"*": anything},
    },
    "configuration?": (None, {"*": anything}),
    "task?": text,
    "test": _SCORE,
    "validation?": (None, _SCORE),
    "retention?": (None, _KL),
    "kept?": (None, {"*": {"title": text, "metric": text, "value": number, "low": number, "high": number}}),
    "training?": (
        None,
        {
            "steps": count, "trainable_parameters": count, "step_seconds?": (None, number),
            "step_seconds_quartiles?": (None, [number]), "peak_bytes?": (None, number),
            "losses": [[number]], "metrics?": [{"*": anything}],
        },
    ),
    "landscape?": (None, [_MATRIX]),
    "trajectory?": (
        None,
        {
            "modules": [text], "steps": [count], "ranks": [[count]], "scores": [[number]], "importance": [[number]],
            "pareto_variance": [(None, number)], "spearman": (None, number), "landscape": [_MATRIX],
        },
    ),
    "masked?": (None, [{"layer": (None, number), "loss": loss, "accuracy": (None, share)}]),
    "curve?": (None, [{"factor": number, "test": _LOSSES, "kl": _KL, "validation?": _LOSSES}]),
    "change?": (None, {"norm": (None, number), "prompts_kl": (None, number)}),
    "seconds?": number,
}  # fmt: skip


def wrong_in(content: Any, form: Form = CELL, place: str = "") -> str | None:
    """What is wrong with the content of a cell's file, such as "test.loss is -1"; None if nothing is."""
    if isinstance(form, tuple):
        return None if content is None else wrong_in(content, form[1], place)
    if isinstance(form, list):
        if not isinstance(content, list):
            return f"{place} is {shown(content)}, and no list"
        rows = (wrong_in(item, form[0], f"{place}[{at}]") for at, item in enumerate(content))
        return next((wrong for wrong in rows if wrong), None)
    if isinstance(form, Mapping):
        return _wrong_in_names(content, form, place)
    meant: Callable[[Any], bool] = form
    return None if meant(content) else f"{place} is {shown(content)}"


def _wrong_in_names(content: Any, form: Mapping[str, Form], place: str) -> str | None:
    if not isinstance(content, Mapping):
        return f"{place or 'it'} is {shown(content)}, and names nothing"
    if every := form.get("*"):
        rows = (wrong_in(item, every, f"{place}.{name}") for name, item in content.items())
        return next((wrong for wrong in rows if wrong), None)
    for name, inner in form.items():
        key = name.removesuffix("?")
        if key not in content:
            if name == key:
                return f"{place or 'it'} has no '{key}'"
            continue
        if wrong := wrong_in(content[key], inner, f"{place}.{key}" if place else key):
            return wrong
    return None
