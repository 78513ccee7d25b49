"""Which layers `all-linear` and names mean, and what is refused before anything is replaced."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import dynalora
from dynalora.adapter.layer import adapter_layers
from dynalora.errors import ConfigError, UnsupportedError
from tests.matrix.rows import Row, every_method
from tests.toys import TOYS


def names(model: nn.Module, adapter: str) -> set[str]:
    return {name.rpartition(".")[2] for name in adapter_layers(model, adapter)}


@every_method
def test_all_linear_for_a_second_adapter(row: Row) -> None:
    toy = TOYS["llama"]
    model = row.adapt(toy, target_modules=["q_proj", "lm_head"])
    model.add_adapter("second", row.configure(toy, target_modules="all-linear"))
    expected = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert names(model, "second") == expected
    assert names(model, "default") == {"q_proj", "lm_head"}
    model.add_adapter("third", row.configure(toy, target_modules="all-linear", exclude_modules=["q_proj"]))
    assert names(model, "third") == expected - {"q_proj"}


class OwnAttention(nn.MultiheadAttention):
    """Something of someone's, that may compute otherwise than torch's own, which is adapted."""


class WithAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.attention = OwnAttention(8, 2)
        self.gate = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return torch.sigmoid(self.gate(h)) * self.attention(h, h, h)[0]


def test_all_linear_leaves_out_with_a_warning_what_would_be_refused() -> None:
    with pytest.warns(UserWarning, match=r"leaves out 1 of 3 .*'attention.out_proj'.*NonDynamically"):
        model = peft.get_peft_model(
            WithAttention(), dynalora.DiraConfig(r=2, total_steps=3, target_modules="all-linear")
        )
    assert set(names(model, "default")) == {"first", "gate"}
    with pytest.warns(UserWarning, match="leaves out 2 of 3"):
        model = peft.get_peft_model(
            WithAttention(), dynalora.DisloraConfig(r=2, total_steps=3, target_modules="all-linear")
        )
    assert names(model, "default") == {"first"}


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (dynalora.DisloraConfig(r=2, total_steps=3, target_modules=["first", "gate"]), ConfigError),
        (dynalora.DiselConfig(r=2, target_modules=["first", "out_proj"]), UnsupportedError),
    ],
)
def test_what_is_named_and_refused_leaves_the_model_as_it_was(config: Any, error: type[Exception]) -> None:
    model = WithAttention()
    with pytest.raises(error, match="exclude_modules"):
        peft.get_peft_model(model, config)
    assert not adapter_layers(model)


def test_layers_that_are_read_and_not_called_are_refused() -> None:
    def mamba() -> nn.Module:
        config = transformers.MambaConfig(
            vocab_size=32, hidden_size=8, state_size=4, num_hidden_layers=1, time_step_rank=2
        )
        return transformers.MambaForCausalLM(config)

    with pytest.raises(UnsupportedError, match=r"mixer.out_proj' is never called by MambaMixer"):
        peft.get_peft_model(mamba(), dynalora.DiselConfig(r=2, target_modules=["in_proj", "out_proj"]))
    with pytest.warns(UserWarning, match="leaves out 3 of 4"):
        model = peft.get_peft_model(mamba(), dynalora.DiselConfig(r=2, target_modules="all-linear"))
    assert names(model, "default") == {"in_proj"}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("target", ["linear1", "linear2", "self_attn"])
def test_torchs_encoder_does_not_pass_over_an_adapter_in_evaluation(target: str, padded: bool) -> None:
    """Without gradients it computes with the weights of its layers and calls none of them."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    config = dynalora.DiraConfig(r=2, target_modules=[target], init_weights=False)
    model = peft.get_peft_model(nn.TransformerEncoder(layer, 2), config)
    x = torch.randn(3, 4, 8)
    lengths = torch.tensor([4, 2, 3])
    mask = torch.arange(4) >= lengths[:, None] if padded else None
    seen = ~mask if mask is not None else torch.ones(3, 4, dtype=torch.bool)
    expected = model.train()(x, src_key_padding_mask=mask)[seen]
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=mask)[seen], expected, atol=1e-5, rtol=1e-5)
        with model.disable_adapter():
            base = model(x, src_key_padding_mask=mask)[seen]
        assert not torch.allclose(base, expected, atol=1e-2)
        model.merge_adapter()
        torch.testing.assert_close(model(x, src_key_padding_mask=mask)[seen], expected, atol=1e-5, rtol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(model(x, src_key_padding_mask=mask)[seen], base, atol=1e-5, rtol=1e-5)


class ToyRouter(nn.Linear):
    """A router as Llama 4 has it: a linear layer that gives scores beside its product."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        logits = super().forward(x)
        return logits.softmax(-1), logits


@pytest.mark.parametrize("config", [dynalora.DiraConfig, dynalora.DiselConfig])
def test_routers_that_give_more_than_a_product_are_left_alone(config: Any) -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.expert = ToyRouter(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.router(x)[0] * self.expert(x)

    with pytest.raises(UnsupportedError, match="'router'"):
        peft.get_peft_model(Mixture(), config(r=2, target_modules=["router"], total_steps=4))
    with pytest.warns(UserWarning, match=r"leaves out 1 of 2 linear layers \('router'\)"):
        model = peft.get_peft_model(Mixture(), config(r=2, target_modules="all-linear", total_steps=4))
    assert [*adapter_layers(model)] == ["base_model.model.expert"]
    assert model(torch.ones(1, 4)).isfinite().all()
