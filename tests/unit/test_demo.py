"""The demo from end to end, on a model of a few kilobytes."""

from __future__ import annotations

import html
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from dynalora.errors import ConfigError, RunFolderError
from dynalora.evaluation.scoring import answer_loss
from dynalora.evaluation.tokens import tokenize
from dynalora.jobs.demo import report
from dynalora.jobs.demo import run as demo
from dynalora.jobs.demo.run import run_demo
from dynalora.jobs.demo.settings import DemoSpec
from dynalora.lab.run_folder import read_metrics
from dynalora.lab.training.train import take_off

from . import tiny

pytest.importorskip("reasoning_gym")

SPEC = DemoSpec(
    methods=["disel", "lora"], task="spell_backward", steps=4, batch_size=2, held_out=6, r=4, retention_texts=3,
    retention_tokens=5, learning_rate=1e-2, shots=1,
)  # fmt: skip


def small() -> dict[str, Any]:
    words = tiny.tokenizer()
    return {"model": tiny.model(len(words)), "tokenizer": words}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One run of the demo: its result, its folder, and the base model before and after."""
    folder = tmp_path_factory.mktemp("demo")
    given = small()
    before = {name: value.clone() for name, value in given["model"].state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNALORA_CACHE", str(folder / "cache"))
        result = run_demo(replace(SPEC, output=str(folder / "run")), **given)
    return result, folder / "run", before, given["model"]


def test_each_method_has_its_row(ran: Any) -> None:
    result, _, _, _ = ran
    assert [row.method for row in result.rows] == ["disel", "lora"]
    disel, lora = result.rows
    assert disel.trainable_parameters > lora.trainable_parameters
    assert disel.accuracy_before == lora.accuracy_before == result.scores["base"].accuracy
    assert disel.answer_loss_before == lora.answer_loss_before
    for row in result.rows:
        assert row.answer_loss_after != row.answer_loss_before, "training changed nothing"
        assert row.kl > 0


def test_the_base_model_is_given_back_bit_for_bit(ran: Any) -> None:
    _, _, before, model = ran
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not hasattr(model, "peft_config")


def test_both_methods_start_at_the_base_model_on_the_same_batches(ran: Any) -> None:
    _, folder, _, _ = ran
    losses = {
        name: [record["loss"] for record in read_metrics(folder) if record["run"] == name and "loss" in record]
        for name in ("disel", "lora")
    }
    assert len(losses["disel"]) == len(losses["lora"]) == SPEC.steps
    # Untrained adapters change nothing, so equal losses at step 1 mean equal batches.
    assert losses["disel"][0] == pytest.approx(losses["lora"][0], abs=1e-5)
    assert losses["disel"][-1] != pytest.approx(losses["lora"][-1], abs=1e-5)


def test_the_run_folder_has_everything(ran: Any) -> None:
    result, folder, _, _ = ran
    for name in ("gates", "loss", "retention"):
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    # So small a model answers nothing, before or after, and bars that are all zero would say nothing.
    assert all(row.accuracy_before.value == row.accuracy_after.value == 0 for row in result.rows)
    assert not (folder / "plots" / "accuracy.png").exists()
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert html.escape(result.task.held_out[0].question) in page
    assert "spell_backward" in page
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["finished"]
    measured = {record["run"]: record for record in read_metrics(folder) if "answer_loss" in record}
    assert set(measured) == {"base", "base, 1 examples", "disel", "lora"}
    assert measured["lora"]["retention"]["kl"] == result.rows[1].kl


def test_the_saved_adapters_give_the_measured_loss_again(ran: Any) -> None:
    result, folder, _, model = ran
    words = tiny.tokenizer()
    rows = tokenize([item.conversation() for item in result.task.held_out], words).rows
    for row, name in zip(result.rows, ("adapter", "adapter-lora"), strict=True):
        loaded = peft.PeftModel.from_pretrained(model, folder / name)
        assert answer_loss(loaded, rows).mean == pytest.approx(row.answer_loss_after, rel=1e-5)
        take_off(loaded)


def test_the_table_shows_base_and_methods(ran: Any) -> None:
    result, _, _, _ = ran
    shown = report.summary_table(result).text
    solved = "base model, shown 1 solved question"
    assert [line[0] for line in shown] == ["base model", solved, "disel, retain = 3000", "lora"]
    assert shown[3][2].startswith(f"{result.rows[1].kl:.4f}")


def test_the_base_model_is_also_asked_after_solved_questions(ran: Any) -> None:
    result, folder, _, model = ran
    words, task = tiny.tokenizer(), result.task
    turns = [turn for item in task.train[:1] for turn in item.conversation()]
    asked = [turns + item.conversation() for item in task.held_out]
    rows = tokenize(asked, words, max_length=999).rows
    answers = [item.answer for item in task.held_out]
    for row, answer in zip(rows, answers, strict=True):  # of all answers only the last one counts
        ends = len(words(answer)["input_ids"]) + 1
        row["labels"] = [-100] * (len(row["labels"]) - ends) + row["input_ids"][-ends:]
    again = answer_loss(model, rows)
    assert result.shown is not None
    assert result.shown.answer_tokens == again.tokens
    assert result.shown.answer_loss == pytest.approx(again.mean, rel=1e-5)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "What a distance looks like" in page
    assert "times less likely from the tuned one" in page


def test_the_first_line_is_what_was_learned_and_what_was_forgotten(ran: Any) -> None:
    result, folder, _, _ = ran
    disel, lora = result.rows
    said = report.summary(result)
    assert said.startswith("disel, retain = 3000 forgets ")
    shares = [f"{100 * row.accuracy_after.value:.1f} % ({100 * row.accuracy_after.low:.1f}–" for row in (disel, lora)]
    first = said.partition(". The base model")[0]
    assert first.index(shares[0]) < first.rindex(shares[1])
    for row in (disel, lora):
        assert f"{row.kl:.3f} ({max(0.0, row.kl - 1.96 * row.kl_error):.3f}–" in first
    assert "after 1 solved question" in said
    assert said in html.unescape((folder / "report.html").read_text(encoding="utf-8"))
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["retain"] == 3000.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["disel", "nope"]}, "nope"),
        ({"methods": ["lora", "lora"]}, "methods names lora twice"),
        ({"methods": []}, "methods is empty"),
        ({"r": 0}, "r is 0; give at least 1"),
        ({"held_out": 0}, "held_out is 0"),
        ({"steps": None}, "steps is missing"),
        ({"task": None, "task_options": {"a": 1}}, "without a task"),
        ({"task": "no_such_task"}, "There is no task 'no_such_task'"),
    ],
)
def test_bad_settings_stop_it_before_a_model_is_sought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(demo, "demo_model", lambda **_: pytest.fail("looked for a model"))
    with pytest.raises(ConfigError, match=message):
        run_demo(replace(SPEC, output=str(tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_refused_first(ran: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder, _, _ = ran
    monkeypatch.setattr(demo, "demo_model", lambda **_: pytest.fail("looked for a model"))
    with pytest.raises(RunFolderError, match="already holds a run"):
        run_demo(replace(SPEC, output=str(folder)))


def test_without_an_output_the_first_free_folder_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert demo._free_folder("runs/demo") == "runs/demo"
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    assert demo._free_folder("runs/demo") == "runs/demo"
    for name in ("demo", "demo-2"):
        (tmp_path / "runs" / name).mkdir(exist_ok=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    assert demo._free_folder("runs/demo") == "runs/demo-3"


def test_a_model_without_its_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="belong together"):
        run_demo(SPEC, model=small()["model"])
