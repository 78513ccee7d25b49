"""One adapter made of several: against the sum of dense updates in float64, and against PEFT's own LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import dynalora
from dynalora.adapter.combining import COMBINATIONS
from dynalora.adapter.layer import adapter_layers
from dynalora.errors import ConfigError, UnsupportedError
from dynalora.export import export_lora
from tests.families import FAMILIES
from tests.matrix.rows import FIRST_OF_EACH_METHOD, ROWS, Row, randomise
from tests.matrix.test_attention import PLAIN as ATTENTION
from tests.matrix.test_behaviour import train
from tests.matrix.test_conventions import one_sentence
from tests.toys import TOYS, Toy

MLP, LLAMA, GPT2 = TOYS["mlp"], TOYS["llama"], TOYS["gpt2"]
COMBINED = ("dira", "dislora", "pedyra", "dylora", "milora", "sorsa")
every_combined = pytest.mark.parametrize(
    "row", [row for row in FIRST_OF_EACH_METHOD if row.name in COMBINED], ids=lambda row: row.name
)


def adapters(row: Row, toy: Toy, *others: dict[str, Any], **first: Any) -> Any:
    """A model with adapters ``default``, ``a1``, ``a2``, …, all away from the base model."""
    model = row.adapt(toy, init_weights=False, task_type=None, **first)
    for number, settings in enumerate(others, 1):
        model.add_adapter(f"a{number}", row.configure(toy, **{"init_weights": False, "task_type": None, **settings}))
    randomise(model)
    return model.eval()


def deltas(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """s·ΔW of every layer that an adapter adapts, in float64."""
    found = {}
    for name, layer in adapter_layers(model, adapter).items():
        up, down = (factor.detach().double() for factor in layer.factors(adapter))
        found[name] = layer.scaling[adapter] * up @ down
    return found


def weighted(model: nn.Module, weights: dict[str, float]) -> dict[str, Tensor]:
    """Σ w·s·ΔW of every layer, in float64."""
    total: dict[str, Tensor] = {}
    for adapter, weight in weights.items():
        for name, delta in deltas(model, adapter).items():
            total[name] = weight * delta + total.get(name, torch.zeros_like(delta))
    return total


def assert_update(model: nn.Module, adapter: str, expected: dict[str, Tensor], rounding: float = 1e-5) -> None:
    found = deltas(model, adapter)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert (found[name] - delta).norm() <= rounding * delta.norm(), name


@pytest.mark.parametrize("toy", [MLP, LLAMA, GPT2], ids=lambda toy: toy.name)
@every_combined
def test_cat_is_the_sum_of_the_updates(row: Row, toy: Toy, tmp_path: Path) -> None:
    """Weights of both signs, different ranks and patterns, and layers that only one of them adapts."""
    some = list(toy.targets)[:1]
    model = adapters(
        row,
        toy,
        {"r": 2, "alpha": 5, "use_rslora": True},
        {"target_modules": some, "r": 3, "rank_pattern": {some[0]: 1}},
    )
    before, trains = toy.logits(model), {name for name, p in model.named_parameters() if p.requires_grad}
    weights = {"default": 0.7, "a1": -1.5, "a2": 2.0}
    expected = weighted(model, weights)
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum", combination_type="cat")
    assert_update(model, "sum", expected)
    assert torch.equal(toy.logits(model), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains

    model.set_adapter("sum")
    logits = toy.logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = peft.PeftModel.from_pretrained(toy.build(), tmp_path / "sum").eval()
    row.assert_same(toy.logits(loaded), logits)
    torch.testing.assert_close(toy.logits(loaded.merge_and_unload()), logits, atol=2e-5, rtol=2e-5)
    report = export_lora(model, tmp_path / "plain", adapter_name="sum")
    assert report.max_error < 1e-5
    stock = peft.PeftModel.from_pretrained(toy.build(), tmp_path / "plain").eval()
    torch.testing.assert_close(toy.logits(stock), logits, atol=2e-5, rtol=2e-5)


@every_combined
def test_more_components_than_a_side_has_are_rewritten_exactly(row: Row) -> None:
    model = adapters(row, MLP, {"r": 9}, r=9)  # of sides 12 and 20
    expected = weighted(model, {"default": 1.0, "a1": 1.0})
    model.add_weighted_adapter(["default", "a1"], [1.0, 1.0], "sum", combination_type="cat")
    assert_update(model, "sum", expected)
    assert all(
        layer.rank("sum") <= min(layer.in_features, layer.out_features) for layer in adapter_layers(model).values()
    )


@every_combined
def test_svd_is_the_best_approximation(row: Row) -> None:
    model = adapters(row, LLAMA, {"r": 3})
    expected = weighted(model, {"default": 1.0, "a1": -0.5})
    model.add_weighted_adapter(["default", "a1"], [1.0, -0.5], "sum", svd_rank=2)
    for name, delta in expected.items():
        assert adapter_layers(model)[name].rank("sum") == 2
        values = torch.linalg.svdvals(delta)
        left = (deltas(model, "sum")[name] - delta).norm()
        torch.testing.assert_close(left, values[2:].norm(), atol=1e-5 * float(values[0]), rtol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in COMBINATIONS if kind != "cat"])
def test_it_is_what_pefts_lora_makes_of_the_exported_adapters(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(share: Tensor, **_: Any) -> Tensor:  # what DARE keeps, whichever layer or factor comes first
        return (torch.arange(share.numel()) % 5 < 3).to(share).view_as(share)

    monkeypatch.setattr(torch, "bernoulli", drawn)
    row = next(row for row in FIRST_OF_EACH_METHOD if row.name == "pedyra")
    model = adapters(row, LLAMA, {"alpha": 3})
    stock: Any = None
    for name in ("default", "a1"):
        export_lora(model, tmp_path / name, adapter_name=name)
        if stock is None:
            stock = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path / name)
        else:
            stock.load_adapter(tmp_path / name, name)
    settings = {"combination_type": kind, "density": 0.6}
    for each in (stock, model):
        each.add_weighted_adapter(["default", "a1"], [0.8, -1.2], "both", **settings)
    found = deltas(model, "both")
    for name, layer in adapter_layers(model, "both").items():
        other = stock.get_submodule(name)
        delta = other.get_delta_weight("both").detach().double()
        assert (found[name] - delta).norm() <= 1e-4 * delta.norm(), layer.name


@pytest.mark.parametrize("toy", [ATTENTION, FAMILIES["qwen3-moe"]], ids=lambda toy: toy.name)
def test_experts_and_attention(toy: Toy, tmp_path: Path) -> None:
    row = next(row for row in FIRST_OF_EACH_METHOD if row.name == "pedyra")
    targets = "all-linear" if toy is not ATTENTION else ["attn"]
    some: Any = {"exclude_modules": ["projections.k"]} if toy is ATTENTION else {"target_modules": ["down_proj"]}
    model = adapters(row, toy, {"target_modules": targets, "r": 3, **some}, target_modules=targets)
    for names, saved in ((["default", "a1"], "sum"), (["a1"], "alone")):
        weights = dict.fromkeys(names, -0.5)
        expected = weighted(model, weights)
        model.add_weighted_adapter(names, list(weights.values()), saved, combination_type="cat")
        assert_update(model, saved, expected)
        model.set_adapter(saved)
        model.save_pretrained(tmp_path, selected_adapters=[saved])
        loaded = peft.PeftModel.from_pretrained(toy.build(), tmp_path / saved)
        assert adapter_layers(loaded).keys() == expected.keys()
        torch.testing.assert_close(toy.logits(loaded), toy.logits(model), atol=1e-5, rtol=1e-5)


def test_convolutions_and_embeddings() -> None:
    class Convolving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.embedding = nn.Embedding(20, 8)
            self.conv = nn.Conv1d(8, 6, 3, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.embedding(x).transpose(1, 2))

    def batch(seed: int) -> dict[str, Tensor]:
        return {"x": torch.randint(0, 20, (3, 7), generator=torch.Generator().manual_seed(seed))}

    toy = Toy("convolving", Convolving, ("embedding", "conv"), batch)
    for row in (row for row in FIRST_OF_EACH_METHOD if row.name in ("dira", "pedyra")):
        model = adapters(row, toy, {"r": 2})
        model.base_model.set_adapter(["default", "a1"])
        together = toy.logits(model)
        model.add_weighted_adapter(["default", "a1"], [1.0, 1.0], "sum", combination_type="cat")
        model.set_adapter("sum")
        torch.testing.assert_close(toy.logits(model), together, atol=1e-5, rtol=1e-5)


def test_names_that_other_modules_end_with() -> None:
    """Only what the adapters adapt is adapted by their combination."""
    inner, outer = nn.Linear(4, 4), nn.Linear(4, 4)
    base = nn.ModuleDict({"a": nn.ModuleDict({"fc": inner}), "b": nn.ModuleDict({"a": nn.ModuleDict({"fc": outer})})})
    config = dynalora.DiraConfig(r=2, target_modules=r"a\.fc", init_weights=False)
    model: Any = peft.get_peft_model(base, config)
    model.add_weighted_adapter(["default"], [2.0], "twice", combination_type="cat")
    assert [layer.name for layer in adapter_layers(model, "twice").values()] == ["a.fc"]


@every_combined
def test_ranks_that_training_moved(row: Row) -> None:
    model = row.adapt(LLAMA, target_modules=["q_proj", "v_proj"])
    train(model, LLAMA)
    model.add_adapter("a1", row.configure(LLAMA, target_modules=["q_proj", "v_proj"], init_weights=False))
    model.eval()
    expected = weighted(model, {"default": 1.0, "a1": 1.0})
    model.add_weighted_adapter(["default", "a1"], [1.0, 1.0], "sum", combination_type="cat")
    assert_update(model, "sum", expected)
    model.delete_adapter("default")
    model.set_adapter("sum")
    assert torch.isfinite(LLAMA.logits(model)).all()
    assert all(p.requires_grad for name, p in model.named_parameters() if ".sum" in name)


def test_it_trains_on() -> None:
    """The combination is an adapter as any other, which its method can drive."""
    for row in (row for row in FIRST_OF_EACH_METHOD if row.name in COMBINED):
        model = adapters(row, LLAMA, {"r": 2})
        model.add_weighted_adapter(["default", "a1"], [1.0, 1.0], "sum", combination_type="cat")
        model.set_adapter("sum")
        before = deltas(model, "sum")
        train(model, LLAMA)
        after = deltas(model, "sum")
        assert any(not torch.equal(after[name], before[name]) for name in before), row.name


@pytest.mark.parametrize(
    "row",
    [row for row in ROWS if not row.static or row.alone or row.config.method not in COMBINED],
    ids=lambda row: row.name,
)
def test_what_is_no_single_matrix_is_refused(row: Row) -> None:
    model = row.adapt(MLP, init_weights=False)
    model.add_adapter("second", row.configure(MLP, init_weights=False))
    with pytest.raises(UnsupportedError) as caught:
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="cat")
    remedy = "merge one" if row.alone else r"set_adapter(['default', 'second'])"
    assert remedy in one_sentence(caught.value)
    assert set(model.peft_config) == {"default", "second"}


def test_what_is_wrongly_asked_for_is_told() -> None:
    row = FIRST_OF_EACH_METHOD[0]
    model = adapters(row, MLP, {"r": 2})
    cases: list[tuple[str, dict[str, Any]]] = [
        ("0 adapters and 2 weights", {"adapters": []}),
        ("at least one adapter", {"adapters": [], "weights": []}),
        ("'a7'", {"adapters": ["default", "a7"]}),
        ("'a1' already", {"adapter_name": "a1"}),
        ("must be a number, got nan", {"weights": [1.0, float("nan")]}),
        ("combination_type must be one of", {"combination_type": "sum"}),
        ("svd_rank must be", {"svd_rank": 0}),
        ("svd_clamp=0.9", {"svd_clamp": 0.9}),
        ("needs density", {"combination_type": "ties"}),
        ("density.*got 2", {"combination_type": "dare_ties_svd", "density": 2}),
        ("majority_sign_method must be", {"majority_sign_method": "most"}),
        ("of one rank.* 4, 2 components", {"combination_type": "linear"}),
    ]
    for message, settings in cases:
        given = {"adapters": ["default", "a1"], "weights": [1.0, 1.0], "adapter_name": "both", **settings}
        with pytest.raises(ConfigError, match=message) as caught:
            model.add_weighted_adapter(**given)
        one_sentence(caught.value)
    for besides in ({"modules_to_save": ["head"]}, {"bias": "all"}):
        other = row.adapt(MLP, init_weights=False, **besides)
        with pytest.raises(UnsupportedError, match=f"trained with {next(iter(besides))}") as refused:
            other.add_weighted_adapter(["default"], [1.0], "both")
        one_sentence(refused.value)
    assert set(model.peft_config) == {"default", "a1"}
