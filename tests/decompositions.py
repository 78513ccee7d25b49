"""Decompositions as tests want them: all at once, in the order of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dynalora.spectral.decomposition import Triplets, decompose_each


def decompose(weights: list[Callable[[], Tensor]], ranks: list[int], **how: Any) -> list[Triplets]:
    """The triplets of every weight, as `decompose_each` finds them."""
    return [each for _, each in sorted(decompose_each(weights, ranks, **how), key=lambda pair: pair[0])]
