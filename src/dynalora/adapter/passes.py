"""Sums over the forward passes of a step, of which only those count whose gradients are there."""

from __future__ import annotations

import torch

from dynalora.common.private import in_backward
from dynalora.driver import making_gradients


class PassSum:
    """A sum that one adapter of a layer makes over its forward passes.

    A forward pass is added when a gradient comes back to what it made. So passes whose gradients nobody asks for (an
    evaluation without `no_grad`) and those that gradient checkpointing repeats for their intermediate values alone do
    not count. They count with the gradients that they are of: no longer when those were thrown away without a step.
    `AdapterLayer.end_passes` and `forget_passes` are told of both.

    Attributes:
        counted: The sum over the passes whose gradients are there; None before the first.
        coming: That over the passes whose gradients are being made; likewise.
        apart: That over passes whose gradients were not made by `backward`: of something else (`torch.autograd.grad` of
            what a loss is sensitive to), unless a step has no others.
    """

    def __init__(self) -> None:
        self.counted: torch.Tensor | None = None
        self.coming: torch.Tensor | None = None
        self.apart: torch.Tensor | None = None

    def add(self, value: torch.Tensor, made: torch.Tensor) -> None:
        """Add what a forward pass has; the tensor, which may be shared, is left as it is.

        Args:
            value: What is summed up.
            made: What the pass made, to which its gradient comes back. Where it has none, and in compiled code, the
                pass is added at once.
        """
        if torch.compiler.is_compiling() or not made.requires_grad:
            if torch.compiler.is_compiling() or not in_backward():
                self.coming = _sum(self.coming, value)
            return
        waiting = [value]  # until the first gradient, of perhaps several

        def came_back(_: torch.Tensor) -> None:
            if waiting and making_gradients():
                self.coming = _sum(self.coming, waiting.pop())
            elif waiting:
                self.apart = _sum(self.apart, waiting.pop())

        made.register_hook(came_back)

    def end(self) -> None:
        """Count the passes so far."""
        if self.coming is not None:
            self.counted, self.coming = _sum(self.counted, self.coming), None

    def forget(self) -> None:
        """Leave out the passes that were counted, and those apart."""
        self.counted = self.apart = None

    def take(self) -> torch.Tensor | None:
        """The sum over all passes since it was last taken, and no more of it."""
        self.end()
        taken = self.apart if self.counted is None else self.counted
        self.counted = self.apart = None
        return taken


def _sum(sofar: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    return value if sofar is None else sofar + value.to(sofar.device)
