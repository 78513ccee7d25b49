"""Recording DISeL's gates on text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import dynalora
from dynalora import DiraConfig, DiselConfig
from dynalora.errors import ConfigError, DynaloraError
from dynalora.forgetting.gates import depth_group
from tests.toys import TOYS

LLAMA = TOYS["llama"]


def gated(**options: Any) -> Any:
    torch.manual_seed(0)
    config = DiselConfig(r=3, target_modules=["q_proj", "down_proj"], init_weights=False, **options)
    return peft.get_peft_model(LLAMA.build(), config)


def by_hand(model: Any, ids: torch.Tensor, mask: torch.Tensor, suffix: str) -> torch.Tensor:
    """σ(W_g x + b_g) of one layer at the counted tokens, from the layer's own input."""
    layer = next(m for n, m in model.named_modules() if n.endswith(suffix))
    seen = []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    with torch.no_grad():
        model.eval()(input_ids=ids, attention_mask=mask)
    handle.remove()
    x = seen[0][mask.bool()].double()
    weight, bias = layer.disel_gate_weight["default"].double(), layer.disel_gate_bias["default"].double()
    return torch.sigmoid(x @ weight.t() + bias)


def test_statistics_equal_those_by_hand_over_several_batches() -> None:
    model = gated(gate_bias_init=0.0)
    generator = torch.Generator().manual_seed(1)
    batches = []
    for length in (5, 9):
        ids = torch.randint(3, 60, (2, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    recorded = dynalora.record_gates(model, batches)
    assert [(row.layer, row.kind) for row in recorded] == [
        (i, k) for i in (0, 1) for k in ("q_proj", "down_proj")
    ]
    expected = torch.cat(
        [by_hand(model, b["input_ids"], b["attention_mask"], "layers.1.mlp.down_proj") for b in batches]
    )
    row = recorded[3]
    assert row.tokens == len(expected) == 3 + 5 + 7 + 9
    torch.testing.assert_close(row.mean, expected.mean(0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(row.mean_square, expected.square().mean(0), atol=1e-6, rtol=1e-6)
    assert int(row.histogram.sum()) == 3 * row.tokens
    assert row.openness == pytest.approx(float(expected.mean()), abs=1e-6)


def test_labels_narrow_to_the_response() -> None:
    model = gated()
    ids = torch.arange(3, 13)[None]
    labels = ids.clone()
    labels[:, :6] = -100
    recorded = dynalora.record_gates(model, [{"input_ids": ids, "labels": labels}])
    assert {row.tokens for row in recorded} == {4}
    whole = torch.zeros_like(ids)
    whole[:, 6:] = 1
    x = by_hand(model, ids, torch.ones_like(ids), "layers.0.self_attn.q_proj")[6:]
    torch.testing.assert_close(recorded[0].mean, x.mean(0), atol=1e-6, rtol=1e-6)


def test_gates_start_almost_closed_and_the_mode_is_left_alone() -> None:
    model = gated(gate_weight_init="zeros")
    model.train()
    recorded = dynalora.record_gates(model, [{"input_ids": torch.arange(3, 13)[None]}])
    assert model.training
    assert all(row.openness == pytest.approx(0.0474258732, abs=1e-6) for row in recorded)  # σ(−3)
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_recorded_says_why() -> None:
    with pytest.raises(DynaloraError, match="no adapter with gates"):
        dynalora.record_gates(
            peft.get_peft_model(LLAMA.build(), DiraConfig(target_modules=["q_proj"])), ["text"]
        )
    with pytest.raises(ConfigError, match="need a tokenizer"):
        dynalora.record_gates(gated(), ["text"])
    with pytest.raises(ConfigError, match="got one string"):
        dynalora.record_gates(gated(), "text")
    with pytest.raises(ConfigError, match="no tokens"):
        dynalora.record_gates(gated(), [])


def test_histograms_are_drawn(tmp_path: Path) -> None:
    model = gated()
    a = dynalora.record_gates(model, [{"input_ids": torch.arange(3, 13)[None]}])
    b = dynalora.record_gates(model, [{"input_ids": torch.arange(20, 40)[None]}])
    figure = dynalora.plot_gates({"math": a, "code": b}, str(tmp_path / "gates.png"))
    assert (tmp_path / "gates.png").stat().st_size > 3000
    shares = [line.get_ydata() for axis in figure.axes for line in axis.lines]
    assert shares
    assert all(sum(map(float, share)) == pytest.approx(1) for share in shares)


@pytest.mark.parametrize(
    ("layer", "group"), [(0, "early"), (9, "early"), (10, "middle"), (29, "late"), (None, "none")]
)
def test_depth_groups_are_thirds(layer: int | None, group: str) -> None:
    assert depth_group(layer, 30) == group
