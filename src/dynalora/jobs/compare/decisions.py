"""What a run's method did: the metrics that it logs, how it moved ranks, and what each layer's update is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from dynalora.drawing.comparison import plot_by_layer
from dynalora.drawing.landscape import plot_rank_trajectory
from dynalora.drawing.training import plot_metrics
from dynalora.errors import DynaloraError
from dynalora.forgetting.landscape import LandscapeRow
from dynalora.forgetting.recovery import ablated, ablated_layers
from dynalora.forgetting.trajectory import RankTrajectory, rank_trajectory
from dynalora.methods import METHODS

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from dynalora.evaluation.results import TaskScore
    from dynalora.jobs.compare.summaries import Summary

OF_A_MATRIX = ("module", "layer", "kind", "rank", "effective_rank", "nuclear_norm")
"""What is kept of a matrix in a landscape."""
_RECORDED = tuple(item.name for item in fields(RankTrajectory) if item.name != "landscape")


def metrics_of(method: str, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a method draws of its metrics, by step, out of what a run logged; empty for methods of PEFT."""
    panels = METHODS[method].panels if method in METHODS else ()
    names = [name for panel in panels for name in panel.metrics]
    rows = [{name: record[name] for name in names if record.get(name) is not None} for record in records]
    return [{"step": record["step"], **row} for record, row in zip(records, rows, strict=True) if row]


def trajectory_record(model: nn.Module) -> dict[str, Any] | None:
    """How ranks moved, as JSON holds it; None where they did not."""
    try:
        trajectory = rank_trajectory(model)
    except DynaloraError:
        return None
    record: dict[str, Any] = {name: getattr(trajectory, name) for name in _RECORDED}
    record["pareto_variance"] = [value if math.isfinite(value) else None for value in trajectory.pareto_variance]
    record["spearman"] = trajectory.spearman if math.isfinite(trajectory.spearman) else None
    record["landscape"] = [{name: getattr(row, name) for name in OF_A_MATRIX} for row in trajectory.landscape]
    return record


def trajectory_of(record: Mapping[str, Any]) -> RankTrajectory:
    """The trajectory of a record, without singular values."""
    values = dict(record)
    values["pareto_variance"] = [-math.inf if value is None else value for value in values["pareto_variance"]]
    values["spearman"] = math.nan if values["spearman"] is None else values["spearman"]
    values["landscape"] = [LandscapeRow(**row, energy=math.nan, singular_values=()) for row in values["landscape"]]
    return RankTrajectory(**values)


def without_layers(model: nn.Module, measure: Callable[[str], TaskScore]) -> list[dict[str, Any]] | None:
    """Losses and accuracies with the ranks of one layer masked to zero, layer by layer (PE-DyRA, Figure 1b).

    Args:
        model: The trained model; it is as it was afterwards.
        measure: Measures it, with a name for progress.

    Returns:
        `layer`, `loss` and `accuracy` for each block with an adapter, first with none masked (`layer` None). None
        where no adapter can be switched off in some layers.
    """
    rows: list[dict[str, Any]] = []
    try:
        count = len(ablated_layers(model, "front")) + len(ablated_layers(model, "back"))
    except DynaloraError:
        return None
    for layer in (None, *range(count)):
        try:
            if layer is None:
                score = measure("nothing masked")
            else:
                with ablated(model, [layer]):
                    score = measure(f"layer {layer} masked")
        except DynaloraError:  # no adapter there
            continue
        accuracy = score.accuracy
        rows.append(
            {"layer": layer, "loss": score.loss.value, "accuracy": None if accuracy is None else accuracy.value}
        )
    return rows if len(rows) > 1 else None


def figures(
    place: str, summaries: Sequence[Summary], methods: Mapping[str, str]
) -> dict[str, tuple[Figure | None, str]]:
    """The figures of all this by their file's name, each with its caption; of each method's first seed.

    Args:
        place: The task's name.
        summaries: Its summaries.
        methods: Label → method.
    """
    drawn: dict[str, tuple[Figure | None, str]] = {}
    masked: dict[str, list[dict[str, Any]]] = {}
    for summary in summaries:
        result = next(iter(summary.results.values()))
        method = methods.get(summary.label, "")
        records = (result.get("training") or {}).get("metrics")
        if records and method in METHODS:
            figure = plot_metrics(records, METHODS[method].panels)
            drawn[f"metrics-{summary.label}-{place}"] = (figure, f"What {summary.label} logged in training.")
        if result.get("trajectory"):
            figure = plot_rank_trajectory(trajectory_of(result["trajectory"]))
            drawn[f"trajectory-{summary.label}-{place}"] = (figure, f"How {summary.label} moved its ranks.")
        if result.get("masked"):
            masked[summary.label] = result["masked"]
    if masked:
        caption = "Held-out questions with the ranks of one layer masked to zero; dotted: with none masked."
        drawn[f"masked-{place}"] = (plot_by_layer(masked, title=f"{place}: one layer masked"), caption)
    return drawn
