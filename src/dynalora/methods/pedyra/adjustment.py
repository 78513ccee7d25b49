"""Which triples go, and which layers get a new one (Algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dynalora.adapter.ranks import in_use
from dynalora.common.processes import spread_as
from dynalora.driver import Moment
from dynalora.methods.pedyra.layer import PedyraLayer
from dynalora.methods.pedyra.record import append_record
from dynalora.methods.pedyra.scores import generator_for
from dynalora.methods.pedyra.settings import AdjustmentPlan, Mode


def choose(
    scores: Sequence[Sequence[float]], size: int, limits: Sequence[int], mode: Mode = "both"
) -> tuple[list[tuple[int, int]], list[int]]:
    """Algorithm 2: which triples go, and which layers get a new one.

    Args:
        scores: Score of every triple, by layer.
        size: k.
        limits: Largest rank of every layer.
        mode: Whether to prune, to expand, both, or neither (`"static"`).

    Returns:
        (layer, index) of the pruned triples, lowest score first, and the expanded layers, highest mean first. With
        both they are equally many: `size`, or as many as can be pruned and placed.
    """
    if mode == "static":
        return [], []
    ranks = [len(layer) for layer in scores]
    order = sorted((s, layer, i) for layer, values in enumerate(scores) for i, s in enumerate(values))
    best = sorted(range(len(scores)), key=lambda layer: (-sum(scores[layer]) / ranks[layer], layer))
    while True:
        left = list(ranks)
        pruned: list[tuple[int, int]] = []
        for _, layer, index in order if mode != "expand" else ():
            if len(pruned) < size and left[layer] > 1:
                left[layer] -= 1
                pruned.append((layer, index))
        if mode == "prune":
            return pruned, []
        most = size if mode == "expand" else len(pruned)
        expanded = [layer for layer in best if left[layer] < limits[layer]][:most]
        if mode == "expand" or len(expanded) == len(pruned):
            return pruned, expanded
        size = len(expanded)


def adjust(moment: Moment, layers: list[PedyraLayer], scores: list[torch.Tensor]) -> None:
    """Prune and expand by the triples' scores, and record it.

    Args:
        moment: The moment after the optimizer step.
        layers: The layers that take part, in model order.
        scores: Every triple's score, a tensor (r) per layer.
    """
    config, adapter, step = moment.config, moment.adapter, moment.step + 1
    numbers = [score.tolist() for score in scores]
    limits = [
        min(layer.reserved[adapter] or layer.limit(config, layer.rank(adapter)), layer.in_features, layer.out_features)
        for layer in layers
    ]
    if config.mode == "mask":
        _mask(moment, layers, numbers)
        return
    pruned, expanded = choose(numbers, config.adjust_size, limits, config.mode)
    generator = generator_for(config, step, 0)
    gone, grown = set(pruned), set(expanded)
    for position, layer in enumerate(layers):
        keep = [i for i in range(layer.rank(adapter)) if (position, i) not in gone]
        new = _new_triple(layer, moment, keep, generator) if position in grown else None
        if new is not None or len(keep) < layer.rank(adapter):
            layer.resize(adapter, keep, new)
    entry = {
        "step": step,
        "layers": [layer.name for layer in layers],
        "ranks": [layer.rank(adapter) for layer in layers],
        "scores": numbers,
        "pruned": pruned,
        "expanded": expanded,
    }
    append_record(moment, entry)


def _mask(moment: Moment, layers: list[PedyraLayer], scores: list[list[float]]) -> None:
    """Set e to zero in the triples that pruning alone would have removed by now, had it today's scores, and record it.

    The triples stay and train on, so others may be the lowest at the next adjustment.
    """
    adapter, step = moment.adapter, moment.step + 1
    plan = AdjustmentPlan.of(moment.config, moment.total_steps)
    times = (step - plan.start) // plan.interval + 1
    masked, _ = choose(scores, times * moment.config.adjust_size, [0] * len(scores), "prune")
    for position, layer in enumerate(layers):
        indices = [index for place, index in masked if place == position]
        e = layer.parameter("e", adapter).detach()
        mask = torch.ones(e.shape, dtype=e.dtype)
        mask[indices] = 0
        e.mul_(spread_as(e, mask.to(e.device)))
    append_record(
        moment,
        {
            "step": step,
            "layers": [layer.name for layer in layers],
            "ranks": [
                layer.rank(adapter) - sum(place == position for place, _ in masked)
                for position, layer in enumerate(layers)
            ],
            "scores": scores,
            "pruned": masked,
            "expanded": [],
        },
    )


def _new_triple(
    layer: PedyraLayer, moment: Moment, keep: list[int], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """A triple with `e` 0, and random unit directions orthogonal to those of the triples that stay, by role."""
    adapter = moment.adapter
    new = {"e": torch.zeros(1), **layer.new_gate(moment.config, adapter, generator)}
    for role in ("down", "up"):
        dim = layer.rank_dims[role]
        factor = in_use(layer, role, adapter, layer.parameter(role, adapter).detach())
        rows = (factor if dim == 0 else factor.t()).to("cpu", torch.float64)[keep]  # (staying, features)
        basis = torch.linalg.qr(rows.t()).Q
        direction = torch.randn(rows.shape[1], generator=generator, dtype=torch.float64)
        for _ in range(2):  # once more for what rounding left
            direction = direction - basis @ (basis.t() @ direction)
            direction = direction / direction.norm()
        new[role] = direction[None] if dim == 0 else direction[:, None]
    return new
