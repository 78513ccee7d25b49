"""Without gradients and with few tokens, as in generation, layers take a shorter way to the same result."""

from __future__ import annotations

from collections import Counter
from typing import Any

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dynalora
from dynalora.adapter import kernel
from tests.matrix.rows import ROWS, Row
from tests.toys import TOYS

LLAMA = TOYS["llama"]
VIEWS = ("view", "_unsafe_view", "t", "transpose", "slice", "detach", "alias", "unsqueeze", "reshape", "permute")


class Operations(TorchDispatchMode):
    """Counts what is computed, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def shaken(model: Any) -> Any:
    """Every parameter of the adapter moved away from its start."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_short_way_gives_what_the_long_way_gives(row: Row, dtype: torch.dtype) -> None:
    model = shaken(row.adapt(LLAMA, LLAMA.build().to(dtype)))
    for count in (1, 3, 40):
        tokens = torch.arange(count).remainder(11)[None]
        assert torch.is_grad_enabled()
        expected = model(input_ids=tokens).logits.detach()
        with torch.no_grad():
            found = model(input_ids=tokens).logits
        scale = float(expected.abs().max())
        tolerance = scale * (1e-5 if dtype == torch.float32 else 4e-2)
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def one_layer(config: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(16, 12))
    return shaken(peft.get_peft_model(base, config(r=4, target_modules=["0"], **more)).eval())


def computed(model: Any, x: torch.Tensor) -> Counter[str]:
    with torch.no_grad(), Operations() as operations:
        model(x)
    return operations.counts


def test_a_gated_token_costs_no_copy_and_one_operation_more_than_peft_lora() -> None:
    x = torch.randn(2, 1, 16)
    lora = computed(one_layer(peft.LoraConfig, lora_alpha=8), x)
    gated = computed(one_layer(dynalora.DiselConfig), x)
    plain = computed(one_layer(dynalora.DiraConfig, total_steps=2), x)
    assert "cat" not in gated
    assert "split_with_sizes" not in gated
    assert sum(gated.values()) == sum(lora.values()) + 1
    assert sum(plain.values()) == sum(lora.values()) - 2


def test_many_tokens_are_projected_at_once() -> None:
    model = one_layer(dynalora.DiselConfig)
    assert computed(model, torch.randn(2, 64, 16))["cat"] == 1


def test_the_short_way_reads_the_weights_as_they_are_now() -> None:
    """Nothing is kept between calls, so edits that torch does not see (`.data`) are followed, too."""
    model, x = one_layer(dynalora.DiselConfig), torch.randn(3, 16)
    layer = next(module for module in model.modules() if hasattr(module, "disel_gate_weight"))
    with torch.no_grad():
        model(x)
    for role in ("disel_gate_weight", "disel_gate_bias", "disel_down", "disel_up"):
        getattr(layer, role)["default"].data.mul_(-1.5)
        gates = torch.sigmoid(x @ layer.disel_gate_weight["default"].t() + layer.disel_gate_bias["default"])
        m = gates * (x @ layer.disel_down["default"].t())
        expected = layer.base_layer(x) + layer.scaling["default"] * m @ layer.disel_up["default"].t()
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_update_without_a_graph(tokens: int, frozen: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    result, up = torch.randn(1, tokens, 7).to(dtype), torch.randn(7, 3)
    more = torch.randn(7, 2) if frozen else None
    m = torch.randn(1, tokens, 5 if frozen else 3)
    matrix = up if more is None else torch.cat([up, more], 1)
    expected = result.double() + 0.5 * m.double() @ matrix.double().t()
    with torch.no_grad():
        found = kernel.add_low_rank(result, m, up, 0.5, True, more)
    assert found.dtype == dtype
    assert found.data_ptr() == result.data_ptr()
    tolerance = 1e-5 if dtype == torch.float32 else 0.06
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dira": (dynalora.DiraConfig, {"total_steps": 2}),
    "bottleneck": (dynalora.DiselConfig, {"gate_bottleneck": 3}),
    "normalized": (dynalora.DiselConfig, {"gate_normalize": True}),
    "dora": (dynalora.PedyraConfig, {"total_steps": 9, "use_dora": True}),
    "pissa": (dynalora.PedyraConfig, {"total_steps": 9, "init_weights": "pissa"}),
    "pedyra with gates": (dynalora.PedyraConfig, {"total_steps": 9, "gates": True}),
    "dislora": (dynalora.DisloraConfig, {"total_steps": 9}),
    "milora": (dynalora.MiloraConfig, {}),
    "dylora": (dynalora.DyloraConfig, {}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_else_is_there_is_not_passed_over(name: str) -> None:
    """Few tokens with and without gradients: the same whatever else stands around the layer."""
    config, options = VARIANTS[name]
    model, x = one_layer(config, **options), torch.randn(1, 3, 16)
    layer: Any = next(module for module in model.modules() if hasattr(module, "base_layer"))

    def same() -> torch.Tensor:
        expected = model(x).detach()
        with torch.no_grad():
            found: torch.Tensor = model(x)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        return found

    adapted = same()
    assert not torch.allclose(adapted, layer.base_layer(x))
    if layer.depends_on_input("default"):
        with layer.holding("default", torch.full((4,), 0.25)):
            assert not torch.allclose(same(), adapted)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(x), layer.base_layer(x), atol=0, rtol=0)
    seen: list[torch.Tensor] = []
    handle = layer.base_layer.register_forward_hook(lambda module, args, result: seen.append(result))
    same()
    handle.remove()
    for result in seen:
        if result.shape[:-1] == x.shape[:-1]:  # DoRA sends other rows through the base layer as well
            torch.testing.assert_close(
                result, layer.base_layer(x), atol=0, rtol=0
            )  # without the update, as it was seen
    handle = layer.base_layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    same()
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(same().float(), adapted, atol=0.1, rtol=0.1)
    model.train()
    same()


def test_dropout_acts_on_few_tokens_too() -> None:
    model, x = one_layer(dynalora.DiselConfig, dropout=0.5).train(), torch.randn(1, 3, 16)
    with torch.no_grad():
        assert not torch.allclose(model(x), model(x))
        assert torch.equal(model.eval()(x), model(x))


def test_products_one_by_one_for_frozen_components() -> None:
    """DisLoRA: for its trained components and for the others each two products, and none of the diagonal's parts is
    joined with another but those of the others."""
    found = computed(one_layer(dynalora.DisloraConfig, total_steps=9), torch.randn(2, 1, 16))
    base = computed(torch.nn.Linear(16, 12), torch.randn(2, 1, 16))
    assert found - base == Counter({"mm": 2, "addmm_": 2, "mul_": 2, "neg": 1, "cat": 1})
