"""The tables of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dynalora.common.statistics import Difference, Interval
from dynalora.forgetting.trim import NEAR_BEST
from dynalora.jobs.compare.contestants import Contestant
from dynalora.jobs.compare.frontiers import Scaled
from dynalora.jobs.compare.grid import Comparison
from dynalora.jobs.compare.settings import CompareSpec
from dynalora.jobs.compare.summaries import MEAN, Summary, training_numbers
from dynalora.lab.distance import in_words
from dynalora.lab.report import Cell as TableCell
from dynalora.lab.report import Table
from dynalora.lab.scores import decimals_for, shown_interval

_A_KL = 0.1
"""The KL whose meaning is told."""


def plan_table(contestants: Sequence[Contestant]) -> Table:
    """What is going to be compared."""
    quantised = any(contestant.quantization is not None for contestant in contestants)
    rows: list[list[TableCell]] = []
    for contestant in contestants:
        rates = ", ".join(f"{rate:g}" for rate in contestant.learning_rates)
        weights: list[TableCell] = [contestant.quantization] if quantised else []
        size = [_ranks(contestant), contestant.parameters, f"{100 * contestant.off:+.1f} %"]
        rows.append([contestant.label, contestant.method, *weights, *size, rates])
    columns = ["label", "method", "rank", "trained parameters", "off", "learning rates"]
    if quantised:
        columns.insert(2, "base weights")
    note = "off: trained parameters relative to the reference's, which is the first."
    return Table(columns, rows, title="Compared", note=note)


def _ranks(contestant: Contestant) -> str | None:
    """A method's ranks: one, or the range of a mix; None if it has none."""
    if contestant.config("CAUSAL_LM") is None:
        return None
    ranks = sorted({contestant.r, *(contestant.options.get("rank_pattern") or {}).values()})
    return f"{ranks[0]} to {ranks[-1]}" if ranks[1:] else str(contestant.r)


def _difference(difference: Difference | None, decimals: int, *, scale: float = 1.0) -> str | None:
    text = shown_interval(difference, decimals, scale=scale, sign="+", half=True)
    return f"{text}*" if difference is not None and difference.p < 0.05 else text


def result_table(comparison: Comparison, place: str, summaries: Sequence[Summary]) -> Table:
    """One task's results."""
    spec = comparison.grid.spec
    texts = list(dict.fromkeys(text for summary in summaries for text in summary.kl))
    metrics = list(dict.fromkeys(name for summary in summaries for name in summary.metrics))
    accuracies = any(summary.accuracy is not None for summary in summaries)
    changes = {
        "KL, task's prompts": {summary.label: summary.prompts_kl for summary in summaries},
        "‖ΔW‖_F": {summary.label: summary.norm for summary in summaries},
    }
    changes = {name: values for name, values in changes.items() if any(values.values())}
    least = {"‖ΔW‖_F": 1}
    of_changes = {name: decimals_for(values.values(), least.get(name, 3)) for name, values in changes.items()}
    of_loss = decimals_for(summary.loss for summary in summaries)
    of_difference = decimals_for(summary.loss_apart for summary in summaries)
    of_kl = {text: decimals_for(summary.kl.get(text) for summary in summaries) for text in texts}
    at_losses = texts and any(summary.at_reference_loss.get(texts[0]) is not None for summary in summaries)
    rows: list[dict[str, TableCell]] = []
    for summary in summaries:
        # First what one comes for, which a narrow screen shows without scrolling.
        row: dict[str, TableCell] = {"method": summary.label, "loss": shown_interval(summary.loss, of_loss, half=True)}
        kl = {} if summary.learning_rate is None else summary.kl
        of_texts = {f"KL, {text}": shown_interval(kl.get(text), of_kl[text], half=True) for text in texts}
        row |= dict(list(of_texts.items())[:1])
        row[f"loss, − {spec.reference}"] = _difference(summary.loss_apart, of_difference)
        if at_losses:
            at_loss = summary.at_reference_loss.get(texts[0])
            row[f"KL, {texts[0]}, at {spec.reference}'s loss"] = None if at_loss is None else f"{at_loss:.4f}"
        if accuracies:
            row["accuracy, %"] = shown_interval(summary.accuracy, 1, scale=100, half=True)
            row[f"accuracy, − {spec.reference}"] = _difference(summary.accuracy_apart, 1, scale=100)
        row |= {name: shown_interval(summary.metrics.get(name), 3, half=True) for name in metrics}
        row |= of_texts
        for name, values in changes.items():
            row[name] = shown_interval(values[summary.label], of_changes[name], half=True)
        rows.append(row | _rate_and_seeds(summary))
    columns = list(rows[0]) if rows else ["method", "loss"]
    return Table(columns, [list(row.values()) for row in rows], title=place, note=_result_note(spec, summaries))


def rate_table(comparison: Comparison, place: str, summaries: Sequence[Summary]) -> Table:
    """One task's results at every learning rate, for comparisons that run every seed at all of them."""
    spec = comparison.grid.spec
    accuracies = any(summary.accuracy is not None for summary in summaries)
    of_loss = decimals_for(summary.loss for summary in summaries)
    of_difference = decimals_for(summary.loss_apart for summary in summaries)
    rows: list[list[TableCell]] = []
    for summary in summaries:
        rate = None if summary.learning_rate is None else f"{summary.learning_rate:g}"
        loss = shown_interval(summary.loss, of_loss, half=True)
        row: list[TableCell] = [rate, summary.label, loss, _difference(summary.loss_apart, of_difference)]
        if accuracies:
            row += [shown_interval(summary.accuracy, 1, scale=100, half=True)]
            row += [_difference(summary.accuracy_apart, 1, scale=100)]
        rows.append([*row, len(summary.results)])
    columns = ["learning rate", "method", "loss", f"loss, − {spec.reference}"]
    columns += ["accuracy, %", f"accuracy, − {spec.reference}"] if accuracies else []
    note = _result_note(spec, [replace(summary, kl={}, norm=None) for summary in summaries], of="differences")
    return Table([*columns, "seeds"], rows, title=f"{place}, at every learning rate", note=note)


def _rate_and_seeds(summary: Summary) -> dict[str, TableCell]:
    if summary.learning_rate is None:
        return {"learning rate": None, "seeds": None}
    edge = " (edge)" if summary.edge else ""
    return {"learning rate": f"{summary.learning_rate:g}{edge}", "seeds": len(summary.results)}


def _result_note(spec: CompareSpec, summaries: Sequence[Summary], of: str = "methods") -> str:
    """How to read a task's results, whose p-values are adjusted for the number of these."""
    scores = [result["test"] for summary in summaries for result in summary.results.values()]
    seeds, reference = spec.seeds > 1, spec.reference
    over = "over the seeds (Student's t)" if seeds else "over the questions, as there is a single seed"
    sentences = [
        f"± is half of a 95 % interval {over}. Losses of the right answers on held-out questions, nats per token (per "
        f"text for classification, per question for marking). − {reference}: paired by seed and question, both taken "
        f"as drawn at random; * p < 0.05 after Holm's adjustment for the number of {of}."
    ]
    if any(summary.kl for summary in summaries):
        sentences.append("KL(base ‖ tuned) in nats per token: what was forgotten.")
        if any(kl is not None for summary in summaries for kl in summary.at_reference_loss.values()):
            sentences.append(
                "The column at a loss compares at equal adaptation: KL where the method's curve over learning rates "
                f"reaches {reference}'s loss; a dash where it does not."
            )
        sentences.append(in_words(_A_KL))
    if any(summary.norm for summary in summaries):
        sentences.append("‖ΔW‖_F: over all matrices, with gates counted as open.")
    if any(score.get("unweighted") for score in scores):
        sentences.append(
            "Several tasks are measured: accuracy is the unweighted mean of theirs, which have a column each; losses "
            "and differences weigh a task by its questions."
        )
    if cut := max((score.get("too_long", 0) for score in scores), default=0):
        sentences.append(f"{cut:,} held-out questions are longer than the model's window and are left out.")
    if any(summary.edge for summary in summaries):
        sentences.append(
            "(edge): the chosen learning rate is the grid's smallest or largest; a wider grid may do better."
        )
    return " ".join(sentences)


def scaled_tables(comparison: Comparison, place: str, summaries: Sequence[Summary]) -> list[Table]:
    """A table per text: runs along their curves over factors of the update; none where no curve was measured."""
    if not any(len(result.get("curve") or []) > 1 for each in summaries for result in each.results.values()):
        return []
    reference = comparison.grid.spec.reference
    columns = [
        "method", "loss", "KL", "factor", f"KL at {reference}'s loss", f"/ {reference}",
        f"/ {reference}, scaled", f"loss at {reference}'s KL, − {reference}",
        f"KL / {reference}, scaled, over all losses",
    ]  # fmt: skip
    note = (
        f"Every run at factors of its update. loss, KL, factor: at the smallest factor whose loss on the questions set "
        f"aside is within {NEAR_BEST:.0%} of the best. Then the curve's lower edge, read where it has the loss, and "
        f"the KL, of {reference} as trained; '/ {reference}, scaled' compares with {reference}'s own curve at that "
        "loss. The last column is the geometric mean of KL's ratio over all losses that both curves have (area "
        "between the curves). Ratios below 1 and differences below 0 are better; ± and brackets: 95 % intervals, "
        "paired over the seeds; a dash where a seed's curve does not get there."
    )
    tables: list[Table] = []
    for text in dict.fromkeys(text for summary in summaries for text in summary.scaled):
        curves = {summary.label: summary.scaled[text] for summary in summaries if text in summary.scaled}
        decimals = {name: decimals_for(getattr(curve, name) for curve in curves.values()) for name in _WITH_INTERVALS}
        rows = [[label, *_scaled_cells(curve, decimals)] for label, curve in curves.items()]
        read = "Read as the table above it." if tables else note
        tables.append(Table(columns, rows, title=f"{place}: scaled after training, {text}", note=read))
    return tables


_WITH_INTERVALS = ("loss", "kl", "at_loss", "at_kl")
"""What is told of a curve with ±."""


def _scaled_cells(scaled: Scaled, decimals: Mapping[str, int]) -> list[TableCell]:
    """The cells of one method on one text."""

    def ratio(interval: Interval | None) -> str | None:
        if interval is None or interval.low == interval.high:
            return None if interval is None else f"{interval.value:.3f}"
        return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"

    return [
        shown_interval(scaled.loss, decimals["loss"], half=True),
        shown_interval(scaled.kl, decimals["kl"], half=True),
        None if scaled.factor is None else f"{scaled.factor:.2f}",
        shown_interval(scaled.at_loss, decimals["at_loss"], half=True),
        ratio(scaled.at_loss_ratio),
        ratio(scaled.own_ratio),
        shown_interval(scaled.at_kl, decimals["at_kl"], sign="+", half=True),
        ratio(scaled.area),
    ]


def kept_table(comparison: Comparison, place: str, summaries: Sequence[Summary]) -> Table | None:
    """The retention tasks after training on one task; None where none were measured."""
    measured = next((summary for summary in summaries if summary.kept), None)
    if measured is None:
        return None
    tasks = next(iter(measured.results.values()))["kept"]
    shares = all(task["share"] for task in tasks.values() if not task.get("further"))
    scales = {name: 100.0 if (shares if name == MEAN else tasks[name]["share"]) else 1.0 for name in measured.kept}
    base = next((summary.kept for summary in summaries if summary.label == "base"), {})
    columns = ["method", "lr"]
    for name, scale in scales.items():
        heading = MEAN if name == MEAN else f"{tasks[name]['title']}, {tasks[name]['metric']}"
        columns += [heading + (", %" if scale == 100 else ""), "− base"]
    rows: list[list[TableCell]] = []
    for summary in summaries:
        row: list[TableCell] = [summary.label, None if summary.learning_rate is None else f"{summary.learning_rate:g}"]
        for name, scale in scales.items():
            kept = summary.kept.get(name)
            apart = (
                None if kept is None or name not in base or summary.label == "base" else kept.value - base[name].value
            )
            row.append(shown_interval(kept, 2, scale=scale, half=True))
            row.append(None if apart is None else f"{scale * apart:+.2f}")
        rows.append(row)
    items = ", ".join(f"{task['title']} {task['items']:,}" for task in tasks.values())
    further = [task["title"] for task in tasks.values() if task.get("further")]
    note = "Benchmarks that nothing was trained for" + (f", and besides {', '.join(further)}" if further else "")
    note += f"; items: {items}. ± is half of a 95 % interval over the seeds."
    return Table(columns, rows, title=f"{place}: what was kept", note=note)


def cost_table(comparison: Comparison, by_place: Mapping[str, Sequence[Summary]]) -> Table:
    """Parameters, time and memory of every method, over all tasks."""
    grid = comparison.grid
    times = {
        contestant.label: training_numbers(by_place, contestant.label, "step_seconds")
        for contestant in grid.contestants
    }
    reference = statistics.median(times[grid.spec.reference]) if times.get(grid.spec.reference) else None
    rows: list[list[TableCell]] = []
    for contestant in grid.contestants:
        peaks, steps = training_numbers(by_place, contestant.label, "peak_bytes"), times[contestant.label]
        step = statistics.median(steps) if steps else None
        ratio = None if step is None or reference is None else f"{step / reference:.2f}"
        rows.append(
            [
                contestant.label, _ranks(contestant), contestant.parameters, f"{100 * contestant.off:+.1f} %",
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
