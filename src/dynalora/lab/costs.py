"""What training an adapter takes in memory, from the shapes alone: no weights are read.

Counted are the numbers that are there for the whole run: base weights, adapter, gradients, the optimizer's state, and
what `retain` keeps. Activations come on top; how large they are depends on the batch and on kernels, so they are
measured in real steps (`dynalora finetune --dry-run`) and not estimated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftConfig, PeftModel
from torch import nn

from dynalora.adapter.config import AdapterConfig
from dynalora.forgetting.retain import retain_cost
from dynalora.lab.budgets import on_meta, trainable_parameters
from dynalora.lab.report import Cell, Table

_FLOAT32 = 4
_BYTES_QUANTISED = {"4bit": 0.5 + 4 / 64, "8bit": 1.0, "int8": 1.0}
"""Bytes per weight of a linear layer. NF4 has a float32 scale for every 64 weights; scales of rows are negligible."""


@dataclass(frozen=True)
class Cost:
    """What an adapter's training keeps in memory, in bytes where nothing else is said.

    Attributes:
        base_parameters: Number of the base model's parameters.
        base: Its weights.
        trained: Number of trained parameters; where ranks grow, at the end.
        adapter: The adapter with all that it keeps, in float32: frozen factors and state of the method included.
        gradients: Of the trained parameters.
        optimizer: AdamW's two moments of each.
        retain: What `retain` keeps of the base model's text; 0 without it.
    """

    base_parameters: int
    base: int
    trained: int
    adapter: int
    gradients: int
    optimizer: int
    retain: int

    @property
    def total(self) -> int:
        """All of it. Activations are not in it."""
        return self.base + self.adapter + self.gradients + self.optimizer + self.retain


def cost_of(
    model: nn.Module, config: PeftConfig | None, *, dtype: torch.dtype, quantization: str | None = None
) -> Cost:
    """What training takes.

    Args:
        model: The base model, without adapters; one on the meta device will do. It is left as it was.
        config: The adapter's configuration; None: full fine-tuning.
        dtype: Of the base model's weights.
        quantization: How the linear layers' weights are held; None: as they are.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = trainable_parameters(model, config)
    base = _base_bytes(model, dtype, quantization)
    if config is None:
        return Cost(parameters, base, trained, 0, trained * dtype.itemsize, 2 * trained * dtype.itemsize, 0)
    adapted = on_meta(model, config)
    numbers = _numbers(adapted) - _numbers(model)
    kept = 0
    if isinstance(config, AdapterConfig) and config.retain and isinstance(adapted, PeftModel):
        kept = retain_cost(adapted.eval()).bytes
    return Cost(
        base_parameters=parameters, base=base, trained=trained, adapter=_FLOAT32 * numbers,
        gradients=_FLOAT32 * trained, optimizer=2 * _FLOAT32 * trained, retain=kept,
    )  # fmt: skip


def cost_table(costs: Sequence[tuple[str, Cost]], *, title: str = "") -> Table:
    """A row for every cost, by name."""
    rows: list[list[Cell]] = [
        [
            name, cost.trained, f"{100 * cost.trained / cost.base_parameters:.2f} %",
            *(amount(part) for part in (cost.base, cost.adapter, cost.gradients, cost.optimizer)),
            amount(cost.retain) if cost.retain else None, amount(cost.total),
        ]
        for name, cost in costs
    ]  # fmt: skip
    return Table(
        ["", "trained parameters", "of the model", "base weights", "adapter", "gradients", "AdamW's state", "retain",
         "together"],
        rows, title=title, note="Memory that is held for the whole run. Activations come on top.",
    )  # fmt: skip


def amount(number: float) -> str:
    """A number of bytes in a unit that can be read."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 2**10:.1f} KiB"


def _numbers(model: nn.Module) -> int:
    return sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))


def _base_bytes(model: nn.Module, dtype: torch.dtype, quantization: str | None) -> int:
    parameters = {id(parameter): parameter.numel() for parameter in model.parameters()}
    if quantization is None:
        return sum(parameters.values()) * dtype.itemsize
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = {
        id(module.weight): module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    held = sum(number for key, number in parameters.items() if key not in linear) * dtype.itemsize
    return held + round(sum(linear.values()) * _BYTES_QUANTISED[quantization])
