"""Counting what a layer does, instead of timing it: a count is the same on every machine and at every run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Operations that only look at memory in another way, or ask for some.
FREE = (
    "view", "_unsafe_view", "t", "transpose", "slice", "detach", "alias", "unsqueeze", "squeeze", "reshape", "permute",
    "select", "expand", "split_with_sizes", "split", "empty", "empty_like", "new_empty",
    "new_empty_strided", "empty_strided",
)  # fmt: skip
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")


@dataclass
class Operations(TorchDispatchMode):
    """Counts what torch computes inside, views left out.

    Attributes:
        wide: Sizes of the tensors that are as wide as a layer's input or result.
        names: Of all operations, in order.
        products: Sizes (rows, inner, columns) of the matrix products.
        passes: Operations other than matrix products that read or write a wide tensor.
    """

    wide: frozenset[int] = frozenset()
    names: list[str] = field(default_factory=list)
    products: list[tuple[int, int, int]] = field(default_factory=list)
    passes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in FREE:
            return result
        self.names.append(name)
        if name in PRODUCTS:
            left, right = [tensor for tensor in args if isinstance(tensor, torch.Tensor)][-2:]
            self.products.append((left.shape[-2], left.shape[-1], right.shape[-1]))
        else:
            tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
            if any(tensor.numel() in self.wide for tensor in tensors):
                self.passes.append(name)
        return result

    @property
    def multiplications(self) -> int:
        """Multiplications of all matrix products."""
        return sum(math.prod(sizes) for sizes in self.products)


@dataclass(frozen=True)
class Work:
    """What a forward pass and its backward pass do; the first of two numbers is the forward pass's.

    Attributes:
        products: Matrix products.
        multiplications: The multiplications in them.
        passes: Other operations over tensors as wide as an input or a result.
        calls: All operations, views left out: on an accelerator each is at least one launch.
        saved: Numbers of bytes kept from the forward pass for the backward pass, each storage once, weights left out.
    """

    products: tuple[int, int]
    multiplications: tuple[int, int]
    passes: tuple[int, int]
    calls: tuple[int, int]
    saved: int


def work(model: torch.nn.Module, forward: Callable[[], list[torch.Tensor]], wide: frozenset[int]) -> Work:
    """Count a forward pass and its backward pass from gradients of ones.

    Args:
        model: Its weights and buffers are not counted among what is saved.
        forward: Runs the pass; its results are differentiated.
        wide: Sizes of tensors as wide as an input or a result.
    """
    held = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    alive: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        return tensor

    there, back = Operations(wide), Operations(wide)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), there:
        results = forward()
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}
    ones = [torch.ones_like(result) for result in results]
    with back:
        torch.autograd.backward(results, ones)
    return Work(
        products=(len(there.products), len(back.products)),
        multiplications=(there.multiplications, back.multiplications),
        passes=(len(there.passes), len(back.passes)),
        calls=(len(there.names), len(back.names)),
        saved=sum(size for address, size in sizes.items() if address not in held),
    )
