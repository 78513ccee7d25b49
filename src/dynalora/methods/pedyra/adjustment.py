"""Which triples go and which layers get a new one (Algorithm 2), and the record of what was decided."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from dynalora.driver import layers_of
from dynalora.methods.pedyra.layer import PedyraLayer, in_use
from dynalora.methods.pedyra.scores import generator_for
from dynalora.methods.pedyra.settings import Mode, PedyraConfig


@dataclass(frozen=True)
class Adjustment:
    """One adjustment, as it is recorded with the adapter.

    Attributes:
        step: Optimizer steps done.
        ranks: Ranks afterwards, by module name.
        scores: Scores of the triples before, by module name and index.
        layer_scores: Their means.
        pruned: Module name and index (before) of what was removed, lowest score first.
        expanded: Modules that got a new triple, highest score first.
    """

    step: int
    ranks: dict[str, int]
    scores: dict[str, list[float]]
    layer_scores: dict[str, float]
    pruned: list[tuple[str, int]]
    expanded: list[str]


def choose(
    scores: Sequence[Sequence[float]], size: int, limits: Sequence[int], mode: Mode = "both"
) -> tuple[list[tuple[int, int]], list[int]]:
    """Algorithm 2: which triples go, and which layers get a new one.

    Args:
        scores: Score of every triple, by layer.
        size: k.
        limits: Largest rank of every layer.
        mode: Whether to prune, to expand, or both.

    Returns:
        (layer, index) of the pruned triples, lowest score first, and the expanded layers, highest mean first. With
        both they are equally many: `size`, or as many as can be pruned and placed.
    """
    ranks = [len(layer) for layer in scores]
    order = sorted((s, layer, i) for layer, own in enumerate(scores) for i, s in enumerate(own))
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


def adjust(
    layers: list[PedyraLayer], adapter: str, config: PedyraConfig, scores: list[torch.Tensor], step: int
) -> None:
    """Prune and expand by the triples' scores, a tensor (r) per layer, and record it.

    Args:
        layers: The layers that take part, in model order.
        adapter: The adapter's name.
        config: Its configuration.
        scores: Every triple's score, a tensor (r) per layer.
        step: The optimizer step that was just taken, counted from 1.
    """
    numbers = [score.tolist() for score in scores]
    limits = [layer.reserved[adapter] or layer.limit(config, layer.rank(adapter)) for layer in layers]
    limits = [
        min(limit, layer.in_features, layer.out_features) for limit, layer in zip(limits, layers, strict=True)
    ]
    pruned, expanded = choose(numbers, config.adjust_size, limits, config.mode)
    generator = generator_for(config, step, 0)
    gone, grown = set(pruned), set(expanded)
    for position, layer in enumerate(layers):
        keep = [i for i in range(layer.rank(adapter)) if (position, i) not in gone]
        new = _new_triple(layer, adapter, keep, generator) if position in grown else None
        if new is not None or len(keep) < layer.rank(adapter):
            layer.resize(adapter, keep, new)
    append_record(
        layers,
        adapter,
        {
            "step": step,
            "layers": [layer.name for layer in layers],
            "ranks": [layer.rank(adapter) for layer in layers],
            "scores": numbers,
            "pruned": pruned,
            "expanded": expanded,
        },
    )


def _new_triple(
    layer: PedyraLayer, adapter: str, keep: list[int], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """E = 0, and random unit directions orthogonal to those of the triples that stay."""
    config: Any = layer.drivers[adapter].config
    new = {"e": torch.zeros(1), **layer.new_gate(config, adapter, generator)}
    for role in ("down", "up"):
        dim = layer.rank_dims[role]
        factor = in_use(layer, role, adapter, layer.parameter(role, adapter).detach())
        rows = (factor if dim == 0 else factor.t()).to("cpu", torch.float64)[keep]  # (kept, features)
        basis = torch.linalg.qr(rows.t()).Q
        direction = torch.randn(rows.shape[1], generator=generator, dtype=torch.float64)
        for _ in range(2):  # once more for what rounding left
            direction = direction - basis @ (basis.t() @ direction)
            direction = direction / direction.norm()
        new[role] = direction[None] if dim == 0 else direction[:, None]
    return new


# The record: JSON, compressed, in a buffer of bytes, so that it is saved and resumed like everything else.


def _recorder(layers: Sequence[Any], adapter: str) -> PedyraLayer | None:
    driver = layers[0].drivers[adapter] if layers else None
    everyone: list[PedyraLayer] = layers_of(driver) if driver is not None else []
    return next((layer for layer in everyone if layer.progress(adapter) is not None), None)


def _raw_record(recorder: PedyraLayer | None, adapter: str) -> list[dict[str, Any]]:
    saved = recorder.running("record", adapter) if recorder is not None else None
    if saved is None or saved.is_meta:
        return []
    return cast("list[dict[str, Any]]", json.loads(zlib.decompress(saved.cpu().numpy().tobytes())))


def append_record(layers: Sequence[Any], adapter: str, entry: dict[str, Any]) -> None:
    """Add an adjustment to the record."""
    recorder = _recorder(layers, adapter)
    if recorder is None:
        return
    entries = [*_raw_record(recorder, adapter), entry]
    data = zlib.compress(json.dumps(entries, separators=(",", ":")).encode())
    device = recorder.parameter("e", adapter).device
    recorder.set_running(
        "record", adapter, torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device, copy=True)
    )


def read_record(layers: Sequence[Any], adapter: str) -> list[Adjustment]:
    """The adjustments on record, in order."""
    found = []
    for entry in _raw_record(_recorder(layers, adapter), adapter):
        names = entry["layers"]
        scores = dict(zip(names, entry["scores"], strict=True))
        found.append(
            Adjustment(
                step=entry["step"],
                ranks=dict(zip(names, entry["ranks"], strict=True)),
                scores=scores,
                layer_scores={name: sum(own) / len(own) for name, own in scores.items()},
                pruned=[(names[layer], index) for layer, index in entry["pruned"]],
                expanded=[names[layer] for layer in entry["expanded"]],
            )
        )
    return found
