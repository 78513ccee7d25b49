"""PEFT's methods by name: what they are configured to be, and that AdaLoRA's ranks really move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from dynalora.errors import ConfigError, ScheduleError
from dynalora.experiments import data
from dynalora.experiments.baselines import BASELINES, driver_of
from dynalora.experiments.finetune import adapter_config, finetune
from dynalora.experiments.training import TrainSettings, train_adapter
from tests.unit import tiny
from tests.unit.test_finetune import spec


def trained(config: Any, steps: int) -> Any:
    tokenizer = tiny.tokenizer()
    data.ensure_pad_token(tokenizer)
    rows = data.tokenize(
        data.to_conversations((f"row {i}", row) for i, row in enumerate(tiny.rows(8))), tokenizer
    )
    settings = TrainSettings(steps=steps, batch_size=4, learning_rate=1e-2, save_every=0)
    return train_adapter(tiny.model(len(tokenizer)), tokenizer, config, rows, settings=settings).model


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_what_its_name_says(name: str) -> None:
    config = adapter_config(name, r=4, dropout=0.1, target_modules=["q_proj"])
    assert isinstance(config, BASELINES[name].config)
    assert config.lora_alpha == {"rslora": 4, "pissa": 4}.get(name, 8)
    assert config.lora_dropout == 0.1
    assert (config.use_dora, config.use_rslora) == (name == "dora", name == "rslora")
    assert (config.init_lora_weights == "pissa") == (name == "pissa")
    if name == "adalora":
        assert (config.target_r, config.init_r) == (4, 6)
    else:
        assert config.r == 4
    with pytest.raises(ConfigError, match="no option 'gate_bias_init'"):
        adapter_config(name, options={"gate_bias_init": 1})
    changed = adapter_config(name, r=4, options={"use_rslora": name != "rslora"})
    assert changed.use_rslora == (name != "rslora")


def test_adalora_is_driven_to_its_budget() -> None:
    model = trained(adapter_config("adalora", r=2, target_modules=["q_proj", "v_proj"]), 20)
    values = [p.detach() for name, p in model.named_parameters() if "lora_E" in name]
    assert sum(len(value) for value in values) == 3 * len(values)
    assert sum(int((value != 0).sum()) for value in values) == 2 * len(values)
    config = model.active_peft_config
    assert (config.total_step, config.tinit, config.tfinal) == (20, 2, 6)


def test_adaloras_own_schedule_is_kept() -> None:
    options = {"tinit": 3, "tfinal": 4, "deltaT": 2}
    model = trained(adapter_config("adalora", r=2, target_modules=["q_proj"], options=options), 12)
    config = model.active_peft_config
    assert (config.tinit, config.tfinal, config.deltaT, config.total_step) == (3, 4, 2, 12)


def test_adalora_says_when_there_is_no_time_for_it() -> None:
    options = {"tinit": 5, "tfinal": 5}
    with pytest.raises(ScheduleError, match="tinit=5 and tfinal=5 has no step to cut ranks at in a run of 8"):
        trained(adapter_config("adalora", r=2, target_modules=["q_proj"], options=options), 8)


def test_others_need_no_driver() -> None:
    model = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(3, 3)), peft.LoraConfig(target_modules=["0"])
    )
    assert driver_of(model, 5) is None
    assert driver_of(torch.nn.Linear(3, 3), 5) is None


def test_retention_is_left_out_where_the_base_is_gone(tmp_path: Path) -> None:
    folder = tiny.saved_model(tmp_path / "model")
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(12))
    finetune(spec(folder, rows, tmp_path / "run", method="pissa", steps=2, retention=True))
    assert "retention" not in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert (tmp_path / "run" / "report.html").exists()
