"""What PEFT's LoRA layers offer besides: scales for the moment, and rows of the embedding that train."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn

from dynalora.adapter.layer import AdapterLayer, adapter_layers
from dynalora.errors import ConfigError
from tests.matrix.rows import ROWS, Row, every_method, every_row
from tests.toys import TOYS

MLP = TOYS["mlp"]


def update_of(layer: AdapterLayer, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return layer(x) - layer.get_base_layer()(x)


@every_row
def test_scales_for_the_moment(row: Row) -> None:
    if row.alone:
        pytest.skip("DoRA's norms follow the scale")
    layer = adapter_layers(row.adapt(MLP, init_weights=False))["base_model.model.first"]
    x = MLP.batch(3)["x"]
    full = update_of(layer, x)

    def acts(factor: float) -> None:
        torch.testing.assert_close(update_of(layer, x), factor * full, rtol=1e-4, atol=1e-5)

    layer.set_scale("default", 0.25)
    acts(0.25)
    layer.set_scale("default", 0.0)
    acts(0.0)
    layer.set_scale("default", 2.0)
    layer.scale_layer(0.5)
    acts(1.0)
    layer.scale_layer(3.0)
    layer.unscale_layer(2.0)
    acts(1.5)
    layer.unscale_layer()
    acts(1.0)
    layer.unscale_layer()
    layer.set_scale("somebody else's", 5.0)
    acts(1.0)


def tied() -> nn.Module:
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
    )


@pytest.mark.parametrize("save", ["auto", False])
@pytest.mark.parametrize("tie", [False, True])
@every_method
def test_rows_of_the_embedding_train(row: Row, tie: bool, save: str | bool, tmp_path: Path) -> None:
    toy = TOYS["llama"]

    def build() -> nn.Module:
        base = tied() if tie else toy.build()
        base.resize_token_embeddings(66, mean_resizing=False)  # two new words
        with torch.no_grad():
            base.get_input_embeddings().weight[64:] = 0.1
            if not tie:
                base.get_output_embeddings().weight[64:] = 0.2
        return base

    base = build()
    model = row.adapt(toy, base, trainable_token_indices=[64, 65]).train()
    ids = torch.tensor([[5, 64, 7, 65, 9]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with torch.no_grad(), model.disable_adapter():
        before = model(input_ids=ids).logits
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, before)
    rows = [p for name, p in model.named_parameters() if "token_adapter" in name and p.requires_grad]
    assert rows
    assert all(p.shape == (2, base.config.hidden_size) for p in rows)
    assert any((p.detach() - 0.1).abs().max() > 1e-3 for p in rows)
    model.save_pretrained(tmp_path, save_embedding_layers=save)
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, trained)
        if row.static:
            merged = loaded.merge_and_unload()
            torch.testing.assert_close(merged(input_ids=ids).logits, trained, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("named", ["lm_head", "embed_tokens"])
@every_method
def test_a_weight_that_is_tied_stays_one_where_it_trains_in_full(row: Row, named: str, tmp_path: Path) -> None:
    mine = [named]
    settings = {"modules_to_save": mine, "ensure_weight_tying": True}
    model = row.adapt(TOYS["llama"], tied(), **settings).train()
    ids = torch.tensor([[5, 4, 7, 6, 9]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    start = model.get_input_embeddings().weight.detach().clone()
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embedding.data_ptr() == head.data_ptr()
    assert not torch.equal(embedding, start)
    assert mine == [named]  # the user's list
    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tied(), tmp_path, is_trainable=True).eval()
    assert loaded.get_input_embeddings().weight.data_ptr() == loaded.get_output_embeddings().weight.data_ptr()
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, trained)
        if row.static:
            model.merge_and_unload().save_pretrained(tmp_path / "merged")
            merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
            torch.testing.assert_close(merged(input_ids=ids).logits, trained, rtol=2e-4, atol=2e-5)


@every_method
def test_what_cannot_stay_tied_is_refused_before_anything_is_replaced(row: Row) -> None:
    base = tied()
    kinds = [type(module) for module in base.modules()]
    for settings, match in (
        ({"target_modules": ["q_proj", "lm_head"]}, "cannot tie adapters of the input embeddings and of 'lm_head'"),
        ({"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}}, "different tokens"),
    ):
        with pytest.raises(ConfigError, match=match):
            row.adapt(TOYS["llama"], base, ensure_weight_tying=True, **settings)
        assert [type(module) for module in base.modules()] == kinds


def test_a_configuration_that_tied_one_model_ties_no_other() -> None:
    row = next(each for each in ROWS if each.name == "dira")
    config = row.configure(TOYS["llama"], modules_to_save=["lm_head"], ensure_weight_tying=True)
    peft.get_peft_model(tied(), config)
    with pytest.warns(UserWarning, match="no tied modules were found"):
        model = peft.get_peft_model(TOYS["llama"].build(), config)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embedding.data_ptr() != head.data_ptr()
