"""Metrics by name, each with its interval: what a task's answers are compared with, and how.

A metric is either a mean over items, or one number over all of them (F1, BLEU). Means over yes and no get Wilson's
interval, other means Student's t, and numbers over all items the percentile bootstrap (B. Efron, Ann. Statist. 7,
1979) with a fixed seed. All intervals are 95 %.

Where a kept library has a metric, it is that library's: sacrebleu (BLEU), rouge-score (ROUGE), bert-score
(BERTScore), NLTK (METEOR), scikit-learn and SciPy (F1, Matthews' and Pearson's correlation).
"""

from __future__ import annotations

import importlib.util
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynalora.common.extras import install
from dynalora.common.statistics import Interval, bootstrap, item_interval
from dynalora.errors import DataError, UnsupportedError
from dynalora.evaluation.numbers import last_number, number, same_number, stated_answer, stated_number

Items = Mapping[str, Sequence[float | None]]
"""By name, one value per item; None where an item does not count for that name."""


@dataclass(frozen=True)
class Metric:
    """One or several numbers out of answers and references.

    Attributes:
        names: Of the numbers.
        items: (answers, references) → per name one value per item; None for a metric over all items.
        whole: (answers, references) → one number over all items.
        needs: Modules that must be importable, each with the package that has it.
        percent: Whether it is a share, shown times 100.
        resamples: Of the bootstrap.
    """

    names: tuple[str, ...]
    items: Callable[[Sequence[Any], Sequence[Any]], Items] | None = None
    whole: Callable[[Sequence[Any], Sequence[Any]], float] | None = None
    needs: Mapping[str, str] | None = None
    percent: bool = True
    resamples: int = 1000

    def check(self) -> None:
        """Make sure that its library is there.

        Raises:
            UnsupportedError: It is not; says what to install.
        """
        for module, package in (self.needs or {}).items():
            if importlib.util.find_spec(module) is None:
                raise UnsupportedError(
                    f"The metric {self.names[0]} needs the package {package}, which is not installed; run: "
                    f"{install('eval')}, or choose other metrics."
                )
        if "nltk" in (self.needs or {}):
            _wordnet()

    def score(
        self, answers: Sequence[Any], references: Sequence[Any]
    ) -> tuple[dict[str, Interval], dict[str, tuple[float | None, ...]]]:
        """The numbers with their intervals, and the values of single items where there are such.

        Raises:
            DataError: There are no items, or not as many references.
        """
        if not answers or len(answers) != len(references):
            raise DataError(
                f"{self.names[0]} of {len(answers)} answers and {len(references)} references; give as many of each, "
                "at least one."
            )
        if self.items is not None:
            values_by_name = {name: tuple(values) for name, values in self.items(answers, references).items()}
            return {
                name: item_interval([v for v in values if v is not None])
                for name, values in values_by_name.items()
                if any(value is not None for value in values)
            }, values_by_name
        assert self.whole is not None
        return {self.names[0]: bootstrap(self.whole, answers, references, self.resamples)}, {}


# --- answers out of texts -------------------------------------------------------------------------------------


def first_keyword(text: str, keywords: Sequence[str]) -> str | None:
    """The keyword that occurs first in a text, in lower case; None where there is none.

    The rule of LLM-Adapters' commonsense evaluation (Hu et al., 2023): no keyword is a wrong answer.
    """
    match = re.search("|".join(map(re.escape, keywords)), text.lower())
    return match[0] if match else None


def letter(text: str, letters: str = "ABCDE") -> str | None:
    """The option a text decides for: the letter behind the last "answer is", else the first that stands alone."""
    decided = re.findall(rf"(?i:answer(?: is|:))\s*\(?([{letters}])\b", text)
    alone = re.findall(rf"(?<![A-Za-z'’])\(?([{letters}])\b(?!['’])", text)
    return decided[-1] if decided else alone[0] if alone else None


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{…}` (or `\boxed …`, `\fbox{…}`) of a text; None where there is none."""
    start = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if start < 0:
        return None
    rest = text[start:].split("boxed" if text.startswith(r"\boxed", start) else "fbox", 1)[1]
    if not rest.lstrip().startswith("{"):
        return rest.split("$")[0].strip() or None
    rest = rest.lstrip()
    depth = 0
    for place, sign in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if depth == 0:
            return rest[1:place]
    return None


def math_answer(text: str) -> str | None:
    r"""The answer that a text gives to a question of MATH: the last `\boxed{…}`, else what "The answer is:" says."""
    return answer if (answer := boxed(text)) is not None else stated_answer(text)


def math_form(answer: str) -> str:
    r"""An answer of MATH without differences of spelling, after the rules of Hendrycks et al. (2021,
    arXiv:2103.03874).

    Spaces, `\left`, `\right`, units in `\text{…}`, dollar and percent signs and a leading `x =` go; `\tfrac` and
    `\dfrac` become `\frac`, `\frac12` becomes `\frac{1}{2}`, `a/b` of whole numbers a fraction, `.5` becomes
    `0.5`.
    """
    text = answer.strip().replace("\n", "").replace(r"\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac").replace(r"\left", "").replace(r"\right", "")
    text = re.sub(r"\^\{?\\circ\}?", "", text).replace(r"\$", "").replace("$", "")
    text = re.sub(r"\\text\{ [^}]*\}\s*$", "", text)  # a unit
    text = re.sub(r"\\(?:text|mbox|mathrm|textbf)\{([^}]*)\}", r"\1", text)
    text = text.replace(r"\%", "").replace("%", "").rstrip(".")
    text = re.sub(r"^[A-Za-z]\s*=(?!=)", "", text)
    text = re.sub(r"\s+", "", text)
    text = re.sub(r"(?<!\d)\.(\d)", r"0.\1", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\d)\{", r"\\frac{\1}{", text)
    text = re.sub(r"\\frac\{([^{}]*)\}(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", text)
    return re.sub(r"^(-?\d+)\.0+$", r"\1", text)


# --- means over items -----------------------------------------------------------------------------------------


def _each(name: str, right: Callable[[Any, Any], bool | float]) -> Metric:
    def items(answers: Sequence[Any], references: Sequence[Any]) -> Items:
        return {name: [float(right(a, r)) for a, r in zip(answers, references, strict=True)]}

    return Metric((name,), items=items)


def keyword_accuracy(keywords: Sequence[str]) -> Metric:
    """Share of answers whose first keyword is the right one; a reference that is no keyword is an error of the data."""
    return _each("accuracy", lambda text, reference: first_keyword(text, keywords) == reference)


STRICT = _each("strict", lambda text, reference: same_number(stated_number(text), number(reference)))
FLEXIBLE = _each("flexible", lambda text, reference: same_number(last_number(text), number(reference)))
NUMBER = _each("accuracy", lambda text, reference: same_number(last_number(text), number(reference)))
LETTER = _each("accuracy", lambda text, reference: letter(text) == reference)
EXACT = _each("accuracy", lambda text, reference: text.strip() == reference.strip())
MATH = _each(
    "accuracy",
    lambda text, reference: (answer := math_answer(text)) is not None and math_form(answer) == math_form(reference),
)
ACCURACY = _each("accuracy", lambda predicted, reference: predicted == reference)
PASS_AT_1 = _each("pass@1", lambda passed, _: bool(passed))


def squad_words(text: str) -> list[str]:
    """An answer's words after SQuAD's normalisation: lower case, without punctuation and articles."""
    plain = "".join(sign for sign in text.lower() if sign not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def squad_scores(answer: str, references: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 of an answer, the best over the references; no reference means that silence is right."""
    mine = squad_words(answer)
    exact = f1 = 0.0
    for reference in references or [""]:
        theirs = squad_words(reference)
        exact = max(exact, float(mine == theirs))
        if not mine or not theirs:
            f1 = max(f1, float(mine == theirs))
            continue
        same = sum((Counter(mine) & Counter(theirs)).values())
        f1 = max(f1, 2 * same / (len(mine) + len(theirs)))
    return exact, f1


def _squad(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Items:
    said = ["" if " ".join(squad_words(a)).startswith("unanswerable") else a for a in answers]
    scores = [squad_scores(a, r) for a, r in zip(said, references, strict=True)]
    result: dict[str, list[float | None]] = {}
    for kind, counts in (("", None), ("HasAns_", True), ("NoAns_", False)):
        for place, name in enumerate(("f1", "exact")):
            result[kind + name] = [
                score[place == 0] if counts is None or bool(r) == counts else None
                for score, r in zip(scores, references, strict=True)
            ]
    return result


SQUAD = Metric(("f1", "exact", "HasAns_f1", "HasAns_exact", "NoAns_f1", "NoAns_exact"), items=_squad)


def _rouge(names: Sequence[str]) -> Metric:
    def items(answers: Sequence[str], references: Sequence[str]) -> Items:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(names), use_stemmer=True)
        scores = [scorer.score(r, a) for a, r in zip(answers, references, strict=True)]
        return {name: [score[name].fmeasure for score in scores] for name in names}

    return Metric(tuple(names), items=items, needs={"rouge_score": "rouge-score"})


ROUGE = _rouge(("rouge1", "rouge2", "rougeL", "rougeLsum"))
ROUGE_L = _rouge(("rougeL",))


def _bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    import sacrebleu

    return float(sacrebleu.corpus_bleu(list(answers), [list(references)]).score) / 100


BLEU = Metric(("bleu",), whole=_bleu, needs={"sacrebleu": "sacrebleu"}, resamples=200)


def _bert(answers: Sequence[str], references: Sequence[str]) -> Items:
    import bert_score

    scores = bert_score.score(list(answers), list(references), lang="en", verbose=False)
    return dict(
        zip(("bertscore_precision", "bertscore_recall", "bertscore_f1"), (x.tolist() for x in scores), strict=True)
    )


BERTSCORE = Metric(
    ("bertscore_f1", "bertscore_precision", "bertscore_recall"), items=_bert, needs={"bert_score": "bert-score"}
)


def _meteor(answers: Sequence[str], references: Sequence[str]) -> Items:
    from nltk.translate.meteor_score import meteor_score

    return {"meteor": [float(meteor_score([r.split()], a.split())) for a, r in zip(answers, references, strict=True)]}


def _wordnet() -> None:
    import nltk

    try:
        nltk.data.find("corpora/wordnet.zip")
    except LookupError as error:
        raise UnsupportedError(
            "The metric meteor needs WordNet, which NLTK does not find; run: python -m nltk.downloader wordnet, "
            "or choose other metrics."
        ) from error


METEOR = Metric(("meteor",), items=_meteor, needs={"nltk": "nltk"})

# --- numbers over all items: classes and values ---------------------------------------------------------------

_SKLEARN = {"sklearn": "scikit-learn"}


def _f1(predicted: Sequence[int], references: Sequence[int]) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(references, predicted, zero_division=0.0))


def _matthews(predicted: Sequence[int], references: Sequence[int]) -> float:
    from sklearn.metrics import matthews_corrcoef

    if len({*predicted, *references}) < 2:
        return 0.0  # undefined, which scikit-learn warns of
    return float(matthews_corrcoef(references, predicted))


def _pearson(predicted: Sequence[float], references: Sequence[float]) -> float:
    from scipy.stats import pearsonr

    if len(set(predicted)) < 2 or len(set(references)) < 2:
        return 0.0  # undefined; a constant prediction explains nothing
    return float(pearsonr(references, predicted).statistic)


F1 = Metric(("f1",), whole=_f1, needs=_SKLEARN, resamples=300)
MATTHEWS = Metric(("matthews",), whole=_matthews, needs=_SKLEARN, resamples=300)
PEARSON = Metric(("pearson",), whole=_pearson, needs={"scipy": "scipy"}, resamples=300)
