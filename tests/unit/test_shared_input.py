"""Layers that get the same input multiply it together, and nobody can tell by what they compute."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

import dynalora
from dynalora.adapter import layer as layer_module
from dynalora.adapter import shared_input
from dynalora.adapter.layer import AdapterLayer, adapter_layers
from tests.matrix.rows import ROWS, Row
from tests.toys import TOYS

LLAMA = TOYS["llama"]


class Attention(nn.Module):
    """Three projections of an input, or of two."""

    def __init__(self, width: int = 8, bias: bool = True) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, width // 2, bias=bias)
        self.v_proj = nn.Linear(width, width // 2, bias=bias)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None, parts: str = "qkv") -> torch.Tensor:
        inputs = {"q": x, "k": x if other is None else other, "v": x if other is None else other}
        return sum(getattr(self, f"{part}_proj")(inputs[part]).square().mean() for part in parts)


class Net(nn.Module):
    """One such module under a name."""

    def __init__(self, name: str = "attn", **options: Any) -> None:
        super().__init__()
        torch.manual_seed(5)
        setattr(self, name, Attention(**options))
        self.inner = name

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        return getattr(self, self.inner)(x, **options)


def adapted(config: type = dynalora.DiraConfig, name: str = "attn", **options: Any) -> Any:
    given = {"r": 2, "target_modules": ["q_proj", "k_proj", "v_proj"], "init_weights": False, "total_steps": 9}
    return peft.get_peft_model(Net(name), config(**{**given, **options})).train()


def x_of(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, 8, generator=generator).to(dtype).requires_grad_()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers of every product that is computed."""
    counts: list[int] = []
    multiply = shared_input.multiply

    def counted(x: torch.Tensor, wanted: Any) -> Any:
        counts.append(len(wanted))
        return multiply(x, wanted)

    monkeypatch.setattr(shared_input, "multiply", counted)
    return counts


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_module, "products_for", lambda *_: None)


def gradients(model: Any, run: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    result = run()
    result.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "result": result.detach().clone()}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = float(tensor.abs().max()) or 1.0
        torch.testing.assert_close(found[name], tensor, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_method_computes_what_it_computes_one_by_one(
    row: Row, dtype: torch.dtype, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = row.adapt(LLAMA, LLAMA.build().to(dtype), init_weights=False).train()
    tokens = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(1))

    def run() -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
        return loss

    found = gradients(model, run)
    assert calls  # by the toy's target modules: query and value, and others alone
    one_by_one(monkeypatch)
    assert_close(found, gradients(model, run), 2e-5 if dtype == torch.float32 else 0.06)


def test_three_projections_save_their_input_once(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision each alone would save its own copy of the input in the adapter's data type."""
    model = adapted(init_weights=True).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    x = x_of(dtype=torch.bfloat16)

    def saved() -> list[torch.Tensor]:
        kept: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(x)
        return [tensor for tensor in kept if tensor.shape[-1] == 8 and tensor.numel() == x.numel()]

    together = saved()
    assert calls == [3]
    # The input, and the query's result, which is as wide and which squaring it keeps.
    assert len({tensor.untyped_storage().data_ptr() for tensor in together}) == 2
    assert {tensor.dtype for tensor in together} == {torch.bfloat16}
    one_by_one(monkeypatch)
    assert len({tensor.untyped_storage().data_ptr() for tensor in saved()}) == 4


@pytest.mark.parametrize(
    "config", [dynalora.DiraConfig, dynalora.DiselConfig, dynalora.DisloraConfig, dynalora.MiloraConfig]
)
def test_gradients_of_gradients(config: type, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(config, r=2).double(), x_of(dtype=torch.float64)

    def second() -> dict[str, torch.Tensor]:
        def run() -> torch.Tensor:
            parameters = [p for p in model.parameters() if p.requires_grad]
            first = torch.autograd.grad(model(x), [x, *parameters], create_graph=True, allow_unused=True)
            return sum(grad.square().sum() for grad in first if grad is not None)

        return gradients(model, run)

    found = second()
    one_by_one(monkeypatch)
    assert_close(found, second(), 1e-9)


def test_a_layer_that_gets_another_input_or_is_not_called_computes_for_itself(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted()
    cases: list[dict[str, Any]] = [{"other": x_of(1)}, {"parts": "q"}, {"parts": "qv"}, {"parts": "vkq"}, {}]
    found = [gradients(model, lambda options=options: model(x_of(), **options)) for options in cases]
    assert calls == [3, 2, 3, 3, 1, 2, 1, 3]
    one_by_one(monkeypatch)
    for options, have in zip(cases, found, strict=True):
        assert_close(have, gradients(model, lambda options=options: model(x_of(), **options)), 1e-5)


def test_an_input_that_was_written_to_is_another_input(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    attention = model.base_model.model.attn

    def run() -> torch.Tensor:
        x = x_of().detach()
        with torch.no_grad():
            attention.q_proj(x)
        first = attention.q_proj(x).sum()
        x = x.clone()
        second = attention.k_proj(x).sum()
        return first + second

    found = gradients(model, run)
    with torch.no_grad():
        x = x_of().detach()
    attention.q_proj(x)
    x.add_(1)
    shifted = attention.k_proj(x).detach()
    one_by_one(monkeypatch)
    torch.testing.assert_close(shifted, attention.k_proj(x).detach())
    assert_close(found, gradients(model, run), 1e-5)


def test_what_nobody_comes_for_is_computed_no_more_from_the_next_step_on(calls: list[int]) -> None:
    model = adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(x_of(), parts="qv").backward()
        model(x_of(), parts="qv").backward()
        optimizer.step()
        optimizer.zero_grad()
    assert calls == [3, 3, 2, 2, 2, 2]


def test_keys_and_values_of_cross_attention_belong_together(calls: list[int]) -> None:
    model = adapted(name="encoder_attn")
    model(x_of(), other=x_of(1))
    assert calls == [1, 2]


def test_what_is_asked_with_and_what_is_attended_to_may_differ_in_width(calls: list[int]) -> None:
    """As in diffusers' models, whose cross-attention is called `attn2`."""
    net = Net("attn2")
    net.attn2.k_proj, net.attn2.v_proj = nn.Linear(6, 4), nn.Linear(6, 4)
    config = dynalora.DiraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"], init_weights=False, total_steps=9)
    model = peft.get_peft_model(net, config).train()
    model(x_of(), other=x_of()[..., :6].contiguous()).backward()
    assert calls == [1, 2]
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()

    def run(parts: str) -> torch.Tensor:
        result: torch.Tensor = torch.utils.checkpoint.checkpoint(
            lambda x: model(x, parts=parts), x_of(), use_reentrant=reentrant
        )
        return result

    found = [gradients(model, lambda parts=parts: run(parts)) for parts in ("qkv", "qk", "qkv")]
    assert 3 in calls
    one_by_one(monkeypatch)
    for parts, have in zip(("qkv", "qk", "qkv"), found, strict=True):
        assert_close(have, gradients(model, lambda parts=parts: run(parts)), 1e-5)


def layers_of(model: Any) -> dict[str, AdapterLayer]:
    return {name.rpartition(".")[2]: layer for name, layer in adapter_layers(model).items()}


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("forward hook", [2]),
        ("pre hook", [2]),
        ("backward hook", [2]),
        ("another forward", [2]),
        ("a weight that trains", [2]),
        ("another data type", [2, 1]),
        ("merged", [2]),
        ("a second adapter", [2]),
        ("dropout", []),
        ("switched off", []),
        ("autocast", [3]),
        ("without gradients", []),
    ],
)
def test_who_would_notice_computes_one_by_one(
    what: str, expected: list[int], calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(dropout=0.5) if what == "dropout" else adapted()
    layer = layers_of(model)["k_proj"]
    base: Any = layer.base_layer
    seen: list[str] = []
    if what == "forward hook":
        base.register_forward_hook(lambda *_: seen.append("k"))
    elif what == "pre hook":
        base.register_forward_pre_hook(lambda *_: seen.append("k"))
    elif what == "backward hook":
        base.register_full_backward_hook(lambda *_: seen.append("k"))
    elif what == "another forward":
        forward = base.forward
        base.forward = lambda x: seen.append("k") or forward(x)
    elif what == "a weight that trains":
        base.weight.requires_grad_(True)
    elif what == "another data type":
        for parameter in layer.adapter_parameters("default").values():
            parameter.data = parameter.data.double()
    elif what == "merged":
        layer.merge()
    elif what == "a second adapter":
        config = model.peft_config["default"]
        model.add_adapter("second", type(config)(r=1, target_modules=["k_proj"], total_steps=9, init_weights=False))
        model.base_model.set_adapter(["default", "second"])

    def run() -> torch.Tensor:
        with (
            torch.set_grad_enabled(what != "without gradients"),
            torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"),
        ):
            if what == "switched off":
                with model.disable_adapter():
                    result: torch.Tensor = model(x_of())
                    return result
            torch.manual_seed(3)
            result = model(x_of())
            return result

    found = run()
    if found.requires_grad:
        found.backward()
    assert calls == expected
    assert bool(seen) == (what in ("forward hook", "pre hook", "backward hook", "another forward"))
    if what == "a weight that trains":
        assert base.weight.grad is not None
    one_by_one(monkeypatch)
    torch.testing.assert_close(found, run(), rtol=1e-5, atol=1e-6)


def test_copies_compute_with_their_own_weights(calls: list[int]) -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers_of(twin).values():
            layer.parameter("up", "default").zero_()
    x = x_of()
    with twin.disable_adapter():
        base = twin(x)
    torch.testing.assert_close(twin(x), base)
    assert calls == [3]
    assert not torch.allclose(model(x), base)


def test_a_deleted_model_is_freed_at_once() -> None:
    gc.collect()
    gc.disable()
    try:
        model = adapted()
        model(x_of()).backward()
        layer = weakref.ref(layers_of(model)["k_proj"])
        del model
        assert layer() is None
    finally:
        gc.enable()


def test_what_is_left_of_an_earlier_pass_is_not_taken(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(), x_of()
    model(x, parts="q").backward()
    with torch.no_grad():
        layers_of(model)["v_proj"].parameter("up", "default").mul_(2)
    found = gradients(model, lambda: model(x, parts="v"))
    assert calls == [3, 1]
    one_by_one(monkeypatch)
    assert_close(found, gradients(model, lambda: model(x, parts="v")), 1e-6)


@pytest.mark.parametrize(
    "config", [dynalora.DiraConfig, dynalora.DiselConfig, dynalora.PedyraConfig, dynalora.MiloraConfig]
)
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=str)
def test_together_under_autocast(
    config: Any, weights: torch.dtype, given: torch.dtype, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As trainers do with `bf16=True`, and weights and inputs of either precision: the same data types come out."""
    model, x = adapted(config).to(weights), x_of(dtype=given)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()

    def step() -> dict[str, torch.Tensor]:
        model.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), "x": x.grad, **gradients}

    together = step()
    assert calls == [3]
    one_by_one(monkeypatch)
    apart = step()
    assert calls == [3]
    assert together.keys() == apart.keys()
    for name, value in apart.items():
        assert together[name].dtype == value.dtype, name
        scale = float(value.abs().max())
        torch.testing.assert_close(together[name], value, atol=0.03 * scale, rtol=0)


def test_autocast_keeps_no_cast_copy_of_a_weight() -> None:
    torch.manual_seed(0)
    model, x = adapted(), x_of()
    kept: list[torch.Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model(x)
    weights = [layer.base_layer.weight for layer in layers_of(model).values()]
    assert len(weights) == 3
    for weight in weights:
        copies = [tensor for tensor in kept if tensor.shape == weight.shape and tensor.dtype == torch.bfloat16]
        assert not any(torch.equal(copy, weight.bfloat16()) for copy in copies)


def test_autocast_leaves_double_precision_to_the_layer(calls: list[int]) -> None:
    model, x = adapted().double(), x_of(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        model(x).backward()
    assert calls == []
