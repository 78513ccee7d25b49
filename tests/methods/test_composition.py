"""Gates on top of methods that learn ranks: DISeL's gates with DiRA's penalty, and with PE-DyRA's moving ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch

import dynalora
from dynalora import DiraConfig, DiselConfig, PedyraConfig
from dynalora.adapter.layer import AdapterLayer
from dynalora.errors import ConfigError, UnsupportedError
from dynalora.export import held_gates
from tests.driver.loops import trainable
from tests.toys import TOYS

TOY = TOYS["mlp"]


def adapted(config: type, **options: Any) -> Any:
    torch.manual_seed(0)
    settings = {"r": 4, "alpha": 8, "target_modules": list(TOY.targets), "total_steps": 12}
    if options.get("gates") or config is DiselConfig:
        settings["gate_bias_init"] = 0.0
    return peft.get_peft_model(TOY.build(), config(**{**settings, **options}))


def layers_of(model: Any) -> list[AdapterLayer]:
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    TOY.loss(model, seed=seed).backward()
    optimizer.step()


MOVING = {"adjust_start": 2, "adjust_interval": 1, "adjust_end": 6, "adjust_size": 1, "match_step": False}


@pytest.mark.parametrize("options", [{}, {"gate_normalize": True}, {"gate_bottleneck": 2}], ids=str)
@pytest.mark.parametrize("config", [DiraConfig, PedyraConfig], ids=["dira", "pedyra"])
def test_the_update_is_gates_times_the_methods_own(config: type, options: dict[str, Any]) -> None:
    model = adapted(config, gates=True, init_weights=False, **options).double()
    layer = layers_of(model)[0]
    x = torch.randn(7, 12, dtype=torch.float64)
    role = {name: p.detach() for name, p in layer.adapter_parameters("default").items()}
    weight = role["gate_out"] @ role["gate_in"] if options.get("gate_bottleneck") else role["gate_weight"]
    logits = x @ weight.t() * (12**-0.5 if options.get("gate_normalize") else 1.0) + role["gate_bias"]
    d = torch.sigmoid(logits) * role.get("e", torch.ones(4, dtype=torch.float64))
    expected = layer.base_layer(x) + 2 * (d * (x @ role["down"].t())) @ role["up"].t()
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("match", [True, False])
def test_gates_on_dira_without_a_penalty_are_disel(match: bool) -> None:
    after = {}
    for config, options in ((DiselConfig, {}), (DiraConfig, {"gates": True, "penalty_weight": 0.0})):
        model = adapted(config, match_step=match, **options)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.3)
        for seed in range(3):
            step(model, optimizer, seed)
        after[config] = [p for layer in layers_of(model) for p in layer.adapter_parameters("default").values()]
    assert len(after[DiselConfig]) == 8
    assert all(one.equal(two) for one, two in zip(*after.values(), strict=True))


def test_the_penalty_is_on_the_factors_and_not_on_the_gates() -> None:
    moved = {}
    options = {"gates": True, "match_step": False, "init_weights": False, "penalty_schedule": "constant"}
    for weight in (0.0, 0.3):
        model = adapted(DiraConfig, penalty_weight=weight, **options)
        before = [
            {role: p.detach().clone() for role, p in layer.adapter_parameters("default").items()}
            for layer in layers_of(model)
        ]
        step(model, torch.optim.SGD(trainable(model), lr=1.0), 0)
        moved[weight] = [
            {role: p.detach() - old[role] for role, p in layer.adapter_parameters("default").items()}
            for layer, old in zip(layers_of(model), before, strict=True)
        ]
    for old, free, penalised in zip(before, moved[0.0], moved[0.3], strict=True):
        up, down = old["up"], old["down"]
        more = 0.3 * up * (down.norm(dim=1) / up.norm(dim=0))
        torch.testing.assert_close(penalised["up"], free["up"] - more, atol=1e-5, rtol=1e-4)
        for role in ("gate_weight", "gate_bias"):
            assert penalised[role].equal(free[role])
            assert penalised[role].any()


@pytest.mark.parametrize("room", [None, 8], ids=["exact", "reserved"])
@pytest.mark.parametrize("bottleneck", [None, 2], ids=["full", "bottleneck"])
def test_gates_move_with_the_ranks(bottleneck: int | None, room: int | None, tmp_path: Path) -> None:
    model = adapted(PedyraConfig, gates=True, gate_bottleneck=bottleneck, max_rank=room, gate_bias_init=-1.0, **MOVING)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for seed in range(5):
        step(model, optimizer, seed)
    for group in optimizer.param_groups:  # from here on only the adjustment changes anything
        group["lr"] = 0.0
    role = "gate_out" if bottleneck else "gate_weight"
    before = [
        {name: layer.used(name, "default").detach().clone() for name in ("down", "e", role, "gate_bias")}
        for layer in layers_of(model)
    ]
    step(model, optimizer, 5)
    # One triple has moved at every adjustment, or has been exchanged for a new one of the same layer.
    assert sum(layer.rank("default") for layer in layers_of(model)) == 8
    grown = 0
    for layer, old in zip(layers_of(model), before, strict=True):
        now = {name: layer.used(name, "default").detach() for name in old}
        assert {len(tensor) for tensor in now.values()} == {layer.rank("default")}
        places = {tuple(row): index for index, row in enumerate(old["down"].tolist())}
        stayed = [places[tuple(row)] for row in now["down"].tolist() if tuple(row) in places]
        new = layer.rank("default") - len(stayed)
        for name, tensor in now.items():
            assert tensor[: len(stayed)].equal(old[name][stayed]), name
        # The newcomer changes nothing yet, and its gate begins as the first ones did.
        assert not now["e"][len(stayed) :].any()
        assert now["gate_bias"][len(stayed) :].tolist() == [-1.0] * new
        assert now[role][len(stayed) :].any() or not new
        grown += new
    assert grown == 1
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(TOY.build(), tmp_path)
    torch.testing.assert_close(TOY.logits(loaded), TOY.logits(model), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("config", [DiraConfig, PedyraConfig], ids=["dira", "pedyra"])
def test_gated_adapters_have_no_fixed_update_until_their_gates_are_held(config: type, tmp_path: Path) -> None:
    model = adapted(config, gates=True, init_weights=False)
    with pytest.raises(UnsupportedError, match="depends on the input"):
        model.merge_adapter()
    layers = layers_of(model)
    x = torch.randn(50, 12)
    inputs = {layers[0].name: x, layers[1].name: torch.randn(50, 20)}
    record = [
        SimpleNamespace(
            module=layer.name,
            mean=layer.gates(inputs[layer.name], "default").mean(0),
            mean_square=layer.gates(inputs[layer.name], "default").square().mean(0),
        )
        for layer in layers
    ]
    with held_gates(model, record):
        held = TOY.logits(model)
    assert dynalora.export_lora(model, tmp_path / "lora", gates=record).max_error < 1e-6
    plain = peft.PeftModel.from_pretrained(TOY.build(), tmp_path / "lora")
    torch.testing.assert_close(TOY.logits(plain), held, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        layers[0].parameter("gate_bias", "default")[2] = -40.0
    record[0].mean_square[2] = 0.0
    if config is PedyraConfig:  # its ranks may be cut once they have settled
        for parameter in trainable(model):
            parameter.requires_grad_(False)
    logits = TOY.logits(model)
    done = dynalora.compact(model, gates=record)
    assert [row.after for row in done.matrices] == [3, 4]
    torch.testing.assert_close(TOY.logits(model), logits, atol=1e-6, rtol=1e-6)


def test_a_method_without_gates_is_what_it_was() -> None:
    for config in (DiraConfig, PedyraConfig):
        model = adapted(config)
        assert not any("gate" in name for name, _ in model.named_parameters())
        assert not model.peft_config["default"].gated
        with pytest.raises(dynalora.DynaloraError, match="no adapter with gates"):
            dynalora.record_gates(model, [TOY.batch(0)])


def test_what_cannot_have_gates_says_so() -> None:
    with pytest.raises(ConfigError, match="use_dora must be False with gates=True"):
        PedyraConfig(gates=True, use_dora=True)
    with pytest.raises(ConfigError, match="init_weights must be 'orthogonal', True or False with gates=True"):
        PedyraConfig(gates=True, init_weights="pissa")
    with pytest.raises(ConfigError, match="gates must be True"):
        DiselConfig(gates=False)
    with pytest.raises(ConfigError, match=r"gate_bias_init must be -3.0 \(its default\) without gates=True, got -1"):
        DiraConfig(gate_bias_init=-1)
    with pytest.raises(ConfigError, match="gates must be True or False, got 'yes'"):
        DiraConfig(gates="yes")
