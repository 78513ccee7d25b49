"""`dynalora export`: a saved adapter as a plain LoRA, as a snapshot of its gates, or as its ranks alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
from peft import PeftConfig, PeftModel
from rich.console import Console

from dynalora.errors import ConfigError
from dynalora.evaluation.heads import ALL_HEADS
from dynalora.evaluation.tokens import Conversation, tokenize
from dynalora.export.lora import ExportReport, export_adapter_folder, export_lora, export_ranks
from dynalora.export.snapshot import snapshot_price
from dynalora.forgetting.gate_recording import record_gates
from dynalora.forgetting.gates import GateStatistics
from dynalora.jobs.export.settings import ExportSpec
from dynalora.lab.adapters import adapter_folder, base_tokenizer, load_adapter, read_config
from dynalora.lab.configs import method_name
from dynalora.lab.data.collator import batches_of
from dynalora.lab.data.conversations import load_conversations
from dynalora.lab.models import resolve_dtype
from dynalora.lab.report import Cell, Table, say


def run_export(spec: ExportSpec, *, console: Console) -> None:
    """Write what the settings ask for, and say what it is and who can serve it."""
    if spec.ranks_only:
        ranks = export_ranks(adapter_folder(spec.adapter), spec.output)["rank_pattern"]
        say(
            console,
            f"{spec.output}: the ranks of {len(ranks)} matrices.",
            f"Use them: LoraConfig(**json.load(open({spec.output!r})))",
        )
    else:
        exported = _export(spec, console)
        say(console, _summary(exported), *map(str, exported.serving), f"Load it with PEFT alone: {_loading(exported)}")


def _export(spec: ExportSpec, console: Console) -> ExportReport:
    options: dict[str, Any] = {
        "dtype": None if spec.dtype is None else resolve_dtype(spec.dtype),
        "max_rank": spec.max_rank,
        "tolerance": spec.tolerance,
        "uniform_rank": spec.uniform_rank,
    }
    if spec.calibrate is None:
        return export_adapter_folder(adapter_folder(spec.adapter), spec.output, **options)
    adapted, record, prices = _snapshot(spec, spec.calibrate)
    exported = export_lora(adapted, spec.output, gates=record, **options)
    say(console, prices)
    return exported


def _summary(exported: ExportReport) -> str:
    ranks = sorted(set(exported.ranks.values()))
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    lost = f", largest share of an update cut off {exported.lost:.1e}" if exported.lost else ""
    return (
        f"{exported.path}: a plain LoRA of {exported.modules} matrices, {span}, {exported.parameters:,} parameters; "
        f"largest relative difference from the adapter {exported.max_error:.1e}{lost}."
    )


def _loading(exported: ExportReport) -> str:
    """The call that loads an export, wherever PEFT is installed."""
    config = PeftConfig.from_pretrained(exported.path)
    classes = [f"AutoPeftModelFor{head.model_class}" for head in ALL_HEADS if head.task_type == config.task_type]
    automatic = next((name for name in classes if hasattr(peft, name)), None)
    if automatic is None or not config.base_model_name_or_path:
        return f"PeftModel.from_pretrained(base_model, {exported.path!r})"
    return f"{automatic}.from_pretrained({exported.path!r})"


def _snapshot(spec: ExportSpec, calibrate: str) -> tuple[PeftModel, Sequence[GateStatistics], Table]:
    """The adapter on its base model, its gates over the calibration text, and what holding them there costs."""
    saved = read_config(spec.adapter)
    if not getattr(saved, "gated", False):
        raise ConfigError(
            f"`calibrate` takes an adapter's gates from text, and '{spec.adapter}' was made by {method_name(saved)}, "
            "which has none and is exported exactly; leave it out."
        )
    texts = _texts(spec, calibrate)
    adapted = load_adapter(spec.adapter, spec.model)
    tokenizer = base_tokenizer(spec.adapter, spec.model)
    batches = {
        source: batches_of(tokenize(conversations, tokenizer, max_length=spec.max_length).rows, tokenizer.pad_token_id)
        for source, conversations in texts.items()
    }
    record = record_gates(adapted, batches[calibrate])
    rows: list[list[Cell]] = []
    for source in spec.measure or [source for source in texts if source != calibrate]:
        price = snapshot_price(adapted, record, batches[source])
        losses = (price.kl, price.base_loss, price.gated_loss, price.snapshot_loss)
        rows.append([Path(source).name, price.tokens, *(f"{loss:.4f}" for loss in losses)])
    table = Table(
        ["text", "tokens", "KL(gated ‖ snapshot)", "loss: base", "gated", "snapshot"], rows,
        title="The price of holding the gates at their means",
        note=f"Nats per response token; the gates are means over {record[0].tokens:,} response tokens of "
        f"{Path(calibrate).name}.",
    )  # fmt: skip
    return adapted, record, table


def _texts(spec: ExportSpec, calibrate: str) -> Mapping[str, Sequence[Conversation]]:
    """The conversations to take the gates from, and those to measure on, by source."""
    texts = {
        source: load_conversations(source, split=spec.split, limit=spec.limit)
        for source in dict.fromkeys([calibrate, *spec.measure])
    }
    if spec.measure:
        return texts
    rows = texts[calibrate]
    if len(rows) < 2:
        raise ConfigError(
            f"{calibrate} has one row only, and the price is measured on rows that the gates were not taken from; "
            "give more, or name others with `measure`."
        )
    return {calibrate: rows[::2], f"{calibrate}, other rows": rows[1::2]}
