"""Handing adapters on: plain LoRA for servers."""

from dynalora.export.lora import ExportReport, export_adapter_folder, export_lora, load_without_base

__all__ = ["ExportReport", "export_adapter_folder", "export_lora", "load_without_base"]
