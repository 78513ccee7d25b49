"""The one place where an update meets the base layer's result: y ← y + s · m · upᵀ.

The result is the widest tensor an adapter touches (tokens × out), so what counts is how often it is read and written.
Adding into it inside the GEMM takes no pass of its own, while the textbook form takes three (a GEMM that writes a
second such tensor, a scaling, an addition) and their backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable


class _AddLowRankInPlace(torch.autograd.Function):
    """``result += scaling · m @ up.T``, written into ``result``."""

    @staticmethod
    def forward(
        ctx: Any, result: torch.Tensor, m: torch.Tensor, up: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        out, r = up.shape
        # The wide side runs in the result's dtype (as under autocast): no copy of it in another.
        narrow = m.reshape(-1, r).to(result.dtype)
        up_cast = up.to(result.dtype)
        result.view(-1, out).addmm_(narrow, up_cast.t(), alpha=scaling)
        ctx.mark_dirty(result)
        ctx.save_for_backward(narrow, up_cast)
        ctx.scaling, ctx.m_shape, ctx.m_dtype, ctx.up_dtype = scaling, m.shape, m.dtype, up.dtype
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        narrow, up = ctx.saved_tensors
        flat = grad.reshape(-1, up.shape[0])
        grad_m = grad_up = None
        if ctx.needs_input_grad[1]:
            grad_m = (flat @ up).mul_(ctx.scaling).to(ctx.m_dtype).view(ctx.m_shape)
        if ctx.needs_input_grad[2]:
            # In this order the product runs along the rows of the wide matrix: half the time on a CPU.
            grad_up = (
                (narrow.t() @ flat)
                .mul_(ctx.scaling)
                .t()
                .to(ctx.up_dtype, memory_format=torch.contiguous_format)
            )
        return grad, grad_m, grad_up, None


def add_low_rank(
    result: torch.Tensor, m: torch.Tensor, up: torch.Tensor, scaling: float, in_place: bool
) -> torch.Tensor:
    """Add a low-rank update to a base layer's result.

    Args:
        result: Result of the base layer, (..., out).
        m: Narrow activations ``d ⊙ down(x)``, (..., r).
        up: Up factor, (out, r).
        scaling: The factor ``s``.
        in_place: Whether ``result`` may be overwritten; see :func:`may_overwrite`.

    Returns:
        ``result + scaling · m @ up.T``, (..., out), in ``result``'s dtype.
    """
    out, r = up.shape
    if in_place and type(result) is torch.Tensor and result.is_contiguous():
        # Linear layers with a bias return a view of the matrix they computed: update that matrix, and view it again.
        # (Autograd handles in-place updates of views by copying their gradient.)
        whole = result._base if result._is_view() else result
        if (
            whole is not None
            and whole.is_contiguous()
            and whole.shape[-1] == out
            and whole.numel() == result.numel()
        ):
            updated: torch.Tensor = _AddLowRankInPlace.apply(whole, m, up, scaling)  # type: ignore[no-untyped-call]
            return updated.view(result.shape)
    narrow = m.reshape(-1, r).to(result.dtype)
    if torch.is_autocast_enabled(result.device.type) and result.dtype == torch.float32:
        # Autocast would compute, and return, half precision from a float32 result.
        return result + scaling * nn.functional.linear(m, up).to(result.dtype)
    flat = result.reshape(-1, out)
    return torch.addmm(flat, narrow, up.to(result.dtype).t(), alpha=scaling).view(result.shape)


def may_overwrite(base_layer: nn.Module) -> bool:
    """Whether nobody but the adapter sees this layer's result, so that it may be updated in place.

    True for a plain ``nn.Linear`` without forward hooks: its backward does not need its result. Other layers may keep
    theirs, and hooks may have stored it.
    """
    return (
        type(base_layer) is nn.Linear and not base_layer._forward_hooks and not torch.compiler.is_compiling()
    )
