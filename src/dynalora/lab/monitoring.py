"""Named texts on which forgetting is followed during training."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from dynalora.forgetting.texts import MeasuredText, given_text
from dynalora.lab.data.conversations import load_texts
from dynalora.lab.settings import named_source

MONITORED_TEXTS = 32
MONITORED_LENGTH = 128
"""The first texts of a source, and the first tokens of each: enough for a curve, and cheap at every measurement."""


def load_named_text(text: str, setting: str) -> tuple[str, list[str]]:
    """The name and the first texts of `NAME=SOURCE`.

    Args:
        text: What was given.
        setting: The setting it was given in, for errors.

    Raises:
        ConfigError: It is not of that form.
        DataError: The source.
    """
    name, source = named_source(text, setting)
    return name, load_texts(source, limit=MONITORED_TEXTS)


def measured_text(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> MeasuredText:
    """The beginning of each text as tokens, to measure on."""
    return given_text(texts, tokenizer, max_length=MONITORED_LENGTH)
