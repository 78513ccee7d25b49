"""LoRA fused by hand into a Llama's linear layers, for this one model: what general code has to match.

One autograd function does the base products and the adapter's for all projections of an input (query, key and value;
gate and up; output; down). The `down` factors of a group are one parameter. The input is saved once, no base result is,
updates are added within the last product, and all gradients of the input within the products that compute them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


class _Fused(torch.autograd.Function):
    """Base results plus updates of several layers with one input."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, down: torch.Tensor, scaling: float, *sides: torch.Tensor) -> Any:
        ups, weights = sides[: len(sides) // 2], sides[len(sides) // 2 :]
        flat = x.view(-1, x.shape[-1])
        narrow = flat @ down.to(x.dtype).t()
        results = []
        for part, up, weight in zip(narrow.split(up_ranks(ups), dim=1), ups, weights, strict=True):
            result = flat @ weight.t()
            result.addmm_(part, up.to(x.dtype).t(), alpha=scaling)
            results.append(result.view(*x.shape[:-1], -1))
        ctx.save_for_backward(flat, narrow, down, *sides)
        ctx.scaling, ctx.shape = scaling, x.shape
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, narrow, down, *sides = ctx.saved_tensors
        ups, weights = sides[: len(sides) // 2], sides[len(sides) // 2 :]
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_narrow = torch.empty_like(narrow)
        grad_ups = []
        parts = zip(narrow.split(up_ranks(ups), dim=1), grad_narrow.split(up_ranks(ups), dim=1), strict=True)
        for (part, grad_part), grad, up in zip(parts, flat, ups, strict=True):
            grad_part.copy_(grad @ up.to(grad.dtype)).mul_(ctx.scaling)
            grad_ups.append((grad.t() @ part).mul_(ctx.scaling).to(up.dtype))
        grad_down = (grad_narrow.t() @ x).to(down.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_narrow @ down.to(x.dtype)
            for grad, weight in zip(flat, weights, strict=True):
                grad_x.addmm_(grad, weight)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, grad_down, None, *grad_ups, *(None for _ in weights)


def up_ranks(ups: tuple[torch.Tensor, ...]) -> list[int]:
    """The rank of each of some `up` factors."""
    return [up.shape[1] for up in ups]


class _Follower(nn.Module):
    """A projection whose result has been computed by the first of its group."""

    def __init__(self) -> None:
        super().__init__()
        self.result: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The result."""
        assert self.result is not None
        result, self.result = self.result, None
        return result


class _Leader(nn.Module):
    """The first projection of a group, which computes all.

    Attributes:
        down: The `down` factors one after the other, (layers · r, in).
        ups: The `up` factors, (out, r) each.
    """

    def __init__(self, layers: list[nn.Linear], followers: list[_Follower], r: int, scaling: float) -> None:
        super().__init__()
        weight = layers[0].weight
        self.down = nn.Parameter(torch.empty(len(layers) * r, layers[0].in_features, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.ups = nn.ParameterList(
            nn.Parameter(torch.zeros(layer.out_features, r, device=weight.device)) for layer in layers
        )
        self.weights = [layer.weight for layer in layers]  # no parameters of this module
        self.followers, self.scaling = followers, scaling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The first result; the others are left with their layers."""
        mine, *others = _Fused.apply(x, self.down, self.scaling, *self.ups, *self.weights)  # type: ignore[no-untyped-call]
        for follower, result in zip(self.followers, others, strict=True):
            follower.result = result
        return mine


def fuse(model: nn.Module, r: int, alpha: float) -> nn.Module:
    """Replace the linear layers of a Llama's blocks, whose weights must be frozen and without bias, and return it."""
    for block in model.get_submodule("model.layers").children():
        for group in GROUPS:
            owner = block.self_attn if hasattr(block.self_attn, group[0]) else block.mlp
            layers = [getattr(owner, name) for name in group]
            followers = [_Follower() for _ in group[1:]]
            for name, module in zip(group, [_Leader(layers, followers, r, alpha / r), *followers], strict=True):
                setattr(owner, name, module)
    return model
