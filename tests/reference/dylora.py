"""DyLoRA in float64, component by component."""

from __future__ import annotations

from torch import Tensor


def forward(x: Tensor, weight: Tensor, down: Tensor, up: Tensor, alpha: float, b: int, frozen: bool = False) -> Tensor:
    """y = W0·x + alpha / b · Σ_{i < b} up_i (down_iᵀx); with ``frozen`` all but the last component are constants."""
    y = x @ weight.T
    for i in range(b):
        d, u = down[i], up[:, i]
        if frozen and i < b - 1:
            d, u = d.detach(), u.detach()
        y = y + alpha / b * (x @ d)[..., None] * u
    return y
