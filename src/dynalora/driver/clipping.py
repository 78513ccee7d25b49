"""Gradients that were clipped before a penalty was added, clipped anew with it.

Penalties are added when the optimizer is about to step, which is after a loop or a trainer has clipped the gradients.
Papers add them to the loss, so that they are clipped along. With `clip_penalty` an adapter has that: what
`torch.nn.utils.clip_grad_norm_` did is noted, and right before the step it is undone, the penalty added, and the sum
clipped to the same norm. A note is of no use any more once the gradients have changed since.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from dynalora.common.private import total_norm, version, watch_norm_clipping
from dynalora.driver.driver import keeping_mark


@dataclass
class Clipping:
    """One call of `clip_grad_norm_`.

    Attributes:
        gradients: What it clipped, and the version that each was left at.
        max_norm: The norm that it clipped to.
        norm_type: Which norm.
        factor: What it multiplied the gradients with, a scalar.
    """

    gradients: list[tuple[weakref.ref[torch.Tensor], int]]
    max_norm: float
    norm_type: float
    factor: torch.Tensor

    def alive(self) -> list[torch.Tensor] | None:
        """The gradients, if they are all there as they were left."""
        found = [(gradient(), left_at) for gradient, left_at in self.gradients]
        same = all(gradient is not None and version(gradient) == left_at for gradient, left_at in found)
        return [gradient for gradient, _ in found if gradient is not None] if same else None


# Of the step to come; those of steps that were never made are dropped with the next look.
_noted: list[Clipping] = []


def watch() -> None:
    """Note clipping from now on; the first call counts, others do nothing."""
    watch_norm_clipping(_note)


def _note(gradients: Sequence[torch.Tensor], max_norm: float, norm_type: float, norm: torch.Tensor) -> None:
    _noted[:] = [clipping for clipping in _noted if clipping.alive() is not None]
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    left = [(weakref.ref(gradient), version(gradient)) for gradient in gradients]
    _noted.append(Clipping(left, max_norm, norm_type, factor))


def undo(parameters: Iterable[torch.Tensor]) -> list[tuple[Clipping, list[torch.Tensor]]]:
    """Take back how the gradients of some parameters were clipped, together with all that were clipped with them.

    Args:
        parameters: The parameters.

    Returns:
        For `redo`: every call that concerned them, the last one first, with its gradients.
    """
    ids = {id(parameter.grad) for parameter in parameters if parameter.grad is not None}
    undone = []
    while _noted:
        clipping = _noted.pop()
        gradients = clipping.alive()
        if gradients is None or ids.isdisjoint(map(id, gradients)):
            continue
        # Infinite gradients were multiplied with 0 or NaN; nothing brings them back, and the driver refuses them.
        factor = torch.where(clipping.factor > 0, clipping.factor, 1.0)
        for gradient in gradients:
            gradient.div_(factor.to(gradient.device))
        undone.append((clipping, gradients))
        for earlier in _noted:  # which stay as they were left, but for this
            earlier.gradients = [(reference, _version_of(reference, left)) for reference, left in earlier.gradients]
    return undone


def _version_of(reference: weakref.ref[torch.Tensor], otherwise: int) -> int:
    gradient = reference()
    return otherwise if gradient is None else version(gradient)


def redo(undone: Sequence[tuple[Clipping, list[torch.Tensor]]]) -> None:
    """Clip gradients as they were clipped before `undo`, with what was added to them meanwhile."""
    for clipping, gradients in reversed(undone):
        norm = total_norm(gradients, clipping.norm_type)
        factor = torch.clamp(clipping.max_norm / (norm + 1e-6), max=1.0)
        for gradient in gradients:
            with keeping_mark(gradient):
                gradient.mul_(factor.to(gradient.device))
