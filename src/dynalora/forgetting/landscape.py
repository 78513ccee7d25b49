"""The rank landscape: how much rank each adapted matrix really uses (DiRA §5.1)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dynalora.adapter.layer import AdapterLayer
from dynalora.adapter.spectrum import factor_spectrum
from dynalora.errors import ConfigError, DynaloraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER_TAU = 1e-3


@dataclass(frozen=True)
class LandscapeRow:
    """One adapted matrix in the landscape. All of it is measured on s·ΔW.

    Attributes:
        module: Full module name.
        layer: Index of its transformer block, None outside of blocks.
        kind: Last part of the name (``q_proj``, …).
        rank: Rank the adapter has there.
        effective_rank: k(τ) = #{σ_i > τ}.
        nuclear_norm: Σ σ_i.
        energy: E(τ) = Σ_{σ_i > τ} σ_i² / Σ σ_i²; 0 for a zero update.
        singular_values: The σ_i, descending, at most ``rank`` of them.
    """

    module: str
    layer: int | None
    kind: str
    rank: int
    effective_rank: int
    nuclear_norm: float
    energy: float
    singular_values: tuple[float, ...]


@torch.no_grad()
def rank_landscape(
    model: nn.Module, tau: float = PAPER_TAU, adapter_name: str | None = None
) -> list[LandscapeRow]:
    """The landscape of an adapter, exact from its factors.

    Args:
        model: Model with an adapter of dynalora or a plain PEFT LoRA. Of a DISeL adapter, the ungated factors count
            (all gates open), the most its update can be.
        tau: Threshold τ on singular values; the paper's 0.001 by default.
        adapter_name: Which adapter; None takes the active one.

    Returns:
        One row per adapted matrix, in model order.

    Raises:
        ConfigError: ``tau`` is negative.
        DynaloraError: No adapter with low-rank factors is found.
    """
    if not tau >= 0:
        raise ConfigError(f"tau must be at least 0, got {tau}.")
    rows = []
    for name, module in model.named_modules():
        factors = _factors(module, adapter_name)
        if factors is None:
            continue
        up, down, scaling = factors
        sigma = abs(scaling) * factor_spectrum(up, down)
        rows.append(_row(_plain_name(name), up.shape[1], sigma, tau))
    if not rows:
        which = "active adapter" if adapter_name is None else f"adapter {adapter_name!r}"
        raise DynaloraError(f"the model has no {which} with low-rank factors to take a landscape of.")
    return rows


def _factors(module: nn.Module, adapter_name: str | None) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    active: Sequence[str] = (
        getattr(module, "active_adapters", ()) if adapter_name is None else (adapter_name,)
    )
    if isinstance(module, AdapterLayer):
        for adapter in active:
            if module.has_adapter(adapter):
                return *module.open_factors(adapter), module.scaling[adapter]
        return None
    lora: Any = module
    if hasattr(module, "lora_A") and hasattr(module, "lora_B"):
        for adapter in active:
            if adapter in lora.lora_A:
                return lora.lora_B[adapter].weight, lora.lora_A[adapter].weight, float(lora.scaling[adapter])
    return None


def _row(name: str, rank: int, sigma: torch.Tensor, tau: float) -> LandscapeRow:
    kept = sigma > tau
    energy = sigma.square()
    total = float(energy.sum())
    return LandscapeRow(
        module=name,
        layer=layer_index(name),
        kind=name.rpartition(".")[2],
        rank=rank,
        effective_rank=int(kept.sum()),
        nuclear_norm=float(sigma.sum()),
        energy=float(energy[kept].sum()) / total if total else 0.0,
        singular_values=tuple(sigma.tolist()),
    )


def layer_index(module_name: str) -> int | None:
    """Index of the transformer block in a module's name: its first part that is a number."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module_name)
    return int(match[1]) if match else None


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.")


def plot_rank_landscape(
    landscape: Sequence[LandscapeRow] | dict[str, Sequence[LandscapeRow]], path: str | None = None
) -> Figure:
    """Draw effective rank over the layers, one panel per module kind, runs overlaid (DiRA Figures 1, 4).

    Args:
        landscape: Result of :func:`rank_landscape`, or several by name.
        path: File to write; None only returns the figure.

    Returns:
        The matplotlib figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = landscape if isinstance(landscape, dict) else {"": landscape}
    kinds = list(dict.fromkeys(row.kind for rows in runs.values() for row in rows))
    columns = min(4, len(kinds))
    lines = -(-len(kinds) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axis in axes.flat[len(kinds) :]:
        axis.set_visible(False)
    for axis, kind in zip(axes.flat, kinds, strict=False):
        ceiling = 0
        for name, rows in runs.items():
            chosen = [row for row in rows if row.kind == kind]
            x = [row.layer if row.layer is not None else i for i, row in enumerate(chosen)]
            axis.plot(
                x, [row.effective_rank for row in chosen], marker="o", markersize=3, linewidth=1.2, label=name
            )
            ceiling = max(ceiling, *(row.rank for row in chosen), 0)
        axis.axhline(ceiling, color="0.6", linestyle=":", linewidth=1)
        axis.set_title(kind, fontsize=9)
        axis.set_ylim(bottom=-0.5)
        axis.set_xlabel("layer", fontsize=8)
        axis.tick_params(labelsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("effective rank", fontsize=8)
    if any(runs):
        axes.flat[0].legend(fontsize=7)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
