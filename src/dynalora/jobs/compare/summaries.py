"""What a comparison came to: means over seeds with intervals, and paired differences from the reference."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dynalora.common.statistics import Difference, Interval, crossed_difference, holm, mean_interval
from dynalora.jobs.compare.contestants import Contestant
from dynalora.jobs.compare.frontiers import Scaled, compare_scaled
from dynalora.jobs.compare.grid import Comparison, Grid
from dynalora.lab.scores import mean_accuracy, mean_loss

Result = Mapping[str, Any]

MEAN = "mean"
"""Name of the unweighted mean of the retention tasks, beside their names."""


@dataclass(frozen=True)
class Summary:
    """One method on one task, at its learning rate, over the seeds that are there.

    Attributes:
        label: Which.
        place: The task.
        learning_rate: Chosen or only one; None for the base model.
        edge: The chosen rate is the grid's smallest or largest, and there were others.
        results: The cells, by seed.
        accuracy: Over the seeds, a share; None where no answer is right or wrong.
        loss: Of the right answers, nats per token (per text for classification, per question for marking).
        metrics: The benchmark's own numbers.
        kl: KL(base ‖ tuned) by text, nats per token.
        kept: Main numbers of the retention tasks, over the seeds, and where all are shares `mean`, their unweighted
            mean.
        accuracy_apart: Accuracy minus the reference's.
        loss_apart: Loss minus the reference's.
        at_reference_loss: KL by text where the method's curve over learning rates has the reference's loss; None where
            it does not reach it.
        norm: ‖ΔW‖_F over all matrices, gates counted as open; None: not measured.
        prompts_kl: KL(base ‖ tuned) on the task's prompts, nats per token; None: not measured.
        scaled: By text, how its curves over factors of the update compare with the reference's.
    """

    label: str
    place: str
    learning_rate: float | None
    edge: bool
    results: Mapping[int, Result] = field(repr=False)
    accuracy: Interval | None = None
    loss: Interval | None = None
    metrics: dict[str, Interval] = field(default_factory=dict)
    kl: dict[str, Interval] = field(default_factory=dict)
    kept: dict[str, Interval] = field(default_factory=dict)
    accuracy_apart: Difference | None = None
    loss_apart: Difference | None = None
    at_reference_loss: dict[str, float | None] = field(default_factory=dict)
    norm: Interval | None = None
    prompts_kl: Interval | None = None
    scaled: dict[str, Scaled] = field(default_factory=dict)

    def training(self, name: str) -> list[float]:
        """A number of the trainings, by seed; without those that do not have it."""
        values = [result["training"][name] for result in self.results.values() if result.get("training")]
        return [float(value) for value in values if value is not None]


def summaries(comparison: Comparison) -> dict[str, list[Summary]]:
    """Summaries by the task's place: the base model, the reference, the others; without those that have no result.

    Where no learning rate is chosen, those of every rate.
    """
    grid, by_place = comparison.grid, {}
    for task, place in grid.places.items():
        if not grid.chooses:
            by_place[place] = by_rate(comparison, task)
            continue
        of_task: list[Summary] = []
        if (base := grid.result(grid.base(task))) is not None:
            of_task.append(_summary("base", place, None, False, {0: base}))
        for contestant in grid.contestants:
            rate = grid.chosen_rate(task, contestant)
            if rate is None:
                continue
            cells = [grid.cell(task, contestant, rate, seed) for seed in grid.spec.run_seeds]
            results = {cell.seed: result for cell in cells if (result := grid.result(cell)) is not None}
            if results:
                rates = contestant.learning_rates
                edge = len(rates) > 1 and rate in (rates[0], rates[-1])
                of_task.append(_summary(contestant.label, place, rate, edge, results))
        by_place[place] = _adjusted(_against(comparison, task, of_task))
    return by_place


def _summary(label: str, place: str, rate: float | None, edge: bool, results: Mapping[int, Result]) -> Summary:
    scores = [result["test"] for result in results.values()]
    accuracy, loss = mean_accuracy(scores), mean_loss(scores)
    metrics = {
        name: mean_interval([score["metrics"][name] for score in scores]) for name in scores[0].get("metrics", {})
    }
    retained = [result.get("retention") or {} for result in results.values()]
    kl = {name: mean_interval([texts[name]["kl"] for texts in retained]) for name in retained[0]}
    numbers = [kept_numbers(result) for result in results.values()]
    kept = {name: mean_interval([of_run[name] for of_run in numbers]) for name in numbers[0]}
    norm, prompts_kl = (_change(results, name) for name in ("norm", "prompts_kl"))
    return Summary(
        label, place, rate, edge, results, accuracy, loss, metrics, kl, kept, norm=norm, prompts_kl=prompts_kl
    )


def _change(results: Mapping[int, Result], name: str) -> Interval | None:
    """A number of what training changed, over the seeds; None where one lacks it."""
    values = [(result.get("change") or {}).get(name) for result in results.values()]
    return None if None in values else mean_interval([float(value) for value in values if value is not None])


def kept_numbers(result: Result) -> dict[str, float]:
    """A run's main numbers on retention tasks and further ones, and `mean`, where retention tasks are of one kind.

    They are of one kind if all are shares, or all one other number, such as perplexity.
    """
    tasks = result.get("kept") or {}
    numbers = {name: float(task["value"]) for name, task in tasks.items()}
    kept = {name: task for name, task in tasks.items() if not task.get("further")}
    kinds = {"share" if task["share"] else task["metric"] for task in kept.values()}
    if len(kept) > 1 and len(kinds) == 1:
        numbers[MEAN] = statistics.fmean(numbers[name] for name in kept)
    return numbers


def _against(comparison: Comparison, task: str, of_task: list[Summary]) -> list[Summary]:
    """Summaries of a task with differences from the reference among them, p-values as they are."""
    grid = comparison.grid
    reference = next((summary for summary in of_task if summary.label == grid.spec.reference), None)
    if reference is None:
        return of_task
    base = grid.result(grid.base(task))
    base_loss = None if base is None else float(base["test"]["loss"])
    compared = []
    for summary in of_task:
        if summary.label != "base":
            summary, plain = _scaled(grid, summary, reference, base_loss), summary
            reference = summary if plain is reference else reference
        if summary is reference or summary.label == "base":
            compared.append(summary)
            continue
        contestant = next(entry for entry in grid.contestants if entry.label == summary.label)
        compared.append(
            replace(
                summary,
                accuracy_apart=_apart(reference, summary, _right),
                loss_apart=_apart(reference, summary, _nats),
                at_reference_loss={
                    text: _at_loss(curve(comparison, task, contestant, text), value_of(reference.loss))
                    for text in summary.kl
                },
            )
        )
    return compared


def by_rate(comparison: Comparison, task: str) -> list[Summary]:
    """The base model, and a task's runs at every learning rate, from the smallest, beside the reference's at it."""
    grid = comparison.grid
    base = grid.result(grid.base(task))
    found = [] if base is None else [_summary("base", grid.places[task], None, False, {0: base})]
    for rate in sorted({rate for contestant in grid.contestants for rate in contestant.learning_rates}):
        of_rate: list[Summary] = []
        for contestant in grid.contestants:
            if rate not in contestant.learning_rates:
                continue
            cells = [grid.cell(task, contestant, rate, seed) for seed in grid.spec.run_seeds]
            results = {cell.seed: result for cell in cells if (result := grid.result(cell)) is not None}
            if results:
                of_rate.append(_summary(contestant.label, grid.places[task], rate, False, results))
        found += _against(comparison, task, of_rate)
    return _adjusted(found)


def _adjusted(compared: list[Summary]) -> list[Summary]:
    """Summaries with p-values adjusted for how many differences there are."""
    for name in ("accuracy_apart", "loss_apart"):
        indices = [index for index, summary in enumerate(compared) if getattr(summary, name) is not None]
        adjusted = holm([getattr(compared[index], name).p for index in indices])
        for index, p in zip(indices, adjusted, strict=True):
            compared[index] = replace(compared[index], **{name: replace(getattr(compared[index], name), p=p)})
    return compared


def _scaled(grid: Grid, summary: Summary, reference: Summary, base_loss: float | None) -> Summary:
    """A summary with what its curves over factors say beside the reference's."""
    weights = {entry.label: entry.quantization for entry in grid.contestants}
    # On other weights than the base model's a factor of 0 is not the base model.
    ends = weights[summary.label] == weights[reference.label] == grid.spec.quantization
    compared = {
        text: compare_scaled(summary.results, reference.results, text, base_loss if ends else None)
        for text in summary.kl
    }
    return replace(summary, scaled={text: found for text, found in compared.items() if found is not None})


def value_of(interval: Interval | None) -> float:
    """An interval's middle; NaN without one."""
    return math.nan if interval is None else interval.value


def _right(score: Mapping[str, Any]) -> list[float]:
    return [float(answer) for answer in score["correct"]]


def _nats(score: Mapping[str, Any]) -> list[float]:
    """Per item a value whose mean over the items is the loss per token."""
    mean = sum(score["counts"]) / max(1, len(score["counts"]))
    return [loss / mean for loss in score["losses"]]


def _apart(
    reference: Summary, summary: Summary, values: Callable[[Mapping[str, Any]], list[float]]
) -> Difference | None:
    """`one` minus the reference over the seeds and items that both have."""
    seeds = [seed for seed in summary.results if seed in reference.results]
    first = [values(reference.results[seed]["test"]) for seed in seeds]
    second = [values(summary.results[seed]["test"]) for seed in seeds]
    if not seeds or len(first[0]) < 2 or len(first[0]) != len(second[0]):
        return None
    return crossed_difference(first, second)


def curve(comparison: Comparison, task: str, contestant: Contestant, text: str) -> list[tuple[float, float, float]]:
    """(learning rate, KL on the text, loss) with growing rates: means over the seeds that ran at each."""
    grid, points = comparison.grid, []
    for rate in contestant.learning_rates:
        results = [grid.result(grid.cell(task, contestant, rate, seed)) for seed in grid.spec.run_seeds]
        measured = [result for result in results if result is not None and text in (result.get("retention") or {})]
        if measured:
            kl = statistics.fmean(result["retention"][text]["kl"] for result in measured)
            points.append((rate, kl, statistics.fmean(result["test"]["loss"] for result in measured)))
    return points


def _at_loss(points: Sequence[tuple[float, float, float]], loss: float) -> float | None:
    """KL at which a curve first reaches a loss, linear in log KL between its points; None if it never does."""
    for (_, first, high), (_, second, low) in itertools.pairwise(points):
        if high >= loss >= low and high > low and first > 0 and second > 0:
            part = (high - loss) / (high - low)
            return math.exp((1 - part) * math.log(first) + part * math.log(second))
    return None


def training_numbers(by_place: Mapping[str, Sequence[Summary]], label: str, name: str) -> list[float]:
    """A number of all trainings of one method, over all tasks and seeds."""
    return [
        value
        for of_task in by_place.values()
        for summary in of_task
        if summary.label == label
        for value in summary.training(name)
    ]
