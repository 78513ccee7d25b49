"""Methods to compare with: what they are configured to be, and that AdaLoRA's ranks really move."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from dynalora.errors import ConfigError, ScheduleError
from dynalora.forgetting.curves import checkpoint_retention
from dynalora.forgetting.landscape import rank_landscape
from dynalora.forgetting.monitor import RetentionMonitor
from dynalora.forgetting.retention import retention
from dynalora.forgetting.texts import anchor_text, given_text
from dynalora.jobs.finetune.run import finetune
from dynalora.jobs.stages.settings import ForgettingSpec
from dynalora.lab.baselines import BASELINES, driver_of, edits_base, finish_start, optimizer_of
from dynalora.lab.choices import label_of
from dynalora.lab.configs import adapter_config, check_targets, compared_config, compared_names, method_names
from dynalora.lab.run_folder import RunFolder
from dynalora.lab.training import train
from dynalora.lab.training.checkpoints import last_checkpoint
from dynalora.lab.training.settings import TrainSettings
from dynalora.lab.training.train import train_adapter
from tests.unit import tiny
from tests.unit.test_finetune import spec, tokenized


def trained(config: Any, steps: int) -> Any:
    tokenizer, rows = tokenized()
    settings = TrainSettings(steps=steps, batch_size=4, learning_rate=1e-2, save_every=0)
    return train_adapter(tiny.model(len(tokenizer)), tokenizer, config, rows, settings=settings).model


ADAPTERS = [name for name, known in BASELINES.items() if known.config is not None]
LORAS = [name for name in ADAPTERS if issubclass(BASELINES[name].config or object, peft.LoraConfig)]


@pytest.mark.parametrize("name", LORAS)
def test_a_baseline_is_what_its_name_says(name: str) -> None:
    config: Any = adapter_config(name, r=4, dropout=0.1, target_modules=["q_proj"])
    assert type(config) is BASELINES[name].config
    assert config.lora_alpha == {"rslora": 4, "pissa": 4}.get(name, 8)
    assert config.lora_dropout == 0.1
    assert (config.use_dora, config.use_rslora) == (name == "dora", name == "rslora")
    assert (config.init_lora_weights == "pissa") == (name == "pissa")
    if name == "adalora":
        assert (config.target_r, config.init_r) == (4, 6)
    else:
        assert config.r == 4
    changed: Any = adapter_config(name, r=4, options={"use_rslora": name != "rslora"})
    assert changed.use_rslora == (name != "rslora")


def test_others_have_fields_of_their_own() -> None:
    randlora: Any = adapter_config("randlora", r=6, dropout=0.1)
    assert (randlora.r, randlora.randlora_alpha, randlora.randlora_dropout) == (6, 120, 0.1)
    assert adapter_config("RandLoRA", r=6, alpha=12).randlora_alpha == 12
    miss: Any = adapter_config("miss", r=6, dropout=0.1)
    assert (miss.r, miss.miss_dropout) == (6, 0.1)
    with pytest.raises(ConfigError, match=r"MiSS has no scaling, so `alpha` \(8\) means nothing; leave it out"):
        adapter_config("miss", alpha=8)
    tuned: Any = adapter_config("p-tuning", r=6)
    assert (tuned.num_virtual_tokens, tuned.encoder_hidden_size) == (6, 128)
    assert adapter_config("p-tuning", options={"encoder_hidden_size": 16}).encoder_hidden_size == 16
    assert check_targets(tiny.model(64), tuned) == []


@pytest.mark.parametrize("name", ADAPTERS)
def test_options_of_other_methods_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no option 'gate_bias_init'"):
        adapter_config(name, options={"gate_bias_init": 1})


# --- LoRA+ ------------------------------------------------------------------------------------------------


def test_lora_plus_steps_further_with_its_up_projections(tmp_path: Path) -> None:
    config = adapter_config("lora+", r=2, target_modules=["q_proj"], options={"loraplus_lr_ratio": 4.0})
    tokenizer, rows = tokenized()
    settings = TrainSettings(
        steps=1, batch_size=8, learning_rate=1e-3, warmup=0.0, schedule="constant_with_warmup", max_grad_norm=0.0
    )  # fmt: skip
    model = train_adapter(tiny.model(len(tokenizer)), tokenizer, config, rows, settings=settings).model
    # Adam's first step moves every entry by its group's learning rate; up-projections start at zero.
    ups = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora_B" in n])
    assert float(ups.abs().median()) == pytest.approx(4e-3, rel=1e-2)
    model.save_pretrained(tmp_path)
    written = (tmp_path / "adapter_config.json").read_text(encoding="utf-8")
    assert "loraplus" not in written
    assert type(peft.PeftConfig.from_pretrained(tmp_path)) is peft.LoraConfig
    with pytest.raises(ConfigError, match=r"loraplus_lr_ratio is 0\.5; give a number of at least 1"):
        adapter_config("lora+", options={"loraplus_lr_ratio": 0.5})


@pytest.mark.parametrize("start", ["eva", "EVA", "lora_ga"])
def test_starts_that_would_silently_be_a_plain_lora_are_refused(start: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="plain LoRA"):
        adapter_config("lora", options={"init_lora_weights": start})
    file = tmp_path / "start.json"
    file.write_text(json.dumps({"peft_type": "LORA", "init_lora_weights": start}))
    with pytest.raises(ConfigError, match="plain LoRA"):
        adapter_config(str(file))
    assert adapter_config("lora", options={"init_lora_weights": "corda"}) is not None


def test_lora_plus_has_the_others_settings() -> None:
    model = peft.get_peft_model(tiny.model(64), adapter_config("lora+", r=2, target_modules=["q_proj"]))
    settings = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-6}
    made: Any = optimizer_of(model, torch.optim.AdamW, settings)
    names = {id(p): n for n, p in model.named_parameters()}
    for group in made.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-6)
        for parameter in group["params"]:
            ratio = 16 if "lora_B" in names[id(parameter)] else 1
            assert (group["lr"], group["weight_decay"]) == (ratio * 1e-3, 0.1)
    stepped = [p for group in made.param_groups for p in group["params"]]
    assert {id(p) for p in stepped} == {id(p) for p in model.parameters() if p.requires_grad}
    plain = peft.get_peft_model(tiny.model(64), adapter_config("lora", r=2, target_modules=["q_proj"]))
    assert optimizer_of(plain, torch.optim.AdamW, settings) is None
    assert optimizer_of(torch.nn.Linear(2, 2), torch.optim.AdamW, settings) is None


# --- going on after a kill ----------------------------------------------------------------------------------


class Killed(Exception):
    """The end of a run before its time."""


@pytest.mark.parametrize("method", ["lora+", "p-tuning", "randlora", "miss", "full"])
def test_a_killed_run_goes_on(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, rows = tokenized()
    settings = TrainSettings(steps=6, batch_size=4, learning_rate=1e-2, save_every=2, eval_every=2)
    asked = {"method": method}

    def run(folder: str, *, resume: bool = False) -> Any:
        config = compared_config(method, r=2, options=None)
        if resume:
            config = compared_config(method, r=2)
        with RunFolder.create(tmp_path / folder, asked, resume=resume) as opened:
            return train_adapter(
                tiny.model(len(tokenizer)), tokenizer, config, rows, rows, settings=settings, run=opened
            )

    whole = run("whole")
    measured = train.held_out_loss
    calls = []

    def killing(*given: Any, **more: Any) -> float:
        calls.append(1)
        if len(calls) == 4:  # before, after 2, after 4 …
            raise Killed
        return measured(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(train, "held_out_loss", killing)
        with pytest.raises(Killed):
            run("killed")
    kept = sorted(entry.name for entry in (tmp_path / "killed" / "checkpoints").iterdir())
    assert kept == ["checkpoint-2", "checkpoint-4"]
    resumed = run("killed", resume=True)
    assert resumed.steps == 6
    assert resumed.held_out_after == pytest.approx(whole.held_out_after, rel=1e-6)
    assert resumed.held_out_after < whole.held_out_before
    for (name, first), (_, second) in zip(
        whole.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(first, second, msg=name)


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path: Path) -> None:
    tokenizer, rows = tokenized()
    settings = TrainSettings(steps=4, batch_size=4, save_every=2)
    for method in ("p-tuning", "full"):
        with RunFolder.create(tmp_path / method, {"method": method}) as run:
            config = compared_config(method, r=2)
            train_adapter(tiny.model(len(tokenizer)), tokenizer, config, rows, settings=settings, run=run)
        folder = tmp_path / method / "checkpoints"
        needs = "prompt_encoder.safetensors" if method == "p-tuning" else None
        assert last_checkpoint(folder, needs=needs) == folder / "checkpoint-4"
        damaged = folder / "checkpoint-4" / (needs or "model.safetensors")
        if needs:
            damaged.unlink()
        else:
            damaged.write_bytes(damaged.read_bytes()[:-10])
        assert last_checkpoint(folder, needs=needs) == folder / "checkpoint-2"


# --- full fine-tuning -----------------------------------------------------------------------------------------


def test_full_fine_tuning_trains_every_weight() -> None:
    tokenizer, rows = tokenized()
    model = tiny.model(len(tokenizer))
    model.requires_grad_(False)  # as an adapter that was taken off leaves it
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = TrainSettings(steps=10, batch_size=4, learning_rate=5e-3)
    result = train_adapter(model, tokenizer, compared_config("full"), rows, rows, settings=settings)
    assert result.label == "full"
    assert result.trainable_parameters == result.parameters == sum(p.numel() for p in before.values())
    assert result.held_out_before is not None
    assert result.held_out_after is not None
    assert result.held_out_after < 0.9 * result.held_out_before
    assert not isinstance(result.model, peft.PeftModel)
    assert result.model.config.use_cache
    assert not result.model.training
    for name, parameter in result.model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_full_fine_tuning_says_what_it_cannot_do(tmp_path: Path) -> None:
    tokenizer, rows = tokenized()
    assert compared_names() == [*method_names(), "full"]
    with pytest.raises(ConfigError, match="Method 'full' has no adapter and cannot be used here; choose one of"):
        adapter_config("full")
    with pytest.raises(ConfigError, match="Method 'full' has no adapter"):
        finetune(spec(tmp_path, tmp_path, tmp_path / "run", method="full"))
    for given, message in (
        ({"alpha": 4.0}, "full fine-tuning has no scaling"),
        ({"dropout": 0.1}, "full fine-tuning has no dropout"),
        ({"options": {"init_weights": True}}, "no option 'init_weights'"),
    ):
        with pytest.raises(ConfigError, match=message):
            compared_config("full", **given)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="float16 cannot be trained"):
        train_adapter(tiny.model(len(tokenizer)).half(), tokenizer, None, rows)
    monitor = RetentionMonitor({"own": given_text(["Some text."], tokenizer)})
    with pytest.raises(ConfigError, match="leaves no base model"):
        train_adapter(tiny.model(len(tokenizer)), tokenizer, None, rows, monitor=monitor)


# --- methods by their configuration file ------------------------------------------------------------------------


def test_any_method_of_pefts_by_its_file(tmp_path: Path) -> None:
    file = tmp_path / "Slim.yaml"
    file.write_text("peft_type: ia3\ntarget_modules: [q_proj, down_proj]\nfeedforward_modules: [down_proj]\n")
    config: Any = adapter_config(str(file), r=4)
    assert type(config) is peft.IA3Config
    assert config.target_modules == {"q_proj", "down_proj"}
    assert config.task_type == "CAUSAL_LM"
    assert trained(config, 2).active_peft_config.peft_type == "IA3"
    changed: Any = adapter_config(str(file), options={"feedforward_modules": []})
    assert not changed.feedforward_modules
    assert label_of(str(file)) == "Slim"


def test_a_saved_adapters_file_is_a_fresh_adapter(tmp_path: Path) -> None:
    saved = peft.get_peft_model(tiny.model(64), adapter_config("lora", r=3, target_modules=["q_proj"]))
    saved.save_pretrained(tmp_path)
    config: Any = adapter_config(str(tmp_path / "adapter_config.json"), r=64, target_modules=["v_proj"])
    assert (config.r, config.target_modules) == (3, {"q_proj"})
    assert not config.inference_mode
    assert config.base_model_name_or_path is None
    assert peft.get_peft_model(tiny.model(64), config).get_nb_trainable_parameters()[0] > 0
    open_file = tmp_path / "open.json"
    open_file.write_text('{"peft_type": "DISEL", "r": 2}')
    assert adapter_config(str(open_file), target_modules="q_proj,v_proj").target_modules == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"peft_type": "QLORA"}', r"has the peft_type 'QLORA'; did you mean '\w*LORA'\? Known are"),
        ('{"r": 3}', "has the peft_type ''; name PEFT's method there"),
        ('{"peft_type": "LORA", "rang": 3}', "LORA has no field 'rang'; "),
        ('{"peft_type": "LORA", ', "cannot be read"),
        ("[1]", "is no mapping"),
        ('{"peft_type": "ADALORA"}', "do not fit together: AdaLoRA does not work when `total_step` is None"),
        ('{"peft_type": "DIRA", "r": 0}', "r must be a positive integer"),
        ('{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}', "whose prompt cannot be measured here"),
    ],
)
def test_a_file_that_cannot_be_is_named(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "method.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        adapter_config(str(file))
    with pytest.raises(ConfigError, match=r"'nowhere\.yml' cannot be read"):
        adapter_config("nowhere.yml")


def test_finetune_takes_a_file(tmp_path: Path) -> None:
    folder = tiny.saved_model(tmp_path / "model")
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(12))
    file = tmp_path / "tokens.json"
    file.write_text('{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}')
    result = finetune(spec(folder, rows, tmp_path / "run", method=str(file), steps=2, retention=True))
    assert result.label == "tokens"
    assert result.trainable_parameters == 3 * 32
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "96 parameters" in report
    assert " modules" not in report.split("96 parameters")[1][:60]


@pytest.mark.parametrize("method", ["p-tuning", "miss", "randlora", "lora+"])
def test_finetune_measures_what_is_left(method: str, tmp_path: Path) -> None:
    folder = tiny.saved_model(tmp_path / "model")
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(12))
    finetune(spec(folder, rows, tmp_path / "run", method=method, r=2, steps=2, retention=True))
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    kept = next(record["retention"] for record in logged if "retention" in record)
    assert kept["kl"] > 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_checkpoints_of_p_tuning_are_measured(tmp_path: Path) -> None:
    tokenizer, rows = tokenized()
    settings = TrainSettings(steps=4, batch_size=4, learning_rate=1e-2, save_every=2)
    text = given_text(["Some text.", "And more of it."], tokenizer)
    with RunFolder.create(tmp_path / "run", {"method": "p-tuning"}) as run:
        config = adapter_config("p-tuning", r=2)
        trained = train_adapter(tiny.model(len(tokenizer)), tokenizer, config, rows, settings=settings, run=run)
    model = tiny.model(len(tokenizer))
    points = checkpoint_retention(model, tmp_path / "run" / "checkpoints", {"given": text})
    assert [point.step for point in points] == [2, 4]
    assert points[1].retention.kl == pytest.approx(retention(trained.model, text).kl, rel=1e-4)


def test_forgetting_needs_an_update_with_factors() -> None:
    for method, told in (("miss", "MiSS"), ("randlora", "RandLoRA"), ("p-tuning", "P-Tuning")):
        asked = ForgettingSpec(task_a="arc_easy", task_b="gsm8k", output="run", method=method)
        with pytest.raises(ConfigError, match=f"The update of {told} has no factors"):
            asked.config()


def test_a_start_that_takes_from_the_base_is_known_by_its_configuration() -> None:
    assert edits_base("lora", adapter_config("lora", options={"init_lora_weights": "olora"}))
    assert edits_base("pissa", adapter_config("pissa"))
    assert edits_base("full", None)
    for name in ("lora", "adalora", "p-tuning", "miss", "dira"):
        assert not edits_base(name, adapter_config(name))
    assert not edits_base("lora", adapter_config("lora", options={"init_lora_weights": "gaussian"}))


def test_adalora_is_driven_to_its_budget() -> None:
    model = trained(adapter_config("adalora", r=2, target_modules=["q_proj", "v_proj"]), 20)
    values = [p.detach() for name, p in model.named_parameters() if "lora_E" in name]
    assert sum(len(value) for value in values) == 3 * len(values)
    assert sum(int((value != 0).sum()) for value in values) == 2 * len(values)
    config = model.active_peft_config
    assert (config.total_step, config.tinit, config.tfinal) == (20, 2, 6)


def test_adaloras_update_is_measured(tmp_path: Path) -> None:
    folder = tiny.saved_model(tmp_path / "model")
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(12))
    result = finetune(spec(folder, rows, tmp_path / "run", method="adalora", r=2, steps=20, learning_rate=0.1))
    assert (tmp_path / "run" / "plots" / "rank_landscape.png").exists()
    layers = {name.removeprefix("base_model.model."): module for name, module in result.model.named_modules()}
    for row in rank_landscape(result.model):
        layer: Any = layers[row.module]
        expected = torch.linalg.svdvals(layer.get_delta_weight("default").double())[: len(row.singular_values)]
        assert torch.tensor(row.singular_values) == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)


def test_adaloras_regulariser_is_not_recorded_as_training_loss(tmp_path: Path) -> None:
    folder, rows = tiny.saved_model(tmp_path / "model"), tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(20))
    first = {}
    for method in ("lora", "adalora"):
        run = tmp_path / method
        result = finetune(
            spec(folder, rows, run, method=method, r=2, steps=10, log_every=1, retention=False, samples=0)
        )
        first[method] = next(record for record in result.records if "loss" in record)
    # Both start at the base model, on the same batch.
    assert first["adalora"]["loss"] == pytest.approx(first["lora"]["loss"], abs=1e-4)
    assert first["adalora"]["regulariser"] > 0.1
    assert "regulariser" not in first["lora"]


def test_adaloras_own_schedule_is_kept() -> None:
    options = {"tinit": 3, "tfinal": 4, "deltaT": 2}
    model = trained(adapter_config("adalora", r=2, target_modules=["q_proj"], options=options), 12)
    config = model.active_peft_config
    assert (config.tinit, config.tfinal, config.deltaT, config.total_step) == (3, 4, 2, 12)


def test_adaloras_schedule_may_be_parts_of_the_run_and_a_single_cut() -> None:
    options = {"tinit": 0.25, "tfinal": 0.5, "deltaT": 2}
    config = trained(adapter_config("adalora", r=2, target_modules=["q_proj"], options=options), 12).active_peft_config
    assert (config.tinit, config.tfinal, config.deltaT, config.total_step) == (3, 6, 2, 12)
    once = {"tinit": 0.25, "tfinal": 0.75, "orth_reg_weight": 0.5}
    model = peft.get_peft_model(tiny.model(64), adapter_config("adalora", r=2, target_modules=["q_proj"], options=once))
    drive = driver_of(model, 12)
    assert drive is not None
    left = []
    for step in range(12):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.manual_seed(step)
                parameter.grad = torch.randn_like(parameter)
                if "lora_E" in name and not left:
                    parameter.data.normal_()
        drive(step)
        left.append(sum(int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name))
    assert left == [6] * 3 + [4] * 9


def test_adalora_says_when_there_is_no_time_for_it() -> None:
    options = {"tinit": 5, "tfinal": 5}
    with pytest.raises(ScheduleError, match="tinit=5 and tfinal=5 has no step to cut ranks at in a run of 8"):
        trained(adapter_config("adalora", r=2, target_modules=["q_proj"], options=options), 8)


def test_others_need_no_driver() -> None:
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), peft.LoraConfig(target_modules=["0"]))
    assert driver_of(model, 5) is None
    assert driver_of(torch.nn.Linear(3, 3), 5) is None


def test_retention_is_left_out_where_the_base_is_gone(tmp_path: Path) -> None:
    folder = tiny.saved_model(tmp_path / "model")
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(12))
    finetune(spec(folder, rows, tmp_path / "run", method="pissa", steps=2, retention=True))
    assert "retention" not in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert not (tmp_path / "run" / "retention.jsonl").exists()
    with pytest.raises(ConfigError, match=r"max_forgetting is 0\.1, but PiSSA changes the base weights"):
        finetune(spec(folder, rows, tmp_path / "other", method="pissa", retention=True, max_forgetting=0.1))
    assert (tmp_path / "run" / "report.html").exists()


def test_lora_null_begins_in_the_directions_that_the_models_own_text_uses_least(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = partial(anchor_text, texts=16, tokens=12)
    monkeypatch.setattr("dynalora.lab.null_space.anchor_text", few)
    words = tiny.tokenizer()
    words.pad_token = words.eos_token
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny.model(len(words)), adapter_config("lora-null", r=2, target_modules="all-linear"))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    text = few(model, words)
    finish_start(model, words)
    inputs: dict[str, list[torch.Tensor]] = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(
            lambda _, given, name=name: inputs.setdefault(name, []).append(given[0].reshape(-1, given[0].shape[-1]))
        )
    with torch.no_grad():
        for row in text.rows:
            model(input_ids=torch.tensor([row]))
    for name, layer in layers.items():
        x = torch.cat(inputs[name]).double()
        least = torch.linalg.svd(x, full_matrices=True)[2][-2:]
        down = layer.lora_A["default"].weight.detach().double()
        torch.testing.assert_close(down @ down.mT, torch.eye(2).double() / 3, rtol=0, atol=1e-5)
        # In the same plane: nothing of it lies outside the two directions with the least energy.
        energy = (x @ down.mT).square().sum()
        torch.testing.assert_close(energy, (x @ least.mT).square().sum() / 3, rtol=1e-2, atol=1e-7)
        assert not layer.lora_B["default"].weight.any()
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert all("lora_A" in name for name in changed)
    assert changed


def test_other_loras_begin_as_peft_lets_them() -> None:
    words = tiny.tokenizer()
    model = peft.get_peft_model(tiny.model(len(words)), adapter_config("lora", r=2, target_modules="all-linear"))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    finish_start(model, words)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


@pytest.mark.parametrize("option", [{"init_lora_weights": "foo"}, {"rank_pattern": 3}], ids=str)
def test_settings_that_peft_does_not_take_are_told_in_a_sentence(option: Any) -> None:
    tokenizer, rows = tokenized()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **option)
    with pytest.raises(
        ConfigError, match=r"PEFT does not take these settings of LoraConfig \(.*\); correct the method\'s options"
    ):
        train_adapter(tiny.model(len(tokenizer)), tokenizer, config, rows)
