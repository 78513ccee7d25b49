"""What the paper's Figures 1a, 10 and 11 show over the steps of a run: ranks in use, orthogonality, gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dynalora.adapter.orthogonality import orthogonality
from dynalora.common.private import foreach_norm
from dynalora.driver import Moment
from dynalora.methods.pedyra.layer import ROLES, PedyraLayer
from dynalora.spectral.spectrum import factor_spectrum

#: Singular values of s·ΔW above this count towards the effective rank, as in the papers.
TAU = 1e-3


def note_gradients(moment: Moment, layers: Sequence[PedyraLayer]) -> None:
    """Keep the norms of the task's gradients at this step, of all `down`, all `e` and all `up`, with the lead."""
    if moment.lead is None or moment.skipped:
        return
    norms = []
    for role in ROLES:
        gradients = [g for layer in layers if (g := layer.parameter(role, moment.adapter).grad) is not None]
        whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
        parts = foreach_norm(whole) if whole else [torch.zeros(())]
        norms.append(torch.stack([part.float().cpu() for part in parts]).norm())
    scale = moment.grad_scale
    if isinstance(scale, torch.Tensor):
        scale = float(scale)
    device = moment.lead.parameter("e", moment.adapter).device
    moment.lead.set_running("gradient_norms", moment.adapter, (torch.stack(norms) / scale).to(device))


def diagnostics(moment: Moment) -> dict[str, float]:
    """The numbers for the log: effective rank and utilisation, the orthogonality term, the gradients' norms.

    The effective rank is the mean over matrices, and utilisation the share of all ranks that it is. With gates, whose
    updates have no spectrum, or where FSDP2 has spread the factors, both are left out.
    """
    config, adapter = moment.config, moment.adapter
    values = {"pedyra_ortho_loss": orthogonality(moment.all_layers, adapter, config.ortho_reduction)}
    norms = None if moment.lead is None else moment.lead.running("gradient_norms", adapter)
    if norms is not None:
        values |= {f"pedyra_gradient_{role}": norm for role, norm in zip(ROLES, norms.tolist(), strict=True)}
    layers = [layer for layer in moment.all_layers if not layer.depends_on_input(adapter)]
    if layers and not hasattr(layers[0].parameter("e", adapter), "full_tensor"):
        effective = 0
        for layer in layers:
            up, down = layer.factors(adapter)
            effective += int((layer.scaling[adapter] * factor_spectrum(up, down) > TAU).sum())
        values["pedyra_effective_rank"] = effective / len(layers)
        values["pedyra_utilisation"] = effective / sum(layer.rank(adapter) for layer in layers)
    return values
