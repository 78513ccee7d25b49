"""What every method promises on every model: start, disable, unload, delete, several adapters, selection."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

import dynalora
from dynalora.adapter.layer import AdapterLayer
from dynalora.errors import DynaloraError, UnsupportedError
from tests.matrix.rows import Row, every_method, every_row, every_toy, every_transformer
from tests.toys import TOYS, Toy, assert_same_state, snapshot


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}


def train(model: nn.Module, toy: Toy, steps: int = 3, lr: float = 1e-2) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        toy.loss(model, seed=step).backward()
        optimizer.step()
    model.eval()


def train_all(model: nn.Module, toy: Toy, steps: int = 3) -> None:
    """Train, and see that whatever trains has moved."""
    trainable = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train(model, toy, steps)
    after = dict(model.named_parameters())
    still = [name for name, before in trainable.items() if torch.equal(after[name], before)]
    assert still == []


# --- start ---------------------------------------------------------------------------------------------------


@every_toy
@every_row
def test_start_equals_base(row: Row, toy: Toy) -> None:
    base = toy.build()
    expected = toy.logits(base)
    row.assert_start(toy.logits(row.adapt(toy, base)), expected)


@every_toy
@every_row
def test_init_weights_false_changes_the_function(row: Row, toy: Toy) -> None:
    expected = toy.logits(toy.build())
    assert not torch.allclose(toy.logits(row.adapt(toy, init_weights=False)), expected, atol=1e-4)


@every_toy
@every_row
def test_every_target_is_adapted_and_nothing_else(row: Row, toy: Toy) -> None:
    model = row.adapt(toy)
    layers = adapted_layers(model)
    expected = {name for name, _ in toy.build().named_modules() if name.rsplit(".", 1)[-1] in toy.targets}
    assert {name.removeprefix("base_model.model.") for name in layers} == expected


@every_toy
@every_row
def test_only_adapter_parameters_train_and_all_of_them_move(row: Row, toy: Toy) -> None:
    model = row.adapt(toy)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    heads = {name for name in trainable if "modules_to_save" in name}
    assert all(row.prefix in name for name in trainable - heads)
    assert trainable - heads
    train_all(model, toy)


# --- the base stays what it was ------------------------------------------------------------------------------


@every_toy
@every_row
def test_training_then_unload_gives_the_base_back(row: Row, toy: Toy) -> None:
    base = toy.build()
    state, logits = snapshot(base), toy.logits(base)
    types = {name: type(module) for name, module in base.named_modules()}
    # Without a task type PEFT does not add a sequence classifier's head to modules_to_save.
    model = row.adapt(toy, base, task_type=None)
    train(model, toy)
    assert not torch.equal(toy.logits(model), logits)
    unloaded = model.unload()
    assert_same_state(unloaded, state)
    assert {name: type(module) for name, module in unloaded.named_modules()} == types
    assert torch.equal(toy.logits(unloaded), logits)


@every_toy
@every_row
def test_disable_gives_the_base_back(row: Row, toy: Toy) -> None:
    base = toy.build()
    logits = toy.logits(base)
    model = row.adapt(toy, base, init_weights=False)
    adapted = toy.logits(model)
    with model.disable_adapter():
        assert torch.equal(toy.logits(model), logits)
    assert torch.equal(toy.logits(model), adapted)


@every_method
def test_disabled_layers_stay_disabled_after_an_inner_block(row: Row) -> None:
    toy = TOYS["llama"]
    base = toy.build()
    logits = toy.logits(base)
    model = row.adapt(toy, base, init_weights=False)
    model.base_model.disable_adapter_layers()
    assert torch.equal(toy.logits(model), logits)
    model.base_model.enable_adapter_layers()
    assert not torch.equal(toy.logits(model), logits)


@every_toy
@every_row
def test_delete_leaves_the_base_and_no_trace(row: Row, toy: Toy) -> None:
    base = toy.build()
    logits = toy.logits(base)
    model = row.adapt(toy, base, init_weights=False)
    model.add_adapter("second", row.configure(toy, init_weights=False))
    model.set_adapter("second")
    model.delete_adapter("default")
    for name, layer in adapted_layers(model).items():
        assert traces_of(layer, "default") == [], name
    assert "default" not in model.peft_config
    model.delete_adapter("second")
    for name, layer in adapted_layers(model).items():
        assert traces_of(layer, "second") == [], name
    # PeftModel itself cannot be called without any adapter.
    assert torch.equal(toy.logits(model.base_model.model), logits)


def traces_of(layer: nn.Module, adapter: str) -> list[str]:
    """Names of the layer's containers that still know ``adapter``."""
    found = []
    for name, value in {**vars(layer), **dict(layer.named_children())}.items():
        if name in {"_parameters", "_buffers", "_modules", "base_layer"}:
            continue
        if isinstance(value, (nn.ParameterDict, nn.ModuleDict, dict, list, set, tuple)) and adapter in value:
            found.append(name)
    return found


# --- several adapters ----------------------------------------------------------------------------------------


@every_toy
@every_row
def test_adapters_are_independent(row: Row, toy: Toy) -> None:
    model = row.adapt(toy, init_weights=False, task_type=None)
    first = toy.logits(model)
    model.add_adapter("second", row.configure(toy, r=2, alpha=3, init_weights=False, task_type=None))
    assert torch.equal(toy.logits(model), first), "adding an adapter must not switch to it"
    model.set_adapter("second")
    second = toy.logits(model.eval())
    assert not torch.allclose(first, second, atol=1e-4)
    for layer in adapted_layers(model).values():
        assert layer.rank("default") == 4
        assert layer.rank("second") == 2
        trainable = {name.rsplit(".", 1)[-1] for name, p in layer.named_parameters() if p.requires_grad}
        assert "default" not in trainable
    train(model, toy)
    model.set_adapter("default")
    assert torch.equal(toy.logits(model.eval()), first)
    model.delete_adapter("second")
    assert torch.equal(toy.logits(model.eval()), first)


@every_method
def test_two_active_adapters_add_up(row: Row) -> None:
    toy = TOYS["mlp"]
    model = row.adapt(toy, init_weights=False)
    model.add_adapter("second", row.configure(toy, r=3, init_weights=False))
    layer = adapted_layers(model)["base_model.model.first"]
    x = toy.batch(1)["x"]
    outputs = {}
    with torch.no_grad():
        for active in (["default"], ["second"], ["default", "second"]):
            model.base_model.set_adapter(active)
            outputs[tuple(active)] = layer(x)
        base = layer.base_layer(x)
    update = outputs["default",] + outputs["second",] - 2 * base
    torch.testing.assert_close(outputs["default", "second"] - base, update, atol=1e-5, rtol=1e-5)


def test_different_methods_cannot_be_mixed_silently() -> None:
    """One PeftModel holds adapters of one method, as with PEFT's own; the refusal is an error, not a wrong result."""
    toy = TOYS["mlp"]
    model = peft.get_peft_model(toy.build(), dynalora.DiraConfig(target_modules=["first"], total_steps=5))
    with pytest.raises(Exception, match=r"(?i)type|method|dira"):
        model.add_adapter("other", dynalora.DiselConfig(target_modules=["first"], total_steps=5))


# --- which layers and how large ------------------------------------------------------------------------------


@every_toy
@every_row
def test_rank_and_alpha_patterns(row: Row, toy: Toy) -> None:
    chosen = toy.targets[0]
    model = row.adapt(toy, rank_pattern={chosen: 2}, alpha_pattern={chosen: 6})
    for name, layer in adapted_layers(model).items():
        rank, alpha = (2, 6) if name.endswith(chosen) else (4, 8)
        divisor = rank**0.5 if row.options.get("use_rslora") else rank
        assert layer.rank("default") == rank
        assert layer.scaling["default"] == pytest.approx(alpha / divisor)
        assert tuple(layer.used("down", "default").shape) == (rank, layer.in_features)
        assert tuple(layer.used("up", "default").shape) == (layer.out_features, rank)


@every_transformer
@every_method
def test_all_linear_adapts_all_but_the_head(row: Row, toy: Toy) -> None:
    model = row.adapt(toy, target_modules="all-linear")
    found = {name.removeprefix("base_model.model.") for name in adapted_layers(model)}
    linear = {
        name
        for name, module in toy.build().named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and name not in {"lm_head", "classifier"}
    }
    assert found == linear


@every_method
def test_exclude_modules(row: Row) -> None:
    toy = TOYS["llama"]
    model = row.adapt(toy, exclude_modules=["v_proj"])
    kinds = {name.rsplit(".", 1)[-1] for name in adapted_layers(model)}
    assert kinds == {"q_proj", "down_proj"}


@every_transformer
@every_method
def test_layers_to_transform(row: Row, toy: Toy) -> None:
    model = row.adapt(toy, layers_to_transform=[1])
    names = adapted_layers(model)
    everything = adapted_layers(row.adapt(toy))
    assert 0 < len(names) == len(everything) // 2
    assert all(".1." in name for name in names)


@every_toy
@every_row
def test_modules_to_save_train_and_are_saved(row: Row, toy: Toy, tmp_path: Any) -> None:
    base = toy.build()
    model = row.adapt(toy, copy.deepcopy(base), modules_to_save=list(toy.extra_modules))
    train(model, toy)
    head = {name: p for name, p in model.named_parameters() if "modules_to_save" in name}
    assert head
    assert all(p.requires_grad for p in head.values())
    expected = toy.logits(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(toy.logits(loaded), expected)
    with model.disable_adapter():
        assert torch.equal(toy.logits(model), toy.logits(base))


@every_method
@pytest.mark.parametrize("bias", ["none", "all"])
def test_bias(row: Row, bias: str) -> None:
    toy = TOYS["mlp"]
    model = row.adapt(toy, bias=bias)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    biases = {name for name in trainable if name.endswith(".bias")}
    assert bool(biases) == (bias == "all")


@every_method
def test_unsupported_layer_is_named(row: Row) -> None:
    toy = TOYS["llama"]
    with pytest.raises(UnsupportedError, match="RMSNorm") as caught:
        row.adapt(toy, target_modules=["input_layernorm"])
    assert "input_layernorm" in str(caught.value)


@every_method
def test_targets_that_match_nothing_say_what_exists(row: Row) -> None:
    toy = TOYS["llama"]
    with pytest.raises(ValueError, match="qkv_proj") as caught:
        row.adapt(toy, target_modules=["qkv_proj"])
    message = str(caught.value)
    assert "q_proj" in message.replace("qkv_proj", "")
    assert "down_proj" in message


@every_method
@pytest.mark.parametrize(
    ("field", "value"), [("r", 0), ("r", -3), ("alpha", -1), ("dropout", 1.5), ("dropout", -0.1), ("total_steps", 0)]
)
def test_bad_values_name_the_field(row: Row, field: str, value: float) -> None:
    toy = TOYS["mlp"]
    with pytest.raises(DynaloraError) as caught:
        row.configure(toy, **{field: value})
    assert field in str(caught.value)
    assert str(value) in str(caught.value)


@every_method
def test_rank_pattern_is_checked_too(row: Row) -> None:
    toy = TOYS["mlp"]
    with pytest.raises(DynaloraError, match="rank_pattern"):
        row.adapt(toy, rank_pattern={"first": 0})


@every_row
def test_dropout_acts_in_training_only(row: Row) -> None:
    toy = TOYS["mlp"]
    model = row.adapt(toy, init_weights=False, dropout=0.5)
    x = toy.batch(1)
    assert torch.equal(model(**x), model(**x))
    model.train()
    assert not torch.equal(model(**x), model(**x))


# --- injected without a PeftModel ----------------------------------------------------------------------------


@every_transformer
@every_method
def test_transformers_add_adapter(row: Row, toy: Toy, tmp_path: Any) -> None:
    reference = row.adapt(toy, init_weights=False, modules_to_save=None, task_type=None)
    model = toy.build()
    model.add_adapter(row.configure(toy, init_weights=False, task_type=None))
    layers = adapted_layers(model)
    assert {"base_model.model." + name for name in layers} == set(adapted_layers(reference))
    state = reference.state_dict()
    for name, tensor in model.state_dict().items():
        tensor.copy_(state["base_model.model." + name])
    assert torch.equal(toy.logits(model), toy.logits(reference))
    model.disable_adapters()
    assert torch.equal(toy.logits(model), toy.logits(toy.build()))
    model.enable_adapters()
    assert torch.equal(toy.logits(model), toy.logits(reference))


@every_row
def test_deepcopy_shares_nothing(row: Row) -> None:
    toy = TOYS["llama"]
    model = row.adapt(toy, init_weights=False)
    before, expected = snapshot(model), toy.logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(toy.logits(twin), expected)
    train(twin, toy)
    assert not torch.equal(toy.logits(twin), expected)
    assert_same_state(model, before)
    assert torch.equal(toy.logits(model), expected)
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in twin.parameters()}
