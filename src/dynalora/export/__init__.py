"""Handing adapters on: plain LoRA for servers."""

from dynalora.export.compaction import compact_adapter_folder
from dynalora.export.lora import (
    ExportReport,
    export_adapter_folder,
    export_lora,
    export_ranks,
    load_without_base,
    rank_pattern,
)
from dynalora.export.serving import Serving, check_serving
from dynalora.export.snapshot import SnapshotPrice, held_gates, snapshot_price

__all__ = [
    "ExportReport",
    "Serving",
    "SnapshotPrice",
    "check_serving",
    "compact_adapter_folder",
    "export_adapter_folder",
    "export_lora",
    "export_ranks",
    "held_gates",
    "load_without_base",
    "rank_pattern",
    "snapshot_price",
]
