"""The record of the adjustments that were made, saved with the adapter.

It is JSON in a buffer of bytes of the adapter's first layer, so that it is saved and resumed like everything else. Each
adjustment adds a list of one entry, compressed apart from those before it, which are not read again.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import Any

import torch

from dynalora.driver import Moment
from dynalora.errors import CheckpointError

_RATIO, _LEAST = 64, 1 << 16  # bytes of text for each byte of a record, and those that any may have
_PIECE = 1 << 12  # bytes that are unpacked at once


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
    # Scores are digits, which no level makes much smaller than the fastest does.
    data = zlib.compress(json.dumps([entry], separators=(",", ":")).encode(), level=1)
    device = moment.lead.parameter("e", moment.adapter).device
    value = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device, copy=True)
    before = moment.lead.running("record", moment.adapter)
    if before is not None and not before.is_meta:
        value = torch.cat([before.to(device), value])
    moment.lead.set_running("record", moment.adapter, value)


def _entries(moment: Moment) -> list[dict[str, Any]]:
    saved = moment.lead.running("record", moment.adapter) if moment.lead is not None else None
    return [] if saved is None or saved.is_meta else _decoded(saved)


def _decoded(saved: torch.Tensor) -> list[dict[str, Any]]:
    """The entries of a record, (bytes)."""
    data = memoryview(saved.cpu().numpy().tobytes())
    # Scores are numbers of 17 digits, which hardly shrink; only a forged record would not end within this.
    room = _RATIO * len(data) + _LEAST
    entries: list[dict[str, Any]] = []
    position = 0
    try:
        while position < len(data) or not entries:
            text, position = _unpacked(data, position, room)
            room -= len(text)
            part = json.loads(text)
            if not isinstance(part, list) or not part or not all(_is_entry(entry) for entry in part):
                raise ValueError("no adjustments")
            entries += part
    except (zlib.error, ValueError, RecursionError) as error:
        raise CheckpointError(
            "the saved PEDYRA adapter has a record of adjustments that cannot be read; use another copy of it, or take "
            "the tensor 'pedyra_record' out of its file: the adapter works without."
        ) from error
    return entries


def _unpacked(data: memoryview, position: int, room: int) -> tuple[bytes, int]:
    """The text that is compressed from a position on, of so many bytes at most, and the position after it.

    Raises:
        ValueError: It is longer, or has no end.
    """
    unpacking = zlib.decompressobj()
    parts = []
    # In pieces, since what follows the end is handed back as a copy.
    while not unpacking.eof:
        piece = data[position : position + _PIECE]
        part = unpacking.decompress(piece, room + 1)
        room -= len(part)
        if room < 0 or not piece or unpacking.unconsumed_tail:
            raise ValueError("too long, or cut off")
        parts.append(part)
        position += len(piece) - len(unpacking.unused_data)
    return b"".join(parts), position


def _is_entry(entry: Any) -> bool:
    lists = ("layers", "ranks", "scores", "pruned", "expanded")
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
        return False
    if not all(isinstance(entry.get(key), list) for key in lists):
        return False
    names, ranks, scores, pruned, expanded = (entry[key] for key in lists)
    return (
        len(names) == len(ranks) == len(scores)
        and all(isinstance(name, str) for name in names)
        and all(isinstance(rank, int) for rank in ranks)
        and all(isinstance(values, list) and values and all(map(_is_number, values)) for values in scores)
        and all(isinstance(pair, list) and len(pair) == 2 and _is_index(pair[0], names) for pair in pruned)
        and all(_is_index(layer, names) for layer in expanded)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_index(value: Any, names: list[str]) -> bool:
    return isinstance(value, int) and 0 <= value < len(names)
