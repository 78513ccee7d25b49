"""DISeL in float64, component by component.

f(x) = Σ_i g_i(x) a_i (b_iᵀx) with g(x) = σ(W_g·x + b_g); ``down`` holds the b_i as rows, ``up`` the a_i as columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gates(x: Tensor, gate_weight: Tensor, gate_bias: Tensor, normalize: bool = False) -> Tensor:
    """σ(W_g·x + b_g) for x (..., in) → (..., r); ``normalize`` divides the logits' product by √in."""
    logits = torch.einsum("ri,...i->...r", gate_weight, x)
    if normalize:
        logits = logits / math.sqrt(x.shape[-1])
    return 1.0 / (1.0 + torch.exp(-(logits + gate_bias)))


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    s: float,
    normalize: bool = False,
) -> Tensor:
    """y = W0·x + b + s·Σ_i g_i(x) a_i (b_iᵀx); x is (..., in), y (..., out)."""
    y = torch.einsum("oi,...i->...o", weight, x)
    if bias is not None:
        y = y + bias
    g = gates(x, gate_weight, gate_bias, normalize)
    for i in range(down.shape[0]):
        y = y + s * g[..., i : i + 1] * (x * down[i]).sum(-1, keepdim=True) * up[:, i]
    return y


def parameter_count(r: int, in_features: int, out_features: int) -> int:
    """r(in + out) for the factors, r·in for W_g, r for b_g."""
    return r * (in_features + out_features) + r * in_features + r


class AdamW:
    """Decoupled AdamW (Loshchilov & Hutter 2019) written out, with its own lr and weight decay per parameter."""

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.beta1, self.beta2 = betas
        self.eps = eps
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.steps = 0

    def step(
        self,
        parameters: dict[str, Tensor],
        gradients: dict[str, Tensor],
        lr: dict[str, float],
        weight_decay: dict[str, float],
    ) -> dict[str, Tensor]:
        """The parameters after one more step; ``parameters`` themselves stay as they are."""
        self.steps += 1
        result = {}
        for name, value in parameters.items():
            g = gradients[name].double()
            m, v = self.moments.get(name, (torch.zeros_like(g), torch.zeros_like(g)))
            m = self.beta1 * m + (1 - self.beta1) * g
            v = self.beta2 * v + (1 - self.beta2) * g * g
            self.moments[name] = (m, v)
            m_hat = m / (1 - self.beta1**self.steps)
            v_hat = v / (1 - self.beta2**self.steps)
            decayed = value.double() * (1 - lr[name] * weight_decay[name])
            result[name] = decayed - lr[name] * m_hat / (v_hat.sqrt() + self.eps)
        return result
