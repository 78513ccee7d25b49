"""Numbers in answers, and word problems whose solution ends in one after `####`, as in GSM8K (Cobbe et al., 2021,
arXiv:2110.14168).

Numbers are decimal fractions as they are written, and compared as numbers: 18.00 is 18. Two of them are the same if
they differ by at most 0.001, the rule of LLM-Adapters' arithmetic tasks (Hu et al., 2023, arXiv:2304.01933).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from dynalora.errors import DataError
from dynalora.evaluation.tasks import Item

MARK = "####"
TOLERANCE = Decimal("0.001")
_FINAL = re.compile(rf"{MARK}\s*(-?\$?\s*-?[0-9.,]+)")
_STATED = re.compile(r"the answer is:?[ \t]*(\S[^\n]*)", re.IGNORECASE)
_ANY = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_NOTES = re.compile(r"<<[^<>]*>>")


def number(text: str | None) -> Decimal | None:
    """A number out of its usual spellings (`1,234`, `$5`, `3.`); None where it is none."""
    if text is None:
        return None
    try:
        value = Decimal(re.sub(r"[,$\s]", "", text).rstrip("."))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def final_number(text: str) -> Decimal | None:
    """The first number that follows `####`; None if there is none.

    Thousands separators, a dollar sign and a full stop behind the number do not matter. This is the strict match of
    lm-evaluation-harness's GSM8K, except that numbers are compared as numbers.

    Args:
        text: A solution, the reference's or the model's.
    """
    match = _FINAL.search(text)
    return number(match[1]) if match else None


def stated_answer(text: str) -> str | None:
    """What the last line with "The answer is:" says, as MetaMathQA ends its solutions; None where there is none.

    A full stop at its end does not count.
    """
    matches = _STATED.findall(text)
    return matches[-1].strip().removesuffix(".").rstrip() if matches else None


def stated_number(text: str) -> Decimal | None:
    """The first number that follows `####`, or without one what follows the last "The answer is:", if it is a number.

    What stands behind a number, a unit for instance, does not matter.
    """
    final = final_number(text)
    stated = stated_answer(text) if final is None and MARK not in text else None
    match = re.match(r"\$*\s*(-?\$?\s*[0-9.,]+)", stated) if stated is not None else None
    return number(match[1]) if match else final


def last_number(text: str) -> Decimal | None:
    """The last number in a text; None where there is none."""
    matches = _ANY.findall(text)
    return number(matches[-1]) if matches else None


def same_number(value: Decimal | None, reference: Decimal | None) -> bool:
    """Whether two numbers are the same, to 0.001; what is no number is the same as nothing."""
    return value is not None and reference is not None and abs(value - reference) <= TOLERANCE


def solution_from(row: Mapping[str, Any], where: str = "the row") -> Item:
    """The question of a row with its solution, without the calculator notes (`<<48/2=24>>`).

    Args:
        row: With the texts `question` and `answer`.
        where: How to call the row in errors.

    Raises:
        DataError: A field is missing, or the answer has no number after `####`.
    """
    for name in ("question", "answer"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise DataError(f"{where} has no text in the field '{name}'; give rows with a question and an answer.")
    if final_number(row["answer"]) is None:
        raise DataError(f"{where} has an answer without a number after '{MARK}'; end it as in '{MARK} 72'.")
    return Item(row["question"].strip(), _NOTES.sub("", row["answer"]).strip())
