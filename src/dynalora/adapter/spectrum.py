"""Exact spectra of low-rank updates, from their factors."""

from __future__ import annotations

import torch


def factor_svd(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular value decomposition of ``up @ down`` without forming it.

    Args:
        up: (out, k).
        down: (k, in).

    Returns:
        U (out, n), singular values (n) in descending order and Vᵀ (n, in), n = min(out, k, in), all float64.
    """
    q_up, r_up = torch.linalg.qr(up.detach().double())
    q_down, r_down = torch.linalg.qr(down.detach().double().t())
    u, values, v = torch.linalg.svd(r_up @ r_down.t(), full_matrices=False)
    return q_up @ u, values, v @ q_down.t()


def factor_spectrum(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Singular values of ``up @ down`` without forming it: QR of each factor, SVD of the small core (App. E of DiRA).

    Args:
        up: (out, k).
        down: (k, in).

    Returns:
        min(out, k, in) singular values, float64, descending; the others are zero. On the factors' device, or the CPU
        where that has no float64.

    Raises:
        ValueError: The factors do not fit each other.
    """
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
        raise ValueError(f"factors of shapes {tuple(up.shape)} and {tuple(down.shape)} cannot be multiplied")
    if up.device.type == "mps":
        up, down = up.cpu(), down.cpu()
    r_up = torch.linalg.qr(up.detach().double(), mode="r").R
    r_down = torch.linalg.qr(down.detach().double().t(), mode="r").R
    core: torch.Tensor = r_up @ r_down.t()
    values: torch.Tensor = torch.linalg.svdvals(core)
    return values
