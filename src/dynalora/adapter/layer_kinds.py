"""Layers that are no plain product with a matrix: convolutions and embeddings, in the shared form.

Every layer here is a linear map of vectors that it takes out of its input, so it has a matrix (out, in), and an update
of low rank is the same as everywhere: `up` (out, r), `down` (r, in), a diagonal between them.

* A convolution multiplies every patch of its input, (channels per group × kernel) numbers, with its flattened weight.
  The products of all patches with `down` are a convolution with r outputs, those with `up` one with a kernel of 1.
  Groups multiply different channels with different rows of the weight: they share `down` and have their own rows of
  `up`.
* An embedding multiplies a vector that is 1 at a token's place and 0 elsewhere: `down` is looked up.

So methods know nothing of it. What they need of an input besides products is asked of a `LayerKind`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import nn

from dynalora.common.private import convolve, padded_input
from dynalora.errors import UnsupportedError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LayerKind(ABC):
    """How a layer that is no plain product is the product with a matrix.

    Attributes:
        in_features: Columns of the matrix.
        out_features: Its rows.
        length: The length of a vector that it multiplies, next to that of one of as many numbers around 1; a start
            that is drawn for the latter is divided by it.
        integers: Whether the layer's input are indices, which no dtype but their own can hold.
        told: Attributes of such layers that models ask for (Whisper reads its convolutions' stride).
    """

    name: ClassVar[str]
    told: ClassVar[tuple[str, ...]]
    in_features: int
    out_features: int
    length: float = 1.0
    integers: bool = False

    @abstractmethod
    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The layer's weight as a matrix (out, in)."""

    @abstractmethod
    def weight(self, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix (out, in) in the layout of the layer's weight."""

    @abstractmethod
    def multiply(self, base: Any, x: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        """The products of all vectors in the layer's input with matrices (·, in), side by side: (…, k)."""

    @abstractmethod
    def add(self, base: Any, result: torch.Tensor, m: torch.Tensor, up: torch.Tensor, scaling: float) -> torch.Tensor:
        """The layer's result with `scaling · up · m` added, for narrow activations m (…, k) and up (out, k)."""

    @abstractmethod
    def squares(self, base: Any, x: torch.Tensor) -> torch.Tensor:
        """Sums of the squares of all vectors in the layer's input, and their number: (in + 1)."""

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """What `stand_in` makes such a layer of, in JSON's types."""

    @abstractmethod
    def plain(self, name: str, down: torch.Tensor, up: torch.Tensor) -> dict[str, torch.Tensor]:
        """The factors as PEFT's LoRA names and shapes them.

        Args:
            name: The layer's name.
            down: (r, in).
            up: (out, r).

        Raises:
            UnsupportedError: PEFT's LoRA computes something else in such a layer.
        """


class Convolution(LayerKind):
    """`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`, with stride, padding, dilation and groups."""

    name = "convolution"
    told = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")

    def __init__(self, base: Any) -> None:
        self.shape: tuple[int, ...] = tuple(base.weight.shape)
        self.out_features, self.in_features = self.shape[0], math.prod(self.shape[1:])
        self.groups: int = base.groups
        self.dilation: tuple[int, ...] = tuple(base.dilation)
        self.padding_mode: str = base.padding_mode
        self.spatial = len(self.shape) - 2

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The flattened weight, (out, channels per group × kernel)."""
        return weight.flatten(1)

    def weight(self, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix in the weight's shape."""
        return matrix.reshape(self.shape)

    def multiply(self, base: Any, x: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        """The products of all patches: (batch, …, k), or (batch, groups, …, k)."""
        matrix = torch.cat(tuple(matrices)) if len(matrices) > 1 else matrices[0]
        kernels = matrix.reshape(len(matrix), *self.shape[1:])
        if self.groups == 1:
            return convolve(base, x, kernels).movedim(-1 - self.spatial, -1)
        products = convolve(base, x, kernels.repeat(self.groups, *[1] * (kernels.ndim - 1)))
        grouped: torch.Tensor = products.unflatten(-1 - self.spatial, (self.groups, -1))
        return grouped.movedim(-1 - self.spatial, -1)

    def add(self, base: Any, result: torch.Tensor, m: torch.Tensor, up: torch.Tensor, scaling: float) -> torch.Tensor:
        """A convolution with a kernel of 1, added."""
        m = m.to(result.dtype).movedim(-1, -1 - self.spatial)
        if self.groups > 1:
            m = m.flatten(-2 - self.spatial, -1 - self.spatial)
        one: Any = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[self.spatial - 1]
        kernels = up.to(result.dtype).reshape(*up.shape, *[1] * self.spatial)
        update = cast(torch.Tensor, one(m, kernels, groups=self.groups)).to(result.dtype)
        return result + scaling * update

    def patches(self, base: Any, x: torch.Tensor) -> torch.Tensor:
        """All patches of an input: (patches, in)."""
        x = padded_input(base, x if x.ndim == self.spatial + 2 else x[None])
        x = x.unflatten(1, (self.groups, -1))
        for dim, (size, stride, dilation) in enumerate(
            zip(base.kernel_size, base.stride, base.dilation, strict=True), start=3
        ):
            x = x.unfold(dim, dilation * (size - 1) + 1, stride)
        steps: Any = (..., *(slice(None, None, dilation) for dilation in base.dilation))
        x = x[steps]
        return x.movedim(2, 2 + self.spatial).flatten(0, 1 + self.spatial).flatten(1)

    def squares(self, base: Any, x: torch.Tensor) -> torch.Tensor:
        """Sums of the squares of all patches, and their number: (in + 1)."""
        patches = self.patches(base, x.detach().to(torch.promote_types(x.dtype, torch.float32)))
        squares = patches.square().sum(0)
        return torch.cat([squares, squares.new_full((1,), len(patches))])

    def described(self) -> dict[str, Any]:
        """The weight's shape, and what PEFT's LoRA does not copy; see `LayerKind.described`."""
        return {
            "kind": self.name,
            "shape": list(self.shape),
            "groups": self.groups,
            "dilation": list(self.dilation),
            "padding_mode": self.padding_mode,
        }

    def plain(self, name: str, down: torch.Tensor, up: torch.Tensor) -> dict[str, torch.Tensor]:
        """Two convolutions; see `LayerKind.plain`."""
        if self.groups > 1 or set(self.dilation) != {1} or self.padding_mode != "zeros":
            raise UnsupportedError(
                f"cannot export {name!r} as a plain LoRA: in convolutions with groups, dilation or a padding other "
                "than zeros PEFT's LoRA computes something else; keep the adapter, or merge it with "
                "merge_and_unload()."
            )
        return {
            "lora_A.weight": down.reshape(len(down), *self.shape[1:]),
            "lora_B.weight": up.reshape(*up.shape, *[1] * self.spatial),
        }


class Embedding(LayerKind):
    """`nn.Embedding`, and those of transformers that multiply what they look up with a number (`embed_scale`)."""

    name = "embedding"
    told = ("num_embeddings", "embedding_dim", "padding_idx")
    integers = True

    def __init__(self, base: Any) -> None:
        self.in_features, self.out_features = base.num_embeddings, base.embedding_dim
        self.length = base.num_embeddings**-0.5

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The transposed weight, (embedding, tokens)."""
        return weight.t()

    def weight(self, matrix: torch.Tensor) -> torch.Tensor:
        """The transposed matrix, (tokens, embedding)."""
        return matrix.t()

    def multiply(self, base: Any, x: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        """The matrices' columns of all tokens: x (…) → (…, k)."""
        # One by one: joined, all of their columns would be copied for the few that are looked up.
        parts = [nn.functional.embedding(x, matrix.t(), padding_idx=base.padding_idx) for matrix in matrices]
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]

    def add(self, base: Any, result: torch.Tensor, m: torch.Tensor, up: torch.Tensor, scaling: float) -> torch.Tensor:
        """The products with `up`, as the base layer's own with its `embed_scale`, added."""
        update = nn.functional.linear(m.to(result.dtype), up.to(result.dtype)).to(result.dtype)
        if (scale := getattr(base, "embed_scale", None)) is not None:
            update = update * (scale.to(update) if isinstance(scale, torch.Tensor) else scale)
        return result + scaling * update

    def squares(self, base: Any, x: torch.Tensor) -> torch.Tensor:
        """How often every token comes, and how many there are: (tokens + 1)."""
        counts = torch.bincount(x.flatten(), minlength=self.in_features)
        return torch.cat([counts, counts.sum()[None]]).float()

    def described(self) -> dict[str, Any]:
        """The weight's shape; see `LayerKind.described`."""
        return {"kind": self.name, "shape": [self.in_features, self.out_features]}

    def plain(self, name: str, down: torch.Tensor, up: torch.Tensor) -> dict[str, torch.Tensor]:
        """PEFT's factors of an embedding; see `LayerKind.plain`."""
        return {"lora_embedding_A": down, "lora_embedding_B": up}


def kind_of(base: nn.Module) -> LayerKind | None:
    """What kind of layer a module is, if it is one that can be adapted and no plain product; else None."""
    own = type(base).forward
    if any(isinstance(base, kind) and own is kind.forward for kind in _CONVOLUTIONS) and _has_weight(base):
        return Convolution(base)
    if isinstance(base, nn.Embedding) and base.max_norm is None and _has_weight(base):
        scaled = hasattr(base, "embed_scale") and base.__class__.__module__.startswith("transformers.")
        if own is nn.Embedding.forward or scaled:
            return Embedding(base)
    return None


def _has_weight(base: nn.Module) -> bool:
    # Parametrised layers compute theirs anew at every call, so that nothing could be merged into it.
    return isinstance(base._parameters.get("weight"), nn.Parameter) and base.weight.is_floating_point()  # type: ignore[operator]


def stand_in(described: Any, dtype: torch.dtype) -> nn.Module:
    """A layer of a kind, with a weight of zeros that takes no memory.

    Args:
        described: What `LayerKind.described` said of it.
        dtype: The weight's.

    Raises:
        ValueError: Nobody said so of a layer.
    """
    kind, shape = described.get("kind"), described.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and 0 < size < 2**31 for size in shape):
        raise ValueError(f"a weight of shape {shape!r}")
    layer: nn.Module
    if kind == Embedding.name and len(shape) == 2:
        layer = nn.Embedding(shape[0], shape[1], device="meta")
    elif kind == Convolution.name and 3 <= len(shape) <= 5:
        groups = described.get("groups", 1)
        settings = {name: described[name] for name in ("dilation", "padding_mode") if name in described}
        make: Any = _CONVOLUTIONS[len(shape) - 3]
        layer = make(shape[1] * groups, shape[0], shape[2:], groups=groups, bias=False, device="meta", **settings)
    else:
        raise ValueError(f"a {kind!r} with a weight of shape {shape!r}")
    layer.weight = nn.Parameter(torch.zeros((), dtype=dtype).expand(shape), requires_grad=False)
    return layer
