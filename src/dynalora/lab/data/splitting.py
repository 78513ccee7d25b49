"""Hold a part of the data out for measuring, with no row on both sides."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence

from dynalora.errors import DataError
from dynalora.evaluation.tokens import Conversation

logger = logging.getLogger(__name__)


def split(
    conversations: Sequence[Conversation], fraction: float, *, seed: int = 42
) -> tuple[list[Conversation], list[Conversation]]:
    """Hold a part out for measuring.

    Equal conversations always land on the same side, so nothing that is measured was trained on.

    Args:
        conversations: All of them.
        fraction: The part to hold out, 0 (none) up to but without 1; at least one conversation if above 0.
        seed: Fixes the choice.

    Returns:
        The training part and the held-out part, each in a shuffled order that `seed` fixes.

    Raises:
        DataError: `fraction` is out of range, or there are too few different conversations to split.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"eval_fraction is {fraction}; give a fraction from 0 up to, but without, 1.")
    if fraction == 0:
        return list(conversations), []
    groups: dict[str, list[Conversation]] = {}
    for conversation in conversations:
        groups.setdefault(json.dumps(conversation, sort_keys=True), []).append(conversation)
    if len(groups) < 2:
        raise DataError(
            f"The data has {len(groups)} distinct row, too few to hold a part out; give more rows, or eval_fraction 0."
        )
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    held = max(1, min(len(order) - 1, round(fraction * len(order))))
    return [item for group in order[held:] for item in group], [
        item for group in order[:held] for item in group
    ]


def without_repeats(held_out: Sequence[Conversation], training: Sequence[Conversation]) -> list[Conversation]:
    """The held-out conversations that do not also occur in training; warns with the number of those that do.

    Raises:
        DataError: All of them occur in training.
    """
    trained = {json.dumps(conversation, sort_keys=True) for conversation in training}
    fresh = [item for item in held_out if json.dumps(item, sort_keys=True) not in trained]
    if held_out and not fresh:
        raise DataError("Every held-out row is also a training row; give other evaluation data.")
    if len(fresh) < len(held_out):
        logger.warning(
            "%d held-out rows are also training rows and are left out.", len(held_out) - len(fresh)
        )
    return fresh
