"""Comparisons from end to end on a model of a few kilobytes: which cells run, what is chosen, what is reported."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shutil
import statistics
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import dynalora
from dynalora.common.statistics import Difference, Interval, crossed_difference, holm
from dynalora.drawing import style as drawing
from dynalora.errors import ConfigError, DataError, RunFolderError, TrainingError
from dynalora.evaluation.kinds import choice
from dynalora.evaluation.results import TaskScore
from dynalora.evaluation.run import measure, prepare
from dynalora.evaluation.tokens import TokenizedSet
from dynalora.forgetting.retention import retention
from dynalora.forgetting.texts import given_text, own_text
from dynalora.jobs.compare import cell as compare_cell
from dynalora.jobs.compare import contestants, decisions, planning, plots, runner, summaries, tables, verdict, writing
from dynalora.jobs.compare.contestants import Cell
from dynalora.jobs.compare.explore import explorer
from dynalora.jobs.compare.frontiers import Scaled
from dynalora.jobs.compare.grid import Comparison
from dynalora.jobs.compare.run import run_compare
from dynalora.jobs.compare.settings import CompareSpec, variant_from
from dynalora.jobs.compare.store import CellStore, shared_settings
from dynalora.lab.data.conversations import MONITORED_LENGTH, load_named_text
from dynalora.lab.models import load_model, load_tokenizer
from dynalora.lab.report import Table, latex_table, markdown_table
from dynalora.lab.tasks import reading

from . import tiny
from .program import Program
from .test_forgetting import write_tasks


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    tiny.saved_model(folder / "model")
    write_tasks(folder / "data")
    (folder / "text.txt").write_text("One line of text.\n\nAnother line of it.\n", encoding="utf-8")
    return folder


def spec_of(place: Path, output: str, **more: Any) -> CompareSpec:
    given: dict[str, Any] = {
        "tasks": [str(place / "data" / "colour")], "output": str(place / output), "model": str(place / "model"),
        "methods": ["lora", "dira"], "learning_rates": [1e-2, 3e-2], "seeds": 2, "steps": 4, "r": 2, "batch_size": 2,
        "held_out": 4, "generated": 2, "generated_tokens": 3, "validation": 3, "system": "Say.",
    }  # fmt: skip
    return CompareSpec(**{**given, **more})


@pytest.fixture(scope="module")
def done(place: Path) -> Comparison:
    """Two methods, two rates, two seeds, one more text."""
    return run_compare(spec_of(place, "done", texts=[f"lines={place / 'text.txt'}"]), apart=False)


def results(comparison: Comparison) -> dict[str, dict[str, Any]]:
    grid = comparison.grid
    found = {cell.name: grid.result(cell) for cell in grid.known()}
    return {name: result for name, result in found.items() if result is not None}


# --- which cells run ----------------------------------------------------------------------------------------------


def test_the_first_seed_tries_every_rate_and_the_others_run_at_the_chosen_one(done: Comparison) -> None:
    grid = done.grid
    assert (grid.total, grid.done(), done.failed) == (1 + 2 * 3, 7, ())
    task = done.grid.spec.tasks[0]
    for own in grid.contestants:
        losses = {cell.learning_rate: results(done)[cell.name]["validation"]["loss"] for cell in grid.tried(task, own)}
        chosen = grid.chosen_rate(task, own)
        assert chosen == min(losses, key=lambda rate: losses[rate])
        names = [name for name in results(done) if f"/{own.label}_" in name and name.endswith("seed43")]
        assert names == [f"colour/{own.label}_r{own.r}_lr{chosen:g}_seed43"]


def test_rates_are_chosen_on_questions_that_are_neither_trained_nor_judged_on(place: Path, done: Comparison) -> None:
    source = done.grid.spec.tasks[0]
    task = done.tasks[source]
    left, aside = task.validation(3, seed=0)
    trained, chosen_on = (
        {example.choice.question for example in part}  # type: ignore[attr-defined]
        for part in (left.train, aside.held_out)  # type: ignore[attr-defined]
    )
    judged = {example.choice.question for example in task.held_out}  # type: ignore[attr-defined]
    assert (len(trained), len(chosen_on), len(judged)) == (9, 3, 4)
    assert not trained & chosen_on
    assert not judged & (trained | chosen_on)
    assert results(done)["colour/dira_r2_lr0.01_seed42"]["training"]["rows"] == 9
    with pytest.raises(ConfigError, match="12 questions to choose settings on cannot be set aside of the 12"):
        task.validation(12)


def test_losses_may_be_computed_in_bfloat16_and_kl_never_is(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    autocast: dict[str, set[bool]] = {"kl": set(), "loss": set()}

    def watched(name: str, function: Any) -> Any:
        def watch(*args: Any, **options: Any) -> Any:
            autocast[name].add(torch.is_autocast_enabled("cpu"))
            return function(*args, **options)

        return watch

    monkeypatch.setattr(compare_cell, "retention", watched("kl", compare_cell.retention))
    monkeypatch.setattr(compare_cell, "predictions_within", watched("kl", compare_cell.predictions_within))
    monkeypatch.setattr(choice, "option_scores", watched("loss", choice.option_scores))
    monkeypatch.setattr(choice, "right_option_losses", watched("loss", choice.right_option_losses))
    spec = spec_of(place, "bf16", methods=["lora"], learning_rates=[1e-2], seeds=1, bf16=True, factors=[1.0, 0.5])
    done = run_compare(spec, apart=False)
    assert not done.failed
    assert autocast == {"kl": {False}, "loss": {True}}
    (trained,) = [result for name, result in results(done).items() if "lora" in name]
    full, half = trained["curve"]
    assert [full["factor"], half["factor"]] == [1.0, 0.5]
    assert 0 < half["kl"]["own text"]["kl"] < full["kl"]["own text"]["kl"]
    assert len(half["test"]["losses"]) == len(full["test"]["losses"]) == 4


def test_finished_cells_are_not_run_again_and_lost_ones_are(
    place: Path, done: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    original = compare_cell._Run.run

    def counted(self: Any) -> dict[str, Any]:
        ran.append(self.cell.name)
        return original(self)

    monkeypatch.setattr(compare_cell._Run, "run", counted)
    again = run_compare(done.grid.spec, apart=False)
    assert ran == []
    lost = done.grid.cell(done.grid.spec.tasks[0], done.grid.contestants[1], 1e-2, 42)
    before = results(again)[lost.name]
    done.grid.store.file(lost).unlink()
    after = results(run_compare(done.grid.spec, apart=False))[lost.name]
    assert ran == [lost.name]
    assert after["test"] == before["test"], "a cell is a matter of its seed"
    assert after["retention"] == before["retention"]


def test_a_grid_may_grow_and_a_setting_of_all_cells_may_not_change(place: Path, done: Comparison) -> None:
    spec = done.grid.spec
    more = replace(spec, methods=["lora"], variants={"open": {"method": "disel", "gate_bias_init": 4.0}}, seeds=1)
    grown = run_compare(more, apart=False)
    assert {own.label for own in grown.grid.contestants} == {"lora", "open"}
    assert grown.grid.done() == grown.grid.total == 1 + 2 + 2
    with pytest.raises(RunFolderError, match="was run with other settings \\(steps was 4, now 5\\)"):
        run_compare(replace(spec, steps=5), apart=False)


def test_cells_of_before_a_setting_was_there_have_its_default(place: Path, done: Comparison) -> None:
    spec = replace(done.grid.spec, output=str(place / "older"))
    store, cell = CellStore(spec.output, shared_settings(spec)), done.grid.base(spec.tasks[0])
    content = json.loads(done.grid.store.file(cell).read_text(encoding="utf-8"))
    del content["settings"]["template"], content["settings"]["by_generation"]
    store.file(cell).parent.mkdir(parents=True)
    store.file(cell).write_text(json.dumps(content), encoding="utf-8")
    assert store.read(cell) == content
    other = CellStore(spec.output, shared_settings(replace(spec, by_generation=True)))
    with pytest.raises(RunFolderError, match="by_generation was False, now True"):
        other.read(cell)


def copied(done: Comparison, output: Path) -> tuple[CompareSpec, Path]:
    """A copy of a comparison's folder with settings for it, and a trained cell's file there."""
    shutil.copytree(done.grid.store.folder, output)
    cell = done.grid.cell(done.grid.spec.tasks[0], done.grid.contestants[1], 1e-2, 42)
    return replace(done.grid.spec, output=str(output)), CellStore(output, {}).file(cell)


def test_a_cell_records_the_version_and_every_default_of_its_method(done: Comparison) -> None:
    cell = done.grid.cell(done.grid.spec.tasks[0], done.grid.contestants[1], 1e-2, 42)
    content = json.loads(done.grid.store.file(cell).read_text(encoding="utf-8"))
    assert content["version"] == dynalora.__version__
    assert cell.options == {}
    assert content["configuration"]["penalty_weight"] == dynalora.DiraConfig().penalty_weight
    fields_of_it = {item.name for item in fields(dynalora.DiraConfig)}
    assert fields_of_it - set(content["configuration"]) <= set(contestants._OF_A_SAVED_ADAPTER) | {"runtime_config"}
    base = json.loads(done.grid.store.file(done.grid.base(cell.task)).read_text(encoding="utf-8"))
    assert base["configuration"] is None


def test_a_cell_from_before_a_default_changed_is_another_cell(done: Comparison, tmp_path: Path) -> None:
    spec, file = copied(done, tmp_path / "changed")
    content = json.loads(file.read_text(encoding="utf-8"))
    content["configuration"]["penalty_weight"] = 0.5
    content["configuration"]["gone"] = 1  # fields that came or went are no difference
    del content["configuration"]["compact_every"]
    file.write_text(json.dumps({**content, "version": "0.0.9"}), encoding="utf-8")
    with pytest.raises(RunFolderError) as refused:
        run_compare(spec, apart=False)
    assert re.search(
        r"run by dynalora 0\.0\.9, where dira had other defaults \(penalty_weight was 0\.5, now 0\.0001\)",
        str(refused.value),
    )
    assert "compact_every" not in str(refused.value)
    # What is there can still be reported.
    comparison = run_compare(spec, run=False)
    (sentence,) = comparison.grid.provenance()
    assert sentence.startswith("dira was run by dynalora 0.0.9, where it had other defaults (penalty_weight was 0.5")
    assert sentence in (tmp_path / "changed" / "report.html").read_text(encoding="utf-8")
    file.unlink()
    assert run_compare(spec, apart=False).grid.provenance() == []


@pytest.mark.parametrize("recorded", [False, True])
def test_a_setting_that_came_later_with_another_effect(tmp_path: Path, recorded: bool) -> None:
    """A cell that ran before `match_step` came is one with `match_step=False`, by whichever name it is asked for."""
    store = CellStore(tmp_path, {})
    shared = {"label": "disel", "method": "disel", "r": 4, "task": "t", "place": "t", "learning_rate": 1e-3}
    then = Cell(**shared)
    file = store.file(then)
    file.parent.mkdir(parents=True)
    content = {"settings": {}, "cell": asdict(then), "test": TaskScore.of([True], [0.5], [2]).record()}
    if recorded:
        configuration = {name: value for name, value in then.configuration().items() if name != "match_step"}
        content |= {"version": "0.0.9", "configuration": configuration}
    file.write_text(json.dumps(content), encoding="utf-8")
    assert store.read(Cell(**shared, options={"match_step": False})) == content
    with pytest.raises(RunFolderError, match=r"match_step was False, now True|'match_step': False"):
        store.read(Cell(**shared, options={"match_step": True}))
    if recorded:
        with pytest.raises(RunFolderError, match=r"other defaults \(match_step was False, now True"):
            store.read(then)


def test_cells_of_versions_that_recorded_no_defaults_are_used_and_said(
    done: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, file = copied(done, tmp_path / "old")
    content = json.loads(file.read_text(encoding="utf-8"))
    del content["version"], content["configuration"]
    file.write_text(json.dumps(content), encoding="utf-8")
    before = file.read_bytes()
    monkeypatch.delattr(compare_cell._Run, "run")  # nothing is run
    console = Console(file=io.StringIO(), width=500)
    comparison = run_compare(spec, console=console, apart=False)
    assert comparison.failed == ()
    assert file.read_bytes() == before
    trained = sum(cell.method != "base" for cell, _ in comparison.grid.results())
    sentence = f"1 of the {trained} trained cells in '{spec.output}' come from an older version of dynalora"
    assert console.file.getvalue().count(sentence) == 1  # type: ignore[attr-defined]


def test_cells_do_not_depend_on_when_a_training_would_log_and_save(done: Comparison, tmp_path: Path) -> None:
    spec, file = copied(done, tmp_path / "logged")
    content = json.loads(file.read_text(encoding="utf-8"))
    # As versions wrote it that took these settings and did nothing with them.
    content["settings"] |= {"log_every": 7, "eval_every": 3, "save_every": 5}
    file.write_text(json.dumps(content), encoding="utf-8")
    assert run_compare(spec, run=False).grid.open_cells() == []


def test_runs_may_be_as_long_as_epochs_say(place: Path) -> None:
    spec = spec_of(
        place, "epochs", steps=None, epochs=2, learning_rates=[1e-2], seeds=1, methods=["lora"], retention=False
    )
    found = results(run_compare(spec, apart=False))
    # 12 training questions without the 3 that are set aside, in batches of 2.
    assert found["colour/lora_r2_lr0.01_seed42"]["training"]["steps"] == 10


def test_prompts_may_be_trained_on_and_nothing_else_changes(place: Path) -> None:
    spec = spec_of(place, "answers", learning_rates=[1e-2], seeds=1, methods=["lora"])
    answers, prompts = (
        results(run_compare(replace(spec, loss_on_prompts=given, output=str(place / f"prompts-{given}")), apart=False))
        for given in (False, True)
    )
    assert answers["colour/base"]["test"] == prompts["colour/base"]["test"]
    one, other = (found["colour/lora_r2_lr0.01_seed42"] for found in (answers, prompts))
    assert one["test"]["losses"] != other["test"]["losses"]
    assert one["test"]["counts"] == other["test"]["counts"]
    assert other["change"]["prompts_kl"] is not None

    rows = TokenizedSet([{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}], truncated=2).with_prompts()
    assert rows.rows == [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]
    assert rows.truncated == 2


def test_a_task_that_is_trained_elsewhere_is_compared_by_its_mean(place: Path) -> None:
    source = f"mixed = {place / 'data' / 'sums'} -> {place / 'data' / 'colour'} + {place / 'data' / 'sums'}"
    spec = spec_of(
        place, "elsewhere", tasks=[source], learning_rates=[1e-2], seeds=2, methods=["lora", "dira"], retention=False
    )  # fmt: skip
    comparison = run_compare(spec, apart=False)
    cells = results(comparison)
    assert {name.split("/")[0] for name in cells} == {"mixed"}
    score = cells["mixed/dira_r2_lr0.01_seed42"]["test"]
    assert len(score["correct"]) == 4 + 2
    assert score["accuracy"] == pytest.approx((sum(score["correct"][:4]) / 4 + sum(score["correct"][4:]) / 2) / 2)
    (base, first, second) = summaries.summaries(comparison)["mixed"]
    assert base.accuracy is not None
    assert base.accuracy.value == pytest.approx(cells["mixed/base"]["test"]["accuracy"])
    assert {"colour", "sums"} <= set(first.metrics)
    assert second.accuracy_apart is not None
    table = tables.result_table(comparison, "mixed", [base, first, second])
    assert {"colour", "sums"} <= set(table.columns)
    assert "accuracy is the unweighted mean of theirs" in table.note


def test_a_failing_cell_loses_no_other(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = compare_cell._Run.run

    def failing(self: Any) -> dict[str, Any]:
        if self.cell.label == "dira":
            raise TrainingError("The loss is nan.")
        return original(self)

    spec = spec_of(place, "failing", learning_rates=[1e-2], seeds=1, retention=False)
    with monkeypatch.context() as patched:
        patched.setattr(compare_cell._Run, "run", failing)
        first = run_compare(spec, apart=False)
    assert [(cell.label, why) for cell, why in first.failed] == [("dira", "The loss is nan.")]
    assert sorted(results(first)) == ["colour/base", "colour/lora_r2_lr0.01_seed42"]
    assert "The loss is nan." in (place / "failing" / "report.html").read_text(encoding="utf-8")
    second = run_compare(spec, apart=False)
    assert second.failed == ()
    assert second.grid.done() == second.grid.total


def test_a_cell_that_a_live_process_has_is_left_to_it(place: Path) -> None:
    spec = spec_of(place, "taken")
    store = CellStore(spec.output, shared_settings(spec))
    cell = Cell(task=spec.tasks[0], place="colour", label="base", method="base")
    assert not store.taken(cell)
    with store.lock(cell):
        assert store.taken(cell)
    assert not store.taken(cell)


@pytest.mark.parametrize(
    "harm", [lambda content: content[: len(content) // 2], lambda content: "[]"], ids=["cut", "no result"]
)
def test_a_damaged_cell_is_named(place: Path, done: Comparison, harm: Any, tmp_path: Path) -> None:
    spec = replace(done.grid.spec, output=str(tmp_path))
    store = CellStore(tmp_path, shared_settings(spec))
    cell = done.grid.base(spec.tasks[0])
    store.file(cell).parent.mkdir(parents=True)
    store.file(cell).write_text(harm(done.grid.store.file(cell).read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"base\.json' (cannot be read|holds no result)"):
        store.read(cell)


@pytest.mark.parametrize(
    ("place_in_file", "value"),
    [
        (("test", "loss"), float("nan")),
        (("test", "loss"), float("inf")),
        (("test", "loss"), -1.0),
        (("test", "accuracy"), 1.5),
        (("test", "counts"), [1, -2]),
        (("test", "losses"), None),
        (("test", "metrics"), {"mcc": "high"}),
        (("test",), []),
        (("retention", "own text"), -5),
        (("retention", "own text", "kl"), 10**400),
        (("curve",), [{"factor": 1.0}]),
        (("training", "losses"), [True]),
        (("landscape",), {"module": 1}),
        (("trajectory",), [None]),
        (("cell",), "x"),
        (("kept",), {"arc": {"value": 1}}),
    ],
    ids=str,
)
def test_a_cell_of_which_no_table_can_be_made_is_named(
    place_in_file: tuple[str, ...], value: Any, done: Comparison, tmp_path: Path
) -> None:
    spec = replace(done.grid.spec, output=str(tmp_path / "damaged"))
    shutil.copytree(done.grid.store.folder, spec.output)
    file = sorted(Path(spec.output, "cells").glob("*/dira*.json"))[0]
    content = json.loads(file.read_text(encoding="utf-8"))
    inner = content
    for name in place_in_file[:-1]:
        inner = inner[name]
    inner[place_in_file[-1]] = value
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(RunFolderError, match=rf"dira.*\.json' is damaged \({place_in_file[0]}") as refused:
        run_compare(spec, run=False)
    assert len(str(refused.value)) < 500


def test_what_has_diverged_is_no_cell(done: Comparison, tmp_path: Path) -> None:
    spec = replace(done.grid.spec, output=str(tmp_path))
    store, cell = CellStore(tmp_path, shared_settings(spec)), done.grid.base(spec.tasks[0])
    result = done.grid.result(cell)
    assert result is not None
    with pytest.raises(TrainingError, match=r"cannot be compared \(test\.loss is nan\)"):
        store.write(cell, {**result, "test": {**result["test"], "loss": float("nan")}})
    assert store.read(cell) is None


def test_cells_run_in_processes_of_their_own_and_one_that_dies_is_reported(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(place, "apart", learning_rates=[1e-2], seeds=1, retention=False, methods=["lora"], jobs=2, threads=1)
    broken = {**json.loads(json.dumps(spec.settings())), "data_seed": "none"}
    original = runner.Runner._process

    def process(self: Any, cell: Cell, slot: int) -> Any:
        if cell.method == "lora":
            monkeypatch.setattr(type(self.grid.spec), "settings", lambda self: broken)
        try:
            return original(self, cell, slot)
        finally:
            monkeypatch.undo()
            monkeypatch.setattr(runner.Runner, "_process", process)

    monkeypatch.setattr(runner.Runner, "_process", process)
    found = run_compare(spec)
    assert sorted(results(found)) == ["colour/base"]
    ((cell, why),) = found.failed
    assert cell.label == "lora"
    assert "data_seed must be a whole number, got 'none'" in why
    assert results(found)["colour/base"]["machine"]["threads"] == 1


# --- what is measured and reported --------------------------------------------------------------------------------


def test_summaries_are_those_of_the_cells(done: Comparison) -> None:
    found = {one.label: one for one in summaries.summaries(done)["colour"]}
    assert list(found) == ["base", "lora", "dira"]
    for label in ("lora", "dira"):
        one, cells = found[label], found[label].results
        assert sorted(cells) == [42, 43]
        assert one.accuracy is not None
        assert one.loss is not None
        right = [statistics.fmean(cell["test"]["correct"]) for cell in cells.values()]
        assert one.accuracy.value == pytest.approx(statistics.fmean(right))
        assert 0 <= one.accuracy.low <= one.accuracy.high <= 1
        losses = [sum(cell["test"]["losses"]) / sum(cell["test"]["counts"]) for cell in cells.values()]
        assert one.loss.value == pytest.approx(statistics.fmean(losses), abs=1e-6)
        kl = [cell["retention"]["lines"]["kl"] for cell in cells.values()]
        assert min(kl) > 0
        assert one.kl["lines"].value == pytest.approx(statistics.fmean(kl))
    apart = found["dira"].loss_apart
    assert apart is not None
    assert apart.value == pytest.approx(found["dira"].loss.value - found["lora"].loss.value, abs=1e-6)  # type: ignore[union-attr]
    assert found["lora"].loss_apart is None
    assert found["base"].kl["lines"].value == 0


def is_rounded(shown: str, value: float) -> bool:
    """Whether a table's number is a value in as many decimals as it shows, three at least."""
    decimals = len(shown.partition(".")[2])
    return decimals >= 3 and abs(float(shown) - value) <= 0.501 * 10**-decimals


def test_where_no_rate_is_chosen_every_one_has_its_rows(place: Path) -> None:
    """Each method beside the reference at the same rate, and no table at rates that nothing chose."""
    rates = {"learning_rates": [3e-2, 1e-2], "all_rates": True, "validation": 0, "factors": []}
    comparison = run_compare(spec_of(place, "every-rate", seeds=1, **rates), apart=False)
    (task,), cells = comparison.grid.places, results(comparison)
    shown = writing._tables(comparison, task, summaries.summaries(comparison)["colour"])
    assert [table.title for table in shown] == ["colour, at every learning rate"]
    table = shown[0]
    assert [row[:2] for row in table.text] == [
        ["–", "base"], ["0.01", "lora"], ["0.01", "dira"], ["0.03", "lora"], ["0.03", "dira"],
    ]  # fmt: skip
    for _, label, loss, apart, *_ in table.text[1:]:
        assert (apart == "–") == (label == "lora"), loss
    losses = {
        (rate, label): cells[f"colour/{label}_r2_lr{rate}_seed42"]["test"]["loss"]
        for rate in ("0.01", "0.03")
        for label in ("lora", "dira")
    }
    for rate, label, loss, apart, *_ in table.text[1:]:
        assert is_rounded(loss.split()[0], losses[rate, label])
        if label == "dira":
            assert is_rounded(apart.split()[0], losses[rate, "dira"] - losses[rate, "lora"])
    # So are the headline, the table of what was kept, and everything else that would speak of one rate alone.
    by_place = summaries.summaries(comparison)
    headlines = verdict.conclusion(comparison, by_place).splitlines()
    assert [line.partition(":")[0] for line in headlines] == [
        f"colour, all at a learning rate of {rate}" for rate in ("0.01", "0.03")
    ]
    assert set(writing._figures(comparison, task, by_place["colour"])) == {
        "frontier-colour", "scaled-colour", "kept-colour",
    }  # fmt: skip
    assert all(line.endswith(",0") for line in writing.cells_csv(comparison).splitlines()[1:])
    # Where seeds follow a chosen rate, its table stands too.
    chosen = run_compare(spec_of(place, "every-rate-2", seeds=1, **{**rates, "validation": 3}), apart=False)
    titles = [table.title for table in writing._tables(chosen, task, summaries.summaries(chosen)["colour"])]
    assert titles[:2] == ["colour, at every learning rate", "colour"]
    assert verdict.conclusion(chosen, summaries.summaries(chosen)).startswith("colour: ")


def test_a_report_runs_nothing(place: Path, done: Comparison) -> None:
    with pytest.raises(ConfigError, match=r"No cell of .* has been run yet"):
        run_compare(spec_of(place, "nothing"), run=False)
    folder = done.grid.store.folder
    before = sorted(folder.glob("cells/**/*.json"))
    more = spec_of(place, "done", texts=[f"lines={place / 'text.txt'}"], seeds=3)
    found = run_compare(more, run=False)
    assert sorted(folder.glob("cells/**/*.json")) == before
    assert found.grid.open_cells()
    assert found.failed == ()
    assert (folder / "report.html").stat().st_size > 0


def test_a_report_needs_neither_data_nor_model_and_may_have_moved(
    place: Path, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(place, "gone", methods=["lora", "disel"], seeds=1, texts=[f"lines={place / 'text.txt'}"])
    for folder in ("data", "model"):
        shutil.copytree(place / folder, tmp_path / folder)
    there = replace(
        spec, tasks=[str(tmp_path / "data" / "colour")], model=str(tmp_path / "model"), output=str(tmp_path / "run")
    )
    run_compare(there, apart=False)
    moved = tmp_path / "elsewhere" / "moved"
    (tmp_path / "run").rename(moved.parent.mkdir() or moved)
    tables = {name: (moved / name).read_text("utf-8") for name in ("results.md", "cells.csv", "curves.csv")}
    for name in (*tables, "report.html"):
        (moved / name).unlink()
    for folder in ("data", "model"):
        shutil.rmtree(tmp_path / folder)
    monkeypatch.chdir(tmp_path / "elsewhere")
    shown = program("compare", "--report", "--output", "moved")
    assert shown.code == 0, shown.err
    assert {name: (moved / name).read_text("utf-8") for name in tables} == tables
    assert "training questions" in (moved / "report.html").read_text("utf-8")
    other = program("compare", "--report", "-o", "moved", "--reference", "disel", "--tasks", "other/colour")
    assert other.code == 0, other.err
    assert "loss, − disel" in other.out
    unknown = program("compare", "--report", "-o", "moved", "--tasks", "shape")
    assert (unknown.code, "--tasks names shape" in unknown.err) == (2, True), unknown.err
    nothing = program("compare", "--report", "-o", "nowhere")
    assert nothing.code == 2
    assert "-o is 'nowhere', which holds no run to report on" in nothing.err


def of_seeds(*losses: float, kl: float = 0.1, factors: tuple[float, ...] = ()) -> dict[int, dict[str, Any]]:
    """Results by seed as cells hold them: one question per loss, KL falling with the factor."""
    return {
        seed: {
            "test": {"loss": loss, "losses": [loss] * 4, "counts": [1] * 4, "correct": [1.0] * 4, "accuracy": 1.0,
                     "loss_error": 0.1},
            "retention": {"own text": {"kl": kl, "kl_error": 0.0}},
        }
        for seed, loss in enumerate(losses)
    }  # fmt: skip


def summary_of(label: str, rate: float | None = 1e-3, **more: Any) -> summaries.Summary:
    interval = Interval(2.0, 1.9, 2.1)
    return summaries.Summary(label, "task", rate, False, of_seeds(2.0, 2.0), loss=interval, **more)


def scaled_ratio(*ratio: float) -> Scaled:
    return Scaled(0.5, None, None, Interval(0.1, 0.1, 0.1), None, Interval(*ratio), None, None, 2, 2)


@pytest.mark.parametrize(
    ("ratio", "says"),
    [
        ((0.4, 0.3, 0.5), "take better, its update scaled down after training, at a learning rate of 0.001"),
        ((0.4, 0.3, 0.5), "95 % interval of the ratio 0.30 to 0.50, 2 seeds"),
        ((0.4, 0.2, 1.5), "no method is beyond chance better than lora"),
        ((0.4, 0.4, 0.4), "repeat it with more seeds"),
        ((1.4, 1.2, 1.5), "stay with lora at a learning rate of 0.001"),
    ],
)
def test_the_headline_says_what_to_take_and_how_sure_that_is(ratio: tuple[float, ...], says: str) -> None:
    kl = {"own text": Interval(0.2, 0.2, 0.2)}
    lora, base = summary_of("lora", kl=kl), summary_of("base", rate=None)
    better = summary_of("better", kl=kl, scaled={"own text": scaled_ratio(*ratio)})
    far = replace(summary_of("far", kl=kl), loss=Interval(1.0, 0.9, 1.1), loss_apart=Difference(-1.0, -1.2, -0.8, 0.01))
    text = " ".join(verdict._of_a_task("task", [base, lora, better, far], "lora"))
    assert says in text
    assert "The lowest held-out loss as trained is that of far, 1.000 ± 0.100, which is 1.000 ± 0.200 below" in text
    assert "(beyond chance, p = 0.010)" in text
    assert "The loss of lora is not reached by far." in text


def test_the_headline_of_what_was_read_off_between_learning_rates() -> None:
    lora = summary_of("lora", kl={"own text": Interval(0.2, 0.2, 0.2)})
    better = summary_of("better", kl=lora.kl, at_reference_loss={"own text": 0.1})
    text = " ".join(verdict._of_a_task("task", [lora, better], "lora"))
    assert "forgets 0.50 times as much as lora" in text
    assert "read off between learning rates, for which there is no interval" in text
    assert "more seeds" not in text  # there are two already


def test_a_file_that_is_not_there_is_no_misspelt_task() -> None:
    with pytest.raises(ConfigError, match=r"There is no file 'nowhere\.jsonl'"):
        reading.generated("nowhere.jsonl", SimpleNamespace(), 4)  # type: ignore[arg-type]


def test_the_headline_where_only_learning_was_measured() -> None:
    lora, best = summary_of("lora"), replace(summary_of("best"), loss=Interval(1.0, 0.9, 1.1))
    sure, unsure = (replace(best, loss_apart=Difference(-1.0, -1.2, high, p)) for high, p in ((-0.8, 0.01), (0.1, 0.2)))
    assert "task: take best at a learning rate" in " ".join(verdict._of_a_task("task", [lora, sure], "lora"))
    text = " ".join(verdict._of_a_task("task", [lora, unsure], "lora"))
    assert "no method is beyond chance better than lora" in text
    assert "which may be chance" in text


def test_the_explorer_has_every_run_at_every_factor(done: Comparison) -> None:
    shown = explorer(done, done.grid.spec.tasks[0])
    assert shown is not None
    assert (shown.x, shown.y) == ("kl own text", "loss")
    assert [line.label for line in shown.lines] == ["lora", "lora", "dira", "dira"]
    marked = [point for line in shown.lines for point in line.points if point.marked]
    chosen = [done.grid.chosen_rate(done.grid.spec.tasks[0], one) for one in done.grid.contestants]
    assert [point.values["rate"] for point in marked] == chosen
    found = summaries.summaries(done)["colour"]
    for point, one in zip(marked, found[1:], strict=True):
        assert point.values["loss"] == pytest.approx(one.loss.value, abs=1e-6)  # type: ignore[union-attr]
        assert point.values["kl lines"] == pytest.approx(one.kl["lines"].value)
    for line in shown.lines:
        assert [point.values["factor"] for point in line.points] == sorted(done.grid.spec.factors, reverse=True)


def test_a_plot_over_sizes_is_left_out_where_they_are_one(done: Comparison) -> None:
    lora, dira = done.grid.contestants
    assert not plots.differ_in_size([lora, dira])
    assert plots.differ_in_size([lora, replace(dira, parameters=2 * (dira.parameters or 0))])
    assert not plots.differ_in_size([lora])
    full = replace(dira, parameters=50 * (dira.parameters or 0))
    assert not plots.differ_in_size([lora, dira, lora, dira, full]), "one beside all others on a line"
    assert not (done.grid.store.folder / "plots" / "parameters-colour.png").exists()


def test_the_table_of_cells_has_one_row_per_cell(done: Comparison) -> None:
    folder = done.grid.store.folder
    writing.write_results(done)  # another comparison may have used the folder
    rows = list(csv.DictReader((folder / "cells.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == done.grid.done() == len(results(done))
    names = {f"{row['place']}/{row['label']}" for row in rows}
    assert names >= {"colour/base", "colour/lora", "colour/dira"}
    for name in ("results.csv", "results.json", "results.md", "results.tex", "report.html", "config.yaml"):
        assert (folder / name).stat().st_size > 0
    assert "A KL of 0.1 means that" in (folder / "results.md").read_text(encoding="utf-8")
    record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert {one["label"] for one in record["colour"]} >= {"base", "lora"}
    page = (folder / "report.html").read_text(encoding="utf-8")
    # plotly's own code names addresses that it can go to; the page's policy lets it go nowhere.
    outside = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(src|href)=\"(?!data:|#)", outside), "the page asks nothing of a server"
    assert "default-src 'none'" in outside


def test_kl_at_equal_loss_is_read_off_the_curve() -> None:
    points = [(1e-4, 0.01, 3.0), (1e-3, 0.1, 2.0), (1e-2, 1.0, 2.5)]
    assert summaries._at_loss(points, 2.5) == pytest.approx(10**-1.5)
    assert summaries._at_loss(points, 2.0) == pytest.approx(0.1)
    assert summaries._at_loss(points, 1.9) is None
    assert summaries._at_loss(points, 3.1) is None
    assert summaries._at_loss(points[:1], 3.0) is None


def test_the_frontier_has_a_line_per_method_with_a_point_per_rate(done: Comparison) -> None:
    task = done.grid.spec.tasks[0]
    drawn = plots.plot_frontier(done, task, "lines")
    assert drawn is not None
    (axis,) = drawn.axes
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert set(lines) == {"lora", "dira"}
    base = results(done)["colour/base"]["test"]["loss"]
    assert axis.get_ylabel().endswith(f"base model: {base:.3f}")
    # In view is what learned at least three quarters of what the best did.
    points = [point for line in lines.values() for point in zip(*line.get_data(), strict=True)]
    best = min(loss for _, loss in points)
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    for kl, loss in points:
        if loss <= best + (base - best) / 4:
            assert left < kl < right
            assert low < loss < high
    for own in done.grid.contestants:
        cells = [results(done)[cell.name] for cell in done.grid.tried(task, own)]
        chosen = done.grid.chosen_rate(task, own)
        x, y = lines[own.label].get_data()
        for place, (rate, first) in enumerate(zip(own.learning_rates, cells, strict=True)):
            both = [first]
            if rate == chosen:
                both.append(results(done)[done.grid.cell(task, own, rate, 43).name])
            assert x[place] == pytest.approx(statistics.fmean(one["retention"]["lines"]["kl"] for one in both))
            assert y[place] == pytest.approx(statistics.fmean(one["test"]["loss"] for one in both))
    assert axis.get_xscale() == "log"
    assert "KL(base ‖ tuned) on lines" in axis.get_xlabel()
    # Told apart without colour.
    looks = {(line.get_linestyle(), line.get_marker()) for line in lines.values()}
    assert len(looks) == 2


def test_the_other_plots_show_what_was_measured(done: Comparison) -> None:
    found = summaries.summaries(done)
    drawn = plots.plot_parameters(done, "colour", found["colour"])
    assert drawn is not None
    heights = {container.get_label(): container.lines[0].get_ydata()[0] for container in drawn.axes[0].containers}
    # Accuracies that are all alike would say nothing, and losses take their place.
    assert len({one.accuracy.value for one in found["colour"] if one.accuracy is not None}) == 1
    assert heights == {
        one.label: pytest.approx(one.loss.value)  # type: ignore[union-attr]
        for one in found["colour"]
        if one.label != "base"
    }
    curves = plots.plot_learning(done, "colour", found["colour"])
    assert curves is not None
    assert [line.get_label() for line in curves.axes[0].get_lines()] == ["lora", "dira"]
    assert list(curves.axes[0].get_lines()[0].get_xdata()) == [1, 2, 3, 4]
    assert plots.plot_ranks(found["colour"], "colour") is None, "every matrix of both has the same rank"
    rows = next(iter(found["colour"][2].results.values()))["landscape"]
    rows = [{**rows[0], "effective_rank": 1}, *rows[1:]]
    learned = replace(found["colour"][2], results={0: {"landscape": rows}})
    maps = plots.plot_ranks([*found["colour"][:2], learned], "colour")
    assert maps is not None
    shown = maps.axes[1].get_images()[0].get_array()
    assert float(shown.sum()) == sum(row["effective_rank"] for row in rows)
    bars = plots.plot_cost(done, found)
    assert bars is not None
    assert {text.get_text() for text in bars.axes[0].get_xticklabels()} == {"lora", "dira"}


def test_word_problems_and_choices_are_compared_together_and_texts_are_refused_early(place: Path) -> None:
    spec = spec_of(
        place, "both", tasks=[str(place / "data" / "colour"), str(place / "data" / "sums")], seeds=1,
        learning_rates=[1e-2], methods=["lora"], retention=False,
    )  # fmt: skip
    found = run_compare(spec, apart=False)
    assert sorted(results(found)) == [
        "colour/base", "colour/lora_r2_lr0.01_seed42", "sums/base", "sums/lora_r2_lr0.01_seed42",
    ]  # fmt: skip
    assert all(result["retention"] is None for result in results(found).values())
    with pytest.raises(DataError, match="nowhere"):
        run_compare(replace(spec, texts=["a=nowhere.txt"], output=str(place / "never")), apart=False)
    assert not (place / "never").exists()


def test_an_encoder_is_compared_on_classification(place: Path, tmp_path: Path) -> None:
    words = tiny.tokenizer(chat=False)
    words.add_special_tokens({"mask_token": "<mask>", "pad_token": "<pad>"})
    words.save_pretrained(tmp_path / "encoder")
    torch.manual_seed(3)
    transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=128,
        )
    ).save_pretrained(tmp_path / "encoder")  # fmt: skip
    (tmp_path / "data" / "glue").mkdir(parents=True)
    for split, count in (("train", 12), ("dev", 6)):
        with gzip.open(tmp_path / "data" / "glue" / f"cola.{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write("".join(json.dumps({"text": f"{split} text {n}.", "label": n % 2}) + "\n" for n in range(count)))
    (tmp_path / "data" / "text").mkdir()
    (tmp_path / "data" / "text" / "wikitext2.test.txt").write_text("Some words of a text.\n" * 20)
    spec = spec_of(
        place, "encoder", tasks=["cola"], data=str(tmp_path / "data"), model=str(tmp_path / "encoder"),
        learning_rates=[1e-2], seeds=1, held_out=6, retention_tasks=["wikitext2_masked"], retention_items=2,
    )  # fmt: skip
    found = results(run_compare(spec, apart=False))
    perplexities = [result["kept"]["wikitext2_masked"]["value"] for result in found.values()]
    assert len(set(perplexities)) == 3  # the base model and two methods
    assert len(found) == 3
    trained = found["cola/dira_r2_lr0.01_seed42"]
    assert set(trained["test"]["metrics"]) == {"matthews"}
    assert len(trained["test"]["correct"]) == len(trained["test"]["losses"]) == 6
    assert trained["retention"] is None
    # The head is trained with every method, and starts alike with every one of a seed.
    first = [found[f"cola/{label}_r2_lr0.01_seed42"]["training"]["losses"][0][1] for label in ("lora", "dira")]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    with pytest.raises(ConfigError, match="Some tasks take another kind of model"):
        run_compare(replace(spec, tasks=["cola", str(place / "data" / "colour")]), apart=False)
    with pytest.raises(ConfigError, match="loss_on_prompts needs a causal language model"):
        run_compare(replace(spec, loss_on_prompts=True, output=str(tmp_path / "never")), apart=False)


def kept_data(folder: Path) -> Path:
    """A folder of benchmarks: yes or no, word problems, and text."""
    rows = [
        {"instruction": f"Is {n} odd?\n\nAnswer format: true/false", "output": "true", "answer": "true"}
        for n in range(3)
    ]
    (folder / "commonsense").mkdir(parents=True)
    tiny.write_jsonl(folder / "commonsense" / "boolq.dev.jsonl", rows)
    (folder / "math").mkdir()
    tiny.write_jsonl(folder / "math" / "gsm8k.test.jsonl", [{"question": "1 and 1?", "answer": "2\n#### 2"}])
    (folder / "text").mkdir()
    (folder / "text" / "wikitext2.test.txt").write_text("Some words of a text that goes on and on.\n" * 40)
    return folder


def test_measuring_over_time_changes_nothing_and_the_best_weights_are_put_back(place: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "data": str(kept_data(tmp_path)), "learning_rates": [3e-2], "seeds": 1, "steps": 6, "dropout": 0.2,
        "methods": ["lora", "pedyra"], "retention_tasks": ["boolq", "wikitext2"], "further_tasks": ["gsm8k"],
        "retention_items": 2, "retention": False, "factors": [1.0],
    }  # fmt: skip
    plain = results(run_compare(spec_of(place, "plain-time", **given), apart=False))
    comparison = run_compare(spec_of(place, "over-time", **given, over_time=True, measure_every=2), apart=False)
    measured = results(comparison)
    for name, result in measured.items():
        if "training" not in result:
            continue
        assert result["training"]["losses"] == plain[name]["training"]["losses"], name
        assert result["test"] == plain[name]["test"]
        points = result["over_time"]["points"]
        assert [point["step"] for point in points] == [2, 4, 6]
        assert points[-1]["loss"] == pytest.approx(result["test"]["loss"])
        assert points[-1]["kept"] == result["kept"]
        assert result["over_time"]["best_step"] is None
        assert {task: kept.get("further", False) for task, kept in result["kept"].items()} == {
            "boolq": False, "wikitext2": False, "gsm8k": True,
        }  # fmt: skip
    (task,) = comparison.grid.places
    (own,) = summaries.summaries(comparison).values()
    drawn = plots.plot_over_time(comparison, task, own)
    assert drawn is not None
    # None of GSM8K is answered at any time, and a line at zero says nothing.
    over_time = [result["over_time"]["points"] for result in measured.values() if "over_time" in result]
    assert {point["kept"]["gsm8k"]["value"] for points in over_time for point in points} == {0}
    labels = {axis.get_ylabel() for axis in drawn.axes}
    assert "accuracy, %" in labels
    assert "GSM8K, strict, %" not in labels
    # Weights of other steps, chosen by what a run was found to have there.
    for by in ("validation-loss", "held-out-accuracy", "further-task"):
        chosen = spec_of(place, f"best-{by}", **{**given, "methods": ["lora"]}, keep_best=by, measure_every=2)
        found = results(run_compare(chosen, apart=False))
        for name, result in found.items():
            if "training" not in result:
                continue
            scores = {point["step"]: point["score"] for point in result["over_time"]["points"]}
            best = min(scores, key=lambda step: (scores[step], step))
            assert result["over_time"]["best_step"] == best, (by, name)
            seen = {point["step"]: point for point in measured[name]["over_time"]["points"]}[best]
            assert result["test"]["loss"] == pytest.approx(seen["loss"], rel=1e-5), (by, name)
            if by == "validation-loss":
                assert result["validation"]["loss"] == pytest.approx(scores[best], rel=1e-5)
            elif by == "held-out-accuracy":
                assert result["test"]["accuracy"] == -scores[best]
            else:
                assert result["kept"]["gsm8k"]["value"] == -scores[best]


def test_what_a_method_did_is_kept_and_drawn(place: Path) -> None:
    spec = spec_of(
        place, "did", learning_rates=[3e-2], seeds=1, steps=6, retention=False, mask_layers=True, methods=["lora"],
        variants={
            "pe-dyra": {"method": "pedyra", "adjust_start": 2, "adjust_interval": 2, "adjust_end": 5, "adjust_size": 1,
                        "diagnostics": True},
            "dislora": {"method": "dislora", "tsd_count": 2},
        },
    )  # fmt: skip
    comparison = run_compare(spec, apart=False)
    assert comparison.failed == ()
    found = {name.split("/")[1].split("_")[0]: result for name, result in results(comparison).items()}
    assert found["lora"]["trajectory"] is None
    assert found["lora"]["training"]["metrics"] == []
    assert [row["step"] for row in found["dislora"]["training"]["metrics"]] == [1, 2, 3, 4, 5, 6]
    first = found["dislora"]["training"]["metrics"][0]
    assert first["dislora_task_weight"] + first["dislora_ortho_weight"] == pytest.approx(1)
    moved = found["pe-dyra"]["trajectory"]
    assert moved["steps"] == [2, 4]
    assert {sum(row) for row in moved["ranks"]} == {2 * len(moved["modules"])}
    assert len(moved["landscape"]) == len(moved["modules"])
    for label, result in found.items():
        if label == "base":
            assert "masked" not in result
            continue
        rows = result["masked"]
        assert [row["layer"] for row in rows] == [None, 0, 1]
        assert rows[0]["loss"] == pytest.approx(result["test"]["loss"], rel=1e-6)
        assert len({round(row["loss"], 6) for row in rows}) == 3
    (own,) = summaries.summaries(comparison).values()
    drawn = decisions.figures("colour", own, {one.label: one.method for one in comparison.grid.contestants})
    assert set(drawn) == {
        "metrics-pe-dyra-colour", "metrics-dislora-colour", "trajectory-pe-dyra-colour", "masked-colour",
    }  # fmt: skip
    assert all(figure is not None for figure, _ in drawn.values())
    report = (Path(spec.output) / "report.html").read_text(encoding="utf-8")
    assert "one layer masked to zero" in report


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep_best": "validation-loss", "validation": 0, "learning_rates": [1e-2]}, "no questions are set aside"),
        ({"keep_best": "loss"}, "keep_best is 'loss'; choose one of validation-loss"),
        ({"keep_best": "further-task"}, "further_tasks names none"),
        ({"measure_every": 2.5}, r"measure_every is 2\.5"),
        ({"retention_tasks": ["boolq"], "further_tasks": ["boolq"]}, "both name boolq"),
    ],
)
def test_a_choice_of_weights_that_cannot_be_is_told(
    place: Path, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_compare(spec_of(place, str(tmp_path / "never"), **given), apart=False)


def test_benchmarks_that_nothing_was_trained_for_show_what_was_kept(place: Path, tmp_path: Path) -> None:
    spec = spec_of(
        place, "kept", data=str(kept_data(tmp_path)), learning_rates=[3e-2], validation=0,
        retention_tasks=["boolq", "gsm8k", "wikitext2"], retention_items=2,
    )  # fmt: skip
    comparison = run_compare(spec, apart=False)
    assert comparison.failed == ()
    found = results(comparison)
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    words = transformers.AutoTokenizer.from_pretrained(place / "model")
    for name in spec.retention_tasks:
        own = measure(
            model,
            words,
            prepare(name, data=spec.data, limit=2),
            batch_size=spec.eval_batch_size,
            system="Say.",
            max_new_tokens=3,
        )
        base = found["colour/base"]["kept"][name]
        assert base["value"] == pytest.approx(own.scores[own.main].value, rel=1e-6)
        assert base["items"] == own.items == (1 if name == "gsm8k" else 2)
    after = {name: result["kept"]["wikitext2"]["value"] for name, result in found.items()}
    assert len(set(after.values())) == 5  # the base model, and two seeds of two methods
    (own,) = summaries.summaries(comparison).values()
    table = tables.kept_table(comparison, "colour", own)
    assert table is not None
    row = dict(zip(table.columns, table.text[1], strict=True))
    lora = statistics.fmean(after[f"colour/lora_r2_lr0.03_seed{seed}"] for seed in (42, 43))
    assert row["WikiText-2, perplexity"].startswith(f"{lora:.2f} ±")
    assert table.text[1][table.columns.index("WikiText-2, perplexity") + 1] == f"{lora - after['colour/base']:+.2f}"
    assert row["method"] == "lora"
    assert "mean" not in table.columns, "a perplexity is no share"
    rows = list(csv.DictReader((Path(spec.output) / "cells.csv").open()))
    assert {float(row["kept wikitext2"]) for row in rows} == set(after.values())
    assert "what was kept" in (Path(spec.output) / "report.html").read_text(encoding="utf-8")
    assert (Path(spec.output) / "plots" / "kept-colour.png").exists()
    with pytest.raises(RunFolderError, match="retention_tasks was"):
        run_compare(replace(spec, retention_tasks=["boolq"]), apart=False)


def test_several_shares_have_a_mean() -> None:
    kept = {"a": {"value": 0.5, "share": True}, "b": {"value": 0.25, "share": True}}
    assert summaries.kept_numbers({"kept": kept}) == {"a": 0.5, "b": 0.25, "mean": 0.375}
    assert summaries.kept_numbers({"kept": {"a": kept["a"]}}) == {"a": 0.5}
    assert summaries.kept_numbers({}) == {}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["wikitext2_masked"], "which the models of this comparison cannot do; name tasks of language models"),
        (["cola"], "cannot do"),
        (["humaneval"], "executes code that the model writes"),
        (["none_such"], "none_such"),
    ],
)
def test_what_cannot_show_what_was_kept_is_refused_before_anything_runs(
    place: Path, tmp_path: Path, names: list[str], said: str
) -> None:
    data = kept_data(tmp_path)
    (data / "glue").mkdir()
    tiny.write_jsonl(data / "glue" / "cola.dev.jsonl", [{"text": "A text.", "label": 1}])
    with pytest.raises(ConfigError, match=said):
        run_compare(spec_of(place, "refused", data=str(data), retention_tasks=names), apart=False)
    assert not (place / "refused").exists()


def test_methods_of_all_kinds_are_matched_and_those_that_change_the_base_are_measured_against_it(place: Path) -> None:
    methods = ["lora", "dora", "disel", "adalora", "pissa", "full"]
    spec = spec_of(place, "kinds", methods=methods, learning_rates=[1e-2], seeds=1, steps=8, r=4)
    done = run_compare(spec, apart=False)
    assert done.failed == ()
    aim = done.grid.contestants[0].parameters
    assert aim is not None
    for own in done.grid.contestants:
        found = done.grid.result(done.grid.cell(spec.tasks[0], own, 1e-2, 42))
        assert found is not None
        assert found["training"]["trainable_parameters"] == own.parameters, "what is printed is what is trained"
        assert own.label == "full" or abs(found["training"]["trainable_parameters"] / aim - 1) <= 0.02
        assert found["retention"]["own text"]["kl"] > 1e-6, own.label
        assert (found["landscape"] is None) == (own.label in ("pissa", "full"))
    # A step of 1e-2 changes all weights a lot more than it changes those of an adapter.
    kl = {one.label: one.kl["own text"].value for one in summaries.summaries(done)["colour"]}
    assert kl["full"] > kl["lora"] > kl["adalora"]
    table = tables.plan_table(done.grid.contestants)
    ranks = {row[0]: row[2] for row in table.rows}
    assert ranks["full"] is None
    assert ranks["lora"] == "4"
    assert ranks["dora"] == "3 to 4"


@pytest.fixture(scope="module")
def wide(place: Path) -> str:
    """A model whose layers are as wide as a block of 4-bit weights at least."""
    pytest.importorskip("bitsandbytes")
    return str(tiny.saved_model(place / "wide", width=64))


def test_variants_on_quantised_weights_are_measured_against_the_base_as_it_is(place: Path, wide: str) -> None:
    # So small a rate leaves an adapter at its start: what is left is what quantisation does.
    variants = {
        "qlora": {"method": "lora", "quantization": "4bit"},
        "qdira": {"method": "dira", "quantization": "8bit"},
    }
    spec = spec_of(
        place, "quantised", methods=["lora"], variants=variants, learning_rates=[1e-9], seeds=1, steps=2,
        texts=[f"lines={place / 'text.txt'}"], model=wide,
    )  # fmt: skip
    done = run_compare(spec, apart=False)
    assert done.failed == ()
    found = {own.label: done.grid.result(done.grid.cell(spec.tasks[0], own, 1e-9, 42)) for own in done.grid.contestants}
    plain, four = (load_model(spec.model, quantization=how) for how in (None, "4bit"))
    words = load_tokenizer(spec.model)
    texts = {
        "own text": own_text(plain, words),
        "lines": given_text(load_named_text(spec.texts[0], "texts")[1], words, max_length=MONITORED_LENGTH),
    }
    for name, text in texts.items():
        kept = {label: result["retention"][name] for label, result in found.items() if result is not None}
        assert {own["tokens"] for own in kept.values()} == {text.tokens}
        assert kept["lora"]["kl"] == pytest.approx(0, abs=1e-7)
        assert kept["qlora"]["kl"] == pytest.approx(retention(four, text, base=plain).kl, rel=1e-4)
        assert kept["qlora"]["kl"] > kept["qdira"]["kl"] > 1e-6
    table = tables.plan_table(done.grid.contestants)
    assert [row[table.columns.index("base weights")] for row in table.rows] == [None, "4bit", "8bit"]


def test_a_comparison_may_be_quantised_as_a_whole(place: Path, wide: str) -> None:
    given = {"model": wide, "methods": ["lora"], "learning_rates": [1e-9], "seeds": 1, "steps": 2}
    plain, four = (
        run_compare(spec_of(place, f"whole-{how}", quantization=how, **given), apart=False) for how in (None, "4bit")
    )
    first, second = (one.grid.result(one.grid.base(one.grid.spec.tasks[0])) for one in (plain, four))
    assert first is not None
    assert second is not None
    assert abs(first["test"]["loss"] - second["test"]["loss"]) > 1e-4
    (own,) = four.grid.contestants
    result = four.grid.result(four.grid.cell(four.grid.spec.tasks[0], own, 1e-9, 42))
    assert result is not None
    assert result["retention"]["own text"]["kl"] == pytest.approx(0, abs=1e-7)
    with pytest.raises(RunFolderError, match="quantization was '4bit', now None"):
        run_compare(spec_of(place, "whole-4bit", **given), apart=False)


def test_a_missing_library_is_told_before_anything_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise ImportError("No package metadata was found for bitsandbytes")

    monkeypatch.setattr(transformers, "BitsAndBytesConfig", missing)
    spec = spec_of(place, "missing", variants={"qlora": {"method": "lora", "quantization": "4bit"}})
    with pytest.raises(ConfigError, match=r"'4bit' needs a library .* pip install 'dynalora\[quant\]'"):
        run_compare(spec, apart=False)
    assert not (place / "missing").exists()


# --- statistics ---------------------------------------------------------------------------------------------------


def test_one_run_is_the_paired_t_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    first, second = [0.3, 1.2, 0.7, 2.0, 1.1], [0.1, 1.0, 0.9, 1.4, 0.6]
    found, known = crossed_difference([first], [second]), stats.ttest_rel(second, first)
    interval = known.confidence_interval(0.95)
    assert found.p == pytest.approx(known.pvalue, rel=1e-6)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-6)


@given(st.integers(2, 4), st.integers(2, 6), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_runs_and_items_both_count_as_drawn(runs: int, items: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(runs, items, generator=generator, dtype=torch.float64) for _ in range(2))
    apart = second - first
    found = crossed_difference(first.tolist(), second.tolist())
    variance = apart.mean(1).var() / runs + apart.mean(0).var() / items
    assert found.value == pytest.approx(float(apart.mean()))
    assert found.high - found.value == pytest.approx(found.value - found.low)
    assert found.high - found.value >= 1.95 * float(variance.sqrt())
    back = crossed_difference(second.tolist(), first.tolist())
    assert (back.value, back.p) == pytest.approx((-found.value, found.p))


def test_intervals_over_runs_and_items_cover_the_truth() -> None:
    generator = torch.Generator().manual_seed(0)
    hits, trials = 0, 400
    for _ in range(trials):
        by_run = 0.3 * torch.randn(3, 1, generator=generator)
        by_item = torch.randn(1, 20, generator=generator)
        apart = 0.5 + by_run + by_item + 0.5 * torch.randn(3, 20, generator=generator)
        found = crossed_difference(torch.zeros(3, 20).tolist(), apart.tolist())
        hits += found.low <= 0.5 <= found.high
    assert 0.93 <= hits / trials <= 1.0


def test_differences_want_the_same_runs_and_items() -> None:
    with pytest.raises(DataError, match="Paired comparison of 1 and 2 runs"):
        crossed_difference([[1.0, 2.0]], [[1.0, 2.0], [1.0, 2.0]])
    with pytest.raises(DataError, match="at least two"):
        crossed_difference([[1.0]], [[2.0]])
    same = crossed_difference([[1.0, 2.0]], [[1.0, 2.0]])
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_p_values_are_adjusted_for_their_number() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


# --- tables -------------------------------------------------------------------------------------------------------


def test_tables_in_markdown_and_latex() -> None:
    table = Table(["method", "a|b"], [["lora_1", "50 % ± 2"], ["disel & co", "60 %"]], title="t", note="n")
    assert markdown_table(table).splitlines() == [
        "**t**", "", "| method | a\\|b |", "| --- | ---: |", "| lora_1 | 50 % ± 2 |", "| disel & co | 60 % |", "", "n",
    ]  # fmt: skip
    text = latex_table(table)
    assert r"lora\_1 & 50 \% $\pm$ 2 \\" in text
    assert r"disel \& co & 60 \% \\" in text
    assert text.startswith("% t\n% n\n\\begin{tabular}{lr}")


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tasks": []}, "tasks is empty"),
        ({"methods": ["lora", "lora"]}, "methods names lora twice"),
        ({"methods": ["lora", "doora"]}, "Unknown method 'doora'"),
        ({"reference": "dora"}, "The reference 'dora' is not among what is compared"),
        ({"variants": {"x": {"gate_bias_init": 1}}}, "The variant 'x' does not say its method"),
        ({"variants": {"lora": {"method": "dira"}}}, "the name of a method and of a variant"),
        ({"variants": {"a/b": {"method": "dira"}}}, "becomes a file name"),
        ({"variants": {"base": {"method": "dira"}}}, "becomes a file name"),
        ({"variants": {"x": {"method": "dira", "penaltyweight": 1}}}, "has no option 'penaltyweight'"),
        ({"variants": {"x": {"method": "dira", "learning_rates": [0.0]}}}, "learning rates of 'x'"),
        ({"learning_rates": [-1.0]}, "learning_rates is -1.0; give more than 0"),
        ({"validation": 0}, "validation is 0, and there are several learning rates"),
        ({"texts": ["nothing"]}, "write it as NAME=SOURCE"),
        ({"texts": ["a=b", "a=c"]}, "uses a name twice"),
        ({"jobs": 0}, "jobs is 0"),
        ({"quantization": "2bit"}, "quantization is '2bit'; choose one of 4bit, 8bit, int8"),
        ({"variants": {"x": {"method": "lora", "quantization": 4}}}, "quantization is '4'; choose one of 4bit"),
        ({"variants": {"x": {"method": "full", "quantization": "4bit"}}}, "'x' trains all weights, and quantised"),
        ({"seeds": 0}, "seeds is 0"),
        ({"epochs": 2}, "steps is 4 and epochs is 2; give one of them"),
        ({"template": "alpacca"}, "template is 'alpacca'; choose one of chat, none, alpaca"),
    ],
)  # fmt: skip
def test_wrong_settings_are_told_before_anything_is_read(place: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        spec_of(place, "wrong", **more)


def test_folders_of_something_else_are_left_alone(place: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(RunFolderError, match="is not empty and holds no comparison"):
        run_compare(replace(spec_of(place, "x"), output=str(tmp_path)), apart=False)
    (tmp_path / "config.yaml").write_text("method: disel\n", encoding="utf-8")
    with pytest.raises(RunFolderError, match="holds another kind of run"):
        run_compare(replace(spec_of(place, "x"), output=str(tmp_path)), apart=False)
    with pytest.raises(RunFolderError, match="is a file"):
        run_compare(replace(spec_of(place, "x"), output=str(tmp_path / "notes.txt")), apart=False)


def test_variants_on_the_command_line() -> None:
    assert variant_from("small=lora,r=4,learning_rates=1e-4/1e-3") == (
        "small", {"method": "lora", "r": 4, "learning_rates": ["1e-4", "1e-3"]},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="not of the form LABEL=METHOD"):
        variant_from("lora")
    with pytest.raises(ConfigError, match="not of the form LABEL=METHOD"):
        variant_from("small=r=4")


def test_equal_tasks_get_places_of_their_own(place: Path) -> None:
    task = spec_of(place, "x").load_task(str(place / "data" / "colour"))
    found = planning.task_places({"a": task, "b": replace(task, name="colour"), "c": replace(task, name="a/b: c")})
    assert list(found.values()) == ["colour", "colour-2", "a-b-c"]


def test_the_command_runs_a_comparison(place: Path, done: Comparison, program: Program) -> None:
    folder = done.grid.store.folder
    shown = program("compare", "--config", str(folder / "config.yaml"), "--methods", "lora,dira", "--seeds", "2")
    assert shown.code == 0
    assert "− lora" in shown.out
    assert "Report:" in shown.out
    wrong = program("compare", "--config", str(folder / "config.yaml"), "--variant", "x=dyra")
    assert wrong.code == 2
    assert "Unknown method 'dyra'" in wrong.err


def test_cells_hold_what_their_numbers_depend_on(done: Comparison) -> None:
    for cell in done.grid.known():
        content = json.loads(done.grid.store.file(cell).read_text(encoding="utf-8"))
        assert content["cell"] == json.loads(json.dumps(asdict(cell)))
        assert content["settings"]["steps"] == 4
        assert "output" not in content["settings"]


def test_many_methods_are_told_apart_without_lines() -> None:
    looks = [drawing.look(index) for index in range(20)]
    assert len({(look.color, look.marker) for look in looks}) == len(looks)
