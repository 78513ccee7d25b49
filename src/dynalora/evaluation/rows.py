"""Rows of data sets as items of tasks: one reader per data set, which takes a row and where it lies.

A row that lacks a field, or whose answer is none, is an error that names the row.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dynalora.errors import DataError
from dynalora.evaluation.commonsense import choice_from
from dynalora.evaluation.kinds.base import Example, Reader
from dynalora.evaluation.metrics import boxed
from dynalora.evaluation.multiple_choice import Choice
from dynalora.evaluation.numbers import final_number, number, solution_from
from dynalora.evaluation.sandbox import Program


def _field(row: Mapping[str, Any], where: str, *names: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    expected = " or ".join(f"'{name}'" for name in names)
    raise DataError(f"{where} has no field {expected}; its fields are {', '.join(map(repr, row)) or 'none'}.")


def _text(row: Mapping[str, Any], where: str, *names: str) -> str:
    value = _field(row, where, *names)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where} has no text in the field '{names[0]}'; give one, or leave the row out.")
    return value


def _index(row: Mapping[str, Any], where: str, *names: str) -> int:
    value = _field(row, where, *names)
    try:
        return int(value)
    except (TypeError, ValueError):
        raise DataError(f"{where} has '{value}' in the field '{names[0]}'; give a whole number.") from None


def commonsense_reader(word: str, written: Callable[[Mapping[str, Any], str], tuple[str, int]]) -> Reader:
    """Rows of LLM-Adapters' files as they are, or rows of the original data set, `written` in the same way.

    `written` gives the instruction and the number of the right option, from 1.
    """

    def read(row: Mapping[str, Any], where: str) -> list[Example]:
        if "instruction" not in row:
            instruction, right = written(row, where)
            label = ("false", "true")[right - 1] if word == "true" else f"{word}{right}"
            row = {"instruction": instruction, "answer": label, "output": f"the correct answer is {label}"}
        prompt, answer = _text(row, where, "instruction"), _text(row, where, "answer").strip()
        if word == "true":
            if answer not in ("true", "false"):
                raise DataError(f"{where} has the answer '{answer}'; it must be true or false.")
            question = re.sub(r"\s*Answer format:.*$", "", prompt, flags=re.DOTALL)
            choice = Choice(question, ("false", "true"), int(answer == "true"))
        else:
            choice = choice_from(row, where)
        return [Example(prompt, answer, str(row.get("output") or ""), choice=choice, where=where)]

    return read


def _listed(
    lead: str, question: str, word: str, options: Sequence[str], *, between: str = " ", last: str = "\n\n"
) -> str:
    shown = between.join(f"{word.title()}{n}: {option}" for n, option in enumerate(options, start=1))
    labels = "/".join(f"{word}{n}" for n in range(1, len(options) + 1))
    return f"{lead}: {question}\n\n{shown}{last}Answer format: {labels}"


_CHOOSE = "Please choose the correct answer to the question"


def boolq(row: Mapping[str, Any], where: str) -> tuple[str, int]:
    """A row of BoolQ as an instruction, and the number of the right option."""
    question = _text(row, where, "question").rstrip("?")
    return (
        f"Please answer the following question with true or false, question: {question}?\n\nAnswer format: true/false",
        1 + bool(_field(row, where, "answer")),
    )


def piqa(row: Mapping[str, Any], where: str) -> tuple[str, int]:
    """The same of PIQA."""
    options = [_text(row, where, "sol1"), _text(row, where, "sol2")]
    lead = "Please choose the correct solution to the question"
    return (
        _listed(lead, _text(row, where, "goal"), "solution", options, between="\n\n"),
        1 + _index(row, where, "label"),
    )


def siqa(row: Mapping[str, Any], where: str) -> tuple[str, int]:
    """The same of SIQA."""
    question = f"{_text(row, where, 'context')} {_text(row, where, 'question')}"
    options = [_text(row, where, f"answer{name}") for name in "ABC"]
    return _listed(_CHOOSE, question, "answer", options), _index(row, where, "label")


def hellaswag(row: Mapping[str, Any], where: str) -> tuple[str, int]:
    """The same of HellaSwag."""
    lead = "Please choose the correct ending to complete the given sentence"
    question = f"{_text(row, where, 'activity_label')}: {_text(row, where, 'ctx')}"
    return _listed(lead, question, "ending", list(_field(row, where, "endings"))), 1 + _index(row, where, "label")


def winogrande(row: Mapping[str, Any], where: str) -> tuple[str, int]:
    """The same of WinoGrande."""
    lead = "Please choose the correct answer to fill in the blank to complete the given sentence"
    options = [_text(row, where, "option1"), _text(row, where, "option2")]
    return _listed(lead, _text(row, where, "sentence"), "option", options, last=" "), _index(row, where, "answer")


def arc(row: Mapping[str, Any], where: str) -> tuple[str, int]:
    """The same of ARC and OpenBookQA."""
    choices = _field(row, where, "choices")
    labels, key = list(choices["label"]), _text(row, where, "answerKey")
    if key not in labels:
        raise DataError(f"{where} has the answer '{key}', which is none of {', '.join(labels)}.")
    question = _text(row, where, "question", "question_stem")
    return _listed(_CHOOSE, question, "answer", list(choices["text"])), 1 + labels.index(key)


def read_gsm8k(row: Mapping[str, Any], where: str) -> list[Example]:
    """A word problem whose solution ends in its number after `####`."""
    item = solution_from(row, where)
    return [Example(item.question, str(final_number(item.answer)), item.answer, where=where)]


def read_math(row: Mapping[str, Any], where: str) -> list[Example]:
    r"""A problem of MATH, whose solution has its answer in `\boxed{…}`."""
    solution = _text(row, where, "solution")
    reference = boxed(solution) or row.get("answer")
    if not reference:
        raise DataError(rf"{where} has no \boxed{{…}} in its solution; give MATH's own rows.")
    return [Example(_text(row, where, "problem"), str(reference), solution, where=where)]


def read_arithmetic(row: Mapping[str, Any], where: str) -> list[Example]:
    """A word problem with a number for an answer."""
    if "Body" in row:  # SVAMP
        question = f"{_text(row, where, 'Body').rstrip('.')}. {_text(row, where, 'Question')}"
    else:
        question = _text(row, where, "instruction", "question")
    reference = _text(row, where, "answer", "Answer", "final_ans", "result")
    if number(reference) is None:
        raise DataError(f"{where} has the answer '{reference}', which is no number.")
    return [Example(question.strip(), reference, str(row.get("output") or "").strip(), where=where)]


def read_aqua(row: Mapping[str, Any], where: str) -> list[Example]:
    """A word problem with lettered options."""
    if "instruction" in row:
        question, reference = _text(row, where, "instruction"), _text(row, where, "answer").strip()
    else:
        options = [str(option).replace(")", ") ", 1) for option in _field(row, where, "options")]
        question = f"{_text(row, where, 'question')} Answer Choices: {' '.join(f'({option}' for option in options)}"
        reference = _text(row, where, "correct").strip()
    if reference not in "ABCDE" or len(reference) != 1:
        raise DataError(f"{where} has the answer '{reference}'; it must be a letter from A to E.")
    response = str(row.get("output") or row.get("rationale") or "").strip()
    return [Example(question, reference, response, where=where)]


def _code_of(answer: str) -> str:
    """The code in an answer: its first fenced block, if it has one."""
    block = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    return block[1] if block else answer.split("```")[0]


_SOLVE = "Write a solution to the following problem:\n```python\n{}\n```"


def read_humaneval(row: Mapping[str, Any], where: str) -> list[Example]:
    """The head of a function to be continued, with its tests."""
    start, test = _text(row, where, "prompt"), _text(row, where, "test")
    entry = _text(row, where, "entry_point")

    try:
        ast.parse(start)
        given = start
    except (SyntaxError, ValueError):  # a head without a text, which is nothing by itself
        given = ""

    def program(answer: str) -> Program:
        # A body continues the prompt; a whole function stands behind it and replaces it. What else the prompt defines
        # the tests may use, and then mean the prompt's and not what an answer put in its place.
        return Program(f"{start}{_code_of(answer)}\n", f"{test}\n\ncheck({entry})\n", given, (entry,))

    body = str(row.get("canonical_solution") or "")
    response = f"```python\n{start}{body}```" if body else ""
    return [
        Example(
            _SOLVE.format(start.strip()), entry, response, prefix=f"```python\n{start}", program=program, where=where
        )
    ]  # fmt: skip


def read_mbpp(row: Mapping[str, Any], where: str) -> list[Example]:
    """A description of a function to be written, with its tests."""
    tests = [str(test) for test in _field(row, where, "test_list")]
    if not tests:
        raise DataError(f"{where} has no test in the field 'test_list'; leave the row out.")
    # MBPP+ has the assertions of `test_list` among many more.
    checks = [_text(row, where, "test")] if row.get("test") else tests
    before = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
    asked = _text(row, where, "text", "prompt").strip()
    task = f"{asked} Your code should satisfy the following assertion:\n{tests[0]}"
    prefix = "```python\n"

    code = str(row.get("code") or "")
    # A few of MBPP's functions have names that Python has, too (`sum`).
    entries = tuple(dict.fromkeys(re.findall(r"^(?:def|class)\s+(\w+)", code, re.MULTILINE)))
    imports = "\n".join(line for line in str(before).splitlines() if re.match(r"(?:import|from)\s", line))

    def program(answer: str) -> Program:
        return Program(f"{imports}\n{_code_of(answer)}\n", "\n".join(checks) + "\n", str(before), entries)

    return [
        Example(
            _SOLVE.format(f'"""\n{task}\n"""'), row.get("task_id"), f"{prefix}{code}\n```" if code else "",
            prefix=prefix, program=program, where=where,
        )
    ]  # fmt: skip


def pair_reader(first: Sequence[str], second: Sequence[str] = (), *, value: bool = False) -> Reader:
    """Reads texts, alone or in pairs, with a class (or a value) in the field `label`."""

    def read(row: Mapping[str, Any], where: str) -> list[Example]:
        label = _field(row, where, "label")
        reference = float(label) if value else int(label)
        if reference == -1 and not value:
            raise DataError(f"{where} has no label (GLUE keeps those of its test sets); take the split dev.")
        both = _text(row, where, *second) if second else ""
        return [Example(_text(row, where, *first), reference, second=both, where=where)]

    return read


def read_convai2(row: Mapping[str, Any], where: str) -> list[Example]:
    """A dialogue, one item per response."""
    persona = "\n".join(str(line) for line in _field(row, where, "personality"))
    examples = []
    for count, turn in enumerate(_field(row, where, "utterances"), start=1):
        place = f"{where}, utterance {count}"
        # The last candidate is the one that was said.
        said = str(list(_field(turn, place, "candidates"))[-1]).strip()
        if not said:
            raise DataError(f"{place} has an empty response; leave it out.")
        history = "\n".join(
            f"{('User', 'You')[at % 2]}: {line}" for at, line in enumerate(_field(turn, place, "history"))
        )
        prompt = f"Your persona:\n{persona}\n\nContinue the dialogue with your next sentence.\n{history}"
        examples.append(Example(prompt, said, said, where=place))
    return examples


def read_xsum(row: Mapping[str, Any], where: str) -> list[Example]:
    """An article with its summary."""
    summary = _text(row, where, "summary")
    prompt = f"Summarize the following article in one sentence.\n\n{_text(row, where, 'document')}"
    return [Example(prompt, summary, summary, where=where)]


def read_squad(row: Mapping[str, Any], where: str) -> list[Example]:
    """A question about a passage, to be answered in words."""
    answers = [str(text) for text in _field(row, where, "answers")["text"]]
    prompt = (
        "Answer the question with words of the passage, or with 'unanswerable' if the passage does not say.\n\n"
        f"Passage: {_text(row, where, 'context')}\n\nQuestion: {_text(row, where, 'question').strip()}"
    )
    return [Example(prompt, answers, answers[0] if answers else "unanswerable", where=where)]


def read_squad_spans(row: Mapping[str, Any], where: str) -> list[Example]:
    """A question about a passage, whose answer is to be marked there."""
    passage, answers = _text(row, where, "context"), _field(row, where, "answers")
    texts = [str(text) for text in answers["text"]]
    span = None
    if texts:
        starts = list(answers.get("answer_start") or [])
        first = int(starts[0]) if starts else passage.find(texts[0])
        span = first, first + len(texts[0])
        if first < 0 or passage[slice(*span)] != texts[0]:
            raise DataError(
                f"{where} has the answer '{texts[0]}', which its passage does not have"
                + (f" at character {first}" if starts else "")
                + "; mend the row, or leave it out."
            )
    question = _text(row, where, "question").strip()
    return [Example(question, texts, texts[0] if texts else "", second=passage, span=span, where=where)]


def read_line(row: Mapping[str, Any], where: str) -> list[Example]:
    """A line of running text."""
    return [Example(str(_field(row, where, "text")), None, where=where)]


def read_union(row: Mapping[str, Any], where: str) -> Example:
    """A row of the commonsense union, with its options where they can be told apart."""
    plain = Example(_text(row, where, "instruction"), row.get("answer"), _text(row, where, "output"), where=where)
    label = str(row.get("answer"))
    word = "true" if label in ("true", "false") else label.rstrip("0123456789")
    try:
        (read,) = commonsense_reader(word, boolq)(row, where)
    except DataError:  # a response to learn all the same
        return plain
    return replace(plain, choice=read.choice)
