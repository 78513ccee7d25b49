"""What a run takes, said before it is begun: memory, parameters, steps and time; nothing is trained or written."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from rich.console import Console
from torch import nn
from transformers.integrations.integration_utils import get_available_reporting_integrations

import dynalora
from dynalora.common.progress import duration
from dynalora.jobs.finetune import run
from dynalora.jobs.finetune.dry_run import STEPS, dry_run
from dynalora.jobs.finetune.run import finetune
from dynalora.jobs.finetune.settings import FinetuneSpec
from dynalora.lab.choices import method_names
from dynalora.lab.configs import adapter_config
from dynalora.lab.costs import amount, cost_of, cost_table
from dynalora.lab.models import empty_model
from dynalora.lab.training import reporting
from dynalora.lab.training.recorder import Display
from tests.unit import tiny
from tests.unit.program import Program, program

__all__ = ["program"]  # a fixture


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("dry")
    tiny.saved_model(place / "model")
    tiny.write_jsonl(place / "rows.jsonl", tiny.rows(24))
    return place


def spec_of(place: Path, output: Path, **given: Any) -> FinetuneSpec:
    wanted = {"r": 2, "batch_size": 4, "epochs": 3.0, "eval_fraction": 0.25, "retention": False, **given}
    return FinetuneSpec(model=str(place / "model"), data=str(place / "rows.jsonl"), output=str(output), **wanted)


@pytest.mark.parametrize("method", method_names())
def test_what_is_said_is_what_a_run_has(method: str, place: Path, tmp_path: Path) -> None:
    said = dry_run(spec_of(place, tmp_path / "run", method=method))
    assert not (tmp_path / "run").exists()
    assert said.steps == 15  # 18 rows in batches of 4, three times
    assert said.step_seconds is not None
    assert said.step_seconds > 0
    model: Any = empty_model(str(place / "model"))
    base = sum(parameter.numel() for parameter in model.parameters())
    assert (said.cost.base_parameters, said.cost.base) == (base, 4 * base)
    torch.manual_seed(0)
    config = adapter_config(method, r=2)
    model = tiny.model(len(tiny.tokenizer()))
    numbers = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if "pissa" not in method:
        adapted = peft.get_peft_model(model, config)
        trained = adapted.get_nb_trainable_parameters()[0]
        kept = sum(tensor.numel() for tensor in (*adapted.parameters(), *adapted.buffers())) - numbers
        # Where ranks grow, what is said is for the end.
        assert said.cost.trained >= trained
        assert said.cost.adapter >= 4 * kept
        if method not in ("increlora", "triadaptlora", "pedyra"):
            assert said.cost.trained == trained
            assert said.cost.adapter == 4 * kept
    assert said.cost.optimizer == 2 * said.cost.gradients == 8 * said.cost.trained
    assert said.cost.total > said.cost.base


def test_steps_are_those_of_the_run(place: Path, tmp_path: Path) -> None:
    for given in ({}, {"gradient_accumulation": 2}, {"steps": 2, "epochs": 1.0}, {"epochs": 0.5}):
        said = dry_run(spec_of(place, tmp_path / "none", **given))
        done = finetune(spec_of(place, tmp_path / str(len(list(tmp_path.iterdir()))), samples=0, **given))
        assert said.steps == done.steps
        assert said.cost.trained == done.trainable_parameters


def test_the_program_says_it_and_leaves_nothing(place: Path, tmp_path: Path, program: Program) -> None:
    flags = ["-m", str(place / "model"), "-d", str(place / "rows.jsonl"), "-o", str(tmp_path / "run"), "-r", "2"]
    shown = program("finetune", *flags, "--steps", "50", "--dry-run")
    assert shown.code == 0, shown.err
    text = " ".join(shown.out.split())
    assert re.search(rf"50 optimizer steps of \d+\.\d\d s \(mean of {STEPS - 1} real ones", text)
    assert "AdamW's state" in text
    assert "Most memory in this process during a step" in text
    assert "Nothing was trained or written" in text
    assert list(tmp_path.iterdir()) == []
    assert program("finetune", *flags[:-2], "-r", "4000", "--dry-run").code == 2


def test_memory_follows_dtype_and_quantisation() -> None:
    model = tiny.model(259)
    config = adapter_config("dira", r=2)
    whole = sum(parameter.numel() for parameter in model.parameters())
    linear = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not model.lm_head
    )
    assert cost_of(model, config, dtype=torch.bfloat16).base == 2 * whole
    for name, bytes_each in (("4bit", 0.5625), ("8bit", 1.0), ("int8", 1.0)):
        held = cost_of(model, config, dtype=torch.bfloat16, quantization=name).base
        assert held == 2 * (whole - linear) + round(bytes_each * linear)
    full = cost_of(model, None, dtype=torch.bfloat16)
    assert (full.trained, full.adapter, full.gradients, full.optimizer) == (whole, 0, 2 * whole, 4 * whole)


def test_what_retain_keeps_is_counted() -> None:
    model = tiny.model(259)
    config = dynalora.DiraConfig(r=2, target_modules="all-linear", retain=10.0, task_type="CAUSAL_LM")
    cost = cost_of(model, config, dtype=torch.float32)
    assert cost.retain > 0
    table = cost_table([("with", cost), ("without", cost_of(model, adapter_config("dira", r=2), dtype=torch.float32))])
    assert table.text[0][-2] == amount(cost.retain)
    assert table.text[1][-2] == "–"


@pytest.mark.parametrize(("number", "text"), [(512, "0.5 KiB"), (3 * 2**20, "3.0 MiB"), (5.5 * 2**30, "5.5 GiB")])
def test_amounts(number: float, text: str) -> None:
    assert amount(number) == text


def test_a_tracker_that_is_missing_is_said_before_anything_is_loaded(
    place: Path, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "get_available_reporting_integrations", lambda: ["tensorboard"])
    flags = ["-m", "no/such-model", "-d", str(place / "rows.jsonl"), "-o", str(tmp_path / "run")]
    shown = program("finetune", *flags, "--report-to", "wandb,tensorboard")
    assert shown.code == 2
    assert shown.err.startswith("Error: --report-to names wandb, which is not installed; run: pip install wandb")
    shown = program("finetune", *flags, "--report-to", "wanbd")
    assert "choose one of wandb, trackio, mlflow, tensorboard" in shown.err.replace("\n", " ")


@pytest.mark.skipif("tensorboard" not in get_available_reporting_integrations(), reason="needs tensorboard")
def test_tensorboard_gets_both_losses_in_the_run_folder(place: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    finetune(
        spec_of(place, tmp_path / "run", report_to=["tensorboard"], log_every=1, eval_every=2, steps=4, epochs=1.0)
    )
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("eval/loss")] == [2, 4]
    assert "report_to" not in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(7, "about 7 s"), (119, "about 119 s"), (120, "about 2 min"), (7200, "about 2.0 h"), (1e6, "about 12 days"),
     (5e8, "about 16 years")],
)  # fmt: skip
def test_times_in_words(seconds: float, words: str) -> None:
    assert f"about {duration(seconds)}" == words


def test_a_run_says_how_long_it_takes_and_how_to_make_one_shorter_that_takes_days() -> None:
    told = io.StringIO()
    display = Display("disel", Console(file=told, width=40))
    display.pace(0.5, 100)
    assert told.getvalue() == "disel: a step takes 0.5 s, and the 100 that are left about 50 s.\n"
    display.pace(0.5, 10**9)
    assert "the 1,000,000,000 that are left about 16 years. Ctrl-C ends" in told.getvalue()


def test_passes_are_told_where_they_are_many(place: Path, tmp_path: Path) -> None:
    told = {}
    for steps in (2, 10**9):
        spec = spec_of(place, tmp_path / "run", steps=steps, epochs=1.0, learning_rate=1e-3)
        told[steps] = run._passes(spec, SimpleNamespace(training=range(18)))  # type: ignore[arg-type]
    assert told == {2: "", 10**9: ", 222,222,222 times in 1,000,000,000 steps"}
