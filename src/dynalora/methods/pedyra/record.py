"""The record of the adjustments that were made, saved with the adapter.

It is JSON, compressed, in a buffer of bytes of the adapter's first layer, so that it is saved and resumed like
everything else.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import Any, cast

import torch

from dynalora.driver import Moment


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


def read_record(moment: Moment) -> list[Adjustment]:
    """The adjustments on record, in order."""
    adjustments = []
    for entry in _entries(moment):
        names = entry["layers"]
        scores = dict(zip(names, entry["scores"], strict=True))
        adjustments.append(
            Adjustment(
                step=entry["step"],
                ranks=dict(zip(names, entry["ranks"], strict=True)),
                scores=scores,
                layer_scores={name: sum(values) / len(values) for name, values in scores.items()},
                pruned=[(names[layer], index) for layer, index in entry["pruned"]],
                expanded=[names[layer] for layer in entry["expanded"]],
            )
        )
    return adjustments


def append_record(moment: Moment, entry: dict[str, Any]) -> None:
    """Add an adjustment to the record.

    Args:
        moment: The moment at which it took place.
        entry: `step`, names of the `layers`, and by their number `ranks`, `scores`, `pruned` and `expanded`.
    """
    if moment.lead is None:
        return
    data = zlib.compress(json.dumps([*_entries(moment), entry], separators=(",", ":")).encode())
    device = moment.lead.parameter("e", moment.adapter).device
    value = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device, copy=True)
    moment.lead.set_running("record", moment.adapter, value)


def _entries(moment: Moment) -> list[dict[str, Any]]:
    saved = moment.lead.running("record", moment.adapter) if moment.lead is not None else None
    if saved is None or saved.is_meta:
        return []
    return cast("list[dict[str, Any]]", json.loads(zlib.decompress(saved.cpu().numpy().tobytes())))
