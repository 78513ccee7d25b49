"""Multiple-choice questions out of the commonsense files of LLM-Adapters (Hu et al., 2023, arXiv:2304.01933).

A file holds one JSON object per line, with or without gzip. Its field `instruction` is a whole prompt

    Please choose the correct answer to the question: <question>

    Answer1: <option> Answer2: <option> …

    Answer format: answer1/answer2/…

and `answer` is the right one's label. ARC, OpenBookQA, SIQA, PIQA (`Solution1`) and WinoGrande (`Option1`) are written
like this; BoolQ lists no options and is not. The question and the options' texts are taken apart, since small models
learn to say an option but not to name its number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dynalora.errors import DataError
from dynalora.evaluation.multiple_choice import Choice, choice_problem

_FORMAT = re.compile(r"\s*Answer format:\s*(\S+)\s*$")
_LEAD = re.compile(r"^Please [^:\n]*:\s*")
_REMEDY = "give rows as in the LLM-Adapters commonsense files, or leave this one out"


def choice_from(row: Mapping[str, Any], where: str = "the row") -> Choice:
    """One question out of a row's `instruction` and `answer`.

    Args:
        row: The row; other fields are not looked at.
        where: How to call the row in errors.

    Raises:
        DataError: A field is missing or no text, the options cannot be told apart, or the answer is none of them.
    """
    for name in ("instruction", "answer"):
        if not isinstance(row.get(name), str):
            raise DataError(f"{where} has no text in the field '{name}'; {_REMEDY}.")
    text, answer = row["instruction"], row["answer"].strip()
    ending = _FORMAT.search(text)
    if ending is None:
        raise DataError(f"{where} does not end in 'Answer format: …'; {_REMEDY}.")
    labels = ending[1].split("/")
    if answer not in labels:
        raise DataError(f"{where} has the answer '{answer}', which is none of {', '.join(labels)}; {_REMEDY}.")
    body, position = text[: ending.start()], 0
    marks: list[tuple[int, int]] = []
    for label in labels:
        mark = re.compile(rf"(?:^|\s){re.escape(label[:1].upper() + label[1:])}:(?=\s|$)").search(body, position)
        if mark is None:
            raise DataError(f"{where} lists no option '{label[:1].upper() + label[1:]}: …'; {_REMEDY}.")
        marks.append((mark.start(), mark.end()))
        position = mark.end()
    ends = [start for start, _ in marks[1:]] + [len(body)]
    options = tuple(body[start:end].strip() for (_, start), end in zip(marks, ends, strict=True))
    question, right = _LEAD.sub("", body[: marks[0][0]]).strip(), labels.index(answer)
    problem = choice_problem(question, options, right)
    if problem is not None:
        raise DataError(f"{where}: {problem}, or leave it out.")
    return Choice(question, options, right)
