"""The plain form of an update, `s · (d ⊙ h) @ [up, frozen].T`, with its gradients written out.

It is computed within the products of an input ([`adapter.shared_input`][dynalora.adapter.shared_input]), where autograd
sees one function for a group of layers. Nodes of their own for every layer's gates, product with the diagonal and
addition would cost more time than what they compute, wherever a device is faster than Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch

from dynalora.adapter.kernel import cast_sides, gradient_of_columns, scaled_product


class Update(NamedTuple):
    """How the products with an adapter's matrices become its update, `s · (d ⊙ h) @ [up, frozen].T`.

    Attributes:
        scaling: The factor `s`.
        up: Trained columns of the up factor, (out, r).
        frozen: Columns that never train, (out, k); None for none.
        diagonal: The part of `d` that is the same for all tokens, (r + k); None for all ones.
        gate_bias: With gates, which multiply the diagonal: b_g of σ(gate_scale · z + b_g), (r), where z are the first r
            products. None without gates.
        gate_scale: The factor of z.
    """

    scaling: float
    up: torch.Tensor
    frozen: torch.Tensor | None = None
    diagonal: torch.Tensor | None = None
    gate_bias: torch.Tensor | None = None
    gate_scale: float = 1.0

    @property
    def present(self) -> tuple[bool, ...]:
        """Which of its tensors there are, in their order."""
        return tuple(tensor is not None for tensor in self[1:5])

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those that are there."""
        return tuple(tensor for tensor in self[1:5] if tensor is not None)

    def split(self, products: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """h (tokens, r + k), and the gates (tokens, r), or None, of the products with the matrices."""
        if self.gate_bias is None:
            return products, None
        count = self.gate_bias.shape[0]
        z, h = products.split([count, products.shape[1] - count], dim=1)
        return h, torch.sigmoid((z if self.gate_scale == 1.0 else z * self.gate_scale) + self.gate_bias)

    def pass_on(self, h: torch.Tensor, gates: torch.Tensor | None) -> torch.Tensor:
        """`d ⊙ h`, (tokens, r + k)."""
        d = self.diagonal if gates is None else gates if self.diagonal is None else gates * self.diagonal
        return h if d is None else h * d


def update_gradients(
    grad: torch.Tensor | None,
    products: torch.Tensor | None,
    middle: tuple[torch.Tensor, torch.Tensor | None],
    update: Update,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of an update in the products that it is made of, and in its tensors.

    Args:
        grad: The gradient of the layer's result, (tokens, out).
        products: The products with the adapter's matrices, (tokens, ·). They may be None where nothing needs them: with
            neither gates nor a diagonal that trains, and unless gradients are differentiated again.
        middle: What `update.pass_on` made of them, (tokens, r + k), and the gates or None.
        update: The update.
        wanted: Which of its tensors need a gradient.
    """
    _, up, frozen, diagonal, bias, gate_scale = update
    of_up: torch.Tensor | None = None
    of_diagonal: torch.Tensor | None = None
    of_bias: torch.Tensor | None = None
    if grad is None:
        return None, *(None for _ in update.tensors)
    m, gates = middle
    h = products
    if products is not None and torch.is_grad_enabled():  # so that second derivatives see how both were computed
        h, gates = update.split(products)
        m = update.pass_on(h, gates)
    elif products is not None and bias is not None:
        h = products[:, bias.shape[0] :]
    narrow, columns = cast_sides(m, up, frozen, grad.dtype)
    if wanted[0]:
        of_up = gradient_of_columns(narrow[:, : up.shape[1]], grad, update.scaling, up.dtype)
    of_m = scaled_product(grad, columns, update.scaling).to(m.dtype)
    of_products = of_m if diagonal is None else of_m * diagonal
    if gates is None:
        if diagonal is not None and wanted[1 + (frozen is not None)]:
            of_diagonal = (of_m * cast(torch.Tensor, h)).sum(0).to(diagonal.dtype)
    else:
        h = cast(torch.Tensor, h)
        of_gates = of_products * h
        of_products = of_products * gates
        if diagonal is not None and wanted[1 + (frozen is not None)]:
            of_diagonal = (of_m * h * gates).sum(0).to(diagonal.dtype)
        of_logits = torch.ops.aten.sigmoid_backward(of_gates, gates)
        if wanted[-1]:
            of_bias = of_logits.sum(0).to(cast(torch.Tensor, bias).dtype)
        of_logits = of_logits if gate_scale == 1.0 else of_logits * gate_scale
        of_products = torch.cat([of_logits, of_products], dim=1)
    grads = ((up, of_up), (frozen, None), (diagonal, of_diagonal), (bias, of_bias))
    return of_products, *(gradient for tensor, gradient in grads if tensor is not None)
