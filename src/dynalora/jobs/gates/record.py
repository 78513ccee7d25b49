"""Recording the gates of an adapter on every domain, and comparing the domains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dynalora.common.progress import Progress, silent
from dynalora.errors import UnsupportedError
from dynalora.forgetting.gate_recording import record_gates
from dynalora.forgetting.gates import GateRecord
from dynalora.forgetting.separation import Separation, depth_separation, gate_separation
from dynalora.jobs.gates.domains import read_domain
from dynalora.jobs.gates.settings import GatesSpec
from dynalora.lab.adapters import load_adapter, read_config
from dynalora.lab.models import load_tokenizer
from dynalora.methods import METHODS


@dataclass(frozen=True)
class GatesResult:
    """Gates of one adapter over several domains.

    Attributes:
        adapter: As it was named.
        records: Domain → its record; the first is the one the others are compared with.
        counted: Domain → which of its tokens count, in words.
        separations: Pair of domains → area under the ROC curve for every layer.
        depth_separations: Pair of domains → the same by depth group and for all layers.
    """

    adapter: str
    records: dict[str, GateRecord]
    counted: dict[str, str]
    separations: dict[str, list[Separation]]
    depth_separations: dict[str, dict[str, Separation]]


def compare_gates(
    spec: GatesSpec,
    *,
    progress: Progress = silent,
    load: Callable[..., Any] = load_adapter,
) -> GatesResult:
    """Record the gates of an adapter on every domain and compare the first domain with the others.

    Args:
        spec: Which adapter, on which text.
        progress: Called with the documents (or batches) done, domain by domain.
        load: Loads the adapter, as [`load_adapter`][dynalora.lab.adapters.load_adapter].

    Raises:
        UnsupportedError: The adapter has no gates.
        CheckpointError: There is no adapter, or it is damaged.
        DataError: A domain cannot be read.
        ConfigError: The base model is unknown or cannot be loaded.
    """
    saved = read_config(spec.adapter)
    method = str(saved.peft_type).rpartition(".")[2].lower()
    if not getattr(saved, "gated", False):
        gated = [name for name, known in METHODS.items() if known.gated]
        raise UnsupportedError(
            f"The adapter '{spec.adapter}' was made by {method}, which has no gates; "
            f"give a {' or '.join(gated)} adapter, or one that was trained with gates=True."
        )
    domains = {name: read_domain(source) for name, source in spec.sources().items()}
    model = load(spec.adapter, spec.model)
    tokenizer = load_tokenizer(spec.model or str(saved.base_model_name_or_path))
    records = {}
    for name, domain in domains.items():
        what = f"Recording gates on {name}"
        batches = domain.batches(tokenizer, batch_size=spec.batch_size, max_length=spec.max_length)
        progress(what, 0, len(batches))
        records[name] = record_gates(
            model,
            batches,
            tokenizer,
            batch_size=spec.batch_size,
            max_length=spec.max_length,
            progress=lambda done, total, what=what: progress(what, done, total or None),  # type: ignore[misc]
        )
    first, *others = records
    pairs = {f"{first} / {other}": (records[first], records[other]) for other in others}
    return GatesResult(
        spec.adapter,
        records,
        {name: domain.counted for name, domain in domains.items()},
        {pair: gate_separation(*both) for pair, both in pairs.items()},
        {pair: depth_separation(*both) for pair, both in pairs.items()},
    )
