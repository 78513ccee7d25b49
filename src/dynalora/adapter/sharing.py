"""Parameters that several layers use: one owner, many users.

A layer reads, besides its own, parameters of all layers of its kind: those whose names differ in the number of the
block only, and whose sizes agree. Every parameter stays that of the layer that owns it. So it is saved once, under its
owner's name, every user's gradient is added to the one that it has, and what reads a layer's update (merging, export,
spectra) finds the parameters of others where the layer itself does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn

from dynalora.adapter.layer import AdapterLayer
from dynalora.errors import UnsupportedError

# The first number between dots: that of the block.
_BLOCK = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")


class SharingLayer(AdapterLayer):
    """A layer that uses parameters of others.

    Attributes:
        peers: By adapter and role, where the layers of this one's kind keep the parameter, this layer included, in the
            order of their blocks. They are the containers and not the layers, which would hold each other; so a layer
            that is taken off the model, as merged ones are one by one, leaves its part to the others.
    """

    takes_factors = False  # factors are not one layer's own

    def __init__(self, base_layer: nn.Module, quantization: dict[str, Any] | None = None) -> None:
        super().__init__(base_layer, quantization)
        self.peers: dict[str, dict[str, list[nn.ParameterDict]]] = {}

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from this layer."""
        super().delete_adapter(adapter_name)
        self.peers.pop(adapter_name, None)

    @property
    def kind(self) -> tuple[str, int, int]:
        """What this layer has in common with those that it shares with: name without its block, and sizes."""
        return _BLOCK.sub("#", self.name, count=1), self.out_features, self.in_features

    def peer_parameters(self, role: str, adapter: str) -> list[torch.Tensor]:
        """A parameter of all layers that an adapter shares with, this one included, in the order of their blocks.

        Raises:
            UnsupportedError: Sharded training has those of the other layers in pieces just now.
        """
        peers = [cast(torch.Tensor, container._parameters[adapter]) for container in self.peers[adapter][role]]
        if any(peer.ndim != 2 or hasattr(peer, "full_tensor") for peer in peers):
            raise UnsupportedError(
                f"{type(self.drivers[adapter].config).__name__} (adapter {adapter!r}) does not train under FSDP1 or "
                f"FSDP2, which hold the factors of layers that do not compute now in pieces, and {self.name!r} uses "
                "those of all layers of its kind; train it under DistributedDataParallel."
            )
        return peers


def join(layers: Iterable[SharingLayer], adapter: str, roles: Sequence[str]) -> None:
    """Let the layers of an adapter know those of their kinds.

    Args:
        layers: All layers of the adapter.
        adapter: Its name.
        roles: The parameters that they share.
    """
    kinds: dict[tuple[str, int, int], list[SharingLayer]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, []).append(layer)
    for peers in kinds.values():
        peers.sort(key=lambda layer: int(number[0]) if (number := _BLOCK.search(layer.name)) else 0)
        for layer in peers:
            layer.peers[adapter] = {
                role: [getattr(peer, f"{peer.method_name}_{role}") for peer in peers] for role in roles
            }
