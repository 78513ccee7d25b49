"""What a fine-tuning run leaves in its folder: plots, tables and the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from dynalora.adapter.layer import adapter_layers
from dynalora.common.names import plain_name
from dynalora.drawing.gates import plot_gates
from dynalora.drawing.landscape import plot_rank_heatmap
from dynalora.drawing.retention import plot_retention_curves, plot_scaled_update
from dynalora.drawing.training import plot_losses, plot_metrics
from dynalora.errors import DynaloraError
from dynalora.evaluation.tokens import TokenizedSet
from dynalora.forgetting.effects import narrow_moments
from dynalora.forgetting.gate_recording import record_gates
from dynalora.forgetting.landscape import deciding_rank, rank_landscape
from dynalora.forgetting.monitor import OWN_TEXT, RetentionMonitor
from dynalora.forgetting.retention import Retention
from dynalora.forgetting.trim import TrimPoint, smallest_near_best
from dynalora.jobs.finetune.learning import learned_little
from dynalora.jobs.finetune.prepare import Prepared
from dynalora.lab.configs import method_name, title_of
from dynalora.lab.data.collator import batches_of
from dynalora.lab.distance import Continued, distance_table, in_words
from dynalora.lab.report import Cell, Report, Section, Table, listing, save_figures, say, write_report
from dynalora.lab.report import Figure as ReportFigure
from dynalora.lab.run_folder import RunFolder
from dynalora.lab.scaling import curve_table
from dynalora.lab.training.recorder import UNTIMED_STEPS
from dynalora.lab.training.train import TrainResult
from dynalora.methods import METHODS

_SHOWN = 300
"""Characters of a sample that are shown."""


def decisions(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, held_out: TokenizedSet
) -> tuple[str, Figure, str] | None:
    """File name, figure and caption of what the adapter decided; None if there is nothing to see.

    These are the gates of an adapter that has any, on held-out responses, and the rank landscape of any other: the rank
    of what the update does on held-out responses, or without any that of its energy.
    """
    try:
        batches = batches_of(held_out.rows[:128], tokenizer.pad_token_id) if len(held_out) else []
        if getattr(getattr(model, "active_peft_config", None), "gated", False):
            if not batches:
                return None
            gates = plot_gates({"held-out responses": record_gates(model, batches)})
            return "gates", gates, "How far the gates open on the tokens of held-out responses, by depth."
        rows = rank_landscape(model, effects=narrow_moments(model, batches) if batches else None)
    except DynaloraError:
        return None
    deciding = deciding_rank(rows)
    caption = "How many singular values hold 99 % of the energy of every adapted matrix's update."
    if deciding == "effect_rank":
        caption = "How many directions hold 99 % of what every adapted matrix's update does on held-out responses."
    return "rank_landscape", plot_rank_heatmap(rows, deciding), caption


def summary_table(result: TrainResult, measured: Retention | None) -> Table:
    """A run's result, and what it forgot if that was measured, as a table of one row."""
    before, after = (
        None if loss is None else f"{loss:.4f}" for loss in (result.held_out_before, result.held_out_after)
    )
    seconds = None if result.step_seconds is None else f"{result.step_seconds:.3f}"
    cells: dict[str, Cell] = {"method": result.label, "held-out loss before": before, "after": after}
    note = "Losses in nats per response token; step: median time of an optimizer step without the first "
    note += f"{UNTIMED_STEPS}."
    if measured is not None:
        cells["KL from base"] = f"{measured.kl:.4f} ± {measured.kl_error:.4f}"
        cells["loss shift"] = f"{measured.loss_shift:+.4f}"
        note += (
            " KL(base ‖ tuned), with its standard error, and loss shift in nats per token of text that the base "
            "model wrote."
        )
    cells |= {"trainable parameters": result.trainable_parameters, "step (s)": seconds}
    return Table(list(cells), [list(cells.values())], note=note)


def write_results(
    ready: Prepared,
    result: TrainResult,
    measured: Retention | None,
    run: RunFolder,
    console: Console | None,
    monitor: RetentionMonitor | None = None,
    curve: Sequence[TrimPoint] = (),
    samples: Sequence[Mapping[str, str | None]] = (),
    begun: Sequence[str] = (),
    distances: Sequence[Continued] = (),
) -> None:
    """Write the plots and the report, and show the closing table."""
    spec = ready.spec
    table = summary_table(result, measured)
    counts = Table(
        ["", "conversations", "tokens to learn from", "truncated", "left out"],
        [
            [name, len(part), part.response_tokens, part.truncated, part.dropped]
            for name, part in (("training", ready.training), ("held out", ready.held_out))
        ],
    )
    sections = [
        Section("Result", tables=[table]),
        *([_samples_section(samples)] if samples else []),
        *([_distance_section(measured, begun, distances)] if measured is not None and distances else []),
        Section("Data", tables=[counts]),
        Section("Plots", figures=_figures(ready, result, run, monitor)),
        *([_scaled_section(run, curve)] if curve else []),
        Section("Settings", listing=listing(spec.settings())),
    ]
    title = f"{_short(spec.model)} fine-tuned with {title_of(result.label)} on {_short(spec.data)}"
    budget = _budget_report(monitor)
    little = learned_little(ready, result)
    # Of what has hardly been learned there is nothing to leave out.
    factor = "" if little else _taken_factor(curve)
    # Before all else that there is nothing to use yet.
    parts = (little, _training_report(ready, result), _forgotten(measured), factor, budget, ready.rate)
    summary = " ".join(filter(None, parts))
    write_report(Report(title, summary, sections), run.report)
    less = [_advice(run, curve)] if curve and not little else []
    say(console, table, *filter(None, (little, budget)), *less, f"Adapter: {run.adapter}\nReport:  {run.report}")
    say(
        console,
        f"Talk to it:     dynalora chat {run.path}",
        f"Measure it:     dynalora evaluate {run.path} --task arc_easy --limit 200",
        f"Who serves it:  dynalora serve-check {run.path}",
    )


def _samples_section(samples: Sequence[Mapping[str, str | None]]) -> Section:
    """What the model said before and after training to the first held-out prompts."""
    names = {"prompt": "prompt", "before": "before training", "after": "after", "response": "in the data"}
    kept = [name for name in names if name in samples[0]]
    rows: list[list[Cell]] = [[(sample[name] or "")[:_SHOWN] for name in kept] for sample in samples]
    note = f"The first held-out prompts; always the likeliest token; cut after {_SHOWN} characters."
    return Section("What it says", tables=[Table([names[name] for name in kept], rows, note=note)])


def _distance_section(measured: Retention, begun: Sequence[str], distances: Sequence[Continued]) -> Section:
    """What the distance from the base model means, in words and in samples."""
    return Section("What the KL means", text=in_words(measured.kl), tables=[distance_table(distances, begun)])


def _figures(
    ready: Prepared, result: TrainResult, run: RunFolder, monitor: RetentionMonitor | None
) -> list[ReportFigure]:
    """Draw and save what the run recorded, what the adapter decided, and how forgetting went."""
    drawn: dict[str, tuple[Figure | None, str]] = {
        "loss": (
            plot_losses({result.label: result.records}),
            "Training loss (thin: each logged step; thick: running mean) and held-out loss.",
        )
    }
    if (plot := decisions(result.model, ready.tokenizer, ready.held_out)) is not None:
        name, figure, caption = plot
        drawn[name] = (figure, caption)
    method = METHODS.get(method_name(result.model.active_peft_config))
    if method is not None:
        drawn["method"] = (
            plot_metrics(result.records, method.panels),
            f"What {method.title or method.name} weighed and measured in training.",
        )
        adapter = result.model.active_adapter
        layers = {plain_name(name): layer for name, layer in adapter_layers(result.model, adapter).items()}
        if rows := method.decided(layers, adapter):
            run.write("decisions.json", json.dumps(rows, indent=1))
    figures = save_figures(run.write, drawn, svg=False)
    if monitor is not None and monitor.points:
        curves = plot_retention_curves(monitor.points, max_forgetting=ready.spec.max_forgetting)
        caption = "KL from the base model, with its standard error, and loss shift during training."
        figures += save_figures(run.write, {"retention": (curves, caption)})
    return figures


def _scaled_section(run: RunFolder, curve: Sequence[TrimPoint]) -> Section:
    """What the update has learned and forgets when it is scaled down."""
    curves = {OWN_TEXT: list(curve)}
    taken = _taken(curve).factor
    caption = "What is forgotten and what is left of the learning by factor of the update; dotted: the factor to take."
    figures = save_figures(run.write, {"scaled": (plot_scaled_update(curves, taken=taken), caption)})
    return Section(
        "If less is to be forgotten", text=_advice(run, curve), tables=[curve_table(curves, taken)], figures=figures
    )


def _taken(curve: Sequence[TrimPoint]) -> TrimPoint:
    factor = smallest_near_best({point.factor: point.loss for point in curve if point.loss is not None})
    return next(point for point in curve if point.factor == factor)


def _advice(run: RunFolder, curve: Sequence[TrimPoint]) -> str:
    """Which factor of the update to take and why, in two sentences."""
    taken, trained = _taken(curve), curve[0]
    if taken is trained:
        return (
            "Scaling the update down would cost more than 1 % of the held-out loss at every factor measured; for less "
            f"forgetting all the same: dynalora trim {run.path} OUTPUT --max-kl {trained.kl / 2:.2g}"
        )
    return (
        f"With {taken.factor:g} of its update the adapter forgets {taken.kl:.4f} nats per token instead of "
        f"{trained.kl:.4f}, at a held-out loss of {taken.loss:.4f} instead of {trained.loss:.4f}: the smallest factor "
        f"within 1 % of the lowest loss. To take it: dynalora trim {run.path} OUTPUT --factor {taken.factor:g}"
    )


def _forgotten(measured: Retention | None) -> str:
    """How far the run went from the base model, in a sentence; empty where it was not measured."""
    if measured is None:
        return ""
    return (
        f"The KL from the base model is {measured.kl:.4f} ± {measured.kl_error:.4f} nats per token of text that the "
        "base model wrote (± one standard error)."
    )


def _taken_factor(curve: Sequence[TrimPoint]) -> str:
    """What scaling the update down would bring, in a sentence; empty where it would bring nothing."""
    if not curve or _taken(curve) is curve[0]:
        return ""
    taken, trained = _taken(curve), curve[0]
    return (
        f"Less of it may do: {taken.factor:g} of the update has a KL of {taken.kl:.4f} instead of {trained.kl:.4f}, at "
        f"a held-out loss of {taken.loss:.4f} instead of {trained.loss:.4f} (see below)."
    )


def _training_report(ready: Prepared, result: TrainResult) -> str:
    """How long was trained, what it changed, and how many parameters took part, in a sentence."""
    change = "were taken"
    if result.held_out_before is not None and result.held_out_after is not None:
        change = f"took the held-out loss from {result.held_out_before:.4f} to {result.held_out_after:.4f}"
    share = 100 * result.trainable_parameters / result.parameters
    modules = f" in {ready.modules} modules" if ready.modules else ""
    return (
        f"{result.steps:,} optimizer steps {change}, training {result.trainable_parameters:,} parameters "
        f"({share:.2f} % of the model){modules}."
        + (" The run was stopped there, since the held-out loss fell no more." if result.stopped else "")
        + ("" if result.best_step is None else f" The weights are those of step {result.best_step:,}, the best.")
    )


def _budget_report(monitor: RetentionMonitor | None) -> str:
    """What happened when the run exceeded its budget of forgetting, in a sentence; empty if it never did."""
    if monitor is None or monitor.exceeded is None:
        return ""
    point = monitor.exceeded
    exceeded = (
        f"At step {point.step:,} KL on '{point.text}' was {point.retention.kl:.4f} nats per token, above the budget "
        f"of {monitor.max_forgetting:g}"
    )
    if not monitor.keep_best:
        return f"{exceeded}, and the run was stopped."
    if monitor.best is None:
        return f"{exceeded}, and no weights within it were measured."
    return f"{exceeded}; the weights are those of step {monitor.best.step:,}, at {monitor.best.forgetting:.4f}."


def _short(source: str) -> str:
    """A Hub id as it is, a path by its last part."""
    return Path(source).resolve().name if Path(source).exists() else source
