"""Nobody who looks at a layer sees that the update is added in place: hooks, torch.func, forward mode, tracers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap

from tests.matrix.rows import Row, every_method, every_row
from tests.toys import TOYS

MLP = TOYS["mlp"]


def adapted(row: Row) -> Any:
    torch.manual_seed(0)
    return row.adapt(MLP, init_weights=False)


@every_row
def test_full_backward_hooks_run_and_change_nothing(row: Row) -> None:
    def run(where: str) -> tuple[list[torch.Tensor], list[nn.Module], list[torch.Tensor]]:
        model = adapted(row)
        bases = [module for name, module in model.named_modules() if name.endswith("base_layer")]
        seen: list[nn.Module] = []
        outputs: list[torch.Tensor] = []

        def hook(module: nn.Module, *_: Any) -> None:
            if module in bases:
                seen.append(module)

        def forward_hook(module: nn.Module, _: Any, output: Any) -> None:
            if module in bases:
                outputs.append(output)

        handles = []
        every = torch.nn.modules.module
        if where == "layers":
            handles = [base.register_full_backward_hook(hook) for base in bases]
        elif where == "everywhere":
            handles = [every.register_module_full_backward_hook(hook)]
        elif where == "forward":
            handles = [every.register_module_forward_hook(forward_hook)]
        x = MLP.batch(3)["x"].requires_grad_()
        try:
            model(x=x).square().sum().backward()
        finally:
            for handle in handles:
                handle.remove()
        return [p.grad for p in model.parameters() if p.grad is not None], seen, outputs

    expected, _, _ = run("nowhere")
    for where, wanted in (("layers", 2), ("everywhere", 2), ("forward", 0)):
        gradients, seen, outputs = run(where)
        assert len(set(seen)) == wanted
        assert bool(outputs) == (where == "forward")
        for mine, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@every_row
def test_per_sample_gradients_by_torch_func(row: Row) -> None:
    model = adapted(row)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    fixed = {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers()) if name not in trained}
    x = MLP.batch(4)["x"]

    def loss(parameters: dict[str, torch.Tensor], one: torch.Tensor) -> torch.Tensor:
        return functional_call(model, {**fixed, **parameters}, kwargs={"x": one[None]}).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(trained, x)
    reference = copy.deepcopy(model)
    for index, one in enumerate(x):
        reference.zero_grad()
        reference(x=one[None]).square().sum().backward()
        for name, parameter in reference.named_parameters():
            if name in each and parameter.grad is not None:
                torch.testing.assert_close(each[name][index], parameter.grad, rtol=1e-3, atol=1e-4)


@every_row
def test_forward_mode_agrees_with_finite_differences(row: Row) -> None:
    model = adapted(row).double()
    x = MLP.batch(4)["x"].double()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(x=forward_ad.make_dual(x, direction))).tangent
    with torch.no_grad():
        slope = (model(x=x + 1e-6 * direction) - model(x=x - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(tangent, slope, rtol=1e-5, atol=1e-6)


@every_row
def test_a_trace_computes_the_same(row: Row) -> None:
    model = adapted(row)
    x, other = MLP.batch(4)["x"], MLP.batch(5)["x"]
    with torch.no_grad():
        expected = model(x=other)
    traced = torch.jit.trace(model.base_model.model, (x,), check_trace=False)
    torch.testing.assert_close(traced(other), expected, rtol=1e-5, atol=1e-6)


@every_method
def test_an_exported_program_computes_the_same(row: Row) -> None:
    """`torch.export`, which ONNX's exporter begins with."""
    if row.config.method not in ("dira", "disel", "dislora", "pedyra"):
        pytest.skip("the others add the same way, and an export takes a second")
    model = adapted(row)
    x, other = MLP.batch(4)["x"], MLP.batch(5)["x"]
    with torch.no_grad():
        program = torch.export.export(model.base_model.model, (x,), strict=False)
        torch.testing.assert_close(program.module()(other), model(x=other), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_row
def test_trained_weights_cast_by_a_trainer(row: Row, dtype: torch.dtype) -> None:
    """Frozen components follow: the start stays that of the base model, to the precision of the weights."""
    model = row.adapt(MLP).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    x = MLP.batch(4)["x"]
    with model.disable_adapter():
        base = model(x=x)
    logits = model(x=x)
    assert (logits - base).abs().max() < 0.05 * base.abs().max()
    logits.sum().backward()
    assert all(
        p.grad is not None and p.grad.dtype == dtype for n, p in model.named_parameters() if n.endswith("up.default")
    )
