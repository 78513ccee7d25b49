"""Merging and the delta weight: exact for static methods, a clear refusal for the others."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import dynalora
from dynalora.errors import UnsupportedError
from tests.matrix.rows import Row, every_dynamic_row, every_static_row, every_toy
from tests.matrix.test_behaviour import adapted_layers
from tests.toys import TOYS, Toy, assert_same_state, snapshot


def stored_weight(layer: nn.Module) -> torch.Tensor:
    """The base weight as out × in; Conv1D stores it transposed."""
    weight = layer.get_base_layer().weight
    return weight.T if type(layer.get_base_layer()).__name__ == "Conv1D" else weight


@every_toy
@every_static_row
def test_delta_weight_is_what_the_forward_applies(row: Row, toy: Toy) -> None:
    if row.plain_factors:
        # Where the diagonal is all ones, and there is nothing else, the update is the product of the factors.
        model = peft.get_peft_model(toy.build(), row.configure(toy, init_weights=False))
        for layer in adapted_layers(model).values():
            down = getattr(layer, f"{row.prefix}down")["default"].detach().double()
            up = getattr(layer, f"{row.prefix}up")["default"].detach().double()
            delta = layer.delta_matrix("default")
            assert tuple(delta.shape) == (layer.out_features, layer.in_features)
            torch.testing.assert_close(delta.double(), layer.scaling["default"] * up @ down, atol=1e-6, rtol=1e-5)
    model = row.adapt(toy, init_weights=False).double()
    for layer in adapted_layers(model).values():
        delta = layer.delta_matrix("default").detach()
        assert tuple(delta.shape) == (layer.out_features, layer.in_features)
        x = torch.randn(5, layer.in_features, dtype=torch.float64)
        with torch.no_grad():
            update = layer(x) - layer.base_layer(x)
        torch.testing.assert_close(update, x @ delta.T, atol=1e-9, rtol=1e-7)
        if not row.alone:
            factor_up, factor_down = layer.factors("default")
            product = layer.scaling["default"] * factor_up @ factor_down
            torch.testing.assert_close(product.detach(), delta, atol=1e-12, rtol=1e-9)


@every_toy
@every_static_row
def test_merge_and_unmerge(row: Row, toy: Toy) -> None:
    base = toy.build()
    state = snapshot(base)
    model = row.adapt(toy, copy.deepcopy(base), init_weights=False, task_type=None)
    expected = toy.logits(model)
    deltas = {name: layer.delta_matrix("default").detach() for name, layer in adapted_layers(model).items()}
    before = {name: stored_weight(layer).detach().clone() for name, layer in adapted_layers(model).items()}

    model.merge_adapter()
    torch.testing.assert_close(toy.logits(model), expected, atol=1e-4, rtol=1e-4)
    for name, layer in adapted_layers(model).items():
        torch.testing.assert_close(stored_weight(layer), before[name] + deltas[name], atol=1e-6, rtol=1e-6)
    merged = snapshot(model)
    with pytest.warns(UserWarning, match="(?i)merged"):
        model.merge_adapter()
    assert_same_state(model, merged)

    model.unmerge_adapter()
    torch.testing.assert_close(toy.logits(model), expected, atol=1e-4, rtol=1e-4)
    for name, tensor in model.unload().state_dict().items():
        torch.testing.assert_close(tensor, state[name], atol=1e-6, rtol=1e-6)


@every_toy
@every_static_row
def test_disable_while_merged_gives_the_base(row: Row, toy: Toy) -> None:
    base = toy.build()
    expected = toy.logits(base)
    model = row.adapt(toy, base, init_weights=False)
    adapted = toy.logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(toy.logits(model), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(toy.logits(model), adapted, atol=1e-4, rtol=1e-4)


@every_toy
@every_static_row
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unload(row: Row, toy: Toy, safe: bool) -> None:
    base = toy.build()
    types = {name: type(module) for name, module in base.named_modules()}
    model = row.adapt(toy, base, init_weights=False, task_type=None)
    expected = toy.logits(model)
    merged = model.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(toy.logits(merged.eval()), expected, atol=1e-4, rtol=1e-4)
    assert {name: type(module) for name, module in merged.named_modules()} == types


@every_static_row
def test_safe_merge_refuses_nan_and_changes_nothing(row: Row) -> None:
    toy = TOYS["mlp"]
    model = row.adapt(toy, init_weights=False)
    layer = adapted_layers(model)["base_model.model.second"]
    getattr(layer, f"{row.prefix}down")["default"].data[0, 0] = float("nan")
    before = layer.get_base_layer().weight.detach().clone()
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)


@every_static_row
def test_merging_several_adapters(row: Row) -> None:
    toy = TOYS["gpt2"]
    model = row.adapt(toy, init_weights=False)
    model.add_adapter("second", row.configure(toy, r=2, init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    if row.alone:
        with pytest.raises(UnsupportedError, match="merge one at a time"):
            model.merge_adapter(adapter_names=["default", "second"])
        return
    expected = toy.logits(model.eval())
    model.merge_adapter(adapter_names=["default", "second"])
    torch.testing.assert_close(toy.logits(model), expected, atol=1e-4, rtol=1e-4)


@every_static_row
def test_merge_in_half_precision_keeps_the_dtype(row: Row) -> None:
    toy = TOYS["mlp"]
    model = row.adapt(toy, toy.build().to(torch.bfloat16), init_weights=False)
    expected = toy.logits(model).float()
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(toy.logits(merged).float(), expected, atol=0.1, rtol=0.1)


def refuses(action: Any) -> None:
    with pytest.raises(UnsupportedError) as caught:
        action()
    message = str(caught.value)
    assert "input" in message.lower(), message
    assert "\n" not in message.strip()


@every_toy
@every_dynamic_row
def test_input_dependent_updates_refuse_to_merge(row: Row, toy: Toy) -> None:
    model = row.adapt(toy, init_weights=False)
    state, expected = snapshot(model), toy.logits(model)
    refuses(model.merge_adapter)
    refuses(model.merge_and_unload)
    refuses(lambda: next(iter(adapted_layers(model).values())).get_delta_weight("default"))
    refuses(lambda: next(iter(adapted_layers(model).values())).factors("default"))
    assert_same_state(model, state)
    assert torch.equal(toy.logits(model), expected)


@pytest.mark.parametrize(
    "norm",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
    ],
    ids=["weight_norm", "spectral_norm", "prune"],
)
def test_a_weight_that_is_computed_at_every_call_is_not_merged_into(norm: Any) -> None:
    """What is added to it would be lost at the next call, in silence."""
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.ModuleDict({"fc": norm(nn.Linear(4, 4))}),
        dynalora.DiraConfig(r=2, target_modules=["fc"], exclude_modules=r".*parametrizations.*", init_weights=False),
    ).eval()
    layer = model.base_model.model["fc"]
    x = torch.randn(3, 4)
    before = layer(x)
    assert not torch.allclose(before, layer.base_layer(x))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UnsupportedError, match="cannot merge into fc, which computes its weight anew"):
            merge()
    torch.testing.assert_close(layer(x), before)
