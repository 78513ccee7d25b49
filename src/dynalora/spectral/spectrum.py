"""Exact spectra of low-rank updates, from their factors."""

from __future__ import annotations

from collections.abc import Callable

import torch

_DIRECT = 2**18  # elements up to which a full decomposition takes no time
_BLOCK = 2**24  # elements of a matrix that are held in float64 at a time


def factor_svd(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular value decomposition of `up @ down` without forming it.

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
    """Singular values of `up @ down` without forming it: QR of each factor, SVD of the small core (App. E of DiRA).

    Args:
        up: (out, k).
        down: (k, in).

    Returns:
        Min(out, k, in) singular values, float64, descending; the others are zero. On the factors' device, or the CPU
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


def matrix_spectrum(
    shape: tuple[int, int], read: Callable[[slice, slice], torch.Tensor], device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Singular values of a large matrix that is read block by block, and never held as a whole.

    They are the roots of the eigenvalues of the Gram matrix on the shorter side, n × n in float64, which is added up
    over blocks along the longer one. An eigenvalue is off by at most about n·ε·σ₁², ε = 2.2e-16, so a singular value σ
    is off by n·ε·σ₁² / σ at most: for n = 4096 by 1e-12·σ₁² / σ, and values below √(n·ε)·σ₁ (1e-6·σ₁), which rounding
    could have made, are returned as 0. Small matrices are decomposed directly.

    Memory: three float64 matrices of n × n and a block of 128 MiB.

    Args:
        shape: (out, in).
        read: Gives the block at (rows, columns), in any floating dtype.
        device: Where to compute; it must have float64.

    Returns:
        Min(out, in) singular values, float64 on the CPU, descending.
    """
    out, width = shape
    everything = slice(None)
    if out * width <= _DIRECT:
        whole: torch.Tensor = torch.linalg.svdvals(read(everything, everything).to(device).double())
        return whole.cpu()
    short, long = min(shape), max(shape)
    gram = torch.zeros(short, short, dtype=torch.float64, device=device)
    step = max(1, _BLOCK // short)
    for start in range(0, long, step):
        part = slice(start, min(start + step, long))
        block = (read(part, everything) if out >= width else read(everything, part).mT).to(device).double()
        gram.addmm_(block.mT, block)
    values = torch.linalg.eigvalsh(gram)
    noise = short * torch.finfo(torch.float64).eps * values[-1].clamp(min=0)
    values = torch.where(values > noise, values, torch.zeros_like(values))
    return values.sqrt().flip(0).cpu()
