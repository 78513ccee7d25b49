"""What layers multiply one input with, all in one: their base weights and the matrices of their adapters.

Query, key and value projections get the same tensor, and so do the two first projections of a gated MLP. Each alone
would save the input for its backward pass, read it twice for its adapter, and give autograd two gradients of it (the
base weight's and the adapter's) to add up. Together they save it once; the adapters' matrices are one product in the
forward pass and two in the backward pass; and all gradients of the input are added up inside the products that
compute them, which takes no pass of its own. Where the update is the plain form it is added there as well, so that a
group of layers takes one call of Python in the backward pass: on an accelerator such calls are what a step waits for.

Which layers belong together is guessed from their names when an adapter is made (`COMPANIONS`). In the forward pass the
first of them computes for the others, too, and they take their part if they are called with the very same tensor, one
after the other; one that is not computes for itself, and is no longer computed for from the next optimizer step on. The
model's own code knows nothing of it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn

from dynalora.adapter.kernel import cast_sides
from dynalora.adapter.update import Update, update_gradients
from dynalora.common.private import in_backward, transforming, version

if TYPE_CHECKING:
    from dynalora.adapter.layer import AdapterLayer

#: Names of layers of one module that get the same input, in the order in which they are called.
COMPANIONS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
    ("linear", "linear_v"),
)
#: Parts of the names of modules that attend to something else than they ask with: only keys and values belong together.
CROSS_ATTENTION = ("cross", "encoder_attn", "encdecattention")


class Factors(NamedTuple):
    """What a layer multiplies its input with.

    Attributes:
        adapter: The adapter that acts.
        weight: The base weight, (out, in).
        bias: The base bias, (out), or None.
        matrices: The adapter's matrices, (·, in) each.
        update: What becomes of the products with them; None where the layer has more to do than that.
    """

    adapter: str
    weight: torch.Tensor
    bias: torch.Tensor | None
    matrices: tuple[torch.Tensor, ...]
    update: Update | None


class Products(NamedTuple):
    """What comes of it, for all tokens in one row.

    Attributes:
        factors: What was multiplied with.
        x: The input, (tokens, in), in the data type of the base product.
        result: The place of the layer's result, (tokens, out); see `fill`.
        narrow: The products with the adapter's matrices, (tokens, ·).
        m: What of them meets the columns of `up`, (tokens, r + k); None where the layer makes the update itself.
    """

    factors: Factors
    x: torch.Tensor
    result: torch.Tensor
    narrow: torch.Tensor
    m: torch.Tensor | None

    @torch.no_grad()
    def fill(self) -> Products:
        """Compute the base layer's result when its layer is called, and add the update into it if it is known how.

        Earlier, another layer's result would push it out of the processor's cache.
        """
        _, weight, bias, _, update = self.factors
        dtype = self.x.dtype  # under autocast the weight may have another
        weight = weight.to(dtype)
        if bias is None:
            torch.mm(self.x, weight.t(), out=self.result)
        else:
            torch.addmm(bias.to(dtype), self.x, weight.t(), out=self.result)
        if update is not None and self.m is not None:
            m, up = cast_sides(self.m, update.up, update.frozen, dtype)
            self.result.addmm_(m, up.t(), alpha=update.scaling)
        return self


class _Layout(NamedTuple):
    """Which of the tensors that `_Multiply` is given belong to a layer.

    Attributes:
        matrices: How many matrices meet the input.
        present: Which tensors of its update there are, in `Update`'s order; none where the update is not made here.
        scaling: The factor of the update.
        gate_scale: That of the gates' products.
    """

    matrices: int
    present: tuple[bool, ...] = ()
    scaling: float = 1.0
    gate_scale: float = 1.0

    @classmethod
    def of(cls, factors: Factors) -> _Layout:
        """That of a layer."""
        count, update = len(factors.matrices), factors.update
        if update is None:
            return cls(count)
        return cls(count, update.present, update.scaling, update.gate_scale)

    def update(self, tensors: Iterator[torch.Tensor]) -> Update:
        """The update of tensors that come one after the other."""
        up, frozen, diagonal, bias = (next(tensors) if there else None for there in self.present)
        return Update(self.scaling, cast(torch.Tensor, up), frozen, diagonal, bias, self.gate_scale)


class _Multiply(torch.autograd.Function):
    """Every base product of one input, its products with matrices, and updates made of those, in one backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        layouts: tuple[_Layout, ...],
        dtype: torch.dtype,
        middles: list[torch.Tensor | None],
        *tensors: torch.Tensor,
    ) -> Any:
        layers, count = len(layouts), sum(layout.matrices for layout in layouts)
        weights, matrices = tensors[:layers], tensors[layers : layers + count]
        ctx.set_materialize_grads(False)
        results = [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]  # filled when they are wanted
        narrow = nn.functional.linear(x.to(dtype), _stack(matrices).to(dtype))
        sizes, first = [], 0
        for layout in layouts:
            sizes.append(sum(matrix.shape[0] for matrix in matrices[first : first + layout.matrices]))
            first += layout.matrices
        narrows = narrow.split(sizes, dim=1) if layers > 1 else (narrow,)
        parts, kept = iter(tensors[layers + count :]), []
        trains = {id(tensor) for tensor, needed in zip(tensors, ctx.needs_input_grad[4:], strict=True) if needed}
        for products, layout in zip(narrows, layouts, strict=True):
            if not layout.present:
                middles.append(None)
                continue
            update = layout.update(parts)
            h, gates = update.split(products)
            m = update.pass_on(h, gates)
            middles.append(m)
            behind_only = gates is None and update.diagonal is not None and id(update.diagonal) not in trains
            kept += [None if behind_only else products, m, gates]
        ctx.save_for_backward(x, *tensors, *kept)
        ctx.layouts, ctx.sizes, ctx.dtype = layouts, sizes, dtype
        return *results, *narrows

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        ctx.done = True
        layouts, needed = ctx.layouts, ctx.needs_input_grad[4:]
        layers, count = len(layouts), sum(layout.matrices for layout in layouts)
        weights, matrices, tensors = tensors[:layers], tensors[layers : layers + count], tensors[layers + count :]
        place, first, of_parts = layers + count, 0, []
        parts, kept = iter(tensors[: len(needed) - place]), iter(tensors[len(needed) - place :])
        wide, narrows = grads[:layers], list(grads[layers:])
        for index, layout in enumerate(layouts):
            mine = matrices[first : first + layout.matrices]
            first += layout.matrices
            if not layout.present:
                continue
            end = place + sum(layout.present)
            products, middle = next(kept), (next(kept), next(kept))
            if products is None and torch.is_grad_enabled():
                products = nn.functional.linear(x.to(ctx.dtype), _stack(mine).to(ctx.dtype))
            of_products, *of_update = update_gradients(
                wide[index], products, middle, layout.update(parts), needed[place:end]
            )
            # Nobody else has seen these products, unless the gradient itself is differentiated.
            narrows[index] = _sum(narrows[index], None if of_products is None else of_products.to(ctx.dtype))
            of_parts += of_update
            place = end
        narrow, grad_x = _joined(narrows, ctx.sizes), None
        if ctx.needs_input_grad[0]:
            for grad, weight in zip(wide, weights, strict=True):
                grad_x = _add_product(grad_x, grad, weight)
            grad_x = _add_product(grad_x, narrow, _stack(matrices))
        seen = [grad is not None for grad, layout in zip(narrows, layouts, strict=True) for _ in range(layout.matrices)]
        wanted = [a and b for a, b in zip(seen, needed[layers : layers + count], strict=True)]
        rows = _row_gradients(narrow, x, matrices, wanted)
        return grad_x, None, None, None, *(None for _ in range(layers)), *rows, *of_parts


def _stack(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(tuple(matrices))


def _sum(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    """The sum of two gradients; None counts as zero."""
    if one is None or other is None:
        return one if other is None else other
    return one + other


def _joined(grads: Sequence[torch.Tensor | None], sizes: Sequence[int]) -> torch.Tensor | None:
    """The gradients of all narrow products side by side, (tokens, ·), with zeros for those that were not used."""
    known = next((grad for grad in grads if grad is not None), None)
    if known is None or len(grads) == 1:
        return known
    parts = [
        known.new_zeros(known.shape[0], size) if grad is None else grad for grad, size in zip(grads, sizes, strict=True)
    ]
    return torch.cat(parts, dim=1)


def _add_product(total: torch.Tensor | None, left: torch.Tensor | None, right: torch.Tensor) -> torch.Tensor | None:
    """`total + left @ right`, in place where nothing is to be differentiated again; None counts as zero."""
    if left is None:
        return total
    if total is None:
        return left @ right.to(left.dtype)
    left, right = left.to(total.dtype), right.to(total.dtype)
    return torch.addmm(total, left, right) if torch.is_grad_enabled() else total.addmm_(left, right)


def _row_gradients(
    narrow: torch.Tensor | None, x: torch.Tensor, matrices: Sequence[torch.Tensor], wanted: Sequence[bool]
) -> list[torch.Tensor | None]:
    """The gradients of the matrices that train, in one product."""
    grads: list[torch.Tensor | None] = [None] * len(matrices)
    trained = [index for index, wants in enumerate(wanted) if wants]
    if narrow is None or not trained:
        return grads
    sizes = [matrix.shape[0] for matrix in matrices]
    if len(trained) < len(matrices):
        columns = narrow.split(sizes, dim=1)
        narrow = torch.cat([columns[index] for index in trained], dim=1)
    rows = (narrow.t() @ x.to(narrow.dtype)).split([sizes[index] for index in trained])
    for index, gradient in zip(trained, rows, strict=True):
        grads[index] = gradient
    return grads


def multiply(x: torch.Tensor, wanted: Sequence[Factors]) -> list[Products]:
    """Multiply one input with all that layers want; the base layers' results are still to be filled in.

    Args:
        x: The input, (…, in).
        wanted: What each layer wants, with matrices of one dtype.
    """
    matrices = [matrix for factors in wanted for matrix in factors.matrices]
    flat, dtype, device = x.reshape(-1, x.shape[-1]), matrices[0].dtype, x.device.type
    layouts = tuple(_Layout.of(factors) for factors in wanted)
    weights = (factors.weight for factors in wanted)
    parts = (tensor for factors in wanted if factors.update is not None for tensor in factors.update.tensors)
    if torch.is_autocast_enabled(device):
        # Base weights are cast for each product anew, as autocast does where they do not train, and not kept so.
        dtype = torch.get_autocast_dtype(device)
        flat = flat.to(dtype)
    middles: list[torch.Tensor | None] = []
    made: Any = _Multiply.apply(flat, layouts, dtype, middles, *weights, *matrices, *parts)  # type: ignore[no-untyped-call]
    flat = flat.detach()
    return [Products(factors, flat, made[i], made[len(wanted) + i], middles[i]) for i, factors in enumerate(wanted)]


class _Waiting(threading.local):
    """What was computed for layers that are to be called next, thread by thread.

    Attributes:
        leader: The layer that computed it.
        x: Its input, and `version` what that was when it was read.
        products: What it computed, by layer.
    """

    leader: AdapterLayer | None = None
    x: torch.Tensor | None = None
    version: int = 0
    products: dict[AdapterLayer, Products] = {}  # noqa: RUF012 - never written to, only replaced

    def take(self, layer: AdapterLayer, x: torch.Tensor) -> Products | None:
        """What was computed for a layer, if this is the input that it was computed of; else none is kept for others."""
        if not self.products:
            return None
        assert self.leader is not None
        stale = getattr(next(iter(self.products.values())).result.grad_fn, "done", False)
        if self.x is not x or self.version != version(x) or layer is self.leader or stale:
            if not in_backward():  # where checkpointing stops a repeated pass as soon as it has what it needs
                self.leader.companions.missed(self.products)
            self.leader, self.x, self.products = None, None, {}
            return None
        products = self.products.pop(layer, None)
        if products is not None:
            self.leader.companions.came(layer)
        if not self.products:
            self.leader = self.x = None
        return products

    def keep(self, leader: AdapterLayer, x: torch.Tensor, products: dict[AdapterLayer, Products]) -> None:
        """Keep what was computed for other layers until they are called."""
        if not self.products:
            self.leader, self.x, self.version, self.products = leader, x, version(x), products


_waiting = _Waiting()


class Companions:
    """The layers that are expected to get the same input right after a layer.

    They only change between optimizer steps: a forward pass that gradient checkpointing repeats must do as the first
    one did.

    Attributes:
        layers: These layers. They hold nothing of this one, so that no cycle keeps a deleted model alive.
    """

    def __init__(self, layers: Iterable[AdapterLayer] = ()) -> None:
        self.layers = list(layers)
        self._came: set[AdapterLayer] = set()
        self._missed: set[AdapterLayer] = set()
        self._steps = 0

    def came(self, layer: AdapterLayer) -> None:
        """Note that a layer came for what was computed for it."""
        self._came.add(layer)

    def missed(self, layers: Iterable[AdapterLayer]) -> None:
        """Note that layers did not come."""
        self._missed.update(layers)

    def at(self, steps: int) -> list[AdapterLayer]:
        """The layers to compute for, after a number of optimizer steps."""
        if self._steps != steps and not in_backward():
            self.layers = [layer for layer in self.layers if layer in self._came or layer not in self._missed]
            self._came, self._missed, self._steps = set(), set(), steps
        return self.layers


def products_for(layer: AdapterLayer, x: torch.Tensor) -> Products | None:
    """A layer's products with its input, in training, with its result filled in; None where it must multiply by itself.

    Args:
        layer: The layer.
        x: Its input, (…, in).
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    products = _waiting.take(layer, x)
    if products is not None:
        return products.fill()
    factors = layer.factors_of_input(x)
    if factors is None or transforming():
        return None
    together = {layer: factors}
    companions = layer.companions
    if companions.layers and not _waiting.products:
        for other in companions.at(layer.drivers[factors.adapter].optimizer_steps):
            theirs = other.factors_of_input(x)
            if theirs is not None and theirs.matrices[0].dtype == factors.matrices[0].dtype:
                together[other] = theirs
    mine, *others = multiply(x, list(together.values()))
    if others:
        _waiting.keep(layer, x, dict(zip([*together][1:], others, strict=True)))
    return mine.fill()


def join_companions(layers: dict[str, AdapterLayer]) -> None:
    """Tell layers, by name, which others are expected to get the same input after them."""
    for name, layer in layers.items():
        owner, _, last = name.rpartition(".")
        row = next((row for row in COMPANIONS if last in row), ())
        if any(part in owner.lower() for part in CROSS_ATTENTION):
            row = row[1:]  # what is asked with comes from elsewhere
        after = row[row.index(last) + 1 :] if last in row else ()
        others = (layers.get(f"{owner}.{other}" if owner else other) for other in after)
        # Keys of another width are of another input, as in the cross-attention of diffusers' models.
        same = (other for other in others if other is not None and other.in_features == layer.in_features)
        layer.companions = Companions(same)
