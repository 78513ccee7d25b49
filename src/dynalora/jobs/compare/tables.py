"""The tables of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from dynalora.common.statistics import Difference, Interval
from dynalora.jobs.compare.contestants import Contestant
from dynalora.jobs.compare.grid import Comparison
from dynalora.jobs.compare.summaries import MEAN, Summary, training_numbers
from dynalora.lab.report import Cell as TableCell
from dynalora.lab.report import Table


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
    times = {own.label: training_numbers(found, own.label, "step_seconds") for own in grid.contestants}
    reference = statistics.median(times[grid.spec.reference]) if times.get(grid.spec.reference) else None
    rows: list[list[TableCell]] = []
    for own in grid.contestants:
        peaks, steps = training_numbers(found, own.label, "peak_bytes"), times[own.label]
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
