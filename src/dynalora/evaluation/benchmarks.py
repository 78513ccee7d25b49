"""Benchmarks by name: one entry says where the rows are, how a row becomes a question, and how answers are scored.

Names are looked up without regard to case and with `-` for `_`. Besides those in
[`BENCHMARKS`][dynalora.evaluation.benchmarks.BENCHMARKS] there are groups
([`GROUPS`][dynalora.evaluation.benchmarks.GROUPS]), `reasoning_gym:NAME` for a generated task and `lm_eval:NAME` for
any task of lm-evaluation-harness.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from dynalora.common.names import did_you_mean
from dynalora.errors import ConfigError
from dynalora.evaluation import metrics, rows
from dynalora.evaluation.kinds.base import Benchmark, Example
from dynalora.evaluation.kinds.classify import CLASSIFY
from dynalora.evaluation.kinds.code import CODE
from dynalora.evaluation.kinds.generate import GENERATE
from dynalora.evaluation.kinds.mark import MARK
from dynalora.evaluation.kinds.masked import MASKED, MASKED_SENTENCES
from dynalora.evaluation.kinds.perplexity import PERPLEXITY
from dynalora.evaluation.metrics import Metric
from dynalora.evaluation.sources import MissingSplitError, Source

_PARQUET = "refs/convert/parquet"
_THREE = {"train": "train", "dev": "validation", "test": "test"}
_NO_TEST = {"train": "train", "dev": "validation"}
_NO_DEV = {"train": "train", "test": "test"}
_TEST = {"test": "test"}


def _keywords(word: str, count: int) -> Metric:
    return metrics.keyword_accuracy(
        ["true", "false"] if word == "true" else [f"{word}{n}" for n in range(1, count + 1)]
    )


def _commonsense() -> Iterator[Benchmark]:
    trained = {"train": "train", "test": "validation"}
    # name, title, file, Hub, subset, splits, keyword, count, the original rows' prompt, branch
    for name, title, file, hub, subset, splits, word, count, prompt, branch in (
        ("boolq", "BoolQ", "boolq", "google/boolq", None, trained, "true", 2, rows.boolq, None),
        ("piqa", "PIQA", "piqa", "ybisk/piqa", None, trained, "solution", 2, rows.piqa, _PARQUET),
        ("social_i_qa", "SIQA", "social_i_qa", "allenai/social_i_qa", None, trained, "answer", 3, rows.siqa, _PARQUET),
        ("hellaswag", "HellaSwag", "hellaswag", "Rowan/hellaswag", None, trained, "ending", 4, rows.hellaswag, None),
        ("winogrande", "WinoGrande", "winogrande", "allenai/winogrande", "winogrande_xl", trained, "option", 2,
         rows.winogrande, None),
        ("arc_easy", "ARC-Easy", "ARC-Easy", "allenai/ai2_arc", "ARC-Easy", _THREE, "answer", 5, rows.arc, None),
        ("arc_challenge", "ARC-Challenge", "ARC-Challenge", "allenai/ai2_arc", "ARC-Challenge", _THREE, "answer", 5,
         rows.arc, None),
        ("openbookqa", "OpenBookQA", "openbookqa", "allenai/openbookqa", "main", _THREE, "answer", 4, rows.arc, None),
    ):  # fmt: skip
        source = Source(f"commonsense/{file}", hub, (subset,), splits, branch)
        reader = rows.commonsense_reader(word, prompt)
        yield Benchmark(name, title, source, reader, (_keywords(word, count),), GENERATE, options=True)


def _mathematics() -> Iterator[Benchmark]:
    subjects = (
        "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
        "precalculus",
    )  # fmt: skip
    # name, title, file, Hub, subsets, splits, reader, metrics, longest answer
    for name, title, file, hub, subsets, splits, reader, scored, longest in (
        ("gsm8k", "GSM8K", "gsm8k", "openai/gsm8k", ("main",), _NO_DEV, rows.read_gsm8k,
         (metrics.STRICT, metrics.FLEXIBLE), 512),
        ("math", "MATH", "math", "EleutherAI/hendrycks_math", subjects, _NO_DEV, rows.read_math, (metrics.MATH,), 1024),
        ("aqua", "AQUA-RAT", "AQuA", "deepmind/aqua_rat", ("raw",), _THREE, rows.read_aqua, (metrics.LETTER,), 512),
        *(
            (name, title, title, hub, (None,), _NO_DEV, rows.read_arithmetic, (metrics.NUMBER,), 256)
            for name, title, hub in (
                ("svamp", "SVAMP", "ChilleD/SVAMP"),
                ("multiarith", "MultiArith", "ChilleD/MultiArith"),
                ("addsub", "AddSub", ""),
                ("singleeq", "SingleEq", ""),
                ("mawps", "mawps", "MU-NLPC/Calc-mawps"),
            )
        ),
    ):  # fmt: skip
        source = Source(f"math/{file}", hub, subsets, splits)
        yield Benchmark(name, title, source, reader, scored, GENERATE, longest)


def _code() -> Iterator[Benchmark]:
    humaneval_ends = ("```", "\nclass ", "\nif __name__", "\nprint(")
    mbpp_ends = ("```", "\nif __name__", "\nprint(", "\nassert ")
    # EvalPlus's versions have the same tasks (of MBPP 378) and far more tests, which compare with NumPy.
    for name, title, hub, subset, splits, reader, stop, packages in (
        ("humaneval", "HumanEval", "openai/openai_humaneval", None, _TEST, rows.read_humaneval, humaneval_ends, ()),
        ("humaneval_plus", "HumanEval+", "evalplus/humanevalplus", None, _TEST, rows.read_humaneval, humaneval_ends,
         ("numpy.testing",)),
        ("mbpp", "MBPP", "google-research-datasets/mbpp", "full", _THREE, rows.read_mbpp, mbpp_ends, ()),
        ("mbpp_plus", "MBPP+", "evalplus/mbppplus", None, _TEST, rows.read_mbpp, mbpp_ends, ("numpy.testing",)),
    ):  # fmt: skip
        source = Source(f"code/{name}", hub, (subset,), splits)
        yield Benchmark(name, title, source, reader, (metrics.PASS_AT_1,), CODE, 512, stop, packages=packages)


def _glue() -> Iterator[Benchmark]:
    accuracy = metrics.ACCURACY
    sentence = ("sentence", "text")
    two = ["sentence1"], ["sentence2"]
    # name, title, reader, metrics, number of classes
    for name, title, reader, scored, labels in (
        ("cola", "CoLA", rows.pair_reader(sentence), (metrics.MATTHEWS, accuracy), 2),
        ("sst2", "SST-2", rows.pair_reader(sentence), (accuracy,), 2),
        ("mrpc", "MRPC", rows.pair_reader(*two), (accuracy, metrics.F1), 2),
        ("qqp", "QQP", rows.pair_reader(["question1"], ["question2"]), (accuracy, metrics.F1), 2),
        ("stsb", "STS-B", rows.pair_reader(*two, value=True), (metrics.PEARSON,), 1),
        ("mnli", "MNLI (matched)", rows.pair_reader(["premise"], ["hypothesis"]), (accuracy,), 3),
        ("qnli", "QNLI", rows.pair_reader(["question"], ["sentence"]), (accuracy,), 2),
        ("rte", "RTE", rows.pair_reader(*two), (accuracy,), 2),
        ("wnli", "WNLI", rows.pair_reader(*two), (accuracy,), 2),
    ):
        dev = "validation_matched" if name == "mnli" else "validation"
        source = Source(f"glue/{name}", "nyu-mll/glue", (name,), {"train": "train", "dev": dev})
        yield Benchmark(name, title, source, reader, scored, CLASSIFY, labels=labels)


def _texts() -> Iterator[Benchmark]:
    convai2 = Source("dialogue/convai2", "AlekseyKorshuk/persona-chat", splits=_NO_TEST)
    spoken = (metrics.BLEU, metrics.ROUGE_L, metrics.METEOR, metrics.BERTSCORE)
    yield Benchmark("convai2", "ConvAI2 (self persona)", convai2, rows.read_convai2, spoken, GENERATE, 48, ("\n",))
    xsum = Source("summarization/xsum", "EdinburghNLP/xsum", splits=_THREE, revision=_PARQUET)
    yield Benchmark("xsum", "XSum", xsum, rows.read_xsum, (metrics.ROUGE,), GENERATE, 64, ("\n",))
    squad = Source("qa/squad_v2", "rajpurkar/squad_v2", splits=_NO_TEST)
    yield Benchmark("squad_v2", "SQuAD v2", squad, rows.read_squad, (metrics.SQUAD,), GENERATE, stop=("\n",))
    yield Benchmark("squad_v2_spans", "SQuAD v2, marked", squad, rows.read_squad_spans, (metrics.SQUAD,), MARK)
    wikitext = Source("text/wikitext2", "Salesforce/wikitext", ("wikitext-2-raw-v1",), _THREE, text=True)
    yield Benchmark("wikitext2", "WikiText-2", wikitext, rows.read_line, (), PERPLEXITY)
    validation = replace(wikitext, measured_on=("dev", "test"))
    yield Benchmark("wikitext2_masked", "WikiText-2, masked", validation, rows.read_line, (), MASKED)
    # Both have all of their texts in one split, of which the first are enough to draw sentences from.
    for name, title, hub, split in (
        ("bookcorpus", "BookCorpusOpen", "lucadiliello/bookcorpusopen", "train[:200]"),
        ("cc_news", "CC-News", "vblagoje/cc_news", "train[:20000]"),
    ):
        corpus = Source(f"text/{name}", hub, splits={"dev": split}, text=True, measured_on=("dev", "test"))
        yield Benchmark(f"{name}_masked", f"{title}, masked", corpus, rows.read_line, (), MASKED_SENTENCES)


BENCHMARKS = {entry.name: entry for group in (_commonsense, _mathematics, _code, _glue, _texts) for entry in group()}
"""The benchmarks by name."""

GROUPS = {
    "commonsense": (
        "boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa",
    ),
    "arithmetic": ("multiarith", "gsm8k", "addsub", "aqua", "singleeq", "svamp", "mawps"),
    "code": ("humaneval", "mbpp"),
    "glue": ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"),
    "masked": ("wikitext2_masked", "bookcorpus_masked", "cc_news_masked"),
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
    entry = find_benchmark(name)
    if entry is None:
        near = did_you_mean(name, [*BENCHMARKS, *GROUPS], brief=True)
        raise ConfigError(f"There is no task '{name}'; {near}; others are reasoning_gym:NAME and lm_eval:NAME.")
    return entry


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
    lines: list[tuple[str, Mapping[str, Any]]] = []
    try:
        lines = UNION.rows("train", folder=folder)[1]
    except MissingSplitError:
        for name in GROUPS["commonsense"]:
            with contextlib.suppress(MissingSplitError):
                lines += BENCHMARKS[name].source.rows("train", folder=folder)[1]
        if not lines:
            raise
    return [rows.read_union(row, where) for where, row in lines]
