"""Optimizers that step copies of the weights: DeepSpeed's ZeRO, and wrappers that train half precision in float32.

Such an optimizer has tensors of its own, often one flat vector for all weights, or this process's piece of it, and
the weights are written anew after its step. What a method adds to a weight's gradient never reaches it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from dynalora.common.private import pieces_of_zero


def has_copies(owned: Sequence[torch.Tensor], parameters: Iterable[torch.Tensor]) -> bool:
    """Whether an optimizer steps copies of parameters, none of which it steps itself.

    Args:
        owned: The optimizer's parameters.
        parameters: Those of an adapter.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    pieces = pieces_of_zero(trained)
    if pieces:
        memory = {tensor.untyped_storage().data_ptr() for tensor in owned}
        here = [piece for piece in pieces if piece is not None]
        if here:
            return any(piece.untyped_storage().data_ptr() in memory for piece in here)
        return all(tensor.ndim == 1 for tensor in owned)  # else it is another model's
    precise = [tensor for tensor in owned if tensor.dtype == torch.float32]
    return any(
        _is_copy(parameter.detach(), tensor)
        for parameter in trained
        if parameter.dtype in (torch.float16, torch.bfloat16) and not hasattr(parameter, "to_local")
        for tensor in precise
    )


def _is_copy(parameter: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether a tensor in float32 has the values of a parameter, or begins with them."""
    if hasattr(tensor, "to_local") or tensor.device != parameter.device:
        return False
    flat = tensor.ndim == 1 and tensor.numel() >= parameter.numel() > 0
    if not flat and tensor.shape != parameter.shape:
        return False
    begun = tensor.detach().reshape(-1)[: parameter.numel()].to(parameter.dtype)
    return bool(begun.any()) and torch.equal(begun, parameter.reshape(-1))
