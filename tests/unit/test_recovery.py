"""Recovery zeroes what it says and trains the rest; ablation switches off what it says and leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import dynalora
from dynalora import DiraConfig, PedyraConfig
from dynalora.errors import ConfigError, DataError, DynaloraError, TrainingError, UnsupportedError
from dynalora.forgetting.recovery import (
    STRATEGIES,
    ablated,
    ablated_layers,
    low_rank_modules,
    modules_to_zero,
    recover,
    zero_updates,
)
from tests.toys import TOYS

LLAMA = TOYS["llama"]
TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, Any] = {
    "lora": lambda **more: peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", **more),
    **{
        name: lambda kind=kind, **more: kind(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", **more)
        for name, kind in {
            "dira": dynalora.DiraConfig,
            "disel": dynalora.DiselConfig,
            "dislora": dynalora.DisloraConfig,
            "pedyra": dynalora.PedyraConfig,
        }.items()
    },
    "pedyra-pissa": lambda **more: PedyraConfig(r=4, target_modules=TARGETS, init_weights="pissa"),
    "pedyra-dora": lambda **more: PedyraConfig(r=4, target_modules=TARGETS, use_dora=True),
}
every_config = pytest.mark.parametrize("name", CONFIGS)


def batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    made = [LLAMA.batch(seed)["input_ids"] for seed in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in made]


def adapted(name: str, *, trained: int = 3) -> Any:
    """A toy model whose adapter has been trained for a few large steps."""
    model = peft.get_peft_model(LLAMA.build(), CONFIGS[name]())
    torch.manual_seed(3)
    dynalora.restart_schedule(model, trained)
    optimizer = torch.optim.AdamW(dynalora.param_groups(model, 3e-2))
    for batch in batches(trained):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def with_ranks(ranks: list[int], adapter: str = "lora", r: int = 4) -> Any:
    """A model whose matrices have updates of the given effective ranks at 0.001, made from the spectrum up.

    The other components are not zero but below the threshold, as training leaves them.
    """
    model = peft.get_peft_model(LLAMA.build(), CONFIGS[adapter]())
    layers = [m for m in model.modules() if hasattr(m, "lora_A") or hasattr(m, "dira_up")]
    assert len(layers) == len(ranks)
    for layer, rank in zip(layers, ranks, strict=True):
        up, down = (
            (layer.lora_B["default"].weight, layer.lora_A["default"].weight)
            if adapter == "lora"
            else (layer.parameter("up", "default"), layer.parameter("down", "default"))
        )
        values = torch.tensor([0.5] * rank + [5e-4] * (r - rank)) / layer.scaling["default"]
        with torch.no_grad():
            up.copy_(torch.linalg.qr(torch.randn(up.shape)).Q * values)
            down.copy_(torch.linalg.qr(torch.randn(down.shape).t()).Q.t())
    return model


def deltas(model: Any) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


# --- which matrices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["lora", "dira"])
def test_rlgr_zeroes_exactly_the_matrices_of_effective_rank_0_and_1(adapter: str) -> None:
    model = with_ranks([0, 1, 2, 4, 1, 3], adapter)
    before = deltas(model)
    # Counted in the full matrices, by another way than the landscape's.
    low = {name for name, delta in before.items() if int((torch.linalg.svdvals(delta) > 1e-3).sum()) <= 1}
    assert len(low) == 3
    landscape = dynalora.rank_landscape(model)
    assert set(low_rank_modules(landscape)) == low
    zero_updates(model, modules_to_zero("rlgr", landscape))
    after = deltas(model)
    for name in before:
        assert torch.equal(after[name], torch.zeros_like(after[name]) if name in low else before[name]), name
    assert {row.module for row in dynalora.rank_landscape(model) if row.nuclear_norm == 0} == low


def test_another_threshold_counts_the_landscapes_own_singular_values() -> None:
    landscape = dynalora.rank_landscape(with_ranks([0, 1, 2, 4, 1, 3]))
    assert low_rank_modules(landscape, tau=1e-4) == []
    assert low_rank_modules(landscape, tau=1.0) == [row.module for row in landscape]
    with pytest.raises(ConfigError, match="tau is -1"):
        low_rank_modules(landscape, tau=-1)


def test_random_zeroes_as_many_with_a_seed() -> None:
    landscape = dynalora.rank_landscape(with_ranks([0, 1, 2, 4, 1, 3]))
    names = [row.module for row in landscape]
    draws = [modules_to_zero("random", landscape, seed=seed) for seed in range(20)]
    assert draws[3] == modules_to_zero("random", landscape, seed=3)
    assert all(len(set(draw)) == 3 and set(draw) <= set(names) for draw in draws)
    assert {name for draw in draws for name in draw} == set(names), "some matrices are never drawn"
    assert modules_to_zero("naive", None) == []


def test_strategies_say_what_they_lack() -> None:
    with pytest.raises(ConfigError, match="'best'; choose one of rlgr, random, naive"):
        modules_to_zero("best", None)
    with pytest.raises(ConfigError, match="needs the landscape after Task A"):
        modules_to_zero("random", [])


@every_config
def test_a_zeroed_adapter_is_the_base_model_and_trains_on(name: str) -> None:
    model = adapted(name)
    base = LLAMA.logits(LLAMA.build())
    assert not torch.allclose(LLAMA.logits(model), base, atol=1e-3)
    zero_updates(model, [row.module for row in dynalora.rank_landscape(model)])
    torch.testing.assert_close(LLAMA.logits(model), base, atol=2e-5, rtol=1e-4)
    found = recover(model, batches(1), strategy="naive", epochs=3, learning_rate=1e-2)
    assert found.losses[-1] < found.losses[0]


@every_config
def test_zeroing_some_leaves_the_others_alone(name: str) -> None:
    model = adapted(name)
    (first, *others) = [row.module for row in dynalora.rank_landscape(model)]
    factors = {key: value.clone() for key, value in model.state_dict().items() if first not in key}
    zero_updates(model, [first])
    for key, value in factors.items():
        assert torch.equal(model.state_dict()[key], value), key
    norms = {row.module: row.nuclear_norm for row in dynalora.rank_landscape(model)}
    assert norms[first] == pytest.approx(0, abs=1e-5)
    assert all(norms[other] > 1e-2 for other in others)


def test_a_zeroed_adapter_is_saved_as_it_is(tmp_path: Path) -> None:
    for name in ("dira", "pedyra-pissa"):
        model = adapted(name)
        rows = dynalora.rank_landscape(model)
        zero_updates(model, [rows[0].module, rows[3].module])
        model.save_pretrained(tmp_path / name)
        loaded = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path / name)
        torch.testing.assert_close(LLAMA.logits(loaded), LLAMA.logits(model))


def test_zeroing_refuses_before_it_changes_anything() -> None:
    model = adapted("dira")
    names = [row.module for row in dynalora.rank_landscape(model)]
    before = deltas(model)
    with pytest.raises(DynaloraError, match="no matrix 'elsewhere'"):
        zero_updates(model, [names[0], "elsewhere"])
    model.merge_adapter()
    with pytest.raises(UnsupportedError, match="merged"):
        zero_updates(model, names)
    model.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in deltas(model).items())
    dora = peft.get_peft_model(LLAMA.build(), CONFIGS["lora"](use_dora=True))
    with pytest.raises(UnsupportedError, match="use_dora"):
        zero_updates(dora, [names[0]])


# --- recovery ---------------------------------------------------------------------------------------------


@every_config
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_recovery_trains_a_loaded_adapter(name: str, strategy: str, tmp_path: Path) -> None:
    trained = adapted(name)
    landscape = dynalora.rank_landscape(trained)
    trained.save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path, is_trainable=True)
    seen: list[int] = []
    values = sorted(row.singular_values[1] for row in landscape)
    tau = (values[2] + values[3]) / 2  # three of the six matrices have at most one singular value above it
    found = recover(
        model, batches(2), strategy=strategy, landscape=landscape, tau=tau, epochs=2, learning_rate=1e-3,
        progress=lambda what, done, total: seen.append(done),
    )  # fmt: skip
    assert len(found.losses) == 4
    assert seen == [0, 1, 2, 3, 4]
    assert len(found.zeroed) == (0 if strategy == "naive" else 3)
    assert not model.training
    changed = deltas(model) if name != "disel" else {}
    for module, delta in changed.items():
        assert not torch.equal(delta, deltas(trained)[module]), f"{module} did not train"


def test_recovery_of_lora_equals_a_loop_of_ones_own() -> None:
    landscape = dynalora.rank_landscape(with_ranks([0, 1, 2, 4, 1, 3]))
    first, second = adapted("lora"), adapted("lora")
    found = recover(
        first, batches(2), landscape=landscape, epochs=2, learning_rate=1e-2, max_grad_norm=0, weight_decay=0.1
    )
    for name, module in second.named_modules():
        if name.removeprefix("base_model.model.") in found.zeroed:
            torch.nn.init.zeros_(module.lora_B["default"].weight)
    parameters = [p for p in second.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    second.train()
    for batch in batches(2) * 2:
        optimizer.zero_grad()
        second(**batch).loss.backward()
        optimizer.step()
    for name, value in second.state_dict().items():
        torch.testing.assert_close(first.state_dict()[name], value, msg=name)


def test_recovery_drives_the_method() -> None:
    model = adapted("dira")
    recover(model, batches(2), strategy="naive", epochs=3)
    (report,) = dynalora.state_report(model)
    assert (report.step, report.total_steps) == (6, 6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, ConfigError, "epochs is 0"),
        ({"learning_rate": 0.0}, ConfigError, r"learning_rate is 0\.0"),
        ({"batches": []}, DataError, "no batch"),
        ({"strategy": "rlgr"}, ConfigError, "needs the landscape"),
        ({"learning_rate": 1e30}, TrainingError, "lower learning_rate"),
    ],
    ids=str,
)
def test_recovery_says_what_is_wrong(options: dict[str, Any], error: type, message: str) -> None:
    model = adapted("lora")
    given = {"batches": batches(1), "strategy": "naive", "epochs": 3, **options}
    with pytest.raises(error, match=message):
        recover(model, **given)


def test_recovery_of_a_frozen_adapter_is_refused(tmp_path: Path) -> None:
    adapted("lora").save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    with pytest.raises(ConfigError, match="is_trainable=True"):
        recover(model, batches(1), strategy="naive")


# --- ablation ---------------------------------------------------------------------------------------------


@every_config
@pytest.mark.parametrize("layers", ["front", "back", [1]], ids=str)
def test_ablation_is_exact_and_undone_bit_for_bit(name: str, layers: Any) -> None:
    model = adapted(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    whole = LLAMA.logits(model)
    gone = 0 if layers == "front" else 1
    # The other way to the same function: an adapter whose factors are zero there.
    other = adapted(name)
    names = [row.module for row in dynalora.rank_landscape(other)]
    zero_updates(other, [module for module in names if f"layers.{gone}." in module])
    with ablated(model, layers) as off:
        assert off == [module for module in names if f"layers.{gone}." in module]
        torch.testing.assert_close(LLAMA.logits(model), LLAMA.logits(other), atol=2e-5, rtol=1e-4)
        assert not torch.allclose(LLAMA.logits(model), whole, atol=1e-4)
    assert torch.equal(LLAMA.logits(model), whole)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    with ablated(model, [0, 1]):
        assert torch.equal(LLAMA.logits(model), LLAMA.logits(LLAMA.build()))


def test_ablation_is_undone_after_an_error_and_can_be_nested() -> None:
    model = adapted("dira")
    whole = LLAMA.logits(model)
    with pytest.raises(RuntimeError, match="on the way"), ablated(model, "front"):
        raise RuntimeError("on the way")
    assert torch.equal(LLAMA.logits(model), whole)
    with ablated(model, "back"):
        back = LLAMA.logits(model)
        with ablated(model, [0, 1]):
            pass
        assert torch.equal(LLAMA.logits(model), back)


def test_halves_are_of_the_models_layers_not_of_the_adapted_ones() -> None:
    config = DiraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0], init_weights=False)
    model = peft.get_peft_model(LLAMA.build(), config)
    assert (ablated_layers(model, "front"), ablated_layers(model, "back")) == ([0], [1])
    with pytest.raises(DynaloraError, match="No adapter changes the layers 1"), ablated(model, "back"):
        pass


@pytest.mark.parametrize(
    ("layers", "message"),
    [("middle", "'middle'; give front, back"), ([2], "layer 2; give indices from 0 to 1"), ([], "empty")],
    ids=str,
)
def test_ablation_says_which_layers_there_are(layers: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message), ablated(adapted("lora"), layers):
        pass


def test_merged_adapters_are_not_ablated() -> None:
    model = adapted("lora")
    model.merge_adapter()
    with pytest.raises(UnsupportedError, match="merged into the base weight of"), ablated(model, "front"):
        pass
    mlp = peft.get_peft_model(TOYS["mlp"].build(), DiraConfig(target_modules=["first"]))
    with pytest.raises(ConfigError, match="no numbered layers"), ablated(mlp, "front"):
        pass
