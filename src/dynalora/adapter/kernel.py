"""The two places where an update meets wide tensors: h = x · downᵀ, and y ← y + s · m · upᵀ.

The result is the widest tensor an adapter touches (tokens × out), so what counts is how often it is read and written.
Adding into it inside the GEMM takes no pass of its own, while the textbook form takes three (a GEMM that writes a
second such tensor, a scaling, an addition) and their backward.

Either side may have frozen components beside the trained ones. They share the products with the input and with the
result, and only the gradient of the trained ones is ever computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dynalora.adapter.parts import PartMatrix
from dynalora.common.private import has_forward_hooks, is_observed, is_replaced, transforming, view_base

#: Data types that autocast casts.
CAST = (torch.float32, torch.bfloat16, torch.float16)


class _AddLowRankInPlace(torch.autograd.Function):
    """`result += scaling · m @ [up, frozen].T`, written into `result`."""

    @staticmethod
    def forward(
        ctx: Any, result: torch.Tensor, m: torch.Tensor, up: torch.Tensor, frozen: torch.Tensor | None, scaling: float
    ) -> torch.Tensor:
        narrow, up_cast = cast_sides(m, up, frozen, result.dtype)
        result.view(-1, up.shape[0]).addmm_(narrow, up_cast.t(), alpha=scaling)
        ctx.mark_dirty(result)
        # Cast and joined once more in the backward pass: next to the products that costs nothing, and is not kept.
        ctx.save_for_backward(m, up, frozen)
        ctx.trained, ctx.scaling = up.shape[1], scaling
        ctx.m_shape, ctx.m_dtype, ctx.up_dtype = m.shape, m.dtype, up.dtype
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        m, up, frozen = ctx.saved_tensors
        narrow, up = cast_sides(m, up, frozen, grad.dtype)
        flat = grad.reshape(-1, up.shape[0])
        grad_m = grad_up = None
        if ctx.needs_input_grad[1]:
            grad_m = scaled_product(flat, up, ctx.scaling).to(ctx.m_dtype).view(ctx.m_shape)
        if ctx.needs_input_grad[2]:
            grad_up = gradient_of_columns(narrow[:, : ctx.trained], flat, ctx.scaling, ctx.up_dtype)
        return grad, grad_m, grad_up, None, None


def scaled_product(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """`scaling · left @ right`, scaled within the product."""
    if torch.is_grad_enabled():
        return left @ right * scaling
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scaling)  # what is times 0 is not read


def gradient_of_columns(m: torch.Tensor, grad: torch.Tensor, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    """The gradient of `up` in `scaling · m @ up.T`, (out, r), from that of the result, (tokens, out)."""
    # In this order the product runs along the rows of the wide matrix: half the time on a CPU.
    rows = scaled_product(m.t(), grad, scaling)
    return rows.t().to(dtype, memory_format=torch.contiguous_format)


def cast_sides(
    m: torch.Tensor, up: torch.Tensor, frozen: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`m` as a matrix, and `[up, frozen]`, in the result's dtype: the wide side has no copy in another."""
    if frozen is not None:
        up = torch.cat([up, frozen], dim=1)
    return m.reshape(-1, up.shape[1]).to(dtype), up.to(dtype)


class _Project(torch.autograd.Function):
    """`x @ [down; frozen].T`, where `frozen` gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, down: torch.Tensor, frozen: torch.Tensor) -> torch.Tensor:
        matrix = torch.cat([down, frozen])
        ctx.save_for_backward(x, matrix, down, frozen)
        ctx.trained = down.shape[0]
        return nn.functional.linear(x, matrix)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, matrix, down, frozen = ctx.saved_tensors
        if torch.is_grad_enabled():
            matrix = torch.cat([down, frozen])
        grad_x = grad @ matrix if ctx.needs_input_grad[0] else None
        grad_down = None
        if ctx.needs_input_grad[1]:
            trained = grad.reshape(-1, matrix.shape[0])[:, : ctx.trained]
            grad_down = trained.t() @ x.reshape(-1, x.shape[-1])
        return grad_x, grad_down, None


class _Observe(torch.autograd.Function):
    """The result as it is; its backward gives `probe` the gradient of a weight that took `x` to the result."""

    @staticmethod
    def forward(ctx: Any, result: torch.Tensor, x: torch.Tensor, probe: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.dtype = probe.dtype
        return result.clone()  # a view of it could not be updated in place by what follows

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        return grad, None, (rows.t() @ inputs.to(rows.dtype)).to(ctx.dtype)


def observe_weight_gradient(result: torch.Tensor, x: torch.Tensor, probe: torch.Tensor) -> torch.Tensor:
    """Let backward passes add the gradient of a layer's weight to `probe.grad`, without any such weight training.

    Args:
        result: The layer's result, (..., out).
        x: Its input, (..., in).
        probe: A leaf (out, in), of any values.

    Returns:
        `result`.
    """
    observed: torch.Tensor = _Observe.apply(result, x, probe)  # type: ignore[no-untyped-call]
    return observed


def _add_without_graph(
    result: torch.Tensor, m: torch.Tensor, up: torch.Tensor, scaling: float, frozen: torch.Tensor | None
) -> torch.Tensor:
    """What `_AddLowRankInPlace` does, where nothing is to be differentiated."""
    flat = result.view(-1, up.shape[0])
    m = m.reshape(-1, m.shape[-1])
    if frozen is None and m.dtype == up.dtype == result.dtype:
        flat.addmm_(m, up.t(), alpha=scaling)
        return result
    narrow, up = cast_sides(m, up, frozen, result.dtype)
    flat.addmm_(narrow, up.t(), alpha=scaling)
    return result


def few_tokens(x: torch.Tensor, rank: int, base_layer: nn.Module) -> bool:
    """Whether there are so few tokens, and so little else, that `AdapterLayer.few` may do an adapter's part.

    Without gradients and in code that is not compiled.

    Args:
        x: The input, (…, in).
        rank: The adapter's rank.
        base_layer: The base layer, whose result is to be overwritten.
    """
    return (
        x.numel() <= 2 * rank * x.shape[-1]
        and (type(base_layer) is nn.Linear or isinstance(base_layer, PartMatrix))
        and not has_forward_hooks(base_layer)
        and not torch.is_autocast_enabled(x.device.type)
        and not transforming()
    )


def add_few(result: torch.Tensor, parts: Sequence[tuple[torch.Tensor, torch.Tensor]], scaling: float) -> torch.Tensor:
    """Add low-rank updates of few tokens to a result, without a cast or stacked copy of any matrix.

    Args:
        result: Result of the base layer, which may be overwritten, (…, out).
        parts: Narrow activations (tokens, ·) and the columns (out, ·) that they meet, all of one dtype.
        scaling: The factor `s`.

    Returns:
        (…, out), in `result`'s dtype.
    """
    (m, up), *more = parts
    if up.dtype == result.dtype and type(result) is torch.Tensor and result.is_contiguous():
        target = result.view(-1, result.shape[-1])
        target.addmm_(m, up.t(), alpha=scaling)
        for m, up in more:
            target.addmm_(m, up.t(), alpha=scaling)
        return result
    update = nn.functional.linear(m, up)
    for m, up in more:
        update.addmm_(m, up.t())
    return result.add_(update.view(result.shape), alpha=scaling)


def apart(x: torch.Tensor, rows: int) -> bool:
    """Whether the products of one input with several matrices had better be done one by one than stacked.

    Stacking writes and reads `rows · in` numbers anew, and saves reading the `tokens · in` of the input again. In
    generation there are few tokens, and the copy would cost more than the products. With gradients stacking stays:
    it saves as much again in the backward pass.

    Args:
        x: Input, (..., in).
        rows: Rows of all the matrices together.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return x.numel() < 2 * rows * x.shape[-1]


def project(x: torch.Tensor, down: torch.Tensor, frozen: torch.Tensor | None) -> torch.Tensor:
    """Multiply the input with the down factor.

    Args:
        x: Input, (..., in).
        down: Trained rows, (r, in), in `x`'s dtype (or under autocast).
        frozen: Rows that never train, (k, in); None for none.

    Returns:
        `x @ [down; frozen].T`, (..., r + k).
    """
    if frozen is None:
        return nn.functional.linear(x, down)
    if apart(x, down.shape[0] + frozen.shape[0]):
        return torch.cat([nn.functional.linear(x, down), nn.functional.linear(x, frozen)], dim=-1)
    # Autocast knows the dtypes of torch's own functions only; torch.func and tracers cannot look into ours.
    if torch.is_autocast_enabled(x.device.type) or transforming():
        return nn.functional.linear(x, torch.cat([down, frozen]))
    projected: torch.Tensor = _Project.apply(x, down, frozen)  # type: ignore[no-untyped-call]
    return projected


def add_low_rank(
    result: torch.Tensor,
    m: torch.Tensor,
    up: torch.Tensor,
    scaling: float,
    in_place: bool,
    frozen: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add a low-rank update to a base layer's result.

    Args:
        result: Result of the base layer, (..., out).
        m: Narrow activations `d ⊙ down(x)`, (..., r + k).
        up: Trained columns of the up factor, (out, r).
        scaling: The factor `s`.
        in_place: Whether `result` may be overwritten; see `may_overwrite`.
        frozen: Columns that never train, (out, k); None for none.

    Returns:
        `result + scaling · m @ [up, frozen].T`, (..., out), in `result`'s dtype.
    """
    out = up.shape[0]
    if in_place and type(result) is torch.Tensor and result.is_contiguous():
        if not torch.is_grad_enabled():
            return _add_without_graph(result, m, up, scaling, frozen)
        # Linear layers with a bias return a view of the matrix they computed: update that matrix, and view it again.
        # (Autograd handles in-place updates of views by copying their gradient.)
        whole = view_base(result)
        if whole is not None and whole.is_contiguous() and whole.shape[-1] == out and whole.numel() == result.numel():
            updated: torch.Tensor = _AddLowRankInPlace.apply(whole, m, up, frozen, scaling)  # type: ignore[no-untyped-call]
            return updated.view(result.shape)
    if frozen is not None:
        up = torch.cat([up, frozen], dim=1)
    narrow = m.reshape(-1, m.shape[-1]).to(result.dtype)
    if torch.is_autocast_enabled(result.device.type) and result.dtype == torch.float32:
        # Autocast would compute, and return, half precision from a float32 result.
        return result + scaling * nn.functional.linear(m, up).to(result.dtype)
    flat = result.reshape(-1, out)
    return torch.addmm(flat, narrow, up.to(result.dtype).t(), alpha=scaling).view(result.shape)


def may_overwrite(base_layer: nn.Module) -> bool:
    """Whether nobody but the adapter sees this layer's result, so that it may be updated in place.

    True for a plain `nn.Linear`, or a matrix out of a parameter (`PartMatrix`), without hooks: its backward does not
    need its result. Other layers may keep theirs, forward hooks may have stored it, and full backward hooks see the
    gradient of what the layer returned. Code that is compiled, traced or transformed is given functional operations.
    """
    return (
        (type(base_layer) is nn.Linear or isinstance(base_layer, PartMatrix))
        and not is_observed(base_layer)
        and not torch.compiler.is_compiling()
        and not transforming()
    )


def only_multiplies(base_layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether a layer does nothing with its input but multiply it with a weight that is there and does not train.

    Then its product may be computed without calling it, and its backward pass be taken part in.
    """
    if type(base_layer) is not nn.Linear or is_observed(base_layer) or is_replaced(base_layer):
        return False
    if type(x) is not torch.Tensor:
        return False
    parameters, device = base_layer._parameters, x.device
    # Autocast brings them to one data type, whatever they have, but for float64.
    dtypes = CAST if torch.is_autocast_enabled(device.type) else (x.dtype,)
    if x.dtype not in dtypes:
        return False
    weight = parameters.get("weight")
    if weight is None or "bias" not in parameters:  # made anew at each call
        return False
    for tensor in (weight, parameters["bias"]):
        if tensor is not None and (
            type(tensor) not in (torch.Tensor, nn.Parameter)
            or tensor.requires_grad
            or tensor.dtype not in dtypes
            or tensor.device != device
        ):
            return False
    return weight.shape == (base_layer.out_features, base_layer.in_features)
