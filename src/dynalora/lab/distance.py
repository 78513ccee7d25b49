"""A scale for KL in words and in samples: what a distance from the base model means for what a model writes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dynalora.common.progress import Progress, silent
from dynalora.evaluation.generation import generate
from dynalora.forgetting.base_model import adapters_off
from dynalora.forgetting.texts import MeasuredText
from dynalora.lab.report import Cell, Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPENINGS = 2
"""Number of openings that are gone on with: one of plain text, and where the tokenizer has chats one of these."""
_TOKENS = 24
"""Longest continuation."""
_SHOWN = 60
"""Characters of an opening that are shown."""
_SENTENCE = 20
"""Number of tokens of which the words speak."""


@dataclass(frozen=True)
class Continued:
    """What a model writes after the openings, at a distance from its base model.

    Attributes:
        name: Which model, or at which factor of its update.
        kl: KL(base ‖ tuned), nats per token.
        said: The likeliest continuation of each opening.
    """

    name: str
    kl: float
    said: Sequence[str]


def openings(text: MeasuredText, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The openings that are gone on with, as text."""
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in _openings(text)]
    return [_ending(text) for text in texts]


def _ending(text: str) -> str:
    """The end of a text, from the beginning of a word."""
    return text if len(text) <= _SHOWN else f"… {text[-_SHOWN:].partition(' ')[2]}"


def _openings(text: MeasuredText) -> list[list[int]]:
    starts = [list(row[:start]) for row, start in zip(text.rows, text.starts, strict=True)]
    return starts[:_OPENINGS]


def continued(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    text: MeasuredText,
    *,
    base: bool = False,
    progress: Progress = silent,
) -> list[str]:
    """The likeliest continuation of the first openings of a text.

    Args:
        model: The model, with an adapter or without.
        tokenizer: Its tokenizer.
        text: The text whose openings are taken.
        base: Whether adapters are switched off.
        progress: Called with the number of openings gone on with.
    """
    with adapters_off(model) if base else contextlib.nullcontext():
        return generate(
            model, tokenizer, _openings(text), max_new_tokens=_TOKENS, what="Going on with openings", progress=progress
        )


def in_words(kl: float) -> str:
    """What a KL means, in a sentence."""
    times = math.exp(min(_SENTENCE * max(0.0, kl), 700.0))
    shown = f"{times:.2f}" if times < 10 else f"{times:,.0f}" if times < 1e6 else "over a million"
    return (
        f"A KL of {kl:.3g} means that {_SENTENCE} tokens that the base model writes are on average {shown} times less "
        "likely from the tuned one."
    )


def distance_table(rows: Sequence[Continued], begun: Sequence[str]) -> Table:
    """Continuations at rising distances from the base model; `begun` are the openings."""
    cells: list[list[Cell]] = [
        [row.name, f"{row.kl:.3f}", *(said or "(ends at once)" for said in row.said)]
        for row in sorted(rows, key=lambda row: row.kl)
    ]
    return Table(
        ["", "KL from base", *(f"“{opening} …”" for opening in begun)], cells, title="What a distance looks like",
        note=f"How each goes on with the same openings, always with the likeliest token, cut after {_TOKENS} tokens.",
    )  # fmt: skip
