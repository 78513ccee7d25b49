"""Gradients that are no numbers: found before a step makes the weights useless, and named.

Looking costs one pass over the adapter's gradients. On a CPU the answer is there at once and the step is not taken.
On an accelerator reading it would wait for the device at every step, so it is read one step later, and before
anything that is decided from the gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from dynalora.common.private import foreach_norm
from dynalora.driver.moment import DrivenLayer


def some_bad(gradients: Iterable[torch.Tensor]) -> torch.Tensor | None:
    """Whether any gradient holds NaN or infinities, a scalar where the gradients are; None without gradients."""
    local = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in gradients]
    by_kind: dict[Any, list[torch.Tensor]] = {}
    for grad in local:
        if grad.numel() and not grad.is_sparse:
            by_kind.setdefault((grad.device, grad.dtype), []).append(grad)
    bad: torch.Tensor | None = None
    for group in by_kind.values():
        here = _no_numbers(group)
        bad = here if bad is None else bad | here.to(bad.device)
    return bad


def _no_numbers(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Whether any of some tensors of one kind holds NaN or infinities, a scalar."""
    if tensors[0].device.type == "cpu":
        # Many times as fast there as the largest entries; but finite entries may have an infinite norm.
        norms = torch.stack(foreach_norm(tensors, 2.0))
        if bool(norms.isfinite().all()):
            return torch.zeros((), dtype=torch.bool)
    return ~torch.isfinite(torch.stack(foreach_norm(tensors, float("inf")))).all()


def first_bad(layers: Sequence[DrivenLayer], adapter: str, *, gradients: bool) -> tuple[str, str] | None:
    """The first layer, in model order, whose gradients or weights hold NaN or infinities.

    Args:
        layers: The layers.
        adapter: The adapter.
        gradients: Whether to look at the gradients; otherwise at the weights.

    Returns:
        The layer's name, and what of it holds what (`"NaN in the gradient of 'up'"`); None if all are finite.
    """
    for layer in sorted(layers, key=lambda layer: layer.order):
        for role, parameter in layer.adapter_parameters(adapter).items():
            tensor = parameter.grad if gradients else parameter.detach()
            if tensor is None or tensor.is_meta or not bool(some_bad([tensor])):
                continue
            return layer.name, f"{_kind(tensor)} in {f'the gradient of {role!r}' if gradients else repr(role)}"
    return None


def first_bad_of(named: Iterable[tuple[str, torch.Tensor]]) -> tuple[str, str] | None:
    """The name of the first of some tensors that holds NaN or infinities, and which of them; None if all are finite.

    Args:
        named: The tensors with their names.
    """
    present = [(name, tensor) for name, tensor in named if tensor.is_floating_point() and not tensor.is_meta]
    if not bool(some_bad([tensor for _, tensor in present])):
        return None
    return next((name, _kind(tensor)) for name, tensor in present if bool(some_bad([tensor])))


def _kind(tensor: torch.Tensor) -> str:
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return "NaN" if bool(local.isnan().any()) else "infinite values"
