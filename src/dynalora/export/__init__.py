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

__all__ = [
    "ExportReport",
    "compact_adapter_folder",
    "export_adapter_folder",
    "export_lora",
    "export_ranks",
    "load_without_base",
    "rank_pattern",
]
