"""Half precision, autocast, gradient checkpointing, compilation and quantised bases."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
import transformers
from torch import nn

from dynalora import DisloraConfig
from tests.matrix.rows import Row, every_method, every_row, every_static_row, every_toy, every_transformer
from tests.matrix.test_behaviour import adapted_layers, train
from tests.toys import MLP, TOYS, Toy, assert_same_state, llama, output_of, snapshot

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{prefix}.{name}": parameter
        for prefix, layer in adapted_layers(model).items()
        for name, parameter in layer.named_parameters()
        if not name.startswith("base_layer.")
    }


@every_toy
@every_row
@HALF
def test_half_precision_base(row: Row, toy: Toy, dtype: torch.dtype) -> None:
    base = toy.build().to(dtype)
    expected = toy.logits(base)
    # Without a task type, or a sequence classifier's head would be trained in half precision.
    start = toy.logits(row.adapt(toy, copy.deepcopy(base), task_type=None))
    if row.config is DisloraConfig:  # its start cancels within one sum, before anything is rounded
        assert torch.equal(start, expected)
    else:
        row.assert_start(start, expected)

    model = row.adapt(toy, copy.deepcopy(base), init_weights=False, task_type=None)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    logits = toy.logits(model)
    assert logits.dtype == dtype
    full = copy.deepcopy(model).float()
    scale = toy.logits(full).abs().max()
    assert (logits.float() - toy.logits(full)).abs().max() < 0.05 * scale
    train(model, toy)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    assert all(p.isfinite().all() for p in model.parameters())
    for layer in adapted_layers(model).values():
        assert layer.get_base_layer().weight.dtype == dtype


@every_method
def test_adapter_dtype_can_follow_the_base(row: Row) -> None:
    toy = TOYS["mlp"]
    base = toy.build().to(torch.bfloat16)
    model = peft.get_peft_model(base, row.configure(toy, init_weights=False), autocast_adapter_dtype=False).eval()
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.bfloat16}
    assert toy.logits(model).dtype == torch.bfloat16
    train(model, toy)


@every_toy
@every_row
def test_autocast(row: Row, toy: Toy) -> None:
    model = row.adapt(toy, init_weights=False)
    exact = toy.logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = toy.logits(model)
    # Apart: torch 2.6 would take the weights that were cast without gradients from autocast's cache.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = toy.loss(model.train())
    assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter_parameters(model).values())


@every_row
def test_autocast_matmuls_run_in_low_precision(row: Row) -> None:
    """Under autocast the layer's result has the dtype that the bare linear layer would have."""
    toy = TOYS["mlp"]
    layer = adapted_layers(row.adapt(toy, init_weights=False))["base_model.model.first"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = toy.batch(1)["x"]
        assert layer(x).dtype == layer.base_layer(x).dtype == torch.bfloat16


@every_transformer
@every_row
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(row: Row, toy: Toy, reentrant: bool) -> None:
    plain = row.adapt(toy, toy.build().double(), init_weights=False)
    checkpointed = copy.deepcopy(plain)
    checkpointed.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    for model in (plain, checkpointed):
        toy.loss(model.train()).backward()
    assert checkpointed.is_gradient_checkpointing if hasattr(checkpointed, "is_gradient_checkpointing") else True
    reference = adapter_parameters(plain)
    for name, parameter in adapter_parameters(checkpointed).items():
        expected = reference[name].grad
        assert expected is not None
        torch.testing.assert_close(parameter.grad, expected, atol=1e-12, rtol=1e-12)


@every_row
def test_gradients_match_finite_differences(row: Row) -> None:
    """The layer's own backward against numbers: input, factors and, where there are any, gates."""
    toy = TOYS["mlp"]
    if row.alone:
        pytest.skip("its norms are constants to the gradient, as DoRA has it, and not to finite differences")
    layer = adapted_layers(row.adapt(toy, toy.build().double(), init_weights=False))["base_model.model.first"]
    own = {n: p for n, p in layer.named_parameters() if not n.startswith("base_layer.")}
    assert {p.dtype for p in own.values()} == {torch.float64}
    x = torch.randn(2, 3, layer.in_features, dtype=torch.float64, requires_grad=True)

    def apply(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(own, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(apply, (x, *own.values()), atol=1e-6, rtol=1e-4)


@every_row
def test_frozen_input_needs_no_gradient(row: Row) -> None:
    toy = TOYS["mlp"]
    layer = adapted_layers(row.adapt(toy, init_weights=False))["base_model.model.first"]
    layer(toy.batch(1)["x"]).sum().backward()
    assert all(p.grad is not None for n, p in layer.named_parameters() if not n.startswith("base_layer."))
    assert layer.get_base_layer().weight.grad is None


@every_row
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (0, 12), (2, 0, 3, 12)], ids=str)
def test_input_shapes(row: Row, shape: tuple[int, ...]) -> None:
    layer = adapted_layers(row.adapt(TOYS["mlp"], init_weights=False))["base_model.model.first"]
    x = torch.randn(shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 20)
    if x.numel():
        torch.testing.assert_close(y.reshape(-1, 20), layer(x.reshape(-1, 12)), atol=1e-6, rtol=1e-5)


@every_row
def test_forward_does_not_write_to_its_input_or_the_base_result(row: Row) -> None:
    layer = adapted_layers(row.adapt(TOYS["mlp"], init_weights=False))["base_model.model.first"]
    x = torch.randn(4, 12)
    before = x.clone()
    kept: list[torch.Tensor] = []
    layer.base_layer.register_forward_hook(lambda module, args, output: kept.append(output.detach().clone()))
    layer(x)
    assert torch.equal(x, before)
    assert torch.equal(kept[0], nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias))


@every_row
def test_compile_without_graph_breaks(row: Row) -> None:
    toy = TOYS["mlp"]
    model = row.adapt(toy, init_weights=False)
    expected = toy.logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**toy.batch(5)).detach(), expected, atol=1e-5, rtol=1e-5)
    reference = copy.deepcopy(model)
    toy.loss(reference.train()).backward()
    compiled.train()
    loss = nn.functional.cross_entropy(compiled(**toy.batch(5)), torch.arange(6) % 3)
    loss.backward()
    wanted = adapter_parameters(reference)
    for name, parameter in adapter_parameters(model).items():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@every_method
def test_compile_with_inductor(row: Row) -> None:
    toy = TOYS["llama"]
    model = row.adapt(toy, init_weights=False)
    expected = toy.logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**toy.batch(5)).logits, expected, atol=1e-4, rtol=1e-4)


# --- quantised bases -----------------------------------------------------------------------------------------


def quantised_mlp(bits: int) -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(11)
    model = MLP(width_in=64, width=64)
    for name in ("first", "second"):
        linear = getattr(model, name)
        bias = linear.bias is not None
        if bits == 4:
            new = bitsandbytes.nn.Linear4bit(
                64, 64, bias=bias, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=True
            )
        else:
            new = bitsandbytes.nn.Linear8bitLt(64, 64, bias=bias, has_fp16_weights=False, threshold=6.0)
        new.load_state_dict(linear.state_dict())
        setattr(model, name, new.to("cpu"))
    return model.eval()


@every_row
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_linear(row: Row, bits: int) -> None:
    toy = TOYS["mlp"]
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = quantised_mlp(bits)
        # The 4-bit state is packed at the first call.
        expected = forward_on(base, x)
        quantised_state = snapshot(base)
        model = row.adapt(toy, base)
        setattr(base, f"is_loaded_in_{bits}bit", True)
        assert len(adapted_layers(model)) == 2
        row.assert_start(forward_on(model, x), expected)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x=x).float(), torch.arange(6) % 3).backward()
            optimizer.step()
        assert not torch.equal(forward_on(model, x), expected)
        with model.disable_adapter():
            assert torch.equal(forward_on(model, x), expected)
        assert torch.equal(forward_on(model.unload(), x), expected)
        assert_same_state(base, quantised_state)


@every_static_row
def test_merging_into_4_bits_after_use(row: Row) -> None:
    """A 4-bit layer that has computed before has its weights in another order; merging must know."""
    toy = TOYS["mlp"]
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = quantised_mlp(4)
        plain = forward_on(base, x)
        model = row.adapt(toy, base, init_weights=False)
        adapted = forward_on(model, x)
        model.merge_adapter()
        merged = forward_on(model, x)
    # What is merged is quantised again: close, but not equal.
    assert (merged - adapted).norm() < 0.2 * (adapted - plain).norm() + 0.1 * plain.norm()


def forward_on(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return output_of(model.eval()(x=x))


@every_method
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_transformer_through_from_pretrained(row: Row, bits: int, tmp_path: object) -> None:
    pytest.importorskip("bitsandbytes")
    toy = TOYS["llama"]
    llama(width=128).save_pretrained(tmp_path)  # 4-bit weights come in blocks of 64
    quantisation = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=quantisation, dtype=torch.float32
        )
        expected = toy.logits(base)
        model = row.adapt(toy, base)
        row.assert_start(toy.logits(model), expected)
        train(model, toy)
        assert not torch.equal(toy.logits(model), expected)
        with model.disable_adapter():
            assert torch.equal(toy.logits(model), expected)
