"""What PEFT asks of each of its own methods holds for ours; what cannot be says so in one sentence."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import replicate_layers
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn

import dynalora
from dynalora.adapter.growth import GrowthConfig
from dynalora.adapter.layer import adapter_layers
from dynalora.errors import CheckpointError, ConfigError, UnsupportedError
from tests.families import FAMILIES
from tests.matrix.rows import FIRST_OF_EACH_METHOD, Row, every_method, every_row
from tests.matrix.test_behaviour import adapted_layers, train
from tests.toys import TOYS, Toy, assert_same_state, output_of, snapshot

MLP, LLAMA, GPT2, BERT = TOYS["mlp"], TOYS["llama"], TOYS["gpt2"], TOYS["bert"]

every_static_method = pytest.mark.parametrize(
    "row", [row for row in FIRST_OF_EACH_METHOD if row.static], ids=lambda row: row.name
)


def two_adapters(row: Row, toy: Toy, **second: Any) -> Any:
    """A model with adapters ``default`` and ``second``, both away from the base model."""
    model = row.adapt(toy, init_weights=False, task_type=None)
    model.add_adapter("second", row.configure(toy, **{"init_weights": False, "task_type": None, "r": 2, **second}))
    return model.eval()


def logits_of(model: nn.Module, toy: Toy, adapter: str | None, seed: int = 5) -> Tensor:
    """Logits with one adapter active; None: with none."""
    if adapter is None:
        with model.disable_adapter():
            return toy.logits(model, seed)
    before = list(model.base_model.active_adapters)
    model.base_model.set_adapter(adapter)
    logits = toy.logits(model, seed)
    model.base_model.set_adapter(before)
    return logits


def one_sentence(error: BaseException) -> str:
    message = str(error)
    assert "\n" not in message
    assert message.endswith(".")
    return message


# --- settings -------------------------------------------------------------------------------------------------


@every_method
def test_settings_that_loras_have_are_told_by_their_name_here(row: Row) -> None:
    for name, value, here in (("lora_alpha", 16, "alpha"), ("lora_dropout", 0.1, "dropout")):
        with pytest.raises(ConfigError, match=f"'{name}': it is called '{here}' here") as caught:
            row.config(r=4, **{name: value})
        assert isinstance(caught.value, TypeError)  # what Python itself raises
        one_sentence(caught.value)
    with pytest.raises(ConfigError, match="'rank_patern': did you mean 'rank_pattern'"):
        row.config(rank_patern={})


@every_method
def test_every_setting_of_loras_is_known_or_answered_with_what_to_do(row: Row) -> None:
    known = {setting.name for setting in fields(row.config)}
    for name in {setting.name for setting in fields(peft.LoraConfig)} - known:
        with pytest.raises(
            ConfigError, match=r"called|leave it out|name experts in target_modules|replicate_layers"
        ) as caught:
            row.config(r=4, **{name: None})
        one_sentence(caught.value)


@every_method
def test_blocks_that_are_replicated_share_weights_and_have_adapters_of_their_own(row: Row) -> None:
    base = LLAMA.build()
    replicate_layers(base, [(0, 2), (1, 2)])
    model = row.adapt(LLAMA, base, init_weights=False, target_modules="all-linear")
    assert len({name.split(".")[4] for name in adapter_layers(model)}) == 3
    third, second = (model.get_submodule(f"base_model.model.model.layers.{i}.mlp.up_proj") for i in (2, 1))
    assert third.base_layer.weight is second.base_layer.weight
    assert not torch.equal(third.parameter("down", "default"), second.parameter("down", "default"))
    if row.static:
        before = LLAMA.logits(model)
        torch.testing.assert_close(LLAMA.logits(model.merge_and_unload()), before, rtol=1e-3, atol=1e-3)


@every_method
def test_settings_of_a_newer_version_are_left_out_with_a_warning(row: Row) -> None:
    """Which PEFT does where the configuration says, in Python's words, that it does not know them."""
    with pytest.warns(UserWarning, match="Unexpected keyword"):
        config = peft.PeftConfig.from_peft_type(**{**row.config().to_dict(), "of_the_future": 1})
    assert type(config) is row.config


# --- mixed batches -------------------------------------------------------------------------------------------


def mixed(model: nn.Module, toy: Toy, names: Sequence[str]) -> Tensor:
    with torch.no_grad():
        return output_of(model(**toy.batch(5), adapter_names=list(names)))


@pytest.mark.parametrize("toy", [MLP, LLAMA, GPT2], ids=lambda toy: toy.name)
@every_row
def test_mixed_batch_gives_every_row_its_adapter(row: Row, toy: Toy) -> None:
    model = two_adapters(row, toy)
    size = len(next(iter(toy.batch(5).values())))
    names = [("default", "__base__", "second")[index % 3] for index in range(size)]
    found = mixed(model, toy, names)
    alone = {
        name: logits_of(model, toy, None if name == "__base__" else name) for name in ("default", "second", "__base__")
    }
    for index, name in enumerate(names):
        torch.testing.assert_close(found[index], alone[name][index], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(alone["default"], alone["second"], atol=1e-3)
    # Afterwards nothing of it is left.
    assert torch.equal(toy.logits(model), alone["default"])


@every_method
def test_mixed_batch_of_adapters_on_different_layers(row: Row) -> None:
    model = two_adapters(row, MLP, target_modules=["second"])
    model.add_adapter("third", row.configure(MLP, init_weights=False, target_modules=["first"]))
    names = ["third", "second", "default", "__base__", "second", "third"]
    found = mixed(model.eval(), MLP, names)
    for index, name in enumerate(names):
        alone = logits_of(model, MLP, None if name == "__base__" else name)
        torch.testing.assert_close(found[index], alone[index], atol=1e-5, rtol=1e-5)


@every_method
def test_mixed_batch_with_modules_trained_in_full(row: Row) -> None:
    model = row.adapt(MLP, init_weights=False, modules_to_save=["head"])
    model.add_adapter("second", row.configure(MLP, init_weights=False, modules_to_save=["head"]))
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["second"].weight.mul_(2)
    names = ["second", "default", "__base__"] * 2
    found = mixed(model.eval(), MLP, names)
    for index, name in enumerate(names):
        alone = logits_of(model, MLP, None if name == "__base__" else name)
        torch.testing.assert_close(found[index], alone[index], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("family", [FAMILIES["llama"], FAMILIES["t5"]], ids=lambda family: family.name)
@every_method
def test_mixed_batch_generates(row: Row, family: Toy, beams: int) -> None:
    model = row.adapt(family, init_weights=False)
    model.add_adapter("second", row.configure(family, init_weights=False))
    model.eval()
    ids = family.batch(3)["input_ids"]
    options: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "num_beams": beams,
        "do_sample": False,
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "pad_token_id": 0,
    }
    found = model.generate(**options, adapter_names=["second", "default"])
    for index, name in enumerate(["second", "default"]):
        model.set_adapter(name)
        assert torch.equal(model.generate(**options)[index], found[index])


def test_mixed_batch_with_dora() -> None:
    row = next(row for row in FIRST_OF_EACH_METHOD if row.name == "pedyra")
    model = row.adapt(MLP, init_weights=False, use_dora=True)
    model.add_adapter("second", row.configure(MLP, init_weights=False))
    names = ["second", "default", "__base__"] * 2
    found = mixed(model.eval(), MLP, names)
    for index, name in enumerate(names):
        alone = logits_of(model, MLP, None if name == "__base__" else name)
        torch.testing.assert_close(found[index], alone[index], atol=1e-5, rtol=1e-5)


@every_method
def test_mixed_batch_errors_are_one_sentence(row: Row) -> None:
    model = two_adapters(row, MLP)
    for names, expected in (
        (["default"] * 5, "5 names for a batch of 6"),
        (["default"] * 5 + ["thrid"], "'thrid'"),
        ("default", "list"),
    ):
        with pytest.raises(ConfigError, match=expected) as caught:
            model(**MLP.batch(5), adapter_names=names)
        one_sentence(caught.value)
    model.train()
    with pytest.raises(ConfigError, match="training") as caught:
        model(**MLP.batch(5), adapter_names=["default"] * 6)
    one_sentence(caught.value)
    model.eval()
    if row.static:
        model.merge_adapter(["second"])
        with pytest.raises(ConfigError, match="second is merged") as caught:
            model(**MLP.batch(5), adapter_names=["default"] * 6)
        one_sentence(caught.value)
        model.unmerge_adapter()
    assert not any(layer._forward_pre_hooks for layer in adapted_layers(model).values())


@every_method
def test_mixed_batch_while_disabled_is_the_base(row: Row) -> None:
    model = two_adapters(row, MLP)
    with model.disable_adapter(), torch.no_grad():
        found = model(**MLP.batch(5), adapter_names=["default", "second"] * 3)
    assert torch.equal(found, MLP.logits(MLP.build()))


# --- merging -------------------------------------------------------------------------------------------------


@every_static_method
def test_merging_one_after_another_equals_merging_together(row: Row) -> None:
    model = two_adapters(row, MLP)
    model.base_model.set_adapter(["default", "second"])
    both = MLP.logits(model)
    together, base = copy.deepcopy(model), MLP.logits(MLP.build())
    together.merge_adapter()
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    for merged in (together, model):
        torch.testing.assert_close(MLP.logits(merged), both, atol=1e-5, rtol=1e-5)
        merged.unmerge_adapter()
        with merged.disable_adapter():
            torch.testing.assert_close(MLP.logits(merged), base, atol=1e-5, rtol=1e-5)


@every_static_method
def test_merging_is_idempotent_and_the_same_in_training(row: Row) -> None:
    weights = []
    for mode in (True, False):
        model = row.adapt(GPT2, init_weights=False, dropout=0.5).train(mode)
        model.merge_adapter()
        with pytest.warns(UserWarning, match="(?i)already"):
            model.merge_adapter()
        weights.append(snapshot(model))
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items() if "base_layer" in name)


@every_static_method
def test_merge_and_unload_of_chosen_adapters(row: Row) -> None:
    model = two_adapters(row, MLP)
    expected = logits_of(model, MLP, "second")
    merged = model.merge_and_unload(adapter_names=["second"])
    assert not adapted_layers(merged)
    torch.testing.assert_close(MLP.logits(merged), expected, atol=1e-5, rtol=1e-5)


@every_method
def test_an_unloaded_model_can_be_adapted_again(row: Row) -> None:
    base = row.adapt(LLAMA, init_weights=False).unload()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*multiple adapters.*")
        warnings.filterwarnings("error", message=".*second time.*")
        again = row.adapt(LLAMA, base)
    row.assert_start(LLAMA.logits(again), LLAMA.logits(LLAMA.build()))


# --- adding and deleting -------------------------------------------------------------------------------------


@every_method
def test_a_name_that_is_taken_or_unknown_is_refused_and_nothing_changes(row: Row) -> None:
    model = two_adapters(row, MLP)
    before, expected = snapshot(model), MLP.logits(model)
    with pytest.raises(ValueError, match="second"):
        model.add_adapter("second", row.configure(MLP))
    with pytest.raises(ValueError, match="third"):
        model.delete_adapter("third")
    with pytest.raises(ValueError, match="third"):
        model.set_adapter("third")
    assert_same_state(model, before)
    assert torch.equal(MLP.logits(model), expected)


@every_static_method
def test_a_merged_adapter_cannot_be_deleted(row: Row) -> None:
    model = two_adapters(row, MLP)
    model.merge_adapter(["default"])
    before = snapshot(model)
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    assert_same_state(model, before)
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"]


@every_method
def test_names_that_contain_each_other(row: Row, tmp_path: Path) -> None:
    """Adapters ``a``, ``a_b`` and the method's own name are saved and loaded each for itself."""
    names = ["a", "a_b", row.name]
    model = peft.get_peft_model(MLP.build(), row.configure(MLP, init_weights=False), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, row.configure(MLP, init_weights=False))
    model.eval()
    model.save_pretrained(tmp_path)
    for name in names:
        loaded = peft.PeftModel.from_pretrained(MLP.build(), tmp_path / name).eval()
        assert torch.equal(MLP.logits(loaded), logits_of(model, MLP, name))


@pytest.mark.parametrize("targets", [["second"], ["first", "second"]], ids=["other-layers", "same-layers"])
@every_method
def test_only_the_active_adapter_trains(row: Row, targets: list[str]) -> None:
    model = row.adapt(MLP)
    model.add_adapter("other", row.configure(MLP, target_modules=targets))

    def trained_by(adapter: str) -> set[str]:
        model.set_adapter(adapter)
        return {name for name, p in model.named_parameters() if p.requires_grad}

    for adapter in ("default", "other", "default"):
        names = trained_by(adapter)
        assert names
        assert all(name.endswith(f".{adapter}") for name in names)
    assert not trained_by("default") & trained_by("other")
    model.set_adapter("other", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())


@every_method
def test_what_trains_is_the_same_after_the_adapters_were_off(row: Row, tmp_path: Path) -> None:
    model = row.adapt(MLP)

    def trains() -> dict[str, bool]:
        return {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    first.requires_grad_(False)
    before = trains()
    assert any(before.values())
    with model.disable_adapter():
        assert not any(trains().values())
        with model.disable_adapter():
            pass
    assert trains() == before
    with model.disable_adapter():
        model.base_model.set_adapter("default")
    assert first.requires_grad  # it was chosen anew
    model.save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(MLP.build(), tmp_path)
    with model.disable_adapter():
        MLP.logits(model)
    assert not any(trains().values())


@every_method
def test_pefts_helper_leaves_inputs_uncast(row: Row) -> None:
    model = row.adapt(MLP, init_weights=False).eval()
    before = MLP.logits(model)
    with disable_input_dtype_casting(model):
        assert not any(layer.cast_input_dtype_enabled for layer in adapter_layers(model).values())
        assert torch.equal(MLP.logits(model), before)
    assert all(layer.cast_input_dtype_enabled for layer in adapter_layers(model).values())


@every_method
def test_requires_grad_can_be_set_by_hand(row: Row) -> None:
    model = two_adapters(row, MLP)
    model.set_requires_grad("second", True)
    model.set_requires_grad("default", False)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names
    assert all(name.endswith(".second") for name in names)


@every_method
def test_selected_adapters_are_saved(row: Row, tmp_path: Path) -> None:
    two_adapters(row, MLP).save_pretrained(tmp_path, selected_adapters=["second"])
    assert {path.name for path in tmp_path.iterdir()} == {"second", "README.md"}


@every_method
def test_status_and_printing(row: Row) -> None:
    model = two_adapters(row, LLAMA)
    status = model.get_model_status()
    assert status.adapter_model_type == row.config.method.capitalize() + "Model"
    assert status.available_adapters == ["default", "second"]
    assert status.active_adapters == ["default"]
    assert status.enabled is True
    assert status.merged_adapters == []
    assert status.num_adapter_layers == len(adapted_layers(model)) == len(model.get_layer_status())
    assert f"method={row.config.method}" in repr(model)


@every_method
def test_what_has_another_size_is_left_out_where_that_is_wanted(row: Row, tmp_path: Path) -> None:
    """A head for other classes beside an adapter that is kept."""

    def build(classes: int) -> nn.Module:
        base: Any = MLP.build()
        base.head = nn.Linear(base.head.in_features, classes)
        return base

    row.adapt(MLP, build(3), init_weights=False, modules_to_save=["head"]).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"of shape \(3, 20\), where the model's is \(5, 20\)"):
        peft.PeftModel.from_pretrained(build(5), tmp_path)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        model = peft.PeftModel.from_pretrained(build(5), tmp_path, ignore_mismatched_sizes=True)
    assert MLP.logits(model).shape[-1] == 5
    saved = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    now = get_peft_model_state_dict(model)
    assert all(torch.equal(now[name], tensor) for name, tensor in saved.items() if "head" not in name)


@every_method
def test_attributes_of_the_base_layer_are_exposed(row: Row) -> None:
    for toy in (MLP, GPT2):
        for layer in adapted_layers(row.adapt(toy)).values():
            assert layer.weight is layer.get_base_layer().weight
            assert layer.bias is layer.get_base_layer().bias
            sides = (layer.in_features, layer.out_features)
            assert tuple(layer.base_matrix().shape) == sides[::-1]


# --- making and loading without weights ----------------------------------------------------------------------


@pytest.mark.parametrize("toy", [MLP, GPT2, BERT], ids=lambda toy: toy.name)
@every_row
def test_low_cpu_mem_usage(row: Row, toy: Toy, tmp_path: Path) -> None:
    model = row.adapt(toy, init_weights=False)
    expected = toy.logits(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(toy.build(), tmp_path, low_cpu_mem_usage=True)
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    row.assert_same(toy.logits(loaded), expected)
    loaded.load_adapter(tmp_path, "again", low_cpu_mem_usage=True)
    loaded.set_adapter("again")
    row.assert_same(toy.logits(loaded), expected)
    assert [name for name, p in loaded.named_parameters() if p.is_meta] == []


@every_row
def test_low_cpu_mem_usage_without_weights_stays_on_meta(row: Row, tmp_path: Path) -> None:
    model = row.adapt(MLP, init_weights=False)
    expected = MLP.logits(model)
    state = get_peft_model_state_dict(model)
    empty = peft.get_peft_model(MLP.build(), row.configure(MLP), low_cpu_mem_usage=True)
    own = [p for layer in adapted_layers(empty).values() for p in layer.adapter_parameters("default").values()]
    assert own
    assert all(p.is_meta for p in own)
    set_peft_model_state_dict(empty, state, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in empty.parameters())
    assert torch.equal(MLP.logits(empty), expected)


@every_row
def test_base_on_the_meta_device(row: Row) -> None:
    """An adapter is made on a base without weights; both are filled later."""
    with torch.device("meta"):
        base = LLAMA.build()
    model = row.adapt(LLAMA, base)
    assert all(p.is_meta for layer in adapted_layers(model).values() for p in layer.parameters())
    reference = row.adapt(LLAMA, init_weights=False)
    model.to_empty(device="cpu")
    model.load_state_dict(reference.state_dict())
    for buffer, source in zip(model.buffers(), reference.buffers(), strict=True):  # some are not in the state dict
        buffer.copy_(source)
    assert torch.equal(LLAMA.logits(model), LLAMA.logits(reference))


@every_method
def test_hotswap_is_for_lora_only(row: Row, tmp_path: Path) -> None:
    """PEFT's ``hotswap_adapter`` knows LoRA's two matrices only, says so, and leaves the model as it was."""
    model = row.adapt(MLP, init_weights=False)
    model.save_pretrained(tmp_path)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"LORA.*{row.config.method.upper()}"):
        hotswap_adapter(model, str(tmp_path), "default")
    assert_same_state(model, before)


@every_method
def test_loading_over_an_adapter_replaces_it(row: Row, tmp_path: Path) -> None:
    """What hot-swapping is for: ``load_adapter`` under a name in use takes over the file's weights and ranks."""
    other = row.adapt(MLP, init_weights=False, r=3, alpha=6)
    train(other, MLP)
    other.save_pretrained(tmp_path)
    model = row.adapt(MLP, init_weights=False, r=3, alpha=6)
    assert not torch.equal(MLP.logits(model), MLP.logits(other))
    model.load_adapter(tmp_path, "default")
    assert torch.equal(MLP.logits(model.eval()), MLP.logits(other))


# --- which modules -------------------------------------------------------------------------------------------


@every_method
def test_regular_expressions_and_exclusions(row: Row) -> None:
    model = row.adapt(LLAMA, target_modules=r".*\.1\..*(q|v)_proj")
    names = {name.removeprefix("base_model.model.") for name in adapted_layers(model)}
    assert names == {f"model.layers.1.self_attn.{kind}_proj" for kind in "qv"}
    model = row.adapt(LLAMA, target_modules="all-linear", exclude_modules=r".*mlp.*")
    assert {name.rpartition(".")[2] for name in adapted_layers(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(ValueError, match="exclu"):
        row.adapt(LLAMA, exclude_modules=["q_proj", "v_proj", "down_proj"])


@every_method
def test_targets_given_by_whole_names(row: Row) -> None:
    chosen = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"]
    model = row.adapt(LLAMA, target_modules=chosen)
    assert sorted(name.removeprefix("base_model.model.") for name in adapted_layers(model)) == chosen


@every_method
def test_layers_pattern(row: Row) -> None:
    model = row.adapt(GPT2, layers_to_transform=0, layers_pattern="h")
    assert adapted_layers(model)
    assert all(".h.0." in name for name in adapted_layers(model))


class OwnAttention(nn.MultiheadAttention):
    """Something of someone's, that may compute otherwise."""


@every_method
@pytest.mark.parametrize(
    ("build", "target"),
    [
        (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3)), "0"),
        (lambda: nn.Sequential(nn.EmbeddingBag(5, 4)), "0"),
        (lambda: nn.MultiheadAttention(8, 2), "out_proj"),
        (lambda: nn.ModuleDict({"attention": OwnAttention(8, 2)}), "attention"),
        (lambda: nn.ModuleDict({"attention": OwnAttention(8, 2)}), "out_proj"),
    ],
    ids=["transposed-convolution", "embedding-bag", "root", "own-attention", "its-out_proj"],
)
def test_what_cannot_be_adapted_is_named(row: Row, build: Any, target: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{target}'") as caught:
        peft.get_peft_model(build(), row.configure(MLP, target_modules=[target]))
    assert "exclude_modules" in one_sentence(caught.value)


# --- tied and resized embeddings -----------------------------------------------------------------------------


def tied_llama() -> nn.Module:
    model = LLAMA.build()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    return model


@every_method
def test_an_adapted_head_leaves_tied_embeddings_alone(row: Row, tmp_path: Path) -> None:
    base = tied_llama()
    before = base.get_input_embeddings().weight.detach().clone()
    model = row.adapt(LLAMA, base, target_modules=["q_proj", "lm_head"], init_weights=False)
    train(model, LLAMA)
    assert torch.equal(base.get_input_embeddings().weight, before)
    expected = LLAMA.logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, that it saves the head that is adapted
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(tied_llama(), tmp_path)
    torch.testing.assert_close(LLAMA.logits(loaded), expected, atol=1e-6, rtol=1e-6)


@every_static_method
def test_merging_an_adapted_head_does_not_write_into_tied_embeddings(row: Row) -> None:
    base = tied_llama()
    before = base.get_input_embeddings().weight.detach().clone()
    model = row.adapt(LLAMA, base, target_modules=["q_proj", "lm_head"], init_weights=False)
    expected = LLAMA.logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload()
    torch.testing.assert_close(LLAMA.logits(merged), expected, atol=2e-5, rtol=2e-5)
    assert torch.equal(merged.get_input_embeddings().weight, before)
    assert merged.config.tie_word_embeddings is False


@every_static_method
def test_merging_an_adapted_head_for_a_while_is_refused_where_it_is_tied(row: Row) -> None:
    model = row.adapt(LLAMA, tied_llama(), target_modules=["q_proj", "lm_head"], init_weights=False)
    before, expected = snapshot(model), LLAMA.logits(model)
    with pytest.raises(UnsupportedError, match=r"'lm_head'.*'model\.embed_tokens'") as caught:
        model.merge_adapter()
    one_sentence(caught.value)
    assert_same_state(model, before)
    assert torch.equal(LLAMA.logits(model), expected)


@every_method
def test_resized_embeddings_are_saved_and_loaded(row: Row, tmp_path: Path) -> None:
    base = LLAMA.build()
    original = copy.deepcopy(base)
    base.resize_token_embeddings(70, mean_resizing=False)
    model = row.adapt(LLAMA, base, init_weights=False)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    original.resize_token_embeddings(70, mean_resizing=False)
    loaded = peft.PeftModel.from_pretrained(original, tmp_path)
    assert LLAMA.logits(loaded).shape[-1] == 70
    assert torch.equal(LLAMA.logits(loaded), LLAMA.logits(model))


# --- without a PeftModel -------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", [MLP, GPT2], ids=lambda toy: toy.name)
@every_method
def test_inject_adapter_in_model(row: Row, toy: Toy) -> None:
    wrapped = row.adapt(toy, init_weights=False, task_type=None)
    state = get_peft_model_state_dict(wrapped)
    injected = peft.inject_adapter_in_model(row.configure(toy, task_type=None), toy.build())
    assert type(injected) is type(toy.build())
    own = get_peft_model_state_dict(injected)
    assert {f"base_model.model.{name}" for name in own} == set(state)
    set_peft_model_state_dict(injected, {k.removeprefix("base_model.model."): v for k, v in state.items()})
    assert torch.equal(toy.logits(injected), toy.logits(wrapped))
    train(injected, toy)
    [report] = dynalora.state_report(injected)
    assert report.step == 3


@every_method
def test_injected_from_a_state_dict(row: Row) -> None:
    """``inject_adapter_in_model(..., state_dict=...)`` takes its targets from the state dict."""
    state = get_peft_model_state_dict(row.adapt(MLP, target_modules=["second"]))
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.inject_adapter_in_model(row.configure(MLP), MLP.build(), state_dict=state)
    assert set(adapted_layers(model)) == {"second"}


@every_method
def test_feature_extraction(row: Row, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(3)
    base = transformers.BertModel(BERT.build().config)
    expected = base.eval()(**BERT.batch(1)).last_hidden_state
    config = row.configure(BERT, task_type="FEATURE_EXTRACTION", init_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    found = model(**BERT.batch(1)).last_hidden_state
    assert not torch.allclose(found, expected, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(loaded(**BERT.batch(1)).last_hidden_state, found)


@every_method
@pytest.mark.parametrize("targets", [["query", "value"], "all-linear"], ids=["some", "all-linear"])
@pytest.mark.parametrize(
    ("task_type", "name"), [("TOKEN_CLS", "BertForTokenClassification"), ("QUESTION_ANS", "BertForQuestionAnswering")]
)
def test_token_classification_and_question_answering(
    row: Row, task_type: str, name: str, targets: Any, tmp_path: Path
) -> None:
    import transformers

    torch.manual_seed(3)
    settings = BERT.build().config
    settings.num_labels = 2
    base = getattr(transformers, name)(settings)
    model = peft.get_peft_model(copy.deepcopy(base), row.configure(BERT, task_type=task_type, target_modules=targets))
    model.eval()
    heads = {name for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name}
    assert heads
    with torch.no_grad():
        found = model(**BERT.batch(1))[0]
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**BERT.batch(1))[0], found)


# --- conversion and helpers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", [MLP, GPT2], ids=lambda toy: toy.name)
@every_method
def test_conversion_by_peft(row: Row, toy: Toy) -> None:
    """PEFT converts static updates to a LoRA, and is told that a gated one has none."""
    model = row.adapt(toy, init_weights=False, r=2)
    assert model.supports_lora_conversion() is row.static
    if not row.static:
        with pytest.raises(TypeError):
            peft.convert_to_lora(model, rank=20, progressbar=False)
        return
    config, state = peft.convert_to_lora(model, rank=12, progressbar=False)  # as many as DisLoRA's components are
    lora = peft.get_peft_model(toy.build(), config).eval()
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(toy.logits(lora), toy.logits(model), atol=1e-4, rtol=1e-4)


def test_peft_is_not_asked_to_convert_what_its_lora_computes_otherwise() -> None:
    for layer in (nn.Conv1d(4, 4, 3), nn.Embedding(5, 4), nn.MultiheadAttention(4, 2)):
        model = peft.get_peft_model(
            nn.ModuleDict({"layer": layer}), dynalora.DiraConfig(r=2, target_modules=["layer"], total_steps=9)
        )
        with pytest.raises(TypeError, match="do not support LoRA conversion"):
            peft.convert_to_lora(model, rank=2)


@every_method
def test_different_methods_in_one_model_are_refused(row: Row) -> None:
    model = row.adapt(MLP)
    with pytest.raises((TypeError, ValueError)):
        model.add_adapter("lora", peft.LoraConfig(target_modules=["first"]))
    assert list(model.peft_config) == ["default"]
    with pytest.raises((TypeError, ValueError), match=f"(?i){row.config.method}"):
        peft.get_peft_model(MLP.build(), row.configure(MLP), mixed=True)


# --- differentiating twice -----------------------------------------------------------------------------------


@every_row
def test_second_derivatives(row: Row) -> None:
    """Of the layer with its in-place kernel, against numbers."""
    if row.alone:
        pytest.skip("its norms are constants to the gradient, as DoRA has it, and not to finite differences")
    layer = adapted_layers(row.adapt(MLP, MLP.build().double(), init_weights=False))["base_model.model.first"]
    own = {n: p for n, p in layer.named_parameters() if not n.startswith("base_layer.")}
    x = torch.randn(2, layer.in_features, dtype=torch.float64, requires_grad=True)

    def apply(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(own, values, strict=True)), (x,))

    assert torch.autograd.gradgradcheck(apply, (x, *own.values()), atol=1e-5, rtol=1e-3)


@every_method
def test_a_gradient_penalty_reaches_the_factors_in_half_precision(row: Row) -> None:
    """A penalty on the input's gradient, through the kernel that casts: as in float32, to bf16's rounding."""
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(4)
        layer = adapted_layers(row.adapt(MLP, MLP.build().to(dtype), init_weights=False))["base_model.model.first"]
        x = MLP.batch(1)["x"].to(dtype).requires_grad_()
        [grad] = torch.autograd.grad(layer(x).float().square().sum(), x, create_graph=True)
        grad.float().square().sum().backward()
        gradients.append(layer.parameter("up", "default").grad)
    assert gradients[0].norm() > 0
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


def test_no_method_is_left_out() -> None:
    assert {row.config.method for row in FIRST_OF_EACH_METHOD} == set(dynalora.methods.METHODS)


# --- the configuration and what training has come to ---------------------------------------------------------


@every_row
def test_reading_a_state_leaves_the_configuration_as_it_is(row: Row, tmp_path: Path) -> None:
    model = row.adapt(LLAMA)
    train(model, LLAMA)
    config = model.peft_config["default"]
    before = config.to_dict()
    model.save_pretrained(tmp_path / "whole")
    get_peft_model_state_dict(model)
    assert config.to_dict() == before
    config.save_pretrained(tmp_path / "alone")
    written = [peft.PeftConfig.from_pretrained(tmp_path / folder).rank_pattern for folder in ("whole", "alone")]
    ranks = {name: rank for name, rank in model.base_model.rank_pattern.items() if rank != config.r}
    moves = row.config is dynalora.PedyraConfig or issubclass(row.config, GrowthConfig) or "target_rank" in row.options
    assert written == [{f"^{name}".replace(".", r"\."): rank for name, rank in ranks.items()}] * 2
    assert bool(ranks) == moves
    assert copy.deepcopy(config).to_dict() == before


@every_method
def test_one_configuration_for_two_models_saves_the_ranks_of_each(row: Row, tmp_path: Path) -> None:
    config = row.configure(LLAMA)
    first, second = (peft.get_peft_model(LLAMA.build(), config) for _ in range(2))
    train(first, LLAMA)
    for name, model in (("first", first), ("second", second)):
        model.save_pretrained(tmp_path / name)
        written = peft.PeftConfig.from_pretrained(tmp_path / name).rank_pattern
        assert bool(written) == any(rank != config.r for rank in model.base_model.rank_pattern.values())
