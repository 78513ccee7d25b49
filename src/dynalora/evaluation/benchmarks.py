"""Benchmarks by name: one entry says where the rows are, how a row becomes a question, and how answers are scored.

Names are looked up without regard to case and with `-` for `_`. Besides those in
[`BENCHMARKS`][dynalora.evaluation.benchmarks.BENCHMARKS] there are groups
([`GROUPS`][dynalora.evaluation.benchmarks.GROUPS]), `reasoning_gym:NAME` for a generated task and `lm_eval:NAME` for
any task of lm-evaluation-harness.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from dynalora.errors import ConfigError, DataError
from dynalora.evaluation import metrics
from dynalora.evaluation.commonsense import choice_from
from dynalora.evaluation.metrics import Metric
from dynalora.evaluation.multiple_choice import Choice
from dynalora.evaluation.numbers import final_number, number, solution_from
from dynalora.evaluation.sources import MissingSplitError, Source

How = Literal["generate", "code", "classify", "extract", "perplexity", "masked perplexity"]


@dataclass(frozen=True)
class Example:
    """One item of a task.

    Attributes:
        prompt: The question as it is put to the model.
        reference: What the answer is compared with; its kind is the metrics' affair.
        response: The text to learn, for training; empty where the task has none.
        second: For classification, the second text of a pair; the passage that an answer is taken out of; else the
            instruction's input.
        prefix: The beginning of the answer, given to the model; part of the generated code.
        choice: The same question with its options, for scoring by likelihood.
        program: For code, (answer) → the program to run.
        span: Where the passage has the answer, in characters, (first, one behind the last); None: nowhere.
        where: Where its row lies, for errors.
    """

    prompt: str
    reference: Any
    response: str = ""
    second: str = ""
    prefix: str = ""
    choice: Choice | None = None
    program: Callable[[str], str] | None = None
    span: tuple[int, int] | None = None
    where: str = ""

    def conversation(self) -> list[dict[str, str]]:
        """Question and response as chat messages, for training."""
        content = f"{self.prompt}\n\n{self.second}" if self.second else self.prompt
        asked = {"role": "user", "content": content}
        if self.second:
            asked |= {"instruction": self.prompt, "input": self.second}
        return [asked, {"role": "assistant", "content": self.response}]


Reader = Callable[[Mapping[str, Any], str], Sequence[Example]]


@dataclass(frozen=True)
class Benchmark:
    """A task.

    Attributes:
        name: How it is asked for.
        title: As its paper writes it.
        source: Where its rows are.
        read: (row, where it lies) → its items; most rows are one, a dialogue is one per turn.
        metrics: How answers are scored; the first metric's first name stands for the task.
        how: What the model does: generate, classify, extract (mark the answer in a passage), ….
        max_new_tokens: Longest answer.
        stop: Texts that end an answer.
        labels: For classification, number of classes; 1: a value.
        packages: For code, modules beyond Python's own library that its tests import.
    """

    name: str
    title: str
    source: Source
    read: Reader
    metrics: tuple[Metric, ...]
    how: How = "generate"
    max_new_tokens: int = 32
    stop: tuple[str, ...] = ()
    labels: int = 2
    packages: tuple[str, ...] = ()

    @property
    def right_or_wrong(self) -> bool:
        """Whether the number that stands for the task says of every generated answer whether it is right."""
        first = self.metrics[0] if self.how in ("generate", "code") and self.metrics else None
        return (
            first is not None
            and first.items is not None
            and first.names[0] in ("accuracy", "strict", "pass@1")
        )

    @property
    def main(self) -> str:
        """The number that stands for the task."""
        return {"perplexity": "perplexity", "masked perplexity": "perplexity"}.get(
            self.how, self.metrics[0].names[0] if self.metrics else ""
        )


# --- reading rows ---------------------------------------------------------------------------------------------


def _field(row: Mapping[str, Any], where: str, *names: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    wanted = " or ".join(f"'{name}'" for name in names)
    raise DataError(f"{where} has no field {wanted}; its fields are {', '.join(map(repr, row)) or 'none'}.")


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


def _commonsense(word: str, written: Callable[[Mapping[str, Any], str], tuple[str, int]]) -> Reader:
    """Rows of LLM-Adapters' files as they are, or rows of the original data set, `written` in the same way.

    `written` gives the instruction and the number of the right option, from 1.
    """

    def read(row: Mapping[str, Any], where: str) -> list[Example]:
        if "instruction" not in row:
            instruction, right = written(row, where)
            label = ("false", "true")[right - 1] if word == "true" else f"{word}{right}"
            row = {
                "instruction": instruction,
                "answer": label,
                "output": f"the correct answer is {label}",
            }
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


def _boolq(row: Mapping[str, Any], where: str) -> tuple[str, int]:
    question = _text(row, where, "question").rstrip("?")
    return (
        f"Please answer the following question with true or false, question: {question}?\n\nAnswer format: true/false",
        1 + bool(_field(row, where, "answer")),
    )


def _piqa(row: Mapping[str, Any], where: str) -> tuple[str, int]:
    options = [_text(row, where, "sol1"), _text(row, where, "sol2")]
    lead = "Please choose the correct solution to the question"
    return (
        _listed(lead, _text(row, where, "goal"), "solution", options, between="\n\n"),
        1 + _index(row, where, "label"),
    )


def _siqa(row: Mapping[str, Any], where: str) -> tuple[str, int]:
    question = f"{_text(row, where, 'context')} {_text(row, where, 'question')}"
    options = [_text(row, where, f"answer{name}") for name in "ABC"]
    return _listed(_CHOOSE, question, "answer", options), _index(row, where, "label")


def _hellaswag(row: Mapping[str, Any], where: str) -> tuple[str, int]:
    lead = "Please choose the correct ending to complete the given sentence"
    question = f"{_text(row, where, 'activity_label')}: {_text(row, where, 'ctx')}"
    return _listed(lead, question, "ending", list(_field(row, where, "endings"))), 1 + _index(
        row, where, "label"
    )


def _winogrande(row: Mapping[str, Any], where: str) -> tuple[str, int]:
    lead = "Please choose the correct answer to fill in the blank to complete the given sentence"
    options = [_text(row, where, "option1"), _text(row, where, "option2")]
    return _listed(lead, _text(row, where, "sentence"), "option", options, last=" "), _index(
        row, where, "answer"
    )


def _arc(row: Mapping[str, Any], where: str) -> tuple[str, int]:
    choices = _field(row, where, "choices")
    labels, key = list(choices["label"]), _text(row, where, "answerKey")
    if key not in labels:
        raise DataError(f"{where} has the answer '{key}', which is none of {', '.join(labels)}.")
    question = _text(row, where, "question", "question_stem")
    return _listed(_CHOOSE, question, "answer", list(choices["text"])), 1 + labels.index(key)


def _gsm8k(row: Mapping[str, Any], where: str) -> list[Example]:
    item = solution_from(row, where)
    return [Example(item.question, str(final_number(item.answer)), item.answer, where=where)]


def _math(row: Mapping[str, Any], where: str) -> list[Example]:
    solution = _text(row, where, "solution")
    wanted = metrics.boxed(solution) or row.get("answer")
    if not wanted:
        raise DataError(rf"{where} has no \boxed{{…}} in its solution; give MATH's own rows.")
    return [Example(_text(row, where, "problem"), str(wanted), solution, where=where)]


def _arithmetic(row: Mapping[str, Any], where: str) -> list[Example]:
    if "Body" in row:  # SVAMP
        question = f"{_text(row, where, 'Body').rstrip('.')}. {_text(row, where, 'Question')}"
    else:
        question = _text(row, where, "instruction", "question")
    wanted = _text(row, where, "answer", "Answer", "final_ans", "result")
    if number(wanted) is None:
        raise DataError(f"{where} has the answer '{wanted}', which is no number.")
    return [Example(question.strip(), wanted, str(row.get("output") or "").strip(), where=where)]


def _aqua(row: Mapping[str, Any], where: str) -> list[Example]:
    if "instruction" in row:
        question, wanted = _text(row, where, "instruction"), _text(row, where, "answer").strip()
    else:
        options = [str(option).replace(")", ") ", 1) for option in _field(row, where, "options")]
        question = (
            f"{_text(row, where, 'question')} Answer Choices: {' '.join(f'({option}' for option in options)}"
        )
        wanted = _text(row, where, "correct").strip()
    if wanted not in "ABCDE" or len(wanted) != 1:
        raise DataError(f"{where} has the answer '{wanted}'; it must be a letter from A to E.")
    response = str(row.get("output") or row.get("rationale") or "").strip()
    return [Example(question, wanted, response, where=where)]


def _code_of(answer: str) -> str:
    """The code in an answer: its first fenced block, if it has one."""
    found = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    return found[1] if found else answer.split("```")[0]


_SOLVE = "Write a solution to the following problem:\n```python\n{}\n```"


def _humaneval(row: Mapping[str, Any], where: str) -> list[Example]:
    start, test = _text(row, where, "prompt"), _text(row, where, "test")
    entry = _text(row, where, "entry_point")

    def program(answer: str) -> str:
        code = _code_of(answer)
        # A body continues the prompt; a whole function stands behind it and replaces it.
        return f"{start}{code}\n\n{test}\n\ncheck({entry})\n"

    body = str(row.get("canonical_solution") or "")
    response = f"```python\n{start}{body}```" if body else ""
    return [
        Example(
            _SOLVE.format(start.strip()), entry, response, prefix=f"```python\n{start}", program=program, where=where
        )
    ]  # fmt: skip


def _mbpp(row: Mapping[str, Any], where: str) -> list[Example]:
    tests = [str(test) for test in _field(row, where, "test_list")]
    if not tests:
        raise DataError(f"{where} has no test in the field 'test_list'; leave the row out.")
    # MBPP+ has the assertions of `test_list` among many more.
    checks = [_text(row, where, "test")] if row.get("test") else tests
    before = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
    asked = _text(row, where, "text", "prompt").strip()
    task = f"{asked} Your code should satisfy the following assertion:\n{tests[0]}"
    prefix = "```python\n"

    def program(answer: str) -> str:
        return "\n".join([str(before), _code_of(answer), *checks]) + "\n"

    code = str(row.get("code") or "")
    return [
        Example(
            _SOLVE.format(f'"""\n{task}\n"""'), row.get("task_id"), f"{prefix}{code}\n```" if code else "",
            prefix=prefix, program=program, where=where,
        )
    ]  # fmt: skip


def _pairs(first: Sequence[str], second: Sequence[str] = (), *, value: bool = False) -> Reader:
    def read(row: Mapping[str, Any], where: str) -> list[Example]:
        label = _field(row, where, "label")
        wanted = float(label) if value else int(label)
        if wanted == -1 and not value:
            raise DataError(f"{where} has no label (GLUE keeps those of its test sets); take the split dev.")
        both = _text(row, where, *second) if second else ""
        return [Example(_text(row, where, *first), wanted, second=both, where=where)]

    return read


def _convai2(row: Mapping[str, Any], where: str) -> list[Example]:
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


def _xsum(row: Mapping[str, Any], where: str) -> list[Example]:
    summary = _text(row, where, "summary")
    prompt = f"Summarize the following article in one sentence.\n\n{_text(row, where, 'document')}"
    return [Example(prompt, summary, summary, where=where)]


def _squad(row: Mapping[str, Any], where: str) -> list[Example]:
    answers = [str(text) for text in _field(row, where, "answers")["text"]]
    prompt = (
        "Answer the question with words of the passage, or with 'unanswerable' if the passage does not say.\n\n"
        f"Passage: {_text(row, where, 'context')}\n\nQuestion: {_text(row, where, 'question').strip()}"
    )
    return [Example(prompt, answers, answers[0] if answers else "unanswerable", where=where)]


def _squad_spans(row: Mapping[str, Any], where: str) -> list[Example]:
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


def _line(row: Mapping[str, Any], where: str) -> list[Example]:
    return [Example(str(_field(row, where, "text")), None, where=where)]


# --- the entries ----------------------------------------------------------------------------------------------


def _keywords(word: str, count: int) -> Metric:
    return metrics.keyword_accuracy(
        ["true", "false"] if word == "true" else [f"{word}{n}" for n in range(1, count + 1)]
    )


def _entries() -> Iterator[Benchmark]:
    parquet = "refs/convert/parquet"
    validated = {"train": "train", "test": "validation"}
    all_three = {"train": "train", "dev": "validation", "test": "test"}
    # name, title, file, Hub, subset, splits, keyword, count, rows written alike, branch
    for name, title, file, hub, subset, splits, word, count, written, branch in (
        ("boolq", "BoolQ", "boolq", "google/boolq", None, validated, "true", 2, _boolq, None),
        ("piqa", "PIQA", "piqa", "ybisk/piqa", None, validated, "solution", 2, _piqa, parquet),
        ("social_i_qa", "SIQA", "social_i_qa", "allenai/social_i_qa", None, validated, "answer", 3, _siqa, parquet),
        ("hellaswag", "HellaSwag", "hellaswag", "Rowan/hellaswag", None, validated, "ending", 4, _hellaswag, None),
        ("winogrande", "WinoGrande", "winogrande", "allenai/winogrande", "winogrande_xl", validated, "option", 2,
         _winogrande, None),
        ("arc_easy", "ARC-Easy", "ARC-Easy", "allenai/ai2_arc", "ARC-Easy", all_three, "answer", 5, _arc, None),
        ("arc_challenge", "ARC-Challenge", "ARC-Challenge", "allenai/ai2_arc", "ARC-Challenge", all_three, "answer", 5,
         _arc, None),
        ("openbookqa", "OpenBookQA", "openbookqa", "allenai/openbookqa", "main", all_three, "answer", 4, _arc, None),
    ):  # fmt: skip
        source = Source(f"commonsense/{file}", hub, (subset,), splits, branch)
        yield Benchmark(name, title, source, _commonsense(word, written), (_keywords(word, count),))
    subjects = (
        "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
        "precalculus",
    )  # fmt: skip
    learned = {"train": "train", "test": "test"}
    yield Benchmark(
        "gsm8k", "GSM8K", Source("math/gsm8k", "openai/gsm8k", ("main",), learned), _gsm8k,
        (metrics.STRICT, metrics.FLEXIBLE), max_new_tokens=512,
    )  # fmt: skip
    yield Benchmark(
        "math", "MATH", Source("math/math", "EleutherAI/hendrycks_math", subjects, learned), _math,
        (metrics.MATH,), max_new_tokens=1024,
    )  # fmt: skip
    yield Benchmark(
        "aqua", "AQUA-RAT", Source("math/AQuA", "deepmind/aqua_rat", ("raw",), all_three), _aqua,
        (metrics.LETTER,), max_new_tokens=512,
    )  # fmt: skip
    for name, title, hub in (
        ("svamp", "SVAMP", "ChilleD/SVAMP"),
        ("multiarith", "MultiArith", "ChilleD/MultiArith"),
        ("addsub", "AddSub", ""),
        ("singleeq", "SingleEq", ""),
        ("mawps", "mawps", "MU-NLPC/Calc-mawps"),
    ):
        source = Source(f"math/{title}", hub, splits=learned)
        yield Benchmark(name, title, source, _arithmetic, (metrics.NUMBER,), max_new_tokens=256)
    test_only = {"test": "test"}
    # EvalPlus's versions have the same tasks (of MBPP 378) and far more tests, which compare with NumPy.
    for name, title, hub, packages in (
        ("humaneval", "HumanEval", "openai/openai_humaneval", ()),
        ("humaneval_plus", "HumanEval+", "evalplus/humanevalplus", ("numpy.testing",)),
    ):
        yield Benchmark(
            name, title, Source(f"code/{name}", hub, splits=test_only), _humaneval, (metrics.PASS_AT_1,), "code", 512,
            ("```", "\nclass ", "\nif __name__", "\nprint("), packages=packages,
        )  # fmt: skip
    for name, title, hub, subset, splits, packages in (
        ("mbpp", "MBPP", "google-research-datasets/mbpp", "full", all_three, ()),
        ("mbpp_plus", "MBPP+", "evalplus/mbppplus", None, test_only, ("numpy.testing",)),
    ):
        yield Benchmark(
            name, title, Source(f"code/{name}", hub, (subset,), splits), _mbpp, (metrics.PASS_AT_1,), "code", 512,
            ("```", "\nif __name__", "\nprint(", "\nassert "), packages=packages,
        )  # fmt: skip
    dev = {"train": "train", "dev": "validation"}
    f1, accuracy = metrics.F1, metrics.ACCURACY
    sentence = ("sentence", "text")
    for name, title, reader, scored, labels, splits in (
        ("cola", "CoLA", _pairs(sentence), (metrics.MATTHEWS, accuracy), 2, dev),
        ("sst2", "SST-2", _pairs(sentence), (accuracy,), 2, dev),
        ("mrpc", "MRPC", _pairs(["sentence1"], ["sentence2"]), (accuracy, f1), 2, dev),
        ("qqp", "QQP", _pairs(["question1"], ["question2"]), (accuracy, f1), 2, dev),
        ("stsb", "STS-B", _pairs(["sentence1"], ["sentence2"], value=True), (metrics.PEARSON,), 1, dev),
        ("mnli", "MNLI (matched)", _pairs(["premise"], ["hypothesis"]), (accuracy,), 3,
         {"train": "train", "dev": "validation_matched"}),
        ("qnli", "QNLI", _pairs(["question"], ["sentence"]), (accuracy,), 2, dev),
        ("rte", "RTE", _pairs(["sentence1"], ["sentence2"]), (accuracy,), 2, dev),
        ("wnli", "WNLI", _pairs(["sentence1"], ["sentence2"]), (accuracy,), 2, dev),
    ):  # fmt: skip
        yield Benchmark(
            name, title, Source(f"glue/{name}", "nyu-mll/glue", (name,), splits), reader, scored, "classify",
            labels=labels,
        )  # fmt: skip
    yield Benchmark(
        "convai2", "ConvAI2 (self persona)",
        Source("dialogue/convai2", "AlekseyKorshuk/persona-chat", splits={"train": "train", "dev": "validation"}),
        _convai2,
        (metrics.BLEU, metrics.ROUGE_L, metrics.METEOR, metrics.BERTSCORE), max_new_tokens=48, stop=("\n",),
    )  # fmt: skip
    yield Benchmark(
        "xsum", "XSum", Source("summarization/xsum", "EdinburghNLP/xsum", splits=all_three, revision=parquet), _xsum,
        (metrics.ROUGE,), max_new_tokens=64, stop=("\n",),
    )  # fmt: skip
    yield Benchmark(
        "squad_v2", "SQuAD v2", Source("qa/squad_v2", "rajpurkar/squad_v2", splits=dev), _squad, (metrics.SQUAD,),
        stop=("\n",),
    )  # fmt: skip
    yield Benchmark(
        "squad_v2_spans", "SQuAD v2, marked", Source("qa/squad_v2", "rajpurkar/squad_v2", splits=dev), _squad_spans,
        (metrics.SQUAD,), "extract",
    )  # fmt: skip
    wikitext = Source("text/wikitext2", "Salesforce/wikitext", ("wikitext-2-raw-v1",), all_three, text=True)
    yield Benchmark("wikitext2", "WikiText-2", wikitext, _line, (), "perplexity")
    yield Benchmark("wikitext2_masked", "WikiText-2, masked", wikitext, _line, (), "masked perplexity")


BENCHMARKS = {entry.name: entry for entry in _entries()}
"""The benchmarks by name."""

GROUPS = {
    "commonsense": (
        "boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa",
    ),
    "arithmetic": ("multiarith", "gsm8k", "addsub", "aqua", "singleeq", "svamp", "mawps"),
    "code": ("humaneval", "mbpp"),
    "glue": ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"),
}  # fmt: skip
"""Groups of benchmarks, whose unweighted mean is given, too."""

_ALIASES = {
    "arc_c": "arc_challenge", "arc_e": "arc_easy", "siqa": "social_i_qa", "obqa": "openbookqa", "aqua_rat": "aqua",
    "sst_2": "sst2", "sts_b": "stsb", "wikitext": "wikitext2", "squadv2": "squad_v2",
    "humaneval+": "humaneval_plus", "humanevalplus": "humaneval_plus", "mbpp+": "mbpp_plus", "mbppplus": "mbpp_plus",
}  # fmt: skip


def find_benchmark(name: str) -> Benchmark | None:
    """The benchmark of that name; None if there is none."""
    key = re.sub(r"[-\s]", "_", name.strip().lower())
    return BENCHMARKS.get(_ALIASES.get(key, key))


def benchmark(name: str) -> Benchmark:
    """A benchmark by its name.

    Raises:
        ConfigError: There is none of this name; lists those there are.
    """
    found = find_benchmark(name)
    if found is None:
        raise ConfigError(
            f"There is no task '{name}'; choose one of {', '.join(BENCHMARKS)}, a group ({', '.join(GROUPS)}), "
            "reasoning_gym:NAME or lm_eval:NAME."
        )
    return found


# --- the commonsense union ------------------------------------------------------------------------------------

UNION_NAME = "commonsense_union"
"""What the union is called where something to train on is named."""

UNION = Source("commonsense/commonsense_170k", "zwhe99/commonsense_170k", splits={"train": "train"})


def commonsense_rows(folder: Any = None) -> list[Example]:
    """The training rows of all eight commonsense tasks together.

    Args:
        folder: With `commonsense/commonsense_170k.train.jsonl[.gz]`, or with the single tasks' training files, which
            are then put together in the order of the group, those that are there; None: the union from the Hub.

    Returns:
        Items whose prompt and response are as the rows have them, with their options where those can be told apart.

    Raises:
        DataError: There are no rows, or one is malformed.
    """
    rows: list[tuple[str, Mapping[str, Any]]] = []
    try:
        rows = UNION.rows("train", folder=folder)[1]
    except MissingSplitError:
        for name in GROUPS["commonsense"]:
            with contextlib.suppress(MissingSplitError):
                rows += BENCHMARKS[name].source.rows("train", folder=folder)[1]
        if not rows:
            raise
    return [_union_item(row, where) for where, row in rows]


def _union_item(row: Mapping[str, Any], where: str) -> Example:
    plain = Example(
        _text(row, where, "instruction"), row.get("answer"), _text(row, where, "output"), where=where
    )
    label = str(row.get("answer"))
    word = "true" if label in ("true", "false") else label.rstrip("0123456789")
    try:
        (read,) = _commonsense(word, _boolq)(row, where)
    except DataError:  # a response to learn all the same
        return plain
    return replace(plain, choice=read.choice)
