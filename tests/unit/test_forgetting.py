"""Three stages, recovery and transfer from end to end, on a model of a few kilobytes and tasks of a few questions."""

from __future__ import annotations

import csv
import gzip
import json
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from dynalora.common.statistics import Interval, mean_interval, t_quantile
from dynalora.drawing.comparison import plot_bars, plot_transfer
from dynalora.drawing.landscape import plot_stages
from dynalora.drawing.style import OVER_PICTURES, rendered
from dynalora.errors import CheckpointError, ConfigError, RunFolderError
from dynalora.forgetting.landscape import LandscapeRow
from dynalora.jobs.stages.forgetting import STAGES, run_forgetting
from dynalora.jobs.stages.recovery import comparison_table, recovery_figures, run_recovery
from dynalora.jobs.stages.settings import ForgettingSpec, RecoverSpec, TransferSpec
from dynalora.jobs.stages.stage_files import read_landscape
from dynalora.jobs.stages.transfer import run_transfer
from dynalora.lab.lab_settings import LabSettings
from dynalora.lab.models import load_model, load_tokenizer
from dynalora.lab.run_folder import read_metrics
from dynalora.lab.scores import mean_accuracy, mean_loss
from dynalora.lab.settings import settings_from
from dynalora.lab.tasks.loading import load_experiment_task
from dynalora.lab.training.best import KeepBest
from dynalora.lab.units import UnitStore
from dynalora.lab.workbench import Workbench

from . import tiny
from .program import Program

COLOURS = ("red", "blue", "green")


def write_tasks(folder: Path) -> Path:
    """Multiple choice in `folder/colour.*`, word problems in `folder/sums/`."""
    (folder / "sums").mkdir(parents=True)
    for split, first, count in (("train", 0, 12), ("dev", 20, 4)):
        rows = [
            {
                "instruction": f"Please choose: Colour {n}?\n\nAnswer1: red Answer2: blue Answer3: green\n\n"
                "Answer format: answer1/answer2/answer3",
                "answer": f"answer{n % 3 + 1}",
            }
            for n in range(first, first + count)
        ]
        with gzip.open(folder / f"colour.{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    for split, first, count in (("train", 0, 12), ("test", 20, 4)):
        tiny.write_jsonl(
            folder / "sums" / f"{split}.jsonl",
            [
                {"question": f"{n} and 1?", "answer": f"<<{n}+1={n + 1}>>It is {n + 1}\n#### {n + 1}"}
                for n in range(first, first + count)
            ],
        )
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forgetting")
    tiny.saved_model(folder / "model")
    write_tasks(folder / "data")
    return folder


def common(place: Path) -> dict[str, Any]:
    return {
        "model": str(place / "model"), "generated": 2, "generated_tokens": 3, "held_out": 4, "system": "Say.",
    }  # fmt: skip


def spec_of(place: Path, output: str, **more: Any) -> ForgettingSpec:
    given = {
        "task_a": str(place / "data" / "colour"), "task_b": str(place / "data" / "sums"),
        "output": str(place / output), "r": 3, "steps": 2, "steps_b": 3, "batch_size": 2, "learning_rate": 1e-2,
        "target_modules": "q_proj,v_proj", "tau": 0.02, **common(place), **more,
    }  # fmt: skip
    return settings_from(ForgettingSpec, given)


@pytest.fixture(scope="module")
def ran(place: Path) -> tuple[list[dict[str, Any]], Path]:
    """One run of two seeds with ablation."""
    return run_forgetting(spec_of(place, "run", seeds=2, ablation=True)), place / "run"


# --- stages -----------------------------------------------------------------------------------------------


def test_every_stage_is_kept_with_its_scores(ran: Any) -> None:
    results, folder = ran
    assert [(done["seed"], done["stage"]) for done in results] == [
        (None, "base"),
        *((seed, stage) for seed in (42, 43) for stage in STAGES),
    ]
    for done in results[1:]:
        stage = folder / f"seed-{done['seed']}" / done["stage"]
        assert json.loads((stage / "result.json").read_text()) == done
        assert (stage / "adapter" / "adapter_model.safetensors").is_file()
        rows = read_landscape(stage)
        assert len(rows) == done["matrices"] == 4
        low = [row for row in rows if sum(value > 0.02 for value in row.singular_values) <= 1]
        assert done["low_rank_matrices"] == len(low)
        assert done["nuclear_norm"] == pytest.approx(sum(sum(row.singular_values) for row in rows))
        assert len(done["scores"]["a"]["correct"]) == 4, "option likelihood answers all"
        assert len(done["scores"]["b"]["correct"]) == 2, "two were to be generated"
        assert done["scores"]["b"]["questions"] == 4
    assert [done["steps"] for done in results[1:4]] == [2, 3, 2]
    losses = [done["scores"]["a"]["loss"] for done in results]
    assert len(set(losses)) == len(losses), "two stages are the same model"


def test_stages_follow_each_other(ran: Any, place: Path) -> None:
    """Stage B's adapter measured again gives its scores; its training began where stage A ended."""
    results, folder = ran
    lab = Workbench(LabSettings(**common(place)), [str(place / "data" / "colour"), str(place / "data" / "sums")])
    model = lab.attach(folder / "seed-42" / "interference" / "adapter")
    again = lab.measure(model, "again")
    stage = next(done for done in results if done["stage"] == "interference")
    assert again[str(place / "data" / "sums")].loss.value == pytest.approx(stage["scores"]["b"]["loss"])
    lab.take_off(model)
    first, second = (read_landscape(folder / "seed-42" / name) for name in ("initial", "interference"))
    assert all(0 < a.nuclear_norm != b.nuclear_norm for a, b in zip(first, second, strict=True))
    logged = [record for record in read_metrics(folder) if record.get("stage") == "interference"]
    assert [r["step"] for r in logged if r["seed"] == 42 and "learning_rate" in r] == [1, 2, 3]


def test_a_stage_may_end_with_its_best_weights(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"validation": 3, "keep_best": "validation-loss", "measure_every": 1, "steps": 3, "steps_b": 3}
    considered: list[tuple[int, float]] = []
    real = KeepBest.consider

    def consider(self: KeepBest, model: Any, step: int, score: float) -> None:
        # As if the loss had been lowest after the second step.
        considered.append((step, score))
        real(self, model, step, abs(step - 2) + score / 1000)

    monkeypatch.setattr(KeepBest, "consider", consider)
    results = run_forgetting(spec_of(place, "best", **given))
    assert [result.get("best_step") for result in results] == [None, 2, 2, 2]
    assert [step for step, _ in considered] == [1, 2, 3] * 3
    task = load_experiment_task(str(place / "data" / "colour"), held_out=common(place)["held_out"])
    aside = task.validation(3, seed=0)[1]
    base = load_model(str(place / "model"), dtype="float32")
    saved = PeftModel.from_pretrained(base, str(place / "best" / "seed-42" / "initial" / "adapter"))
    how = spec_of(place, "best", **given).measuring
    assert aside.measure(saved, load_tokenizer(str(place / "model")), how).loss.value == pytest.approx(
        considered[1][1], rel=1e-5
    )
    with pytest.raises(ConfigError, match="no questions are set aside"):
        spec_of(place, "never", keep_best="validation-loss")


def test_ablation_is_measured_after_task_a(ran: Any) -> None:
    results, _ = ran
    first = next(done for done in results if done["stage"] == "initial")
    base, whole = results[0]["scores"]["a"]["loss"], first["scores"]["a"]["loss"]
    front, back = (first["ablation"][half]["a"]["loss"] for half in ("front", "back"))
    assert len({base, whole, front, back}) == 4
    assert all("ablation" not in done for done in results if done["stage"] != "initial")


def test_the_run_folder_has_everything(ran: Any) -> None:
    results, folder = ran
    for name in ("rank_landscape", "nuclear_norm", "accuracy", "loss"):
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        xml.etree.ElementTree.parse(folder / "plots" / f"{name}.svg")
    page = (folder / "report.html").read_text(encoding="utf-8")
    for told in ("Task B (interference)", "Spectral energy", "Ablation", "colour", "sums"):
        assert told in page
    assert page.count("data:image/svg+xml") == 4
    rows = list(csv.DictReader((folder / "stages.csv").open()))
    assert len(rows) == 2 * len(results)
    assert float(rows[2]["loss"]) == results[1]["scores"]["a"]["loss"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("method", ["dira", "lora"])
def test_a_killed_run_goes_on_with_the_stage_that_is_missing(
    method: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(place, f"killed-{method}", method=method)
    trained: list[str] = []
    train = Workbench.train

    def until_b(self: Workbench, *arguments: Any, label: str, **more: Any) -> Any:
        if len(trained) == 1:
            raise Killed
        trained.append(label)
        return train(self, *arguments, label=label, **more)

    monkeypatch.setattr(Workbench, "train", until_b)
    with pytest.raises(Killed):
        run_forgetting(spec)
    # As a kill in the middle of writing leaves it.
    (Path(spec.output) / "seed-42" / ".interference.x.tmp").mkdir()
    kept = {file: file.stat().st_mtime_ns for file in Path(spec.output).rglob("initial/**/*")}
    assert kept

    def noted(self: Workbench, *arguments: Any, label: str, **more: Any) -> Any:
        trained.append(label)
        return train(self, *arguments, label=label, **more)

    monkeypatch.setattr(Workbench, "train", noted)
    with pytest.raises(RunFolderError, match="already holds a run"):
        run_forgetting(spec)
    with pytest.raises(RunFolderError, match="other settings"):
        run_forgetting(replace(spec, resume=True, steps=5))
    resumed = run_forgetting(replace(spec, resume=True))
    assert trained == [f"seed 42, Task {stage}" for stage in ("A (initial)", "B (interference)", "A (recovered)")]
    assert kept == {file: file.stat().st_mtime_ns for file in kept}, "a finished stage was written again"
    whole = run_forgetting(replace(spec, output=f"{spec.output}-whole"))
    for one, other in zip(resumed, whole, strict=True):
        assert one["scores"] == other["scores"], one["stage"]
    with pytest.raises(RunFolderError, match="finished"):
        run_forgetting(replace(spec, resume=True))


def test_a_stage_that_was_killed_before_its_scores_were_written_is_run_again(
    ran: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(place, "unscored", seeds=2, ablation=True)
    write = UnitStore.write

    def dying(self: Any, unit: Any, result: Any) -> Any:
        if unit.name.endswith("interference"):
            raise Killed
        return write(self, unit, result)

    with monkeypatch.context() as patched:
        patched.setattr(UnitStore, "write", dying)
        with pytest.raises(Killed):
            run_forgetting(spec)
    stage = Path(spec.output) / "seed-42" / "interference"
    assert (stage / "adapter").is_dir()
    assert not (stage / "result.json").exists()

    def dying_later(self: Any, unit: Any, result: Any) -> Any:
        write(self, unit, result)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(UnitStore, "write", dying_later)
        with pytest.raises(Killed):
            run_forgetting(replace(spec, resume=True))
    with open(Path(spec.output) / "metrics.jsonl", "a", encoding="utf-8") as metrics:
        metrics.write('{"run": "seed-42/interf')  # the kill was in the middle of its record
    results, output = ran
    resumed = run_forgetting(replace(spec, resume=True))
    assert [result["scores"] for result in resumed] == [result["scores"] for result in results]

    def recorded(folder: Path) -> list[dict[str, Any]]:
        return [{key: row[key] for key in row if "seconds" not in key} for row in read_metrics(folder)]

    assert recorded(Path(spec.output)) == recorded(output)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": 0}, "seeds is 0"),
        ({"steps_b": 0}, "steps_b is 0"),
        ({"steps": None}, "steps is missing"),
        ({"tau": -1.0}, r"tau is -1\.0"),
        ({"held_out": 0}, "held_out is 0"),
        ({"eval_every": 5}, "eval_every is 5, and this experiment does not use it"),
        ({"task_b": "same", "task_a": "same"}, "two different tasks"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(place: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_of(place, "never", **given)


def test_starts_that_edit_base_weights_are_refused(place: Path) -> None:
    spec = spec_of(place, "never", method="lora", method_options={"init_lora_weights": "pissa"})
    with pytest.raises(ConfigError, match="'pissa' edits the base weights"):
        run_forgetting(spec)
    assert not Path(spec.output).exists()


# --- recovery ---------------------------------------------------------------------------------------------


def telling_tau(source: Path) -> float:
    """A threshold at which about half of the matrices of the first seed have effective rank 0 or 1."""
    second = sorted(row.singular_values[1] for row in read_landscape(source / "seed-42" / "initial"))
    return (second[1] + second[2]) / 2


@pytest.fixture(scope="module")
def recovered(ran: Any, place: Path) -> tuple[list[dict[str, Any]], Path]:
    _, source = ran
    spec = RecoverSpec(
        source=str(source), output=str(place / "recovery"), seeds=2, examples=3, batch_size=2, tau=telling_tau(source),
        learning_rate=1e-3,
    )  # fmt: skip
    return run_recovery(spec), place / "recovery"


def test_every_strategy_is_run_from_every_checkpoint(recovered: Any, ran: Any) -> None:
    results, folder = recovered
    units = [(done["checkpoint"], done["strategy"], done["seed"]) for done in results]
    strategies = [(strategy, seed) for seed in (0, 1) for strategy in ("rlgr", "random", "naive")]
    assert units == [(name, *unit) for name in ("seed-42", "seed-43") for unit in [("before", None), *strategies]]
    _, source = ran
    for done in results:
        rows = read_landscape(source / done["checkpoint"] / "initial")
        low = [r.module for r in rows if sum(value > telling_tau(source) for value in r.singular_values) <= 1]
        if done["strategy"] == "rlgr":
            assert done["modules"] == low
        assert done["zeroed"] == (len(low) if done["strategy"] in ("rlgr", "random") else 0)
        # 3 examples in batches of 2, twice
        assert len(done["losses"]) == (0 if done["seed"] is None else 4)
    assert any(0 < done["zeroed"] < done["matrices"] for done in results), "the test distinguishes nothing"
    assert len(list(csv.DictReader((folder / "recovery.csv").open()))) == 2 * len(results)


def test_recovery_starts_from_the_checkpoint_after_task_b(recovered: Any, ran: Any) -> None:
    results, _ = recovered
    stages, _ = ran
    for done in (done for done in results if done["strategy"] == "before"):
        stage = next(
            s for s in stages
            if s["stage"] == "interference" and f"seed-{s['seed']}" == done["checkpoint"]
        )  # fmt: skip
        assert done["scores"]["a"]["loss"] == pytest.approx(stage["scores"]["a"]["loss"])
        assert done["scores"]["b"]["loss"] == pytest.approx(stage["scores"]["b"]["loss"])


def test_recovery_is_reported(recovered: Any) -> None:
    results, folder = recovered
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "RLGR − naive" in page
    for name in ("recovery_accuracy", "recovery_loss"):
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / "plots" / f"{name}.svg").is_file()
    table = comparison_table(results)
    assert table is not None
    losses = {(d["strategy"], d["checkpoint"], d["seed"]): d["scores"]["a"]["loss"] for d in results}
    pairs = [
        losses["rlgr", checkpoint, seed] - losses["naive", checkpoint, seed]
        for checkpoint in ("seed-42", "seed-43") for seed in (0, 1)
    ]  # fmt: skip
    row = next(row for row in table.rows if row[0] == "RLGR − naive")
    assert str(row[2]).startswith(f"{sum(pairs) / 4:+.4f} (")
    assert row[-1] == 4


def test_a_killed_recovery_goes_on(recovered: Any, ran: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dynalora.jobs.stages.recovery as module

    whole, _ = recovered
    _, source = ran
    spec = RecoverSpec(
        source=str(source), output=str(place / "recovery-killed"), seeds=2, examples=3, batch_size=2,
        tau=telling_tau(source), learning_rate=1e-3,
    )  # fmt: skip
    calls: list[str] = []
    recover = module.recover

    def dying(*arguments: Any, strategy: str, **more: Any) -> Any:
        calls.append(strategy)
        if len(calls) == 3:
            raise Killed
        return recover(*arguments, strategy=strategy, **more)

    monkeypatch.setattr(module, "recover", dying)
    with pytest.raises(Killed):
        run_recovery(spec)
    resumed = run_recovery(replace(spec, resume=True))
    assert len(calls) == 12 + 1, "what was there was run again"
    assert [done["scores"] for done in resumed] == [done["scores"] for done in whole]


def test_recovery_of_a_named_adapter_says_what_it_lacks(ran: Any, place: Path) -> None:
    _, source = ran
    adapter = str(source / "seed-42" / "interference")
    spec = RecoverSpec(source=adapter, output=str(place / "named"))
    with pytest.raises(ConfigError, match="initial is missing"):
        run_recovery(spec)
    given = {"task_a": str(place / "data/colour"), "task_b": str(place / "data/sums")}
    spec = replace(
        spec, initial=str(source / "seed-42" / "initial"), strategies=["naive"], seeds=1, examples=2, **given,
        **common(place),
    )  # fmt: skip
    before, after = run_recovery(spec)
    assert (before["strategy"], after["strategy"]) == ("before", "naive")
    assert before["scores"]["a"]["loss"] != after["scores"]["a"]["loss"]


def test_a_source_without_task_b_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("task_a: x\ntask_b: y\n")
    with pytest.raises(CheckpointError, match="has finished Task B"):
        run_recovery(RecoverSpec(source=str(tmp_path), output=str(tmp_path / "out")))
    with pytest.raises(ConfigError, match="strategies is 'best'"):
        RecoverSpec(source="x", output="y", strategies=["best"])


# --- transfer ---------------------------------------------------------------------------------------------


def test_transfer_fills_the_matrix_and_goes_on_where_it_was_killed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [str(place / "data" / "colour"), str(place / "data" / "sums")]
    spec = TransferSpec(
        tasks=tasks, output=str(place / "transfer"), r=2, steps=2, batch_size=2, learning_rate=1e-2,
        target_modules="q_proj", method_options={"dira.penalty_weight": "1e-2"}, **common(place),
    )  # fmt: skip
    assert spec.config("dira").penalty_weight == 0.01
    trained: list[str] = []
    train = Workbench.train

    def dying(self: Workbench, *arguments: Any, label: str, **more: Any) -> Any:
        trained.append(label)
        if len(trained) == 3:
            raise Killed
        return train(self, *arguments, label=label, **more)

    monkeypatch.setattr(Workbench, "train", dying)
    with pytest.raises(Killed):
        run_transfer(spec)
    results = run_transfer(replace(spec, resume=True))
    assert len(trained) == 4 + 1
    cells = [(done["method"], done["task"]) for done in results]
    assert cells == [("base", None), *((method, task) for method in ("lora", "dira") for task in tasks)]
    assert all(set(done["scores"]) == set(tasks) for done in results)
    assert len({done["scores"][tasks[0]]["loss"] for done in results}) == 5
    folder = Path(spec.output)
    assert len(list(csv.DictReader((folder / "transfer.csv").open()))) == 10
    for name in ("transfer_accuracy", "transfer_loss"):
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / "plots" / f"{name}.svg").is_file()
    assert "no training" in (folder / "report.html").read_text(encoding="utf-8")


def test_transfer_refuses_what_cannot_be(place: Path) -> None:
    with pytest.raises(ConfigError, match="name at least 2"):
        TransferSpec(tasks=["chain_sum"], output="x")
    with pytest.raises(ConfigError, match=r"'pedyra\.r' belongs to none of lora, dira"):
        TransferSpec(tasks=["a", "b"], output="x", method_options={"pedyra.r": 1})


# --- the commands -----------------------------------------------------------------------------------------


def test_the_commands_from_end_to_end(place: Path, tmp_path: Path, program: Program) -> None:
    output = tmp_path / "run"
    measuring = ["--held-out", "3", "--generated", "0", "--threads", "1"]
    shown = program(
        "forgetting", "--task-a", str(place / "data" / "colour"), "--task-b", str(place / "data" / "sums"),
        "-o", str(output), "-m", str(place / "model"), "--method", "dira", "-O", "penalty_weight=1e-3", "-r", "2",
        "-t", "q_proj", "--steps", "1", "-b", "2", "--lr", "1e-2", "--tau", "0.01", *measuring,
    )  # fmt: skip
    assert shown.code == 0, shown.err
    assert "Task A (recovered), seed 42: colour" in shown.out
    assert f"Report: {output / 'report.html'}" in shown.out
    # Nothing was generated, so there is no accuracy on the word problems, and nothing claims one.
    assert json.loads((output / "base" / "result.json").read_text())["scores"]["b"]["accuracy"] is None
    again = program("forgetting", "--config", str(output / "config.yaml"), "--resume")
    assert again.code == 2
    assert "has finished" in again.err
    shown = program(
        "recover", str(output), "-o", str(tmp_path / "recovery"), "-n", "2", "--seeds", "1", "--tau", "0.01",
        "--strategies", "rlgr,naive", "--lr", "1e-3",
    )  # fmt: skip
    assert shown.code == 0, shown.err
    assert "RLGR − naive" in shown.out
    assert "before recovery" in shown.out
    shown = program(
        "transfer", "--task", str(place / "data" / "colour"), "--task", str(place / "data" / "sums"), "--methods",
        "dira", "-o", str(tmp_path / "transfer"), "-m", str(place / "model"), "-r", "2", "-t", "q_proj", "--steps",
        "1", "-b", "2", *measuring,
    )  # fmt: skip
    assert shown.code == 0, shown.err
    assert "Transfer with dira" in shown.out


def test_an_unknown_task_is_told_before_the_model_is_loaded(place: Path, program: Program) -> None:
    shown = program("forgetting", "--task-a", "no/such", "--task-b", "x/y", "-o", "out", "-m", "none")
    assert shown.code == 2
    assert "The task 'no/such' has no file 'no/such.train.jsonl'" in shown.err


# --- numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.7062047), (2, 4.3026527), (3, 3.1824463), (4, 2.7764451), (9, 2.2621572), (30, 2.0422725)],
)
def test_students_t_has_its_tabulated_quantiles(degrees: int, expected: float) -> None:
    assert t_quantile(0.975, degrees) == pytest.approx(expected, abs=1e-7)


def test_means_over_seeds_have_students_interval() -> None:
    values = [0.2, 0.5, 0.3]
    half = 4.3026527 * torch.tensor(values).std().item() / 3**0.5
    found = mean_interval(values)
    assert (found.value, found.high - found.value) == (pytest.approx(1 / 3), pytest.approx(half))
    assert mean_interval([2.0]) == Interval(2.0, 2.0, 2.0)
    records = [{"accuracy": v, "correct": [1, 0], "loss": v, "loss_error": 0.1} for v in values]
    inside = mean_accuracy(records)
    assert inside is not None
    assert half > 1 / 3  # so the interval is cut at 0
    assert (inside.low, inside.high) == (0.0, pytest.approx(1 / 3 + half))
    assert mean_loss(records[:1]) == Interval(0.2, pytest.approx(0.2 - 0.1959963985), pytest.approx(0.2 + 0.1959963985))
    assert mean_accuracy([{**records[0], "accuracy": None}]) is None


# --- plots ------------------------------------------------------------------------------------------------


def row(layer: int, kind: str, rank: int, norm: float) -> LandscapeRow:
    return LandscapeRow(f"layers.{layer}.{kind}", layer, kind, 4, rank, norm, 1.0, (norm,))


def test_stages_are_drawn_as_one_line_each_per_kind_of_module() -> None:
    first = [[row(n, kind, n + seed, 1.0) for kind in ("q", "v") for n in range(3)] for seed in (0, 2)]
    second = [[row(n, kind, 4, 2.0) for kind in ("q", "v") for n in range(3)]]
    drawn = plot_stages({"A": first, "B": second}, "effective_rank", label="effective rank", title="T")
    axes = {axis.get_title(): axis for axis in drawn.axes if axis.get_visible()}
    assert set(axes) == {"q", "v"}
    lines = {line.get_label(): line for line in axes["q"].lines}
    assert list(lines["A"].get_ydata()) == [1, 2, 3]  # means over the two seeds
    assert list(lines["B"].get_ydata()) == [4, 4, 4]
    # Told apart without colour.
    assert lines["A"].get_linestyle() != lines["B"].get_linestyle()
    assert lines["A"].get_marker() != lines["B"].get_marker()
    (band,) = axes["q"].collections
    assert band.get_paths()[0].vertices[:, 1].min() == 0  # the lowest seed
    assert axes["q"].get_xlabel() == "layer"
    assert axes["q"].get_ylabel() == "effective rank"
    assert drawn.get_suptitle() == "T"


def test_bars_are_drawn_with_their_intervals_and_lines() -> None:
    bars = {"A": {"RLGR": Interval(80.0, 78.0, 82.0), "naive": None}, "B": {"RLGR": Interval(5.0, 5.0, 5.0)}}
    drawn = plot_bars(bars, label="accuracy, %", title="T", lines={"A": {"before": 12.0}})
    first, second = drawn.axes
    assert [patch.get_height() for patch in first.patches] == [80.0]
    assert [label.get_text() for label in first.get_xticklabels()] == ["RLGR", "naive"]
    texts = [text.get_text() for text in first.texts]
    assert texts == ["80.0", "not measured"]
    (segments,) = [collection.get_segments() for collection in first.collections if len(collection.get_segments())]
    assert [list(segment[:, 1]) for segment in segments] == [[78.0, 82.0]]
    assert [list(line.get_ydata()) for line in first.lines if line.get_label() == "before"] == [[12.0, 12.0]]
    assert not second.collections, "an interval of no width is none"
    hatches = {patch.get_hatch() for patch in plot_bars(
        {"A": {name: Interval(1, 0, 2) for name in "abc"}}, label="", title=""
    ).axes[0].patches}  # fmt: skip
    assert len(hatches) == 3


def test_heat_maps_share_one_scale_and_darker_is_better() -> None:
    numbers = {"lora": [[90.0, 10.0], [None, 50.0]], "dira": [[80.0, 20.0], [30.0, 40.0]]}
    for better in (True, False):
        drawn = plot_transfer(numbers, ["x", "y"], ["x", "y"], label="accuracy, %", title="T", larger_is_better=better)
        left, right = drawn.axes[:2]
        assert (left.get_title(), right.get_title()) == ("lora", "dira")
        assert left.images[0].get_clim() == right.images[0].get_clim() == (10.0, 90.0)
        assert [text.get_text() for text in left.texts] == ["90.0", "10.0", "–", "50.0"]
        shades = left.images[0].to_rgba([90.0, 10.0])[:, 0]
        assert (shades[0] < shades[1]) == better
        # White on dark, black on light.
        colours = [text.get_color() for text in left.texts][:2]
        assert colours == [OVER_PICTURES[name] for name in (("white", "black") if better else ("black", "white"))]
        assert left.get_xlabel() == "measured on"
        assert drawn.axes[-1].get_ylabel() == "accuracy, %"


def test_svg_is_the_same_for_the_same_figure() -> None:
    made = [plot_bars({"A": {"x": Interval(1, 0, 2)}}, label="l", title="t") for _ in range(2)]
    first, second = (rendered(drawn, "svg") for drawn in made)
    assert first == second
    assert b"<svg" in first


def test_recovery_figures_show_strategies_and_what_they_started_from(recovered: Any) -> None:
    results, _ = recovered
    drawn, _ = recovery_figures(results, {"a": "colour", "b": "sums"}, [results[0]["scores"]])["recovery_loss"]
    first, _ = drawn.axes
    assert [label.get_text() for label in first.get_xticklabels()] == ["RLGR", "random", "naive"]
    mean = sum(d["scores"]["a"]["loss"] for d in results if d["strategy"] == "naive") / 4
    assert first.patches[2].get_height() == pytest.approx(mean)
    assert {line.get_label() for line in first.lines if not line.get_label().startswith("_")} == {
        "before recovery", "after Task A",
    }  # fmt: skip
