"""Names and labels that several rooms agree on."""

from __future__ import annotations

PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's modules."""

IGNORED_LABEL = -100
"""The label of tokens without a loss, as transformers has it."""


def plain_name(name: str) -> str:
    """A module's name in the base model: without what PEFT puts before it."""
    return name.removeprefix(PREFIX)
