"""The first lines of a comparison's report: what to take, how sure that is, and what speaks against it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dynalora.common.statistics import Interval
from dynalora.jobs.compare.grid import Comparison
from dynalora.jobs.compare.summaries import Summary, value_of
from dynalora.lab.scores import shown_interval


def conclusion(comparison: Comparison, by_place: Mapping[str, Sequence[Summary]]) -> str:
    """What to take on each task, a line for each; whether cells are missing comes first."""
    grid = comparison.grid
    done, total = grid.done(), grid.total
    sentences = [f"{done} of {total} cells are done, so this may change."] if done < total else []
    paragraphs = [" ".join(sentences)] if sentences else []
    paragraphs += [
        " ".join(_of_a_task(called, group, grid.spec.reference))
        for place, of_task in by_place.items()
        for called, group in _compared(place, of_task, grid.chooses)
    ]
    return "\n".join(filter(None, paragraphs)) if by_place and any(by_place.values()) else "No cell is done yet."


def _compared(place: str, of_task: Sequence[Summary], chooses: bool) -> list[tuple[str, list[Summary]]]:
    """What is compared with each other on a task: all, or where no learning rate is chosen those of each rate."""
    if chooses:
        return [(place, list(of_task))]
    rates = dict.fromkeys(each.learning_rate for each in of_task if each.learning_rate is not None)
    return [
        (f"{place}, all at a learning rate of {rate:g}", [each for each in of_task if each.learning_rate == rate])
        for rate in rates
    ]


@dataclass(frozen=True)
class _AtEqualLoss:
    """What a method forgets where it has the reference's loss.

    Attributes:
        summary: Whose.
        kl: KL there, nats per token.
        ratio: That divided by the reference's KL at the same loss.
        scaled: Whether the update is scaled down to get there, and not the learning rate.
    """

    summary: Summary
    kl: float
    ratio: Interval
    scaled: bool


def _of_a_task(place: str, of_task: Sequence[Summary], reference: str) -> list[str]:
    trained = [summary for summary in of_task if summary.learning_rate is not None and summary.loss is not None]
    base = next((summary for summary in trained if summary.label == reference), None)
    if not trained:
        return []
    best = min(trained, key=lambda summary: value_of(summary.loss))
    if len(trained) == 1:
        return [f"{place}: {best.label} is alone; there is nothing to compare it with yet."]
    text = next((text for summary in trained for text in summary.kl), None)
    if base is None or text is None:
        return [_advice_by_loss(place, best, reference), _learned(best, reference)]
    entries = [entry for summary in trained if summary is not base and (entry := _at_equal_loss(summary, base, text))]
    missing = [each.label for each in trained if each is not base and all(each is not e.summary for e in entries)]
    sentences = [_advice(place, entries, base, text), _learned(best, reference)]
    if missing:
        sentences.append(f"The loss of {reference} is not reached by {_listed(missing)}.")
    return sentences


def _at_equal_loss(summary: Summary, base: Summary, text: str) -> _AtEqualLoss | None:
    """A method beside the reference at its loss, along factors of the update or else along learning rates."""
    scaled = summary.scaled.get(text)
    if scaled is not None and scaled.own_ratio is not None and scaled.at_loss is not None:
        return _AtEqualLoss(summary, scaled.at_loss.value, scaled.own_ratio, True)
    kl, of_base = summary.at_reference_loss.get(text), value_of(base.kl.get(text))
    if kl is None or not of_base > 0:
        return None
    return _AtEqualLoss(summary, kl, Interval(*[kl / of_base] * 3), False)


def _advice(place: str, entries: Sequence[_AtEqualLoss], base: Summary, text: str) -> str:
    """Which method to take where forgetting was measured: the one that forgets least for what the reference learned."""
    rate = f"a learning rate of {base.learning_rate:g}"
    least = min(entries, key=lambda entry: entry.ratio.value, default=None)
    if least is None or least.ratio.value >= 1:
        return f"{place}: stay with {base.label} at {rate}; no other method here forgets less at its loss."
    ratio, unsure, seeds = least.ratio, least.ratio.low == least.ratio.high, len(least.summary.results)
    measured = (
        f"at {base.label}'s loss it forgets {ratio.value:.2f} times as much as {base.label} "
        f"(KL from the base model {least.kl:.3f} nats per token on {text}"
    )
    how = ", its update scaled down after training," if least.scaled else ""
    take = f"{least.summary.label}{how} at a learning rate of {least.summary.learning_rate:g}"
    if unsure and (least.scaled or seeds == 1):
        return (
            f"{place}: on what was run, take {take}: {measured}). That is one run of each, so no interval can be "
            "given; repeat it with more seeds (--seeds 3) before you rely on it."
        )
    if unsure:
        return (
            f"{place}: on what was run, take {take}: {measured}). That is read off between learning rates, for which "
            "there is no interval; measure scaled updates, too (--factors), to have one."
        )
    interval = f"95 % interval of the ratio {ratio.low:.2f} to {ratio.high:.2f}, {seeds} seeds)"
    if ratio.high < 1:
        return f"{place}: take {take}: {measured}; {interval}."
    return (
        f"{place}: no method is beyond chance better than {base.label} at {rate}. Nearest to it comes {take}: "
        f"{measured}; {interval}."
    )


def _advice_by_loss(place: str, best: Summary, reference: str) -> str:
    """Which method to take where only what was learned is known."""
    apart = best.loss_apart
    if apart is not None and apart.p < 0.05 and apart.value < 0:
        return f"{place}: take {best.label} at a learning rate of {best.learning_rate:g}."
    if best.label == reference:
        return f"{place}: stay with {reference}, which no other method here is better than."
    return f"{place}: no method is beyond chance better than {reference}."


def _learned(best: Summary, reference: str) -> str:
    """Which method learned most, beside the reference."""
    lowest = f"The lowest held-out loss as trained is that of {best.label}, {shown_interval(best.loss, 3, half=True)}"
    apart = best.loss_apart
    if best.label == reference or apart is None or math.isnan(apart.value):
        return f"{lowest}."
    half = (apart.high - apart.low) / 2
    sure = "beyond chance" if apart.p < 0.05 else "which may be chance"
    p = "p < 0.001" if apart.p < 1e-3 else f"p = {apart.p:.3f}"
    return f"{lowest}, which is {-apart.value:.3f} ± {half:.3f} below that of {reference} ({sure}, {p})."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
