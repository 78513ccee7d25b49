"""Adapters from strangers: what is wrong is said in one sentence, and the model that they were for is as it was."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

import dynalora
from dynalora.adapter import patterns, targets
from dynalora.adapter.layer import adapter_layers
from dynalora.adapter.patterns import check_patterns, of_module
from dynalora.errors import CheckpointError, ConfigError, DynaloraError
from dynalora.lab.adapters import read_config
from dynalora.methods.pedyra import adjustments
from tests.conftest import FUZZ
from tests.unit import tiny

CONFIGS: dict[str, Callable[..., Any]] = {
    "dira": dynalora.DiraConfig,
    "disel": dynalora.DiselConfig,
    "dislora": dynalora.DisloraConfig,
    "pedyra": dynalora.PedyraConfig,
    "increlora": dynalora.IncreloraConfig,
    "loradash": dynalora.LoraDashConfig,
    "rasa": dynalora.RasaConfig,
}
Tensors = dict[str, torch.Tensor]
INPUT = torch.arange(3, 19)[None]


def base() -> Any:
    return tiny.model(64, layers=1)


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    config = CONFIGS[request.param](r=3, target_modules="all-linear", init_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(base(), config).save_pretrained(folder)
    return folder


def changed(source: Path, target: Path, tensors: Callable[[Tensors], Tensors] | None = None, **fields: Any) -> Path:
    """A copy of an adapter with other tensors, or other settings."""
    target.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    state = load_file(source / "adapter_model.safetensors")
    state = tensors(dict(state)) if tensors else state
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, target / "adapter_model.safetensors")
    return target


def stored(folder: Path) -> Path:
    """A sound adapter."""
    peft.get_peft_model(base(), dynalora.DiraConfig(r=3, target_modules=["q_proj"])).save_pretrained(folder)
    return folder


def last(state: Tensors, end: str) -> str:
    return [name for name in state if name.endswith(end)][-1]


def nan(state: Tensors) -> Tensors:
    state[last(state, "_down")][-1, -1] = float("nan")
    return state


def wrong_width(state: Tensors) -> Tensors:
    name = last(state, "_down")
    state[name] = state[name][:, :-1]
    return state


def base_tensor(state: Tensors) -> Tensors:
    return {**state, "base_model.model.lm_head.weight": torch.full((64, 32), 3.0)}


def base_layer_tensor(state: Tensors) -> Tensors:
    name = last(state, "_down").rpartition(".")[0] + ".base_layer.weight"
    shape = (state[last(state, "_up")].shape[0], state[last(state, "_down")].shape[1])
    return {**state, name: torch.zeros(shape)}


def foreign_rank(state: Tensors) -> Tensors:
    return {**state, last(state, "_down").removesuffix("down") + "rank": torch.tensor(10**9)}


def unknown_role(state: Tensors) -> Tensors:
    return {**state, last(state, "_down").removesuffix("down") + "surprise": torch.zeros(3)}


def integers(state: Tensors) -> Tensors:
    return {name: (value.to(torch.int8) if name.endswith("_up") else value) for name, value in state.items()}


def clock(state: Tensors) -> Tensors:
    return {**state, last(state, "_progress"): torch.tensor([-1, 5])}


def no_rank(state: Tensors) -> Tensors:
    down, up = last(state, "_down"), last(state, "_up")
    return {**state, down: state[down][:0], up: state[up][:, :0]}


def half(state: Tensors) -> Tensors:
    del state[last(state, "_up")]
    return state


def eight_bits(state: Tensors) -> Tensors:
    return {name: (value.to(torch.float8_e4m3fn) if name.endswith("_up") else value) for name, value in state.items()}


def complex_numbers(state: Tensors) -> Tensors:
    return {name: (value.to(torch.complex64) if name.endswith("_up") else value) for name, value in state.items()}


DAMAGE = [
    eight_bits, complex_numbers, nan, wrong_width, base_tensor, base_layer_tensor, foreign_rank, unknown_role,
    integers, clock, no_rank, half,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_load_is_all_or_nothing(saved: Path, tmp_path: Path, damage: Callable[[Tensors], Tensors]) -> None:
    model = peft.PeftModel.from_pretrained(base(), saved).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        output = model(input_ids=INPUT).logits

    def scaled(state: Tensors) -> Tensors:
        # Whatever was loaded before the damage was met would show.
        return damage({name: (2 * v if v.is_floating_point() else v) for name, v in state.items()})

    hostile = changed(saved, tmp_path / "hostile", scaled)
    for name in ("default", "other"):
        with pytest.raises(CheckpointError) as caught:
            model.load_adapter(str(hostile), adapter_name=name)
        assert "\n" not in str(caught.value)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert list(model.peft_config) == ["default"]
        with torch.no_grad():
            assert torch.equal(model(input_ids=INPUT).logits, output)


def test_further_modules_of_an_adapter_that_is_refused_are_as_they_were(saved: Path, tmp_path: Path) -> None:
    model = peft.PeftModel.from_pretrained(base(), str(saved))
    before = {name: type(module) for name, module in model.named_modules()}
    bad = changed(saved, tmp_path / "bad", target_modules=["q_proj", "v_proj", "lm_head"])
    with pytest.raises(CheckpointError, match="lm_head"):
        model.load_adapter(str(bad), adapter_name="other")
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_base_model_is_as_it_was_after_an_adapter_that_cannot_be_loaded(saved: Path, tmp_path: Path) -> None:
    model = base()
    names = list(model.state_dict())
    with pytest.raises(CheckpointError):
        peft.PeftModel.from_pretrained(model, changed(saved, tmp_path / "x", base_tensor))
    assert list(model.state_dict()) == names
    with pytest.raises(CheckpointError):
        peft.PeftModel.from_pretrained(model, changed(saved, tmp_path / "y", r=10**6 // 20))
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    "fields",
    [
        {"alpha": 1e300}, {"alpha": "8"}, {"r": 10**9}, {"r": True}, {"scaling_ranks": {"q_proj": -2}},
        {"scaling_ranks": {"q_proj": "x"}}, {"rank_pattern": ["q_proj"]}, {"rank_pattern": {"((": 3}},
        {"rank_pattern": {"q_proj": 10**5}}, {"alpha_pattern": {"q_proj": 1e200}}, {"target_modules": 5},
        {"target_modules": "(a"}, {"exclude_modules": [1]}, {"modules_to_save": {"a": 1}}, {"use_rslora": "no"},
        {"layers_to_transform": "all", "target_modules": ["q_proj"]}, {"task_type": "NOTHING"}, {"bias": ["all"]},
        {"total_steps": 2**60}, {"dropout": "0.1"}, {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": "(a+)+$"}, {"trainable_token_indices": 3},
        {"trainable_token_indices": {"embed_tokens": [-1]}}, {"peft_type": ["DIRA"]}, {"peft_type": "NOBODY"},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_settings_that_cannot_be_meant(saved: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(DynaloraError) as caught:
        peft.PeftModel.from_pretrained(base(), changed(saved, tmp_path / "x", **fields))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b'{"r": 3}', b"[]", b'{"peft_type": "\xb3"}'], ids=repr)
def test_a_configuration_that_is_none(saved: Path, tmp_path: Path, text: bytes) -> None:
    """PEFT reads it before it knows whose it is, and ends in errors of Python's own, of its own methods, too."""
    folder = changed(saved, tmp_path / "x")
    (folder / "adapter_config.json").write_bytes(text)
    model = peft.PeftModel.from_pretrained(base(), saved)
    for load in (lambda: peft.PeftModel.from_pretrained(base(), folder), lambda: model.load_adapter(folder, "other")):
        with pytest.raises(CheckpointError) as caught:
            load()
        assert "\n" not in str(caught.value)
    assert list(model.peft_config) == ["default"]


@pytest.mark.skipif(not os.path.exists("/dev/null"), reason="needs a device")
@pytest.mark.parametrize("kind", ["device", "folder"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_that_are_none_are_not_read(kind: str, name: str, tmp_path: Path) -> None:
    """A pipe in their place would be waited for, and a device without end would fill the memory."""
    stored(tmp_path / "x")
    (tmp_path / "x" / name).unlink()
    if kind == "device":
        (tmp_path / "x" / name).symlink_to("/dev/null")
    else:
        (tmp_path / "x" / name).mkdir()
    with pytest.raises(CheckpointError, match=f"{name} is no file but"):
        peft.PeftModel.from_pretrained(base(), tmp_path / "x")
    with pytest.raises(CheckpointError, match=f"{name} is no file but"):
        read_config(tmp_path / "x")


@pytest.mark.parametrize("gone", ["weights", "link"])
def test_an_adapter_without_its_weights(gone: str, tmp_path: Path) -> None:
    stored(tmp_path / "x")
    (tmp_path / "x" / "adapter_model.safetensors").unlink()
    if gone == "link":
        (tmp_path / "x" / "adapter_model.safetensors").symlink_to("nowhere")
    model = base()
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors"):
        peft.PeftModel.from_pretrained(model, tmp_path / "x")
    assert not adapter_layers(model)


@pytest.mark.parametrize("kind", ["pickle", "six bits"])
def test_weights_that_are_not_read(kind: str, tmp_path: Path) -> None:
    """A pickle can hold anything, and of any size; and there are kinds of numbers that torch does not have."""
    folder = stored(tmp_path / "x")
    file = folder / "adapter_model.safetensors"
    if kind == "pickle":
        torch.save(load_file(file), folder / "adapter_model.bin")
        file.unlink()
    else:
        name, empty = "base_model.model.model.layers.0.self_attn.q_proj.dira_up", b"\0" * 48
        header = json.dumps({name: {"dtype": "F6_E2M3", "shape": [64, 1], "data_offsets": [0, 48]}}).encode()
        header = header.replace(b"dira_up", b"dira_x")
        file.write_bytes(len(header).to_bytes(8, "little") + header + empty)
    model: Any = peft.get_peft_model(base(), dynalora.DiraConfig(r=3, target_modules=["q_proj"]))
    for load in (lambda: peft.PeftModel.from_pretrained(base(), folder), lambda: model.load_adapter(folder, "other")):
        with pytest.raises(CheckpointError, match="a pickle" if kind == "pickle" else "cannot be read"):
            load()
    assert list(model.peft_config) == ["default"]


def test_a_configuration_that_is_none_beside_weights_that_are_none(tmp_path: Path) -> None:
    stored(tmp_path / "x")
    (tmp_path / "x" / "adapter_model.safetensors").write_bytes(b"PK")
    with (tmp_path / "x" / "adapter_config.json").open("a") as file:
        file.write(',"r": 3}')
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        peft.PeftModel.from_pretrained(base(), tmp_path / "x")


def test_settings_of_a_newer_version_are_named(saved: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="of_tomorrow"):
        peft.PeftModel.from_pretrained(base(), changed(saved, tmp_path / "x", of_tomorrow=1))


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
def test_patterns_that_never_end(field: str, saved: Path, tmp_path: Path) -> None:
    endless = r"(([a-z._0-9])+)+(\!)"
    value: Any = {endless: 3} if field == "rank_pattern" else endless
    with pytest.raises(DynaloraError, match=f"{field}.*takes too long"):
        peft.PeftModel.from_pretrained(base(), changed(saved, tmp_path / "x", **{field: value}))


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern", "modules_to_save"])
def test_a_pattern_that_takes_long_to_compile_is_refused(field: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="of 100,000 characters at most, got 'aaa") as refused:
        peft.PeftModel.from_pretrained(base(), changed(saved, tmp_path / "x", **{field: "a" * 10**6}))
    assert len(str(refused.value)) < 500


NAMES_AND_PARTS = st.sampled_from(["q_proj", "v_proj", "layers.0", "layers.1", "layers", "1.q_proj", "x", "layers/0"])


@settings(max_examples=200, deadline=None)
@given(
    keys=st.lists(st.one_of(NAMES_AND_PARTS, st.sampled_from([".*", r"^layers\.0", "(q|v)_proj", r".*\.1\..*"]))),
    parts=st.lists(NAMES_AND_PARTS, max_size=3),
)
def test_a_pattern_means_what_it_means_to_peft(keys: list[str], parts: list[str]) -> None:
    pattern, name = {key: rank for rank, key in enumerate(keys)}, ".".join(parts)
    assert of_module(pattern, name, -1) == pattern.get(get_pattern_key(list(pattern), name), -1)


def test_the_expressions_of_a_pattern_are_compiled_once() -> None:
    pattern = dict.fromkeys((f"layers.{at}.q_proj" for at in range(600)), 3)  # more than Python's own memory holds
    patterns._expressions.cache_clear()
    assert all(of_module(pattern, f"model.{name}", 8) == 3 for name in pattern)
    assert patterns._expressions.cache_info().misses == 1


LONG = [f"x{at}" for at in range(100_000)]


@pytest.mark.parametrize(
    "fields",
    [
        {"rank_pattern": dict.fromkeys((f"{name}.*y" for name in LONG), 2)},
        {"alpha_pattern": {f"({'a' * 1000}|{name})": 2.0 for name in LONG[:400]}},
        {"modules_to_save": LONG},
        {"layers_pattern": LONG, "layers_to_transform": [0]},
        {"trainable_token_indices": {name: [1] for name in LONG}},
        {"rank_pattern": dict.fromkeys(LONG, 2)},
        {"scaling_ranks": dict.fromkeys(LONG, 2)},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_lists_that_are_compared_with_every_module_are_bounded(
    fields: dict[str, Any], saved: Path, tmp_path: Path
) -> None:
    model = base()
    with pytest.raises(DynaloraError, match=next(iter(fields))) as refused:
        peft.PeftModel.from_pretrained(model, changed(saved, tmp_path / "x", **fields))
    assert len(str(refused.value)) < 1000
    with pytest.raises(ConfigError, match=next(iter(fields))):
        peft.get_peft_model(model, dynalora.DiraConfig(target_modules=["q_proj"], **fields))
    assert not adapter_layers(model)


@pytest.mark.parametrize("tail", ["", ".q_proj"], ids=["unknown names", "known ends"])
def test_long_lists_of_names_mean_what_is_in_the_model(tail: str, saved: Path, tmp_path: Path) -> None:
    model = peft.PeftModel.from_pretrained(base(), saved)
    names = sorted(adapter_layers(model.base_model.model))
    fields = {
        "target_modules": [*names, *(f"{name}{tail}" for name in LONG)],
        "exclude_modules": ["lm_head", *(f"{name}{tail}" for name in LONG)],
    }
    long = peft.PeftModel.from_pretrained(base(), changed(saved, tmp_path / "x", **fields))
    assert torch.equal(long(input_ids=INPUT).logits, model(input_ids=INPUT).logits)
    assert len(long.peft_config["default"].target_modules) <= len(names)


def test_a_long_list_in_which_nothing_is_known_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Target modules .*'x0'.* not found") as refused:
        peft.PeftModel.from_pretrained(base(), changed(saved, tmp_path / "x", target_modules=LONG))
    assert len(str(refused.value)) < 1000


@settings(max_examples=200, deadline=None)
@given(
    meant=st.lists(NAMES_AND_PARTS, min_size=1),
    left_out=st.lists(NAMES_AND_PARTS),
    blocks=st.none() | st.just([1]),
    parts=st.lists(NAMES_AND_PARTS, min_size=1, max_size=4),
)
def test_a_long_list_means_what_it_means_to_peft(
    meant: list[str], left_out: list[str], blocks: Any, parts: list[str]
) -> None:
    fields = {"target_modules": meant, "exclude_modules": left_out, "layers_to_transform": blocks}
    config, name = dynalora.DiraConfig(**fields), ".".join(parts)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(targets, "_MANY", 0)
        found = targets.exists(config, name)
    expected = check_target_module_exists(config, name)
    assert (bool(found), type(found)) == (bool(expected), type(expected))


def test_a_pattern_whose_matching_never_ends_behind_the_name_of_a_block() -> None:
    config = dynalora.DiraConfig(r=2, rank_pattern={"(l+)+x": 3})
    with pytest.raises(ConfigError, match=r"rank_pattern.*takes too long"):
        check_patterns(config, ["model.block." + 40 * "l"])


@pytest.mark.parametrize(
    "fields", [{"layers_pattern": "(l+)+x", "layers_to_transform": [0]}, {"modules_to_save": ["head", "(l+)+x"]}]
)
def test_names_of_blocks_and_of_modules_are_patterns_too(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "_SECONDS", 1)
    field = next(iter(fields))
    with pytest.raises(ConfigError, match=f"{field}.*takes too long"):
        check_patterns(dynalora.DiraConfig(r=2, **fields), ["model.block." + 40 * "l"])
    with pytest.raises(
        ConfigError, match=rf"{field} must be a regular expression of 100,000 characters at most, got '\('"
    ):
        dynalora.DiraConfig(r=2, **{**fields, field: ["("]})


def test_weights_of_the_base_model_that_were_saved_along_change_nothing(saved: Path, tmp_path: Path) -> None:
    words = base().model.embed_tokens.weight.detach()  # PEFT saves embeddings with adapters of the output layer
    along = changed(saved, tmp_path / "x", lambda t: {**t, "base_model.model.model.embed_tokens.weight": words.half()})
    with torch.no_grad():
        results = [peft.PeftModel.from_pretrained(base(), folder)(input_ids=INPUT).logits for folder in (saved, along)]
    assert torch.equal(*results)


def test_new_words_are_taken_and_old_ones_are_not(saved: Path, tmp_path: Path) -> None:
    words = base().lm_head.weight.detach().clone()
    words[60:] = 3.0

    def with_words(state: Tensors) -> Tensors:
        return {**state, "base_model.model.lm_head.weight": words}

    added = changed(saved, tmp_path / "x", with_words)
    model = peft.PeftModel.from_pretrained(base(), added)
    assert torch.equal(model.get_base_model().lm_head.weight, words)
    other = peft.PeftModel.from_pretrained(base(), saved)
    with pytest.raises(CheckpointError, match="would change the base model"):
        other.load_adapter(str(added), adapter_name="second")
    words[3] = 3.0
    with pytest.raises(CheckpointError, match="would change the base model"):
        peft.PeftModel.from_pretrained(base(), changed(saved, tmp_path / "y", with_words))


def test_new_words_are_those_behind_the_checkpoints_vocabulary(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")

    def resized(words: int) -> Any:
        model = type(base()).from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(words, mean_resizing=False)
        return model

    source = resized(66)
    config = dynalora.DiraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(source, config).save_pretrained(tmp_path / "good", save_embedding_layers=True)
    loaded = peft.PeftModel.from_pretrained(resized(66), tmp_path / "good").get_base_model()
    assert torch.equal(loaded.lm_head.weight, source.lm_head.weight)

    def last_old_word(state: Tensors) -> Tensors:
        state["base_model.model.lm_head.weight"][63] = 3.0
        return state

    with pytest.raises(CheckpointError, match="would change the base model"):
        peft.PeftModel.from_pretrained(resized(66), changed(tmp_path / "good", tmp_path / "x", last_old_word))


def test_embeddings_trained_in_full_are_loaded_with_new_words(tmp_path: Path) -> None:
    """PEFT saves the embeddings of a resized vocabulary, too, whose new rows are drawn anew wherever it is resized."""
    base().save_pretrained(tmp_path / "base")

    def resized(seed: int) -> Any:
        model = type(base()).from_pretrained(tmp_path / "base")
        torch.manual_seed(seed)
        model.resize_token_embeddings(66, mean_resizing=False)
        return model

    config = dynalora.DiraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = peft.get_peft_model(resized(0), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "good")
    names = load_file(tmp_path / "good" / "adapter_model.safetensors").keys()
    assert any(name.endswith("lm_head.original_module.weight") for name in names)
    loaded = peft.PeftModel.from_pretrained(resized(1), tmp_path / "good")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=INPUT).logits, model.eval()(input_ids=INPUT).logits)

    def old_word(state: Tensors) -> Tensors:
        state["base_model.model.lm_head.original_module.weight"][3] = 3.0
        return state

    with pytest.raises(CheckpointError, match="would change the base model"):
        peft.PeftModel.from_pretrained(resized(1), changed(tmp_path / "good", tmp_path / "x", old_word))


def rows_of(state: Tensors) -> str:
    return next(name for name in state if "trainable_tokens" in name or "lm_head" in name)


BESIDES: list[tuple[dict[str, Any], dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]] = [
    # What was trained besides the adapter, fields that are changed, and what is done to its tensor.
    ({"trainable_token_indices": [1, 5]}, {}, lambda rows: rows * float("nan")),
    ({"trainable_token_indices": [1, 5]}, {}, lambda rows: rows[:-1]),
    ({"trainable_token_indices": [1, 5]}, {}, lambda rows: rows.int()),
    ({"trainable_token_indices": [1, 5]}, {"trainable_token_indices": None}, lambda rows: rows),
    ({"trainable_token_indices": [1, 5]}, {"trainable_token_indices": [1]}, lambda rows: rows),
    ({"trainable_token_indices": [1, 5]}, {"trainable_token_indices": [1, 64]}, lambda rows: rows),
    ({"trainable_token_indices": [1, 5]}, {"trainable_token_indices": [5, 5]}, lambda rows: rows),
    ({"trainable_token_indices": [1, 5]}, {"trainable_token_indices": {"q_proj": [1, 5]}}, lambda rows: rows),
    ({"trainable_token_indices": [1, 5]}, {"trainable_token_indices": {"lm_head": [1, 5]}}, lambda rows: rows),
    ({"modules_to_save": ["lm_head"]}, {}, lambda head: head * float("inf")),
    ({"modules_to_save": ["lm_head"]}, {}, lambda head: head[:, :-1]),
    ({"modules_to_save": ["lm_head"]}, {}, lambda head: head.int()),
    ({"modules_to_save": ["lm_head"]}, {"modules_to_save": None}, lambda head: head + 1),
    ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head", "norm"]}, lambda head: head),
    ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head", "q_proj"]}, lambda head: head),
    ({"modules_to_save": ["lm_head"]}, {"target_modules": ["nothing"]}, lambda head: head),
]


@pytest.mark.parametrize(("besides", "fields", "change"), BESIDES)
def test_what_is_trained_besides_is_all_or_nothing_too(
    besides: dict[str, Any], fields: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    def config(**more: Any) -> Any:
        return dynalora.DiraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **more)

    peft.get_peft_model(base(), config(**besides, init_weights=False)).save_pretrained(tmp_path / "good")
    kept: Any = peft.PeftModel.from_pretrained(base(), tmp_path / "good")
    assert len(kept.peft_config) == 1

    def damaged(state: Tensors) -> Tensors:
        return {name: change(tensor) if name == rows_of(state) else tensor for name, tensor in state.items()}

    bad = changed(tmp_path / "good", tmp_path / "bad", damaged, **fields)
    fresh: Any = base()
    running: Any = peft.get_peft_model(base(), config())
    before = [{name: t.clone() for name, t in model.state_dict().items()} for model in (fresh, running)]
    for load in (lambda: peft.PeftModel.from_pretrained(fresh, bad), lambda: running.load_adapter(bad, "other")):
        with pytest.raises(DynaloraError) as caught:
            load()
        assert "\n" not in str(caught.value)
    for model, old in zip((fresh, running), before, strict=True):
        state = model.state_dict()
        assert list(state) == list(old)
        assert all(torch.equal(state[name], old[name]) for name in old)
    assert list(running.peft_config) == ["default"]


GOOD_RECORD = zlib.compress(b'[{"step":1,"layers":["a"],"ranks":[2],"scores":[[0.5]],"pruned":[],"expanded":[]}]')


@pytest.mark.parametrize("before", [b"", GOOD_RECORD], ids=["alone", "after a good one"])
@pytest.mark.parametrize(
    "text", [b"[" + b" " * (1 << 24) + b"]", b"[[" * 5000, b'[{"step": 1}]', b"nothing", b'{"a": 1}', b"[]"]
)
def test_a_record_of_adjustments_that_cannot_be_read(text: bytes, before: bytes, tmp_path: Path) -> None:
    config = dynalora.PedyraConfig(r=2, target_modules=["q_proj", "v_proj"], total_steps=9)
    peft.get_peft_model(base(), config).save_pretrained(tmp_path / "good")
    forged = torch.frombuffer(bytearray(before + zlib.compress(text, 9)), dtype=torch.uint8)

    def forge(state: Tensors) -> Tensors:
        return {**state, last(state, "_progress").replace("progress", "record"): forged}

    model = peft.PeftModel.from_pretrained(
        base(), changed(tmp_path / "good", tmp_path / "bad", forge), is_trainable=True
    )
    with pytest.raises(CheckpointError, match="record of adjustments"):
        adjustments(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=INPUT, labels=INPUT).loss.backward()
    with pytest.raises(CheckpointError, match="record of adjustments"):
        optimizer.step()


PIECES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.lists(st.one_of(st.integers(), st.text(max_size=4)), max_size=3),
    st.dictionaries(st.text(max_size=6), st.one_of(st.integers(), st.floats(), st.text(max_size=3)), max_size=2),
)  # fmt: skip


@settings(max_examples=500 * max(1, FUZZ), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_setting_ends_in_a_traceback(data: st.DataObject, tmp_path: Path) -> None:
    kind = CONFIGS[data.draw(st.sampled_from(sorted(CONFIGS)))]
    names = [name for name in kind.own_fields() if name not in ("retain_on",)]
    fields = data.draw(st.dictionaries(st.sampled_from(names), PIECES, min_size=1, max_size=3))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind.method.upper(), **fields}))
    try:
        kind.from_pretrained(tmp_path)
    except DynaloraError as error:
        assert "\n" not in str(error)  # noqa: PT017


@settings(max_examples=60 * max(1, FUZZ), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_file_ends_in_a_traceback(saved: Path, data: st.DataObject, tmp_path: Path) -> None:
    state = load_file(saved / "adapter_model.safetensors")
    for name in data.draw(st.lists(st.sampled_from(sorted(state)), min_size=1, max_size=3, unique=True)):
        how = data.draw(st.sampled_from(["gone", "flat", "cut", "empty", "double", "huge", "bytes", "deep"]))
        tensor = state.pop(name)
        made = {
            "flat": lambda t: t.reshape(-1),
            "cut": lambda t: t[: len(t) // 2] if t.ndim else t[None],
            "empty": lambda t: t[:0] if t.ndim else t[None][:0],
            "double": lambda t: torch.cat([t, t]) if t.ndim else t[None],
            "huge": lambda t: torch.full_like(t, torch.finfo(t.dtype).max if t.is_floating_point() else 2**40),
            "bytes": lambda t: t.to(torch.uint8),
            "deep": lambda t: t[None, None],
        }
        if how != "gone":
            state[name] = made[how](tensor).contiguous()
    folder = changed(saved, tmp_path / "x", lambda _: state)
    model = base()
    try:
        loaded = peft.PeftModel.from_pretrained(model, folder)
    except DynaloraError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert not adapter_layers(model)
        return
    with torch.no_grad():
        loaded(input_ids=INPUT)


def test_a_models_own_load_is_all_or_nothing_too(saved: Path) -> None:
    model = peft.PeftModel.from_pretrained(base(), str(saved))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor + 1 if "_up" in name else tensor for name, tensor in before.items()}
    state[[name for name in state if "_up." in name][-1]] *= float("nan")
    with pytest.raises(CheckpointError, match=r"NaN|not finite|infinite"):
        model.load_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
