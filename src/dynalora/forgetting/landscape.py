"""The rank landscape: how much rank each adapted matrix really uses (DiRA §5.1)."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from dynalora.adapter.gates import GatedLayer
from dynalora.adapter.layer import AdapterLayer
from dynalora.common.names import plain_name
from dynalora.common.notebook import Shown
from dynalora.errors import ConfigError, DynaloraError
from dynalora.forgetting.defaults import PAPER_TAU as PAPER_TAU
from dynalora.forgetting.defaults import QUANTITIES as QUANTITIES
from dynalora.forgetting.defaults import Quantity as Quantity
from dynalora.forgetting.gates import GateStatistics
from dynalora.spectral.spectrum import factor_spectrum

TAUS = (0.01, 0.005, 0.001, 0.0005, 0.0001)
"""Thresholds of the energy table; DiRA's Table 3 has the second and the third."""


@dataclass(frozen=True)
class LandscapeRow:
    """One matrix in the landscape. All of it is measured on s·ΔW, or on the difference of two models' weights.

    Attributes:
        module: Full module name.
        layer: Index of its transformer block, None outside of blocks.
        kind: Last part of the name (`q_proj`, …).
        rank: Rank the adapter has there; for whole weights the shorter side.
        effective_rank: k(τ) = #{σ_i > τ}.
        nuclear_norm: Σ σ_i.
        energy: E(τ) = Σ_{σ_i > τ} σ_i² / Σ σ_i²; 0 for a zero update.
        singular_values: The σ_i, descending, at most `rank` of them.
        effect: Singular values of s·ΔW·C^½, descending, with C the second moment of the inputs that were measured; None
            where none were.
    """

    module: str
    layer: int | None
    kind: str
    rank: int
    effective_rank: int
    nuclear_norm: float
    energy: float
    singular_values: tuple[float, ...]
    effect: tuple[float, ...] | None = None

    @property
    def entropy_rank(self) -> float:
        """Effective rank by entropy, exp(−Σ p_i ln p_i) with p_i = σ_i / Σ σ (Roy and Vetterli 2007).

        Unlike k(τ) it does not change when the update is scaled; 0 for a zero update.
        """
        total = math.fsum(self.singular_values)
        shares = [value / total for value in self.singular_values if value > 0] if total else []
        return math.exp(-math.fsum(share * math.log(share) for share in shares)) if shares else 0.0

    @property
    def stable_rank(self) -> float:
        """Σ σ_i² / σ_1² (Rudelson and Vershynin 2007), which small singular values hardly change; 0 for no update."""
        largest = max(self.singular_values, default=0.0)
        return math.fsum((value / largest) ** 2 for value in self.singular_values) if largest else 0.0

    @property
    def energy_rank(self) -> int:
        """The least number of singular values that hold 99 % of Σ σ_i²; 0 for a zero update."""
        return _holding(self.singular_values)

    @property
    def effect_rank(self) -> int | None:
        """The least number of directions that hold 99 % of E‖s·ΔW·x‖² on the inputs measured; None where none were.

        Directions that no input has, and inputs that the update does not move, count for nothing, and the number does
        not change when the update is scaled.
        """
        return None if self.effect is None else _holding(self.effect)


class Landscape(list[LandscapeRow], Shown):
    """The landscape of a model, a row for each matrix, which a notebook shows as a table and a picture."""


_ENERGY = 0.99


def _holding(values: Sequence[float]) -> int:
    """How many of some values, the largest first, it takes for 99 % of the sum of all squares."""
    energies = sorted((value**2 for value in values), reverse=True)
    total = math.fsum(energies)
    sums = itertools.accumulate(energies, initial=0.0)
    return next((count for count, held in enumerate(sums) if held >= _ENERGY * total), len(energies))


def deciding_rank(rows: Sequence[LandscapeRow]) -> Quantity:
    """The measure of rank that says most of these matrices: of the effect, where all have it, else of the energy.

    The number of singular values above a threshold is not: a little-trained update has few of them whatever its shape.
    """
    return "effect_rank" if rows and all(row.effect is not None for row in rows) else "energy_rank"


@torch.no_grad()
def rank_landscape(
    model: nn.Module,
    tau: float = PAPER_TAU,
    adapter_name: str | None = None,
    gates: Sequence[GateStatistics] | None = None,
    effects: Mapping[str, torch.Tensor] | None = None,
) -> Landscape:
    """The landscape of an adapter, exact from its factors.

    Args:
        model: Model with an adapter of dynalora, or PEFT's LoRA or AdaLoRA. Gates that move count as open, which gives
            the most that the update can be, unless `gates` are given.
        tau: Threshold τ on singular values; the paper's 0.001 by default.
        adapter_name: Which adapter; None takes the active one, or the sum of all that are active.
        gates: Of an adapter with gates, what `dynalora.record_gates` measured on some text: each component then counts
            with its mean gate there, s·up·diag(ḡ ⊙ d)·down.
        effects: What [`narrow_moments`][dynalora.forgetting.effects.narrow_moments] measured of this very adapter on
            some text, for `effect` and `effect_rank`. Gates then count as they were on each token.

    Returns:
        One row per adapted matrix, in model order. A notebook shows a table and a picture of the ranks.

    Raises:
        ConfigError: `tau` is negative, `gates` lack a matrix, have another rank for it, or are given for an adapter
            without gates, or `effects` have another rank for a matrix.
        DynaloraError: No adapter with low-rank factors is found.
    """
    check_tau(tau)
    means = None if gates is None else {row.module: row.mean for row in gates}
    rows = Landscape()
    for name, module in model.named_modules():
        update = low_rank_update(module, adapter_name, means)
        if update is None:
            continue
        sigma = abs(update.scaling) * factor_spectrum(update.up, update.down)
        row = landscape_row(plain_name(name), update.up.shape[1], sigma, tau)
        moment = None if effects is None else effects.get(plain_name(name))
        rows.append(row if moment is None else replace(row, effect=_effect(row.module, module, update, moment)))
    if not rows:
        which = "active adapter" if adapter_name is None else f"adapter {adapter_name!r}"
        raise DynaloraError(f"the model has no {which} with low-rank factors to take a landscape of.")
    return rows


def check_tau(tau: float) -> None:
    """Raise ConfigError for a threshold that is none."""
    if not tau >= 0:
        raise ConfigError(f"tau must be at least 0, got {tau}.")


def _layer_factors(
    layer: AdapterLayer, adapter: str, means: Mapping[str, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors (out, k) and (k, in) of an update, with its gates held at their means, or open where they move."""
    if means is None:
        return layer.factors(adapter, gates="open" if layer.depends_on_input(adapter) else "held")
    if not isinstance(layer, GatedLayer) or not layer.gated(adapter):
        raise ConfigError(f"gates were given, but adapter {adapter!r} has none; leave them out.")
    mean, rank = means.get(layer.name), layer.rank(adapter)
    if mean is None or len(mean) != rank:
        count = "none" if mean is None else f"{len(mean)}"
        raise ConfigError(
            f"gates has {count} for '{layer.name}', which has rank {rank}; record the gates of this very adapter."
        )
    with layer.holding(adapter, mean):
        return layer.factors(adapter)


@dataclass(frozen=True)
class LowRankUpdate:
    """The update of one matrix, s·up·down.

    Attributes:
        adapter: The adapter's name.
        up: (out, k), with the diagonal in it.
        down: (k, in).
        scaling: s.
    """

    adapter: str
    up: torch.Tensor
    down: torch.Tensor
    scaling: float


def low_rank_update(
    module: nn.Module, adapter_name: str | None = None, means: Mapping[str, torch.Tensor] | None = None
) -> LowRankUpdate | None:
    """The update that an adapter makes of a module; None if it makes none.

    Args:
        module: Any module.
        adapter_name: Which adapter; None takes the active one, or the sum of all that are active.
        means: Gates by module name at which moving gates count; None: open.
    """
    if not (isinstance(module, AdapterLayer) or (hasattr(module, "lora_A") and hasattr(module, "lora_B"))):
        return None
    active: Sequence[str] = getattr(module, "active_adapters", ()) if adapter_name is None else (adapter_name,)
    updates = [update for adapter in active if (update := _update_of(module, adapter, means)) is not None]
    if len(updates) < 2:
        return updates[0] if updates else None
    device = updates[0].up.device
    ups = [update.scaling * update.up.float().to(device) for update in updates]
    downs = [update.down.float().to(device) for update in updates]
    return LowRankUpdate(" + ".join(update.adapter for update in updates), torch.cat(ups, 1), torch.cat(downs), 1.0)


def require_one_adapter(update: LowRankUpdate) -> None:
    """Refuse the sum of several adapters where one is measured."""
    if " + " in update.adapter:
        raise ConfigError(f"effects are measured of one adapter, but {update.adapter} are active; give adapter_name.")


def _update_of(module: nn.Module, adapter: str, means: Mapping[str, torch.Tensor] | None) -> LowRankUpdate | None:
    """The update that one adapter makes of a module; None if it makes none."""
    if isinstance(module, AdapterLayer):
        if not module.has_adapter(adapter):
            return None
        return LowRankUpdate(adapter, *_layer_factors(module, adapter, means), module.scaling[adapter])
    lora: Any = module
    if adapter in getattr(module, "lora_E", ()):  # AdaLoRA's, as it weighs them
        scaling = float(lora.scaling[adapter]) / (float(lora.ranknum[adapter]) + 1e-5)
        return LowRankUpdate(adapter, lora.lora_B[adapter], lora.lora_A[adapter] * lora.lora_E[adapter], scaling)
    if adapter not in lora.lora_A:
        return None
    up, down = lora.lora_B[adapter].weight, lora.lora_A[adapter].weight  # of convolutions with kernels
    return LowRankUpdate(adapter, up.flatten(1), down.flatten(1), float(lora.scaling[adapter]))


def _effect(name: str, module: nn.Module, update: LowRankUpdate, moment: torch.Tensor) -> tuple[float, ...]:
    """Singular values of s·ΔW·C^½ from M = E[m mᵀ], (k, k), m the narrow activations."""
    require_one_adapter(update)
    up = update.up
    if isinstance(module, AdapterLayer) and module.depends_on_input(update.adapter):
        up = module.sides(update.adapter)[0]  # whose diagonal is in m
    if moment.shape != (up.shape[1], up.shape[1]):
        raise ConfigError(
            f"effects has a moment of shape {tuple(moment.shape)} for '{name}', which has {up.shape[1]} components; "
            "measure this very adapter."
        )
    values, vectors = torch.linalg.eigh(moment.double())
    root = vectors * values.clamp_min(0).sqrt()
    return tuple((abs(update.scaling) * factor_spectrum(up.cpu().double(), root)).tolist())


def landscape_row(name: str, rank: int, sigma: torch.Tensor, tau: float) -> LandscapeRow:
    """The row of a matrix with these singular values (descending, float64)."""
    above = sigma > tau
    energy = sigma.square()
    total = float(energy.sum())
    return LandscapeRow(
        module=name,
        layer=layer_index(name),
        kind=module_kind(name),
        rank=rank,
        effective_rank=int(above.sum()),
        nuclear_norm=float(sigma.sum()),
        energy=float(energy[above].sum()) / total if total else 0.0,
        singular_values=tuple(sigma.tolist()),
    )


def module_kind(module_name: str) -> str:
    """What a module is called in its block: the last part of its name, with the one before where that is a number.

    So every expert of a mixture (`gate_up_proj.3`) is of a kind of its own.
    """
    *before, last = module_name.split(".")
    return f"{before[-1]}.{last}" if last.isdigit() and before else last


def layer_index(module_name: str) -> int | None:
    """Index of the transformer block in a module's name: its first part that is a number."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module_name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class EnergyRow:
    """What is left of all updates together above a threshold (DiRA Table 3).

    Attributes:
        tau: The threshold.
        energy: Σ_l Σ_{σ > τ} σ² / Σ_l Σ σ², over all matrices l; 0 if all updates are zero.
        effective_rank: Mean of k_l(τ) over the matrices.
        matrices: Number of matrices.
    """

    tau: float
    energy: float
    effective_rank: float
    matrices: int


def energy_table(rows: Sequence[LandscapeRow], taus: Sequence[float] = TAUS) -> list[EnergyRow]:
    """Spectral energy and effective rank above each of several thresholds, over all matrices.

    Raises:
        ConfigError: A threshold is negative, or there are no rows.
    """
    if not rows:
        raise ConfigError("There are no matrices to tabulate; take a landscape first.")
    values = torch.tensor([value for row in rows for value in row.singular_values], dtype=torch.float64)
    total = float(values.square().sum())
    table = []
    for tau in taus:
        check_tau(tau)
        above = values[values > tau]
        share = float(above.square().sum()) / total if total else 0.0
        table.append(EnergyRow(tau, share, len(above) / len(rows), len(rows)))
    return table


def landscape_records(runs: Mapping[str, Sequence[LandscapeRow]], *, spectra: bool = False) -> list[dict[str, Any]]:
    """Landscapes as flat mappings, one per run and matrix, for CSV or JSON; with the singular values if asked for."""
    records = []
    for run, rows in runs.items():
        for row in rows:
            record = {"run": run, **asdict(row)}
            record |= {name: getattr(row, name) for name in ("entropy_rank", "stable_rank", "energy_rank")}
            if row.effect is not None:
                record["effect_rank"] = row.effect_rank
            for name in ("singular_values", "effect"):
                if not spectra or record[name] is None:
                    del record[name]
            records.append(record)
    return records
