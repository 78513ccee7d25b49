"""The plain form of an update, and its gradients, against autograd of the form as it is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynalora.adapter.shared_input import Factors, multiply
from dynalora.adapter.update import Update, update_gradients

Form = Callable[..., torch.Tensor]


def parts(
    tokens: int, out: int, r: int, frozen: int, diagonal: bool, gates: bool, seed: int
) -> tuple[Update, torch.Tensor, torch.Tensor]:
    """An update, products with its matrices, and a gradient of its result, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    frozen = 0 if gates else frozen
    update = Update(
        scaling=1.7,
        up=draw(out, r).requires_grad_(),
        frozen=draw(out, frozen) if frozen else None,
        diagonal=draw(r + frozen).requires_grad_() if diagonal else None,
        gate_bias=draw(r).requires_grad_() if gates else None,
        gate_scale=0.3 if gates else 1.0,
    )
    products = draw(tokens, 2 * r if gates else r + frozen).requires_grad_()
    return update, products, draw(tokens, out)


def written_out(update: Update, products: torch.Tensor) -> torch.Tensor:
    """`s · (d ⊙ h) @ [up, frozen].T`, with d = σ(c · z + b) ⊙ diagonal where there are gates."""
    d = torch.ones(products.shape[1], dtype=products.dtype)
    h = products
    if update.gate_bias is not None:
        r = len(update.gate_bias)
        z, h = products[:, :r], products[:, r:]
        d = 1 / (1 + torch.exp(-(update.gate_scale * z + update.gate_bias)))
    if update.diagonal is not None:
        d = d * update.diagonal
    columns = update.up if update.frozen is None else torch.cat([update.up, update.frozen], dim=1)
    return update.scaling * (h * d) @ columns.mT


shapes = given(
    tokens=st.integers(1, 6), out=st.integers(1, 7), r=st.integers(1, 4), frozen=st.integers(0, 3),
    diagonal=st.booleans(), gates=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip


@shapes
def test_gradients_are_those_of_autograd(
    tokens: int, out: int, r: int, frozen: int, diagonal: bool, gates: bool, seed: int
) -> None:
    update, products, grad = parts(tokens, out, r, frozen, diagonal, gates, seed)
    wanted = [tensor.requires_grad for tensor in update.tensors]
    inputs = [products, *(tensor for tensor in update.tensors if tensor.requires_grad)]
    expected = iter(torch.autograd.grad(written_out(update, products), inputs, grad))
    with torch.no_grad():
        h, openings = update.split(products)
        found = update_gradients(grad, products, (update.pass_on(h, openings), openings), update, wanted)
    for gradient, wants in zip(found, [True, *wanted], strict=True):
        if wants:
            torch.testing.assert_close(gradient, next(expected), rtol=1e-10, atol=1e-10)
        else:
            assert gradient is None


@pytest.mark.parametrize(("frozen", "diagonal", "gates"), [(0, False, False), (2, True, False), (0, True, True)])
def test_gradients_of_gradients_are_those_of_finite_differences(frozen: int, diagonal: bool, gates: bool) -> None:
    """Two layers with one input, one of which makes its update elsewhere."""
    update, _, _ = parts(3, 4, 2, frozen, diagonal, gates, seed=1)
    generator = torch.Generator().manual_seed(2)
    x, down, frozen_down, gate, weight, other = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 5), (2, 5), (frozen, 5), (2, 5), (4, 5), (3, 5))
    )
    trained = [x, down, gate, *(tensor for tensor in update.tensors if tensor.requires_grad)]
    trained = [tensor.detach().clone().requires_grad_() for tensor in trained]

    def result(x: torch.Tensor, down: torch.Tensor, gate: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        left = iter(rest)
        here = Update(
            update.scaling,
            next(left),
            update.frozen,
            next(left) if diagonal else None,
            next(left) if gates else None,
            update.gate_scale,
        )
        matrices = (*((gate,) if gates else ()), down, *((frozen_down,) if frozen else ()))
        first, second = multiply(
            x, [Factors("a", weight, None, matrices, here), Factors("b", other, None, (down,), None)]
        )
        return torch.cat([first.fill().result, second.fill().result, second.narrow], dim=1)

    used = trained if gates else [*trained[:2], *trained[3:]]
    run: Form = result if gates else lambda x, down, *rest: result(x, down, trained[2], *rest)
    assert torch.autograd.gradcheck(run, used)
    assert torch.autograd.gradgradcheck(run, used)
