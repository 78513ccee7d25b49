"""Sums over the forward passes of a step, of which only those count whose gradients are there."""

from __future__ import annotations

import torch


class PassSum:
    """A sum that one adapter of a layer makes over its forward passes.

    A forward pass is added at once. It counts when its gradients have been made, and no longer when those were thrown
    away without a step; `AdapterLayer.end_passes` and `forget_passes` are told of both.

    Attributes:
        counted: The sum over the passes whose gradients are there; None before the first.
        coming: That over the passes whose gradients are still to come; likewise.
    """

    def __init__(self) -> None:
        self.counted: torch.Tensor | None = None
        self.coming: torch.Tensor | None = None

    def add(self, value: torch.Tensor) -> None:
        """Add what a forward pass has; the tensor, which may be shared, is left as it is."""
        self.coming = _sum(self.coming, value)

    def end(self) -> None:
        """Count the passes so far."""
        if self.coming is not None:
            self.counted, self.coming = _sum(self.counted, self.coming), None

    def forget(self) -> None:
        """Leave out the passes that were counted."""
        self.counted = None

    def take(self) -> torch.Tensor | None:
        """The sum over all passes since it was last taken, and no more of it."""
        self.end()
        taken, self.counted = self.counted, None
        return taken


def _sum(sofar: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    return value if sofar is None else sofar + value.to(sofar.device)
