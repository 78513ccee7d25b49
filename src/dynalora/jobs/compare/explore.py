"""Everything that was measured of a comparison's runs against everything else, as a plot with axes to choose."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dynalora.jobs.compare.contestants import Contestant
from dynalora.jobs.compare.frontiers import points_of
from dynalora.jobs.compare.grid import Comparison
from dynalora.jobs.compare.plots import loss_shown
from dynalora.jobs.compare.summaries import MEAN, kept_numbers
from dynalora.lab.explorer import Explorer, Line, Point

_OTHERS = {
    "loss": "loss of the right answers",
    "accuracy": "accuracy, %",
    "kept": "retention tasks, mean",
    "step": "time of a step, s",
    "peak": "peak of training, GiB",
    "norm": "size of the update, ‖ΔW‖_F",
    "parameters": "trained parameters",
    "rate": "learning rate",
    "factor": "factor of the update",
}
_CAPTION = (
    "Every run; large marks are runs{at} as trained, means over the seeds. Point at a mark to read it off, drag to "
    "zoom, double-click to see all, click a name to hide it, and choose the axes above."
)


def explorer(comparison: Comparison, task: str) -> Explorer | None:
    """The plot of one task: a line over factors of the update for each run, or else over learning rates.

    Points are means over the seeds; those of the chosen learning rates stand out, or where none is chosen all runs as
    trained. None where there is too little to see.
    """
    grid = comparison.grid
    lines: list[Line] = []
    for contestant in grid.contestants:
        runs = [_run(comparison, task, contestant, rate) for rate in contestant.learning_rates]
        if any(len(points) > 1 for points in runs):
            lines += [Line(contestant.label, points) for points in runs if points]
        elif any(runs):
            lines.append(Line(contestant.label, [point for points in runs for point in points]))
    points = [point for line in lines for point in line.points]
    texts = _texts(comparison, task)
    titles = {f"kl {text}": f"KL on {text} (nats per token)" for text in texts} | _OTHERS
    quantities = {
        key: title
        for key, title in titles.items()
        if len({point.values[key] for point in points if key in point.values}) > 1
    }
    if len(points) < 2 or len(quantities) < 2:
        return None
    highest, _ = loss_shown(grid, task, [point.values["loss"] for point in points if "loss" in point.values])
    across = next(key for key in (*quantities, "") if key != "loss")
    upwards = "loss" if "loss" in quantities else [key for key in quantities if key != across][-1]
    return Explorer(
        lines, quantities, across, upwards, log=[f"kl {text}" for text in texts] + ["rate"],
        labels=[contestant.label for contestant in grid.contestants],
        caption=_CAPTION.format(at=" at the chosen learning rate" if grid.chooses else ""),
        highest={} if highest is None else {"loss": highest},
    )  # fmt: skip


def _texts(comparison: Comparison, task: str) -> list[str]:
    results = [result for cell, result in comparison.grid.results() if cell.task == task]
    return list(dict.fromkeys(text for result in results for text in result.get("retention") or {}))


def _run(comparison: Comparison, task: str, contestant: Contestant, rate: float) -> list[Point]:
    """A method's runs at one rate, means over the seeds: as trained, and then down its curve over factors."""
    grid = comparison.grid
    cells = (grid.cell(task, contestant, rate, seed) for seed in grid.spec.run_seeds)
    results = [result for cell in cells if (result := grid.result(cell)) is not None]
    if not results:
        return []
    stands_out = not grid.chooses or grid.chosen_rate(task, contestant) == rate
    seeds = f", mean of {len(results)} seeds" if len(results) > 1 else ""
    by_factor: dict[float, list[dict[str, float]]] = {1.0: [_as_trained(result) for result in results]}
    for result in results:
        for text in result.get("retention") or {}:
            for number, (factor, loss, kl) in enumerate(points_of(result, text)):
                if number:  # the first is the run as trained
                    by_factor.setdefault(factor, []).append({"loss": loss, f"kl {text}": kl})
    points = []
    for factor, numbers in by_factor.items():
        values = {"rate": rate, "factor": factor, **_means(numbers)}
        if contestant.parameters is not None:
            values["parameters"] = float(contestant.parameters)
        scaled = "as trained" if factor == 1 else f"{factor:g} of its update"
        note = f"{contestant.label}, learning rate {rate:g}, {scaled}{seeds}"
        points.append(Point(values, note, marked=stands_out and factor == 1))
    return points


def _means(numbers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for number in numbers for name in number)
    return {name: statistics.fmean(number[name] for number in numbers if name in number) for name in names}


def _as_trained(result: Mapping[str, Any]) -> dict[str, float]:
    """What was measured of a run, by the keys of the plot."""
    training, kept = result.get("training") or {}, kept_numbers(result)
    numbers = {
        "loss": result["test"]["loss"],
        "accuracy": None if result["test"]["accuracy"] is None else 100 * result["test"]["accuracy"],
        "kept": kept.get(MEAN, next(iter(kept.values()), None)),
        "step": training.get("step_seconds"),
        "peak": None if training.get("peak_bytes") is None else training["peak_bytes"] / 2**30,
        "norm": (result.get("change") or {}).get("norm"),
        **{f"kl {text}": measured["kl"] for text, measured in (result.get("retention") or {}).items()},
    }
    return {name: float(number) for name, number in numbers.items() if number is not None}
