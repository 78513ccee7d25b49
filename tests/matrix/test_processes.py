"""Saved in one process, loaded in another; exported for a process that has no dynalora."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch

import dynalora
from dynalora.errors import CheckpointError, UnsupportedError
from tests.matrix.rows import (
    FIRST_OF_EACH_METHOD,
    ROWS,
    STATIC,
    TRANSFORMERS,
    Row,
    every_dynamic_row,
    every_method,
    every_row,
    every_static_row,
    every_toy,
    every_transformer,
)
from tests.matrix.test_behaviour import adapted_layers, train
from tests.toys import TOYS, Toy, assert_same_state, snapshot

CAUSAL = tuple(toy for toy in TRANSFORMERS if toy.task_type == "CAUSAL_LM")

LOAD = """
import json, sys
from pathlib import Path
import safetensors.torch, torch
torch.set_num_threads(1)
import dynalora, peft
from tests.toys import TOYS
folder = Path(sys.argv[1])
logits, trainable, types = {}, {}, {}
thorough = json.loads(sys.argv[3])
for row in json.loads(sys.argv[2]):
    for name, toy in TOYS.items():
        key = f"{row}.{name}"
        model = peft.PeftModel.from_pretrained(toy.build(), folder / key)
        logits[f"plain/{key}"] = toy.logits(model)
        trainable[key] = sum(p.requires_grad for p in model.parameters())
        types[key] = model.peft_config["default"].peft_type
        if row not in thorough:
            continue
        lean = peft.PeftModel.from_pretrained(toy.build(), folder / key, low_cpu_mem_usage=True)
        logits[f"lean/{key}"] = toy.logits(lean)
        if toy.task_type == "CAUSAL_LM":
            auto = peft.AutoPeftModelForCausalLM.from_pretrained(folder / key)
            logits[f"auto/{key}"] = toy.logits(auto)
safetensors.torch.save_file({k: v.contiguous() for k, v in logits.items()}, folder / "logits.safetensors")
print(json.dumps({"trainable": trainable, "types": types}))
"""

LOAD_EXPORTED = """
import json, sys
from pathlib import Path
import safetensors.torch, torch
torch.set_num_threads(1)
import peft
from tests.toys import TOYS
folder = Path(sys.argv[1])
logits, types = {}, {}
for row in json.loads(sys.argv[2]):
    for name, toy in TOYS.items():
        key = f"{row}.{name}"
        model = peft.PeftModel.from_pretrained(toy.build(), folder / key)
        logits[key] = toy.logits(model)
        types[key] = model.peft_config["default"].peft_type
        merged = model.merge_and_unload()
        logits[f"merged/{key}"] = toy.logits(merged)
assert sys.modules["dynalora"] is None
safetensors.torch.save_file({k: v.contiguous() for k, v in logits.items()}, folder / "logits.safetensors")
print(json.dumps(types))
"""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The causal models as folders, as a user would have them."""
    root = tmp_path_factory.mktemp("bases")
    for toy in CAUSAL:
        toy.build().save_pretrained(root / toy.name)
    return {toy.name: root / toy.name for toy in CAUSAL}


def trained(row: Row, toy: Toy, bases: dict[str, Path], **overrides: Any) -> Any:
    base = toy.build()
    if toy.name in bases:
        base = type(base).from_pretrained(bases[toy.name])
    torch.manual_seed(7)
    model = row.adapt(toy, base, init_weights=False, **overrides)
    train(model, toy)
    return model


@pytest.fixture(scope="module")
def elsewhere(
    tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path], run_python: Any
) -> dict[str, dict[str, Any]]:
    """Every row on every model, saved here and loaded by one other process."""
    folder = tmp_path_factory.mktemp("saved")
    here = {}
    for row in ROWS:
        for toy in TOYS.values():
            model = trained(row, toy, bases)
            model.save_pretrained(folder / f"{row.name}.{toy.name}")
            here[f"{row.name}.{toy.name}"] = toy.logits(model)
    rows, thorough = [row.name for row in ROWS], [row.name for row in FIRST_OF_EACH_METHOD]
    output = run_python(LOAD, str(folder), json.dumps(rows), json.dumps(thorough))
    report = json.loads(output.splitlines()[-1])
    return {
        "folder": {"path": folder},
        "here": here,
        "there": safetensors.torch.load_file(folder / "logits.safetensors"),
        **report,
    }


@every_toy
@every_row
def test_another_process_computes_the_same(row: Row, toy: Toy, elsewhere: dict[str, Any]) -> None:
    key = f"{row.name}.{toy.name}"
    assert torch.equal(elsewhere["there"][f"plain/{key}"], elsewhere["here"][key])
    if row in FIRST_OF_EACH_METHOD:
        assert torch.equal(elsewhere["there"][f"lean/{key}"], elsewhere["here"][key])
    if row in FIRST_OF_EACH_METHOD and toy.task_type == "CAUSAL_LM":
        assert torch.equal(elsewhere["there"][f"auto/{key}"], elsewhere["here"][key])
    assert elsewhere["trainable"][key] == 0
    assert elsewhere["types"][key] == row.config().peft_type


@every_toy
@every_row
def test_saved_folder_is_small_and_unpickled(row: Row, toy: Toy, elsewhere: dict[str, Any]) -> None:
    folder = elsewhere["folder"]["path"] / f"{row.name}.{toy.name}"
    suffixes = {path.suffix for path in folder.iterdir()}
    assert suffixes <= {".json", ".safetensors", ".md"}
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    prefix = row.prefix
    strangers = [n for n in tensors if prefix not in n and not n.startswith("base_model.model.classifier")]
    assert strangers == []
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == row.config().peft_type
    assert config["r"] == 4


@every_row
def test_checkpoint_does_not_depend_on_the_adapter_name(row: Row, tmp_path: Path) -> None:
    toy = TOYS["llama"]
    model = peft.get_peft_model(toy.build(), row.configure(toy, init_weights=False), adapter_name="mine").eval()
    expected = toy.logits(model)
    model.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "mine" / "adapter_model.safetensors")
    assert not [name for name in tensors if "mine" in name]
    loaded = peft.PeftModel.from_pretrained(toy.build(), tmp_path / "mine", adapter_name="yours")
    assert torch.equal(toy.logits(loaded), expected)


@every_row
def test_load_adapter_into_a_running_model(row: Row, tmp_path: Path) -> None:
    toy = TOYS["gpt2"]
    model = row.adapt(toy, init_weights=False, rank_pattern={"c_fc": 3})
    expected = toy.logits(model)
    model.save_pretrained(tmp_path)
    other = row.adapt(toy, init_weights=False)
    other.load_adapter(tmp_path, adapter_name="loaded")
    other.set_adapter("loaded", inference_mode=True)
    assert torch.equal(toy.logits(other.eval()), expected)
    assert not any(p.requires_grad for n, p in other.named_parameters() if "loaded" in n)


@every_toy
@every_row
def test_trainable_load_trains_what_a_fresh_adapter_trains(row: Row, toy: Toy, tmp_path: Path) -> None:
    model = row.adapt(toy, init_weights=False)
    fresh = {name for name, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(toy.build(), tmp_path, is_trainable=True)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == fresh
    frozen = peft.PeftModel.from_pretrained(toy.build(), tmp_path)
    assert not [name for name, p in frozen.named_parameters() if p.requires_grad]


@every_row
def test_half_precision_base_round_trip(row: Row, tmp_path: Path) -> None:
    toy = TOYS["llama"]
    model = row.adapt(toy, toy.build().to(torch.bfloat16), init_weights=False)
    expected = toy.logits(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(toy.build().to(torch.bfloat16), tmp_path)
    assert torch.equal(toy.logits(loaded), expected)


@every_transformer
@every_method
def test_transformers_save_and_load_adapter(row: Row, toy: Toy, tmp_path: Path) -> None:
    model = toy.build()
    model.add_adapter(row.configure(toy, init_weights=False, task_type=None))
    expected = toy.logits(model)
    model.save_pretrained(tmp_path)
    other = toy.build()
    other.load_adapter(str(tmp_path))
    assert torch.equal(toy.logits(other), expected)


@every_method
def test_transformers_loads_what_training_goes_on_with(row: Row, tmp_path: Path) -> None:
    """Averages and records that a fresh adapter does not have yet, and transformers gives no place."""
    toy = TOYS["llama"]
    model = toy.build()
    model.add_adapter(row.configure(toy, task_type=None))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        toy.loss(model.train()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    other = toy.build()
    other.load_adapter(str(tmp_path), is_trainable=True)
    before, after = model.state_dict(), other.state_dict()
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key


# --- damaged or foreign folders ------------------------------------------------------------------------------


@every_method
def test_truncated_file_is_one_clear_sentence(row: Row, tmp_path: Path) -> None:
    toy = TOYS["mlp"]
    row.adapt(toy, init_weights=False).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    base = toy.build()
    state = snapshot(base)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        peft.PeftModel.from_pretrained(base, tmp_path)
    assert_same_state(base, state)


@every_method
def test_adapter_of_another_method_is_refused(row: Row, tmp_path: Path) -> None:
    """By every way in: beside another method's adapter, through its configuration class, or with its configuration."""
    toy = TOYS["mlp"]
    other = next(r for r in ROWS if r.config is not row.config)
    made, asked = str(row.config().peft_type), str(other.config().peft_type)
    made, asked = made.rsplit(".", 1)[-1], asked.rsplit(".", 1)[-1]
    row.adapt(toy, init_weights=False).save_pretrained(tmp_path)
    model = other.adapt(toy, init_weights=False)
    with pytest.raises(ValueError, match=made) as caught:
        model.load_adapter(tmp_path, adapter_name="foreign")
    assert asked in str(caught.value)
    with pytest.raises(CheckpointError, match=made) as caught:
        other.config.from_pretrained(tmp_path)
    assert asked in str(caught.value)
    with pytest.raises(CheckpointError, match=asked):
        peft.PeftModel.from_pretrained(toy.build(), tmp_path, config=other.configure(toy))


@every_method
def test_config_survives_saving(row: Row, tmp_path: Path) -> None:
    toy = TOYS["llama"]
    config = row.configure(toy, rank_pattern={"q_proj": 2}, dropout=0.25, layers_to_transform=[1])
    config.save_pretrained(tmp_path)
    for loaded in (peft.PeftConfig.from_pretrained(tmp_path), row.config.from_pretrained(tmp_path)):
        assert type(loaded) is row.config
        assert isinstance(loaded.peft_type, peft.PeftType), "transformers reads peft_type.value"
        assert loaded.peft_type is peft.PeftType[row.config.method.upper()]
        assert loaded.to_dict() == config.to_dict()


@every_method
def test_missing_tensors_are_reported(row: Row, tmp_path: Path) -> None:
    """A file that lacks a tensor must not load into a half-random adapter in silence."""
    toy = TOYS["mlp"]
    row.adapt(toy, init_weights=False).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors.pop(sorted(name for name in tensors if "_up" in name)[0])
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError):
        peft.PeftModel.from_pretrained(toy.build(), tmp_path)


# --- export --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path], run_python: Any
) -> dict[str, dict[str, Any]]:
    """Every static row on every model, exported here and loaded by one process without dynalora."""
    folder = tmp_path_factory.mktemp("exported")
    here = {}
    for row in STATIC:
        for toy in TOYS.values():
            chosen = toy.targets[0]
            model = trained(row, toy, bases, rank_pattern={chosen: 2}, alpha_pattern={chosen: 6})
            dynalora.export_lora(model, folder / f"{row.name}.{toy.name}")
            here[f"{row.name}.{toy.name}"] = toy.logits(model)
    output = run_python(
        LOAD_EXPORTED, str(folder), json.dumps([row.name for row in STATIC]), without_dynalora=True, timeout=400
    )
    return {
        "folder": {"path": folder},
        "here": here,
        "types": json.loads(output.splitlines()[-1]),
        "there": safetensors.torch.load_file(folder / "logits.safetensors"),
    }


@every_toy
@every_static_row
def test_export_loads_without_dynalora(row: Row, toy: Toy, exported: dict[str, Any]) -> None:
    key = f"{row.name}.{toy.name}"
    assert exported["types"][key] == "LORA"
    torch.testing.assert_close(exported["there"][key], exported["here"][key], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(exported["there"][f"merged/{key}"], exported["here"][key], atol=1e-4, rtol=1e-4)
    names = {path.name for path in (exported["folder"]["path"] / key).iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names


@every_dynamic_row
def test_export_refuses_input_dependent_updates_and_writes_nothing(row: Row, tmp_path: Path) -> None:
    model = row.adapt(TOYS["mlp"], init_weights=False)
    with pytest.raises(UnsupportedError) as caught:
        dynalora.export_lora(model, tmp_path / "out")
    assert "input" in str(caught.value).lower()
    assert list(tmp_path.iterdir()) == []


@every_static_row
def test_export_leaves_the_model_as_it_was(row: Row, tmp_path: Path) -> None:
    toy = TOYS["llama"]
    model = row.adapt(toy, init_weights=False)
    before = snapshot(model)
    dynalora.export_lora(model, tmp_path / "out")
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert adapted_layers(model)
