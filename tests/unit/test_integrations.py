"""Tools that build their adapters themselves build ours, each tried with the real package where it is installed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import dynalora
from dynalora.errors import ConfigError, UnsupportedError
from dynalora.integrations import OPTIONS_VARIABLE, tool_config
from dynalora.methods import method_names
from tests.unit import tiny


@pytest.fixture
def base() -> Any:
    return tiny.model(300)


def test_what_a_tool_says_becomes_a_configuration() -> None:
    config: Any = tool_config(
        "disel", r=3, alpha=6.0, dropout=0.1, target_modules=["all-linear"], options={"retain": 10.0}
    )
    assert isinstance(config, dynalora.DiselConfig)
    assert (config.r, config.alpha, config.dropout, config.target_modules) == (3, 6.0, 0.1, "all-linear")
    assert config.retain == 10.0
    assert config.task_type == "CAUSAL_LM"


@pytest.mark.parametrize("method", method_names())
def test_nothing_said_means_the_methods_defaults(method: str) -> None:
    config: Any = tool_config(method)
    default: Any = type(config)()
    assert (config.r, config.alpha, config.dropout) == (default.r, default.alpha, default.dropout)
    assert config.target_modules == "all-linear"


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("disell", {}, "disel"),
        ("dira", {"retian": 3}, "retain"),
        ("dira", {"r": 3}, "'r' is set twice"),
        ("dira", {"target_modules": "x"}, "'target_modules' is set twice"),
    ],
)
def test_what_cannot_be_is_told(method: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        tool_config(method, r=4, options=options)


class TestAxolotl:
    @pytest.fixture
    def cfg(self) -> Any:
        pytest.importorskip("axolotl", reason="axolotl is not installed")
        from axolotl.utils.dict import DictDefault

        return DictDefault({"adapter": "disel", "lora_r": 3, "lora_target_linear": True, "dynalora": {"retain": 5.0}})

    @pytest.fixture
    def manager(self, cfg: Any) -> Any:
        from axolotl.integrations.base import PluginManager

        manager = PluginManager.get_instance()
        manager.register("dynalora.integrations.axolotl.DynaloraPlugin")
        yield manager
        manager.plugins.clear()

    def test_its_loader_makes_ours(self, cfg: Any, manager: Any, base: Any) -> None:
        from axolotl.loaders.adapter import load_adapter

        model, config = load_adapter(base, cfg, cfg.adapter)
        assert isinstance(config, dynalora.DiselConfig)
        assert config.r == 3
        assert config.retain == 5.0
        assert isinstance(model, peft.PeftModel)
        assert model.peft_config["default"] is config
        nothing, alone = load_adapter(tiny.model(300), cfg, cfg.adapter, config_only=True)
        assert nothing is None
        assert alone.to_dict() == tool_config("disel", r=3, options={"retain": 5.0}).to_dict()

    def test_a_saved_adapter_goes_on(self, cfg: Any, manager: Any, base: Any, tmp_path: Path) -> None:
        from axolotl.loaders.adapter import load_adapter

        model, _ = load_adapter(base, cfg, cfg.adapter)
        model.save_pretrained(tmp_path)
        cfg.lora_model_dir = str(tmp_path)
        again, config = load_adapter(tiny.model(300), cfg, cfg.adapter)
        assert config.r == 3
        assert any(parameter.requires_grad for parameter in again.parameters())

    def test_its_settings_have_the_methods_own(self, cfg: Any, manager: Any) -> None:
        from axolotl.integrations.config import merge_input_args

        assert manager.get_input_args() == ["dynalora.integrations.axolotl.DynaloraArgs"]
        _, settings = merge_input_args()
        assert "dynalora" in settings.model_fields
        assert "adapter" in settings.model_fields

    def test_settings_of_loras_form_are_refused(self, cfg: Any, manager: Any, base: Any) -> None:
        from axolotl.loaders.adapter import load_adapter

        cfg.peft_use_dora = True
        with pytest.raises(ConfigError, match="peft_use_dora"):
            load_adapter(base, cfg, cfg.adapter)

    def test_other_adapters_are_left_to_axolotl(self, cfg: Any, manager: Any, base: Any) -> None:
        cfg.adapter = "lora"
        assert manager.load_adapter(base, cfg) is None


class TestMsSwift:
    def test_its_path_is_printed(self) -> None:
        run = subprocess.run(
            [sys.executable, "-m", "dynalora.integrations.ms_swift"], capture_output=True, text=True, check=True
        )
        assert Path(run.stdout.strip()).name == "ms_swift.py"
        assert Path(run.stdout.strip()).is_file()

    def test_its_tuners_have_ours(self, base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("swift.tuner_plugin", reason="ms-swift is not installed")
        from swift.tuner_plugin import tuners_map

        import dynalora.integrations.ms_swift  # as --external_plugins does

        monkeypatch.setenv(OPTIONS_VARIABLE, '{"retain": 7.0}')

        class Arguments:
            lora_rank, lora_alpha, lora_dropout, target_modules = 3, 6.0, 0.0, ["all-linear"]

        model = tuners_map["dira"].prepare_model(Arguments(), base)
        config = model.peft_config["default"]
        assert isinstance(config, dynalora.DiraConfig)
        assert (config.r, config.alpha, config.retain) == (3, 6.0, 7.0)
        assert set(method_names()) <= set(tuners_map)

    @pytest.mark.parametrize("text", ["{", "[1]"])
    def test_options_that_are_no_object_are_told(self, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from dynalora.integrations import options_from_environment

        monkeypatch.setenv(OPTIONS_VARIABLE, text)
        with pytest.raises(ConfigError, match=OPTIONS_VARIABLE):
            options_from_environment()


class TestLlamaFactory:
    def test_its_registry_has_ours(self, base: Any, tmp_path: Path) -> None:
        pytest.importorskip("llamafactory.v1.plugins.model_plugins.peft", reason="LLaMA-Factory is not installed")
        from llamafactory.v1.plugins.model_plugins.peft import PeftPlugin

        from dynalora.integrations.llamafactory import register

        register()
        settings = {"name": "pedyra", "r": 3, "target_modules": "all", "retain": 5.0}
        model = PeftPlugin(settings["name"])(base, settings, True)
        config = model.peft_config["default"]
        assert isinstance(config, dynalora.PedyraConfig)
        assert config.r == 3
        assert config.retain == 5.0
        assert any(parameter.requires_grad for parameter in model.parameters())
        model.save_pretrained(tmp_path)
        again = PeftPlugin("pedyra")(tiny.model(300), {"adapter_name_or_path": str(tmp_path)}, True)
        assert again.peft_config["default"].r == 3


@pytest.mark.parametrize("script", ["sft", "dpo", "kto", "grpo", "rloo", "reward"])
def test_trls_scripts_ask_for_a_configuration_and_get_ours(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from dynalora.integrations import trl as ours

    module = importlib.import_module(f"trl.scripts.{script}")
    assert "get_peft_config" in module.main.__code__.co_names + module.main.__code__.co_varnames
    theirs, given = trl.get_peft_config, []
    monkeypatch.setattr(module, "main", lambda *_: given.append(trl.get_peft_config(None)))
    ours.main(
        [
            *(script, "--adapter", "disel", "--lora_r", "3", "--lora_task_type", "CAUSAL_LM", "--dataset_name", "data"),
            *("--model_name_or_path", "model", "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"),
        ]
    )
    (config,) = given
    assert isinstance(config, dynalora.DiselConfig)
    assert (config.r, config.task_type) == (3, "CAUSAL_LM")
    assert trl.get_peft_config is theirs


def test_trls_script_trains_ours(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    tiny.saved_model(tmp_path / "model")
    rows = [{"text": f"The number after {number} is {number + 1}."} for number in range(8)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = [
        *("sft", "--adapter", "disel", "--adapter_options", '{"gate_bias_init": -1.0}', "--lora_r", "3"),
        *("--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "data")),
        *("--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--report_to", "none", "--use_cpu", "true"),
        *("--bf16", "false", "--save_strategy", "no", "--learning_rate", "1e-2", "--max_length", "64"),
        *("--pad_token", "<|im_end|>"),
    ]
    run = subprocess.run(
        [sys.executable, "-m", "dynalora.integrations.trl", *line],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    saved: Any = peft.PeftConfig.from_pretrained(str(tmp_path / "out"))
    assert isinstance(saved, dynalora.DiselConfig)
    assert saved.r == 3
    assert saved.gate_bias_init == -1.0
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    learned = [tensor for name, tensor in tensors.items() if name.endswith("disel_up")]
    assert learned
    assert all(torch.count_nonzero(tensor) for tensor in learned)


class StandIn:
    """What diffusers' `EMAModel` does, as far as it matters here."""

    def __init__(self, parameters: Any) -> None:
        self.shadow = [parameter.detach().clone() for parameter in parameters]

    def step(self, parameters: Any) -> None:
        for mine, parameter in zip(self.shadow, parameters, strict=True):
            mine.lerp_(parameter.detach(), 0.5)

    def copy_to(self, parameters: Any) -> None:
        for mine, parameter in zip(self.shadow, parameters, strict=True):
            parameter.data.copy_(mine)


@pytest.mark.parametrize("real", [False, True], ids=["stand-in", "diffusers"])
@pytest.mark.parametrize("method", ["dira", "disel", "pedyra"])
def test_diffusers_averages_are_refused_once_ranks_have_moved(
    method: str, real: bool, base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if real:
        average = pytest.importorskip("diffusers.training_utils", reason="diffusers is not installed").EMAModel
    else:
        average = type("EMAModel", (StandIn,), dict(vars(StandIn)))  # to be wrapped by this test alone
        monkeypatch.setitem(sys.modules, "diffusers.training_utils", SimpleNamespace(EMAModel=average))  # type: ignore[arg-type]
    options: dict[str, Any] = {"total_steps": 5}
    if method == "pedyra":
        options |= {"adjust_start": 2, "adjust_interval": 1, "adjust_end": 4, "adjust_size": 2}
    if method == "dira":
        options |= {"target_rank": 2}
    model = peft.get_peft_model(base, tool_config(method, r=4, options=options))
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    mean, told = average(weights), []
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    for step in range(5):
        model(input_ids=torch.arange(3, 11)[None] + step).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        try:
            mean.step(iter(weights))
        except UnsupportedError as error:
            told.append(str(error))
    if method == "disel":
        assert not told
        mean.copy_to(weights)
        return
    assert "AveragedModel" in told[-1]
    with pytest.raises(UnsupportedError, match="when ranks move no more"):
        mean.copy_to(weights)
    later = average(weights)
    later.step(weights)
    later.copy_to(weights)


@pytest.mark.parametrize("method", ["dira", "disel", "pedyra", "dislora"])
def test_diffusers_models_train_switch_and_reload_ours(method: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

    def unet() -> Any:
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, in_channels=4, out_channels=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=8, attention_head_dim=8,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=16,
        ).requires_grad_(False)  # fmt: skip

    model = unet()
    image, *rest = inputs = (torch.randn(2, 4, 8, 8), torch.tensor([3, 5]), torch.randn(2, 5, 16))
    before = model(*inputs).sample
    config = tool_config(method, r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], options={"total_steps": 4})
    model.add_adapter(config, adapter_name="ours")
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(4):
        (model(image, *rest).sample - image).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model(*inputs).sample
    assert (after - before).abs().max() > 1e-3
    assert [report.step for report in dynalora.state_report(model)] == [4]
    model.disable_adapters()
    assert torch.equal(model(*inputs).sample, before)
    model.enable_adapters()
    model.set_adapters(["ours"], [0.5])
    half = (model(*inputs).sample - before).abs().max()
    assert 0.3 < half / (after - before).abs().max() < 0.7
    model.set_adapters(["ours"], [1.0])
    model.save_lora_adapter(tmp_path, adapter_name="ours")

    fresh = unet()
    fresh.add_adapter(config, adapter_name="ours")
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    peft.set_peft_model_state_dict(fresh, tensors, adapter_name="ours")
    torch.testing.assert_close(fresh(*inputs).sample, after, atol=1e-5, rtol=1e-5)
