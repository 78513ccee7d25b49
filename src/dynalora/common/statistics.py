"""Estimates with their errors and intervals, and comparisons of models on the same items: one place for all numbers.

| of | interval |
|---|---|
| a share | Wilson's |
| a mean over runs or items | Student's t |
| a mean per token, over texts of different lengths | normal, with the error of a ratio estimate |
| a number over all items that is no mean | percentile bootstrap |
| a difference of two shares on the same items | Bonett and Price's, with McNemar's test |
| a difference over several runs on the same items | Student's t, of both runs and items drawn at random |

All are 95 % intervals unless said otherwise. SciPy, which takes a moment to import and belongs to the extra `lab`, is
imported where it is needed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, stdev
from typing import Any

from dynalora.common.extras import require
from dynalora.errors import ConfigError, DataError


@dataclass(frozen=True)
class Interval:
    """A number with its interval.

    Attributes:
        value: The estimate.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error over the items (0 for a single one)."""

    value: float
    error: float

    @property
    def interval(self) -> Interval:
        """The normal 95 % interval."""
        half = normal_quantile() * self.error
        return Interval(self.value, self.value - half, self.value + half)


def wilson(correct: int, total: int, confidence: float = 0.95) -> Interval:
    """A proportion with Wilson's score interval (E. B. Wilson, JASA 22, 1927), which stays inside [0, 1].

    Raises:
        ConfigError: Total below 1, correct outside 0 … total, or confidence outside (0, 1).
    """
    if total < 1 or not 0 <= correct <= total:
        raise ConfigError(f"{correct} of {total} is no share; give 0 ≤ correct ≤ total and total ≥ 1.")
    normal_quantile(confidence)
    ends = _scipy_stats().binomtest(correct, total).proportion_ci(confidence, method="wilson")
    return Interval(correct / total, float(ends.low), float(ends.high))


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> Interval:
    """Accuracy of `second` minus accuracy of `first` on the same items, with its interval.

    The interval is the adjusted Wald interval of D. G. Bonett and R. M. Price, J. Educ. Behav. Stat. 37 (2012): one
    observation is added to each of the two cells in which the models differ, which keeps the coverage near nominal
    for small samples and extreme proportions. The estimate itself is the plain difference.

    Raises:
        DataError: No items, or different numbers of them.
    """
    gained, lost = _discordant(first, second)
    total = len(first)
    plus, minus = (gained + 1) / (total + 2), (lost + 1) / (total + 2)
    half = normal_quantile() * math.sqrt((plus + minus - (plus - minus) ** 2) / (total + 2))
    return Interval((gained - lost) / total, max(-1.0, plus - minus - half), min(1.0, plus - minus + half))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided p-value of the exact McNemar test: do two models differ in accuracy on the same items?

    The items on which exactly one of them is right are fair coin tosses if they do not (Q. McNemar, Psychometrika 12,
    1947; the binomial form).

    Raises:
        DataError: No items, or different numbers of them.
    """
    gained, lost = _discordant(first, second)
    if gained + lost == 0:
        return 1.0
    return float(_scipy_stats().binomtest(gained, gained + lost).pvalue)


def _discordant(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int]:
    """Numbers of items that only `second`, and that only `first`, has right."""
    if not first or len(first) != len(second):
        raise DataError(f"Paired comparison of {len(first)} and {len(second)} items; give both on the same items.")
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    return gained, lost


@dataclass(frozen=True)
class Difference(Interval):
    """A difference with its interval.

    Attributes:
        p: Two-sided p-value of no difference.
    """

    p: float


def crossed_difference(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> Difference:
    """Mean of `second` minus `first`, where the same runs (seeds) were measured on the same items.

    Runs and items both count as drawn at random, so the result speaks of other seeds and other questions. With
    differences d of run r on item i, the variance of their mean is taken as

        var_r(mean_i d) / R + var_i(mean_r d) / I

    which is the unbiased estimate of the crossed random-effects model without its small negative third term (what is
    left over counts twice), and so errs on the safe side. Degrees of freedom by Satterthwaite (Biometrics Bulletin 2,
    1946). A single run has no variance between runs, and the result speaks of that run only.

    Args:
        first: One sequence per run, one value per item.
        second: Likewise, runs and items in the same order.

    Raises:
        DataError: No runs, fewer than two items, or different numbers of either.
    """
    shape = [len(run) for run in first]
    if not shape or shape != [len(run) for run in second] or len(set(shape)) > 1 or shape[0] < 2:
        raise DataError(
            f"Paired comparison of {len(first)} and {len(second)} runs; give the same runs on the same items, at least "
            "two of these."
        )
    differences = [
        [b - a for a, b in zip(before, after, strict=True)] for before, after in zip(first, second, strict=True)
    ]
    runs, items = len(differences), shape[0]
    by_run = [math.fsum(run) / items for run in differences]
    by_item = [math.fsum(run[index] for run in differences) / runs for index in range(items)]
    mean = math.fsum(by_run) / runs
    parts = [(stdev(by_item) ** 2 / items, items - 1)]
    if runs > 1:
        parts.append((stdev(by_run) ** 2 / runs, runs - 1))
    variance = math.fsum(part for part, _ in parts)
    if variance == 0:
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    degrees = max(1, int(variance**2 / math.fsum(part**2 / free for part, free in parts)))
    error = math.sqrt(variance)
    half = t_quantile(0.975, degrees) * error
    return Difference(mean, mean - half, mean + half, float(2 * _scipy_stats().t.sf(abs(mean) / error, degrees)))


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (S. Holm, Scand. J. Stat. 6, 1979): below 0.05 means so for all of them."""
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda place: values[place])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted


def normal_quantile(confidence: float = 0.95) -> float:
    """Standard errors on either side of an estimate that an interval of this coverage takes, 1.96 for 95 %.

    Raises:
        ConfigError: Confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}; give a number between 0 and 1.")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """A mean with Student's t interval, for a number measured in several independent runs.

    Of a single run the spread is unknown, and the interval is that value alone.

    Raises:
        DataError: No values.
        ConfigError: Confidence outside (0, 1).
    """
    if not values:
        raise DataError("There are no values to average; give at least one.")
    normal_quantile(confidence)
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, mean, mean)
    half = t_quantile(0.5 + confidence / 2, len(values) - 1) * (stdev(values) / math.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


def unweighted_mean(scores: Sequence[Interval]) -> Interval:
    """The mean of several tasks' scores, each counting the same; its interval takes the tasks as independent.

    Raises:
        DataError: There are no scores.
    """
    if not scores:
        raise DataError("There are no results to average; give at least one.")
    value = math.fsum(score.value for score in scores) / len(scores)
    below = math.sqrt(math.fsum((score.value - score.low) ** 2 for score in scores)) / len(scores)
    above = math.sqrt(math.fsum((score.high - score.value) ** 2 for score in scores)) / len(scores)
    return Interval(value, value - below, value + above)


def item_interval(values: Sequence[float]) -> Interval:
    """A mean over a task's items: Wilson's interval if all values are 0 or 1, else Student's.

    Raises:
        DataError: No values.
        ConfigError: Confidence outside (0, 1).
    """
    if values and all(value in (0, 1) for value in values):
        return wilson(round(sum(values)), len(values))
    return mean_interval(values)


def ratio(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
    """Σ sums / Σ counts with the standard error of a ratio estimate; with equal counts, that of a mean.

    Both have one number per item, such as its negative log-likelihood and its number of tokens; not all counts are 0.
    """
    number, whole = len(sums), sum(counts)
    value = math.fsum(sums) / whole
    if number < 2:
        return Estimate(value, 0.0)
    spread = math.fsum((total - value * count) ** 2 for total, count in zip(sums, counts, strict=True))
    return Estimate(value, math.sqrt(spread / (number - 1) / number) / (whole / number))


def bootstrap(
    whole: Callable[[Sequence[Any], Sequence[Any]], float],
    answers: Sequence[Any],
    references: Sequence[Any],
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """A number over all items with its percentile bootstrap interval; items are drawn with their references."""
    value = whole(answers, references)
    chance = random.Random(seed)
    drawn = []
    for _ in range(resamples):
        picked = chance.choices(range(len(answers)), k=len(answers))
        drawn.append(whole([answers[i] for i in picked], [references[i] for i in picked]))
    drawn.sort()
    low, high = drawn[int(0.025 * resamples)], drawn[min(resamples - 1, int(0.975 * resamples))]
    return Interval(value, min(low, value), max(high, value))


def t_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t distribution."""
    return float(_scipy_stats().t.ppf(probability, degrees))


def _scipy_stats() -> Any:
    return require("scipy.stats", "An interval or a test of significance")
