"""Word problems whose solution ends in a number after `####`, as in GSM8K (Cobbe et al., 2021, arXiv:2110.14168)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from dynalora.errors import DataError
from dynalora.evaluation.tasks import Item

MARK = "####"
_NUMBER = re.compile(rf"{MARK}\s*\$?\s*(-?[0-9.,]+)")
_NOTES = re.compile(r"<<[^<>]*>>")


def final_number(text: str) -> Decimal | None:
    """The first number that follows `####`; None if there is none.

    Thousands separators, a dollar sign and a full stop behind the number do not matter. This is the strict match of
    lm-evaluation-harness's GSM8K, except that numbers are compared as numbers: 18.00 is 18.

    Args:
        text: a solution, the reference's or the model's.
    """
    found = _NUMBER.search(text)
    if found is None:
        return None
    try:
        return Decimal(found[1].replace(",", "").rstrip("."))
    except InvalidOperation:
        return None


def same_number(said: str, reference: str) -> bool:
    """Whether two solutions end in the same number; a solution without one is wrong."""
    number = final_number(said)
    return number is not None and number == final_number(reference)


def solution_from(row: Mapping[str, Any], where: str = "the row") -> Item:
    """The question of a row with its solution, without the calculator notes (`<<48/2=24>>`).

    Args:
        row: with the texts `question` and `answer`.
        where: how to call the row in errors.

    Raises:
        DataError: a field is missing, or the answer has no number after `####`.
    """
    for name in ("question", "answer"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise DataError(
                f"{where} has no text in the field '{name}'; give rows with a question and an answer."
            )
    if final_number(row["answer"]) is None:
        raise DataError(f"{where} has an answer without a number after '{MARK}'; end it as in '{MARK} 72'.")
    return Item(row["question"].strip(), _NOTES.sub("", row["answer"]).strip())
