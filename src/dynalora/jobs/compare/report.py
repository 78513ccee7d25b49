"""What a comparison came to: tables with intervals and paired differences, plots, and one page."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynalora.common.files import csv_text, write_file
from dynalora.common.statistics import (
    Difference,
    Interval,
    crossed_difference,
    holm,
    mean_interval,
)
from dynalora.drawing import runs as plots
from dynalora.drawing.stages import plot_bars
from dynalora.drawing.style import figure, panels, rendered, style
from dynalora.jobs.compare.run import Comparison, Contestant
from dynalora.lab.lab import listing, mean_accuracy, mean_loss
from dynalora.lab.report import Cell as TableCell
from dynalora.lab.report import (
    Figure,
    Report,
    Section,
    Table,
    latex_table,
    markdown_table,
    rich_table,
    write_report,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawn
    from rich.console import Console

Result = Mapping[str, Any]
MEAN = "mean"


# --- numbers --------------------------------------------------------------------------------------------------------


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

    def training(self, name: str) -> list[float]:
        """A number of the trainings, by seed; without those that do not have it."""
        values = [result["training"][name] for result in self.results.values() if result.get("training")]
        return [float(value) for value in values if value is not None]


def summaries(comparison: Comparison) -> dict[str, list[Summary]]:
    """By task: the base model, the reference, the others; what has no result yet is left out."""
    grid, found = comparison.grid, {}
    for task, place in grid.places.items():
        own: list[Summary] = []
        if (base := grid.result(grid.base(task))) is not None:
            own.append(_summary("base", place, None, False, {0: base}))
        for contestant in grid.contestants:
            rate = grid.chosen_rate(task, contestant)
            if rate is None:
                continue
            cells = [grid.cell(task, contestant, rate, seed) for seed in grid.spec.run_seeds]
            results = {cell.seed: result for cell in cells if (result := grid.result(cell)) is not None}
            if results:
                rates = contestant.learning_rates
                edge = len(rates) > 1 and rate in (rates[0], rates[-1])
                own.append(_summary(contestant.label, place, rate, edge, results))
        found[place] = _against(comparison, task, own)
    return found


def _summary(
    label: str, place: str, rate: float | None, edge: bool, results: Mapping[int, Result]
) -> Summary:
    scores = [result["test"] for result in results.values()]
    accuracy, loss = mean_accuracy(scores), mean_loss(scores)
    metrics = {
        name: mean_interval([score["metrics"][name] for score in scores])
        for name in scores[0].get("metrics", {})
    }
    kept = [result.get("retention") or {} for result in results.values()]
    kl = {name: mean_interval([own[name]["kl"] for own in kept]) for name in kept[0]}
    numbers = [kept_numbers(result) for result in results.values()]
    still = {name: mean_interval([own[name] for own in numbers]) for name in numbers[0]}
    return Summary(label, place, rate, edge, results, accuracy, loss, metrics, kl, still)


def kept_numbers(result: Result) -> dict[str, float]:
    """A run's main numbers on the retention tasks, and `mean`, where there are several and all are shares."""
    tasks = result.get("kept") or {}
    found = {name: float(own["value"]) for name, own in tasks.items()}
    if len(tasks) > 1 and all(own["share"] for own in tasks.values()):
        found[MEAN] = statistics.fmean(found.values())
    return found


def _against(comparison: Comparison, task: str, own: list[Summary]) -> list[Summary]:
    """The same with differences from the reference, p-values adjusted for their number."""
    grid = comparison.grid
    reference = next((one for one in own if one.label == grid.spec.reference), None)
    if reference is None:
        return own
    compared = []
    for one in own:
        if one is reference or one.label == "base":
            compared.append(one)
            continue
        contestant = next(own for own in grid.contestants if own.label == one.label)
        compared.append(
            replace(
                one,
                accuracy_apart=_apart(reference, one, _right),
                loss_apart=_apart(reference, one, _nats),
                at_reference_loss={
                    text: _at_loss(curve(comparison, task, contestant, text), _value(reference.loss))
                    for text in one.kl
                },
            )
        )
    for name in ("accuracy_apart", "loss_apart"):
        known = [index for index, one in enumerate(compared) if getattr(one, name) is not None]
        adjusted = holm([getattr(compared[index], name).p for index in known])
        for index, p in zip(known, adjusted, strict=True):
            compared[index] = replace(compared[index], **{name: replace(getattr(compared[index], name), p=p)})
    return compared


def _value(interval: Interval | None) -> float:
    return math.nan if interval is None else interval.value


def _right(score: Mapping[str, Any]) -> list[float]:
    return [float(own) for own in score["correct"]]


def _nats(score: Mapping[str, Any]) -> list[float]:
    """Per item a value whose mean over the items is the loss per token."""
    mean = sum(score["counts"]) / max(1, len(score["counts"]))
    return [own / mean for own in score["losses"]]


def _apart(
    reference: Summary, one: Summary, values: Callable[[Mapping[str, Any]], list[float]]
) -> Difference | None:
    """`one` minus the reference over the seeds and items that both have."""
    seeds = [seed for seed in one.results if seed in reference.results]
    first = [values(reference.results[seed]["test"]) for seed in seeds]
    second = [values(one.results[seed]["test"]) for seed in seeds]
    if not seeds or len(first[0]) < 2 or len(first[0]) != len(second[0]):
        return None
    return crossed_difference(first, second)


def curve(
    comparison: Comparison, task: str, contestant: Contestant, text: str
) -> list[tuple[float, float, float]]:
    """(learning rate, KL on the text, loss) with growing rates: means over the seeds that ran at each."""
    grid, points = comparison.grid, []
    for rate in contestant.learning_rates:
        results = [grid.result(grid.cell(task, contestant, rate, seed)) for seed in grid.spec.run_seeds]
        there = [
            result for result in results if result is not None and text in (result.get("retention") or {})
        ]
        if there:
            kl = statistics.fmean(result["retention"][text]["kl"] for result in there)
            points.append((rate, kl, statistics.fmean(result["test"]["loss"] for result in there)))
    return points


def _at_loss(points: Sequence[tuple[float, float, float]], loss: float) -> float | None:
    """KL at which a curve first reaches a loss, linear in log KL between its points; None if it never does."""
    for (_, first, high), (_, second, low) in itertools.pairwise(points):
        if high >= loss >= low and high > low and first > 0 and second > 0:
            part = (high - loss) / (high - low)
            return math.exp((1 - part) * math.log(first) + part * math.log(second))
    return None


# --- tables ---------------------------------------------------------------------------------------------------------


def plan_table(contestants: Sequence[Contestant]) -> Table:
    """What is going to be compared."""
    rows: list[list[TableCell]] = []
    quantised = any(own.quantization is not None for own in contestants)
    for own in contestants:
        rank = _ranks(own)
        rates = ", ".join(f"{rate:g}" for rate in own.learning_rates)
        held: list[TableCell] = [own.quantization] if quantised else []
        rows.append([own.label, own.method, *held, rank, own.parameters, f"{100 * own.off:+.1f} %", rates])
    more = ["base weights"] if quantised else []
    return Table(
        ["label", "method", *more, "rank", "trained parameters", "off", "learning rates"], rows, title="Compared",
        note="off: trained parameters relative to the reference's, which is the first.",
    )  # fmt: skip


def _ranks(own: Contestant) -> str | None:
    """A method's ranks: one, or the range of a mix; None if it has none."""
    if own.config("CAUSAL_LM") is None:
        return None
    ranks = sorted({own.r, *(own.options.get("rank_pattern") or {}).values()})
    return f"{ranks[0]} to {ranks[-1]}" if ranks[1:] else str(own.r)


def _shown(interval: Interval | None, shape: str, scale: float = 1.0) -> str | None:
    if interval is None:
        return None
    half = scale * (interval.high - interval.low) / 2
    told = shape.format(scale * interval.value)
    return told if half == 0 else f"{told} ± {shape.replace('+', '').format(half)}"


def _shown_apart(apart: Difference | None, shape: str, scale: float = 1.0) -> str | None:
    told = _shown(apart, shape, scale)
    return None if told is None or apart is None else f"{told}{'*' if apart.p < 0.05 else ''}"


def result_table(comparison: Comparison, place: str, found: Sequence[Summary]) -> Table:
    """One task's results."""
    spec = comparison.grid.spec
    texts = list(dict.fromkeys(text for one in found for text in one.kl))
    metrics = list(dict.fromkeys(name for one in found for name in one.metrics))
    accuracies = any(one.accuracy is not None for one in found)
    columns = ["method", "lr", "seeds"]
    columns += ["accuracy, %", f"− {spec.reference}"] if accuracies else []
    columns += [*metrics, "loss", f"− {spec.reference}, loss"]
    columns += [f"KL, {text}" for text in texts]
    columns += [f"KL, {texts[0]}, at {spec.reference}'s loss"] if texts else []
    rows: list[list[TableCell]] = []
    for one in found:
        rate = None if one.learning_rate is None else f"{one.learning_rate:g}{' (edge)' if one.edge else ''}"
        row: list[TableCell] = [one.label, rate, len(one.results) if one.learning_rate is not None else None]
        if accuracies:
            row += [_shown(one.accuracy, "{:.1f}", 100), _shown_apart(one.accuracy_apart, "{:+.1f}", 100)]
        row += [_shown(one.metrics.get(name), "{:.3f}") for name in metrics]
        row += [_shown(one.loss, "{:.4f}"), _shown_apart(one.loss_apart, "{:+.4f}")]
        row += [None if one.learning_rate is None else _shown(one.kl.get(text), "{:.4f}") for text in texts]
        if texts:
            at = one.at_reference_loss.get(texts[0])
            row.append(None if at is None else f"{at:.4f}")
        rows.append(row)
    seeds = spec.seeds
    over = "over the seeds (Student's t)" if seeds > 1 else "over the questions, as there is a single seed"
    note = (
        f"± is half of a 95 % interval {over}. Losses of the right answers on held-out questions, nats per token (per "
        f"text for classification, per question for marking). "
        f"− {spec.reference}: paired by seed and question, both taken as drawn at random; "
        "* p < 0.05 after Holm's adjustment for the number of methods."
    )
    if texts:
        note += (
            " KL(base ‖ tuned) in nats per token: what was forgotten. The last column compares at equal adaptation: KL "
            f"where the method's curve over learning rates reaches {spec.reference}'s loss; a dash where it does not."
        )
    if any(result["test"].get("unweighted") for one in found for result in one.results.values()):
        note += (
            " Several tasks are measured: accuracy is the unweighted mean of theirs, which have a column each; losses "
            "and differences weigh a task by its questions."
        )
    cut = max(
        (result["test"].get("too_long", 0) for one in found for result in one.results.values()), default=0
    )
    if cut:
        note += f" {cut:,} held-out questions are longer than the model's window and are left out."
    if any(one.edge for one in found):
        note += (
            " (edge): the chosen learning rate is the grid's smallest or largest; a wider grid may do better."
        )
    return Table(columns, rows, title=place, note=note)


def kept_table(comparison: Comparison, place: str, found: Sequence[Summary]) -> Table | None:
    """The retention tasks after training on one task; None where none were measured."""
    measured = next((one for one in found if one.kept), None)
    if measured is None:
        return None
    tasks = next(iter(measured.results.values()))["kept"]
    scales = {name: 100.0 if name == MEAN or tasks[name]["share"] else 1.0 for name in measured.kept}
    base = next((one.kept for one in found if one.label == "base"), {})
    columns = ["method", "lr"]
    for name, scale in scales.items():
        told = MEAN if name == MEAN else f"{tasks[name]['title']}, {tasks[name]['metric']}"
        columns += [told + (", %" if scale == 100 else ""), "− base"]
    rows: list[list[TableCell]] = []
    for one in found:
        row: list[TableCell] = [one.label, None if one.learning_rate is None else f"{one.learning_rate:g}"]
        for name, scale in scales.items():
            own = one.kept.get(name)
            apart = (
                None
                if own is None or name not in base or one.label == "base"
                else own.value - base[name].value
            )
            row.append(_shown(own, "{:.2f}", scale))
            row.append(None if apart is None else f"{scale * apart:+.2f}")
        rows.append(row)
    items = ", ".join(f"{own['title']} {own['items']:,}" for own in tasks.values())
    note = f"Benchmarks that nothing was trained for; items: {items}. ± is half of a 95 % interval over the seeds."
    return Table(columns, rows, title=f"{place}: what was kept", note=note)


def cost_table(comparison: Comparison, found: Mapping[str, Sequence[Summary]]) -> Table:
    """Parameters, time and memory of every method, over all tasks."""
    grid = comparison.grid
    times = {own.label: _numbers(found, own.label, "step_seconds") for own in grid.contestants}
    reference = statistics.median(times[grid.spec.reference]) if times.get(grid.spec.reference) else None
    rows: list[list[TableCell]] = []
    for own in grid.contestants:
        peaks, steps = _numbers(found, own.label, "peak_bytes"), times[own.label]
        step = statistics.median(steps) if steps else None
        ratio = None if step is None or reference is None else f"{step / reference:.2f}"
        rows.append(
            [
                own.label, _ranks(own), own.parameters, f"{100 * own.off:+.1f} %",
                None if step is None else f"{step:.3f}", ratio,
                f"{max(peaks) / 2**30:.2f}" if peaks else None,
            ]
        )  # fmt: skip
    return Table(
        [
            "method", "rank", "trained parameters", "off", "step, s", f"/ {grid.spec.reference}",
            "peak of training, GiB",
        ],
        rows, title="Cost",
        note="Step: median over steps, then over cells. Cells run in processes of their own, so the ratio carries "
        "whatever else the machine did meanwhile; dynalora bench measures it in turns. Peak: GPU memory, or all of the "
        "process without a GPU.",
    )  # fmt: skip


def _numbers(found: Mapping[str, Sequence[Summary]], label: str, name: str) -> list[float]:
    return [
        value for own in found.values() for one in own if one.label == label for value in one.training(name)
    ]


# --- plots ----------------------------------------------------------------------------------------------------------


def plot_frontier(comparison: Comparison, task: str, text: str) -> Drawn | None:
    """Loss on the task against distance from the base model, a line over learning rates per method.

    Below and to the left is better: more learned, less forgotten. Where the base model has been measured, the axes show
    the runs that learned at least three quarters of what the best did; others would stretch them over decades.
    """
    grid = comparison.grid
    curves = {own.label: curve(comparison, task, own, text) for own in grid.contestants}
    points = [(kl, loss) for line in curves.values() for _, kl, loss in line]
    if not points:
        return None
    made, (axis,) = figure(6.6, 4.6)
    base = grid.result(grid.base(task))
    shown, against = points, ""
    if base is not None:
        best = min(loss for _, loss in points)
        worst = best + (base["test"]["loss"] - best) / 4
        shown = [point for point in points if point[1] <= worst]
        against = f"; base model: {base['test']['loss']:.3f}"
    for index, (label, line) in enumerate(curves.items()):
        if not line:
            continue
        looks = style(index) | {"markersize": 5}
        axis.plot([kl for _, kl, _ in line], [loss for *_, loss in line], label=label, **looks)
        seen = [point for point in line if point[1:] in shown]
        for rate, kl, loss in seen[:1] + seen[1:][-1:]:
            axis.annotate(f"{rate:g}", (kl, loss), xytext=(3, 3), textcoords="offset points", fontsize=6)
    axis.set_xscale("log")
    if len(shown) > 1 and len(shown) < len(points):
        kls, losses = zip(*shown, strict=True)
        room = 0.08 * (max(losses) - min(losses))
        axis.set_xlim(min(kls) / 1.3, max(kls) * 1.3)
        axis.set_ylim(min(losses) - room, max(losses) + room)
    axis.set_xlabel(f"KL(base ‖ tuned) on {text}, nats per token (log scale)")
    axis.set_ylabel(f"loss of the right answers{against}")
    axis.set_title(f"{grid.places[task]}: learned against forgotten, by learning rate", fontsize=10)
    axis.legend(fontsize=7, frameon=False)
    return made


def plot_kept(comparison: Comparison, task: str) -> Drawn | None:
    """Accuracy against the retention tasks (their mean, or the first), a line over learning rates per method."""
    grid = comparison.grid
    results = [(cell, result) for cell in grid.known() if cell.task == task and (result := grid.result(cell))]
    first = next((result["kept"] for _, result in results if result.get("kept")), None)
    if first is None or any(result["test"]["accuracy"] is None for _, result in results):
        return None
    name = MEAN if MEAN in kept_numbers({"kept": first}) else next(iter(first))
    scale = 100 if name == MEAN or first[name]["share"] else 1
    told = (
        "retention tasks, unweighted mean"
        if name == MEAN
        else f"{first[name]['title']}, {first[name]['metric']}"
    )
    made, (axis,) = figure(6.6, 4.6)
    for index, own in enumerate(grid.contestants):
        line = []
        for rate in own.learning_rates:
            there = [one for cell, one in results if cell.label == own.label and cell.learning_rate == rate]
            if there:
                kept = statistics.fmean(kept_numbers(one)[name] for one in there)
                right = statistics.fmean(one["test"]["accuracy"] for one in there)
                line.append((rate, scale * kept, 100 * right))
        if line:
            looks = style(index) | {"markersize": 5}
            axis.plot([kept for _, kept, _ in line], [right for *_, right in line], label=own.label, **looks)
            for rate, kept, right in line[:1] + line[1:][-1:]:
                axis.annotate(
                    f"{rate:g}", (kept, right), xytext=(3, 3), textcoords="offset points", fontsize=6
                )
    base = grid.result(grid.base(task))
    if base is not None:
        axis.axvline(
            scale * kept_numbers(base)[name], color="0.5", linewidth=1, linestyle=":", label="base model"
        )
    axis.set_xlabel(told + (", %" if scale == 100 else ""))
    axis.set_ylabel("accuracy, %")
    axis.set_title(f"{grid.places[task]}: learned against kept, by learning rate", fontsize=10)
    axis.legend(fontsize=7, frameon=False)
    return made


def plot_parameters(comparison: Comparison, place: str, found: Sequence[Summary]) -> Drawn | None:
    """Accuracy (or loss) against the number of trained parameters."""
    counts = {own.label: own.parameters for own in comparison.grid.contestants}
    shares = all(one.accuracy is not None for one in found)
    made, (axis,) = figure(6.0, 4.0)
    index = 0
    for one in found:
        number = one.accuracy if shares else one.loss
        count = counts.get(one.label)
        if number is None or not count:
            continue
        scale = 100 if shares else 1
        error = [[scale * (number.value - number.low)], [scale * (number.high - number.value)]]
        looks = style(index) | {"linestyle": "none", "markersize": 6}
        axis.errorbar([count], [scale * number.value], yerr=error, capsize=3, label=one.label, **looks)
        index += 1
    if not index:
        return None
    axis.set_xscale("log")
    axis.set_xlabel("trained parameters (log scale)")
    axis.set_ylabel("accuracy, %" if shares else "loss of the right answers")
    axis.set_title(f"{place}: quality against size", fontsize=10)
    axis.legend(fontsize=7, frameon=False)
    return made


def plot_learning(comparison: Comparison, place: str, found: Sequence[Summary]) -> Drawn | None:
    """Training loss by step, running means over the seeds."""
    made, (axis,) = figure(6.6, 4.0)
    index = 0
    for one in found:
        runs = [result["training"]["losses"] for result in one.results.values() if result.get("training")]
        length = min((len(run) for run in runs), default=0)
        if not length:
            continue
        steps = [step for step, _ in runs[0][:length]]
        means = [statistics.fmean(run[place][1] for run in runs) for place in range(length)]
        axis.plot(steps, plots.running_mean(means), label=one.label, **style(index, marker=False))
        index += 1
    if not index:
        return None
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("training loss (running mean)")
    axis.set_title(f"{place}: learning curves at the chosen learning rates", fontsize=10)
    axis.legend(fontsize=7, frameon=False)
    return made


def plot_cost(comparison: Comparison, found: Mapping[str, Sequence[Summary]]) -> Drawn | None:
    """Time of a step and peak of memory, a bar per method."""
    bars: dict[str, dict[str, Interval | None]] = {"step, s": {}, "peak of training, GiB": {}}
    for own in comparison.grid.contestants:
        for title, name, scale in (
            ("step, s", "step_seconds", 1.0), ("peak of training, GiB", "peak_bytes", 2.0**-30)
        ):  # fmt: skip
            values = [scale * value for value in _numbers(found, own.label, name)]
            if values:
                middle = statistics.median(values)
                bars[title][own.label] = Interval(middle, min(values), max(values))
    if not all(bars.values()):
        return None
    return plot_bars(
        bars, label="", title="Cost: median over cells, with the smallest and the largest", decimals=2
    )


def plot_ranks(found: Sequence[Summary], place: str) -> Drawn | None:
    """Effective ranks by layer and kind of module, a panel per method, of the first seed."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    maps: dict[str, tuple[list[str], Any]] = {}
    for one in found:
        rows = next(iter(one.results.values())).get("landscape")
        if rows:
            maps[one.label] = plots.rank_grid(rows)
    if not maps:
        return None
    most = max(float(np.nanmax(grid)) for _, grid in maps.values())
    made, axes = panels(len(maps), width=3.4, height=2.2, columns=3)
    image = None
    for axis, (label, (kinds, grid)) in zip(axes, maps.items(), strict=True):
        image = axis.imshow(grid, aspect="auto", cmap="cividis", vmin=0, vmax=max(most, 1))
        axis.grid(False)
        axis.set_yticks(range(len(kinds)), kinds, fontsize=6)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("layer", fontsize=7)
        axis.set_title(label, fontsize=9)
    if image is not None:
        made.colorbar(image, ax=axes, label="effective rank", fraction=0.04)
    made.suptitle(f"{place}: effective ranks", fontsize=10)
    return made


# --- files ----------------------------------------------------------------------------------------------------------


def cells_csv(comparison: Comparison) -> str:
    """Every cell with a result, a row each."""
    grid = comparison.grid
    texts = list(
        dict.fromkeys(
            text for cell in grid.known() for text in ((grid.result(cell) or {}).get("retention") or {})
        )
    )
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    about = ("place", "label", "method", "r", "learning_rate", "seed")
    measured = ("accuracy", "loss", "loss_error", "questions")
    trained = ("trainable_parameters", "steps", "step_seconds", "peak_bytes", "seconds")
    still = list(
        dict.fromkeys(name for cell in grid.known() for name in kept_numbers(grid.result(cell) or {}))
    )
    writer.writerow(
        [
            *about, *measured, "validation_loss", *(f"kl {text}" for text in texts),
            *(f"kept {name}" for name in still), *trained, "chosen",
        ]
    )  # fmt: skip
    for task in grid.places:
        chosen = {own.label: grid.chosen_rate(task, own) for own in grid.contestants}
        for cell in grid.known():
            result = grid.result(cell)
            if cell.task != task or result is None:
                continue
            kept, training = result.get("retention") or {}, result.get("training") or {}
            writer.writerow(
                [
                    *(getattr(cell, name) for name in about), *(result["test"][name] for name in measured),
                    (result.get("validation") or {}).get("loss"), *(kept.get(text, {}).get("kl") for text in texts),
                    *(kept_numbers(result).get(name) for name in still),
                    *(training.get(name) for name in trained),
                    int(chosen.get(cell.label) == cell.learning_rate),
                ]
            )  # fmt: skip
    return buffer.getvalue()


def _table_csv(tables: Sequence[Table]) -> str:
    """Tables below each other, each with its own header."""
    return "".join(
        csv_text(["table", *table.columns], ([table.title, *row] for row in table.text)) for table in tables
    )


def _as_record(one: Summary) -> dict[str, Any]:
    return {
        **{name: value for name, value in asdict(one).items() if name != "results"},
        "seeds": list(one.results),
    }


def write_results(comparison: Comparison) -> Path:
    """Tables, plots and the report, from the cells that are there; returns the report."""
    grid = comparison.grid
    folder = grid.store.folder
    found = summaries(comparison)
    by_place = {place: _tables(comparison, place, own) for place, own in found.items()}
    tables = [table for own in by_place.values() for table in own]
    cost = cost_table(comparison, found)
    write_file(folder / "cells.csv", cells_csv(comparison))
    write_file(folder / "results.csv", _table_csv([*tables, cost]))
    records = {place: [_as_record(one) for one in own] for place, own in found.items()}
    write_file(folder / "results.json", json.dumps(records, indent=1) + "\n")
    write_file(folder / "results.md", "\n".join(map(markdown_table, [*tables, cost])))
    write_file(folder / "results.tex", "\n".join(map(latex_table, [*tables, cost])))
    sections = [Section("Compared", tables=[plan_table(grid.contestants)])]
    for task, place in grid.places.items():
        own = found[place]
        drawn: dict[str, tuple[Drawn | None, str]] = {}
        for number, text in enumerate(dict.fromkeys(text for one in own for text in one.kl)):
            drawn[f"frontier-{place}" + (f"-{number + 1}" if number else "")] = (
                plot_frontier(comparison, task, text),
                f"Loss against KL from the base model on {text}; below and to the left is better. Numbers are learning "
                "rates.",
            )
        drawn[f"kept-{place}"] = (
            plot_kept(comparison, task),
            "Accuracy against benchmarks that nothing was trained for. Numbers are learning rates.",
        )
        drawn[f"parameters-{place}"] = (
            plot_parameters(comparison, place, own),
            "At the chosen learning rates, with 95 % intervals.",
        )
        drawn[f"learning-{place}"] = plot_learning(comparison, place, own), "Mean over the seeds."
        drawn[f"ranks-{place}"] = plot_ranks(own, place), "Singular values of s·ΔW above 0.001, first seed."
        sections.append(
            Section(
                place, text=comparison.tasks[task].about, tables=by_place[place], figures=_kept(folder, drawn)
            )
        )
    bars = _kept(
        folder, {"cost": (plot_cost(comparison, found), "Whiskers: smallest and largest of the cells.")}
    )
    sections.append(Section("Cost", tables=[cost], figures=bars))
    if comparison.failed:
        failed = Table(
            ["cell", "last line"], [[cell.title, line] for cell, line in comparison.failed], title="Failed"
        )
        sections.insert(1, Section("Failed cells", tables=[failed]))
    sections.append(Section("Settings", listing=listing(grid.spec.settings())))
    methods = ", ".join(own.label for own in grid.contestants)
    title = f"{methods} on {', '.join(grid.places.values())}"
    return write_report(Report(title, _told(comparison, found), sections), folder / "report.html")


def _tables(comparison: Comparison, place: str, own: Sequence[Summary]) -> list[Table]:
    """The tables of one task."""
    kept = kept_table(comparison, place, own)
    return [result_table(comparison, place, own), *([kept] if kept is not None else [])]


def _kept(folder: Path, drawn: Mapping[str, tuple[Drawn | None, str]]) -> list[Figure]:
    """Write figures as PNG and SVG."""
    figures = []
    for name, (made, caption) in drawn.items():
        if made is not None:
            picture = rendered(made)
            write_file(folder / "plots" / f"{name}.png", picture)
            write_file(folder / "plots" / f"{name}.svg", rendered(made, "svg"))
            figures.append(Figure(picture, caption))
    return figures


def _told(comparison: Comparison, found: Mapping[str, Sequence[Summary]]) -> str:
    """The result in a few sentences."""
    grid = comparison.grid
    done, total = grid.done(), grid.total
    said = [f"{done} of {total} cells are done."] if done < total else []
    for place, own in found.items():
        trained = [one for one in own if one.learning_rate is not None and one.loss is not None]
        if not trained:
            continue
        best = min(trained, key=lambda one: _value(one.loss))
        better = [
            one.label
            for one in trained
            if one.loss_apart and one.loss_apart.p < 0.05 and one.loss_apart.value < 0
        ]
        worse = [
            one.label
            for one in trained
            if one.loss_apart and one.loss_apart.p < 0.05 and one.loss_apart.value > 0
        ]
        reference = grid.spec.reference
        said.append(
            f"{place}: the lowest loss has {best.label} ({_value(best.loss):.4f}); beyond chance better than "
            f"{reference}: {', '.join(better) or 'none'}; worse: {', '.join(worse) or 'none'}."
        )
    return " ".join(said) or "No cell is done yet."


def show_tables(comparison: Comparison, console: Console) -> None:
    """The closing tables."""
    found = summaries(comparison)
    for place, own in found.items():
        for table in _tables(comparison, place, own):
            console.print(rich_table(table))
    console.print(rich_table(cost_table(comparison, found)))
