"""benchmarks/scaling.py, driver_share.py and combinations.py on models of a few numbers."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> ModuleType:
    return load_script(f"benchmarks/{name}.py")


def test_curves_over_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = script("scaling")
    assert scaling.exponent([1, 2, 4, 8], [9.0, 3.0, 3 * 2**1.5, 3 * 4**1.5]) == pytest.approx(1.5)
    monkeypatch.setattr(scaling, "USUAL", {"rank": 2, "tokens": 8, "layers": 1, "adapters": 2})
    monkeypatch.setattr(scaling, "VALUES", {"tokens": (8, 16, 32)})
    given = ["scaling", "--output", str(tmp_path), "--methods", "lora,dira", "--varied", "tokens", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", given)
    scaling.main()
    found = json.loads((tmp_path / "tokens.json").read_text())
    saved = [[found[str(tokens)][method][1] for tokens in (8, 16, 32)] for method in ("lora", "dira")]
    for sizes in saved:
        assert sizes[1:] == pytest.approx([2 * sizes[0], 4 * sizes[0]], rel=0.01)
    assert saved[1][2] <= saved[0][2]
    assert "exponent" in (tmp_path / "scaling.md").read_text()
    assert (tmp_path / "scaling.png").exists()


def test_a_driver_is_counted_by_what_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("driver_share")
    width, inner = 16, 24

    def model_of(layers: int) -> Any:
        config = transformers.LlamaConfig(
            vocab_size=32, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=2
        )
        return transformers.AutoModelForCausalLM.from_config(config)

    monkeypatch.setattr(module, "model_of", model_of)
    args = argparse.Namespace(layers=1, tokens=6, steps=3, r=4)
    multiplications = {name: module.share(name, args).multiplications for name in ("dira", "disel", "dislora")}
    sides = 4 * 2 * width + 3 * (width + inner)
    # DisLoRA's penalty takes the Gram matrix of each factor and one product with it; norms and gates take no product.
    assert {name: found[1] for name, found in multiplications.items()} == {
        "dira": 0, "disel": 0, "dislora": 2 * args.r**2 * sides
    }  # fmt: skip
    assert all(found[0] > 0 for found in multiplications.values())


@pytest.mark.slow
def test_a_combination_is_compared_with_the_method_without_it() -> None:
    module = script("combinations")
    plain = module.train("dira", {}, 3)
    assert float(module.cell("gradient checkpointing", "dira", plain, 3)) > 0
    assert module.cell("activation offloading", "dira", plain, 3) == "needs an accelerator"
    worse = plain[0], [loss + 1 for loss in plain[1]], 0
    assert "losses 1 apart" in module.cell("padding-free", "dira", worse, 3)


def test_the_lora_fused_by_hand_is_pefts_lora() -> None:
    module = script("gpu")
    base = module.base_model("tiny", None, torch.device("cpu")).float()
    ids = torch.randint(0, 128, (2, 5), generator=torch.Generator().manual_seed(0))
    models = [module.adapted(method, base, 9) for method in ("lora", "fused")]
    layers = dict(models[0].get_base_model().model.layers.named_modules())
    downs, ups = {}, {}
    for name, leader in models[1].model.layers.named_modules():
        if hasattr(leader, "ups"):
            owner, _, first = name.rpartition(".")
            group = next(group for group in module.fuse.__globals__["GROUPS"] if group[0] == first)
            parts = [layers[f"{owner}.{part}"] for part in group]
            downs[leader.down] = [part.lora_A["default"].weight for part in parts]
            ups |= {up: part.lora_B["default"].weight for up, part in zip(leader.ups, parts, strict=True)}
    for up, lora in ups.items():
        up.data = lora.data = torch.randn(lora.shape, generator=torch.Generator().manual_seed(1)) / 10
    for down, loras in downs.items():
        down.data = torch.cat([lora.data for lora in loras])
    losses = [model(input_ids=ids, labels=ids).loss for model in models]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0])
    assert len(ups) == 2 * 7
    for up, lora in ups.items():
        torch.testing.assert_close(up.grad, lora.grad, atol=1e-5, rtol=1e-4)
    for down, loras in downs.items():
        torch.testing.assert_close(down.grad, torch.cat([lora.grad for lora in loras]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("what", ["step", "host", "generate"])
def test_what_is_measured_on_an_accelerator_runs_without_one(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "found.json"
    given = [
        "gpu", what, "--shape", "tiny", "--batches", "2x8", "--methods", "lora,dira (budget),pedyra (adjusts)",
        "--rounds", "2", "--warmup", "1", "--steps", "2", "--new-tokens", "3", "--device", "cpu", "--json", str(file),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", given)
    script("gpu").main()
    rows = json.loads(file.read_text())["rows"]
    assert [row["method"] for row in rows][:3] == ["lora", "dira (budget)", "pedyra (adjusts)"]
    if what == "step":
        assert rows[0]["ratio"] == 1
        assert all(len(row["seconds"]) == 2 and row["state_bytes"] > row["adapter_bytes"] for row in rows[:2])


def test_decompositions_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["x", "--shapes", "tiny", "--rounds", "1", "--device", "cpu", "--json", str(file)])
    script("decomposition_on_device").main()
    rows = json.loads(file.read_text())["rows"]
    assert {row["way"] for row in rows} == {"full", "gram", "smallest", "largest"}
    assert all(row["subspace"] < 1e-3 and row["values"] < 1e-4 for row in rows)
