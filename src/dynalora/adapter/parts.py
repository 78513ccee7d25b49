"""Matrices that lie in the parameters of a module that never calls them as layers.

A `PartMatrix` is a linear layer that reads its matrix out of such a parameter, so that adapters wrap it as they wrap
any linear layer. `Parted` stands around the module, holds those layers, and computes with them what the module would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import nn


class PartMatrix(nn.Module):
    """A linear layer whose matrix is a part of another module's parameter; it has none of its own."""

    #: Where the owner has the bias, if that is a parameter of its own, which can train; empty if not.
    bias_name: ClassVar[str] = ""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple, so that it is no submodule

    @property
    def owner(self) -> Any:
        """The module that has the parameter."""
        return self._owner[0]

    @property
    def weight(self) -> torch.Tensor:
        """The matrix, (out, in): a view of the parameter."""
        raise NotImplementedError

    @property
    def bias(self) -> torch.Tensor | None:
        """What is added to the product, (out), or None."""
        return None

    # As PEFT reads the sizes of layers of other libraries.
    @property
    def input_size(self) -> int:
        """Numbers of an input."""
        return self.weight.shape[1]

    @property
    def output_size(self) -> int:
        """Numbers of an output."""
        return self.weight.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product: x (…, in) → (…, out)."""
        return nn.functional.linear(x, self.weight, self.bias)


class Parted(nn.Module):
    """Stands around a module whose parameters hold matrices that are adapted.

    Attributes:
        base_layer: The module, left as it is.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)  # what else is asked of the module

    def parts(self) -> Iterator[nn.Module]:
        """The layers that stand for the matrices, adapted or not."""
        raise NotImplementedError

    def is_used(self) -> bool:
        """Whether any part has an adapter."""
        return not all(isinstance(layer, PartMatrix) for layer in self.parts())

    def take_back_if_disabled(self) -> None:
        """Take merged updates out of the parameters where adapters are switched off, as layers do when they are called.

        To be called before the module computes with its parameters.
        """
        for layer in self.parts():
            if not isinstance(layer, PartMatrix):
                cast(Any, layer).take_back_if_disabled()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module alone, with its adapters merged if wanted; as PEFT's layers have it."""
        for layer in self.parts() if merge else ():
            if not isinstance(layer, PartMatrix):
                cast(Any, layer).merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer


def name_in_base_model(model: nn.Module, key: str) -> str:
    """What a parameter is called in a base model without adapters.

    Args:
        model: The base model, with what stands around some of its modules.
        key: The parameter's name in it.
    """
    module: Any = model
    parts = []
    for part in key.split("."):
        if not (part == "base_layer" and isinstance(module, Parted)):
            parts.append(part)
        module = getattr(module, part, None)
    return ".".join(parts)


def biases_of_parts(model: nn.Module) -> list[str]:
    """Names of the biases of adapted parts that are parameters of their own.

    Args:
        model: A model in which modules are parted.
    """
    return [
        f"{name}.base_layer.{matrix.bias_name}"
        for name, module in model.named_modules()
        for part in (module.parts() if isinstance(module, Parted) else ())
        if not isinstance(part, PartMatrix) and (matrix := cast(Any, part).get_base_layer()).bias_name
    ]


def acts(layer: Any, adapter_names: Sequence[str] | None = None) -> bool:
    """Whether a part computes something else than its matrix alone.

    Args:
        layer: The part.
        adapter_names: In mixed batches the adapters of the rows; None for those that are active.
    """
    if isinstance(layer, PartMatrix):
        return False
    names = layer.active_adapters if adapter_names is None else adapter_names
    return bool(not layer.disable_adapters and not layer.merged and any(map(layer.has_adapter, names)))


def of_part(layer: nn.Module, x: torch.Tensor, adapter_names: Sequence[str] | None = None) -> torch.Tensor:
    """What a part makes of an input, (rows, …, in) → (rows, …, out); in mixed batches with an adapter for each row."""
    if adapter_names is None or isinstance(layer, PartMatrix):
        return cast(torch.Tensor, layer(x))
    return cast(torch.Tensor, layer(x, adapter_names=adapter_names))
