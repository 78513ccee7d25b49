"""Runs as curves over factors of their update: what cells measure, what is chosen, and what frontiers say."""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynalora.adapter.layer import AdapterLayer
from dynalora.errors import ConfigError
from dynalora.jobs.compare import cell as compare_cell
from dynalora.jobs.compare import frontiers, plots, summaries, tables
from dynalora.jobs.compare.frontiers import compare_scaled, frontier, kl_at, log_ratio, loss_at, taken_point
from dynalora.jobs.compare.grid import Comparison
from dynalora.jobs.compare.run import run_compare
from dynalora.jobs.compare.settings import CompareSpec
from dynalora.lab.baselines import corda_config
from dynalora.lab.scaling import interpolated, scalable

from . import tiny
from .test_forgetting import write_tasks

FACTORS = [1.0, 0.5, 0.25]
METHODS = {
    "lora": {"method": "lora"},
    "decayed": {"method": "lora", "weight_decay": 5.0},
    "mlp": {"method": "lora", "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "kept": {"method": "dira", "retain": 3000.0},
    "disel": {"method": "disel", "match_step": False},  # the learning rate is as large as it is for the others
    "dora": {"method": "dora"},
    "pissa": {"method": "pissa"},
    "corda": {"method": "lora", "init_lora_weights": "corda"},
    "full": {"method": "full"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frontiers")
    tiny.saved_model(folder / "model")
    write_tasks(folder / "data")
    return folder


def spec_of(place: Path, output: str, **more: Any) -> CompareSpec:
    values: dict[str, Any] = {
        "tasks": [str(place / "data" / "colour")], "output": str(place / output), "model": str(place / "model"),
        "methods": [], "variants": METHODS, "learning_rates": [3e-2], "seeds": 1, "steps": 6, "r": 4, "batch_size": 2,
        "held_out": 4, "generated": 0, "validation": 3, "factors": FACTORS,
    }  # fmt: skip
    return CompareSpec(**{**values, **more})


@pytest.fixture(scope="module")
def done(place: Path) -> Comparison:
    """One run of every kind of method."""
    comparison = run_compare(spec_of(place, "done"), apart=False)
    assert comparison.failed == ()
    return comparison


def result_of(comparison: Comparison, label: str, rate: float = 3e-2, seed: int = 42) -> dict[str, Any]:
    grid = comparison.grid
    contestant = next(entry for entry in grid.contestants if entry.label == label)
    result = grid.result(grid.cell(grid.spec.tasks[0], contestant, rate, seed))
    assert result is not None
    return result


@pytest.mark.parametrize("label", METHODS)
def test_a_cell_measures_its_run_at_every_factor(done: Comparison, label: str) -> None:
    result = result_of(done, label)
    curve = {point["factor"]: point for point in result["curve"]}
    assert list(curve) == FACTORS
    assert curve[1.0]["test"]["loss"] == result["test"]["loss"]
    assert curve[1.0]["kl"]["own text"]["kl"] == result["retention"]["own text"]["kl"]
    kl = [curve[factor]["kl"]["own text"]["kl"] for factor in FACTORS]
    assert kl[0] > kl[1] > kl[2] > 0
    # For small updates KL grows with the square of the factor; these are not small, but between 1 and 3 powers of it.
    assert 1 < math.log2(kl[1] / kl[2]) < 3
    assert {point["validation"]["loss"] for point in curve.values()} != {result["validation"]["loss"]}
    assert all(len(point["test"]["losses"]) == 4 for point in curve.values())
    assert result["change"]["norm"] > 0
    assert result["change"]["prompts_kl"] > 0


def test_a_variant_may_keep_the_base_model_and_decay_its_weights(done: Comparison) -> None:
    assert result_of(done, "kept")["configuration"]["retain"] == 3000.0
    norms = {label: result_of(done, label)["change"]["norm"] for label in ("lora", "decayed", "kept")}
    assert norms["decayed"] < 0.9 * norms["lora"]
    kl = {label: result_of(done, label)["retention"]["own text"]["kl"] for label in ("lora", "kept")}
    assert kl["kept"] < kl["lora"]
    assert result_of(done, "decayed")["cell"]["weight_decay"] == 5.0


def test_cordas_start_keeps_the_base_models_knowledge(done: Comparison) -> None:
    result = result_of(done, "corda")
    assert "kpm" in str(result["configuration"]["corda_config"])
    assert result["landscape"] is None  # it edits the base weights
    with pytest.raises(ConfigError, match="corda_config"):
        corda_config({"mode": "kpm"})


def test_interpolated_weights_are_between_the_base_models_and_the_tuned_ones() -> None:
    base, tuned = tiny.model(300), tiny.model(300)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = {name: value.clone() for name, value in tuned.state_dict().items()}
    expected = {name: 0.75 * value + 0.25 * before[name] for name, value in base.state_dict().items()}
    with interpolated(tuned, base, 0.25) as model:
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, expected[name])
    assert all(torch.equal(value, before[name]) for name, value in tuned.state_dict().items())
    ready = scalable(tuned, base, lambda: base)
    assert ready is not None
    change = sum(float((value - base.state_dict()[name]).square().sum()) for name, value in before.items())
    assert ready.norm == pytest.approx(math.sqrt(change), rel=1e-5)


def test_the_norm_of_an_adapter_is_that_of_its_update(place: Path) -> None:
    import peft

    import dynalora

    model = peft.get_peft_model(tiny.model(300), dynalora.DiraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    squares = [
        float(module.get_delta_weight("default").square().sum())
        for module in model.modules()
        if isinstance(module, AdapterLayer)
    ]
    ready = scalable(model, None, lambda: pytest.fail("the base model is in the adapted one"))
    assert ready is not None
    assert ready.norm == pytest.approx(math.sqrt(sum(squares)), rel=1e-4)


def test_no_curve_where_it_is_not_asked_for(place: Path) -> None:
    spec = spec_of(place, "plain", variants={"lora": {"method": "lora"}}, factors=[])
    comparison = run_compare(spec, apart=False)
    assert [point["factor"] for point in result_of(comparison, "lora")["curve"]] == [1.0]
    of_task = summaries.summaries(comparison)["colour"]
    assert tables.scaled_tables(comparison, "colour", of_task) == []
    assert plots.plot_scaled(comparison, spec.tasks[0], "own text") is None
    with pytest.raises(ConfigError, match="factors is"):
        spec_of(place, "plain", factors=[0.0])


def test_cells_from_before_curves_have_one_point(place: Path, done: Comparison, tmp_path: Path) -> None:
    result = dict(result_of(done, "lora"))
    del result["curve"]
    assert frontiers.points_of(result, "own text") == [
        (1.0, result["test"]["loss"], result["retention"]["own text"]["kl"])
    ]
    assert taken_point(result, "own text")[0] == 1.0
    found = compare_scaled({0: result}, {0: result}, "own text", 9.0)
    assert found is not None
    assert found.at_loss_ratio is not None
    assert found.at_loss_ratio.value == pytest.approx(1)


def test_a_rate_may_be_chosen_by_its_best_factor(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"variants": {"lora": {"method": "lora"}}, "learning_rates": [1e-2, 3e-2], "seeds": 1}
    comparison = run_compare(spec_of(place, "chosen", **given), apart=False)
    grid = comparison.grid
    task, contestant = grid.spec.tasks[0], grid.contestants[0]
    for rate, plain, scaled in ((1e-2, 2.0, 1.9), (3e-2, 3.0, 1.0)):
        file = grid.store.file(grid.cell(task, contestant, rate, 42))
        content = json.loads(file.read_text())
        content["validation"]["loss"] = content["curve"][0]["validation"]["loss"] = plain
        for point in content["curve"][1:]:
            point["validation"]["loss"] = scaled
        file.write_text(json.dumps(content))
    monkeypatch.delattr(compare_cell._Run, "run")  # nothing is run
    rates = {
        choose: run_compare(spec_of(place, "chosen", choose=choose, **given), apart=False).grid.chosen_rate(
            task, contestant
        )
        for choose in ("as-trained", "best-factor")
    }
    assert rates == {"as-trained": 1e-2, "best-factor": 3e-2}


def test_tables_plots_and_files_show_the_curves(done: Comparison) -> None:
    of_task = summaries.summaries(done)["colour"]
    (table,) = tables.scaled_tables(done, "colour", of_task)
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert list(rows) == list(METHODS)
    assert rows["lora"]["/ lora, scaled"] == "1.000"
    assert rows["lora"]["KL / lora, scaled, over all losses"] == "1.000"
    result = tables.result_table(done, "colour", of_task)
    assert {"KL, task's prompts", "‖ΔW‖_F"} <= set(result.columns)
    drawn = plots.plot_scaled(done, done.grid.spec.tasks[0], "own text")
    assert drawn is not None
    lines = {line.get_label(): line for line in drawn.axes[0].get_lines() if len(line.get_xdata()) > 1}
    assert set(lines) == set(METHODS)
    points = frontiers.points_of(result_of(done, "full"), "own text")
    assert list(lines["full"].get_xdata()) == pytest.approx([kl for *_, kl in points])
    folder = done.grid.store.folder
    with (folder / "curves.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(METHODS) * len(FACTORS)
    assert (folder / "plots" / "scaled-colour.png").exists()


# --- frontiers ----------------------------------------------------------------------------------------------------

CURVE = [(2.0, 0.36), (1.8, 0.16), (2.4, 0.04), (5.0, 0.0)]


def test_a_frontier_leaves_out_what_is_worse_in_both() -> None:
    assert frontier(CURVE) == [(5.0, 0.0), (2.4, 0.04), (1.8, 0.16)]
    assert frontier([(math.nan, 0.1), (2.0, math.inf)]) == []
    assert frontier([(2.0, -1e-9), (3.0, 0.0)]) == [(2.0, 0.0)]


def test_kl_and_loss_are_read_between_the_points() -> None:
    front = frontier(CURVE)
    assert kl_at(front, 2.4) == pytest.approx(0.04)
    assert kl_at(front, 2.1) == pytest.approx(0.3**2)  # halfway from √0.04 to √0.16
    assert kl_at(front, 1.7) is None
    assert kl_at(front, 9.0) == 0
    assert loss_at(front, 0.3**2) == pytest.approx(2.1)
    assert loss_at(front, 1.0) == 1.8
    assert loss_at([(2.0, 0.1)], 0.05) is None
    assert kl_at([(2.0, 0.1)], 2.5) == 0.1


@given(st.lists(st.tuples(st.floats(1, 5), st.floats(0.001, 2)), min_size=1, max_size=8))
@settings(deadline=None)
def test_a_frontier_falls_and_no_point_is_below_it(points: list[tuple[float, float]]) -> None:
    front = frontier(points)
    assert all(first[0] > second[0] and first[1] < second[1] for first, second in itertools.pairwise(front))
    for loss, kl in points:
        at = kl_at(front, loss)
        assert at is not None
        # √KL is linear between neighbours, so a point above the chord may be cut off, but none is below the frontier.
        assert any(other[0] <= loss and other[1] <= kl for other in front)


def test_the_area_between_frontiers_is_the_mean_ratio_of_kl() -> None:
    front = frontier(CURVE)
    third = [(loss, kl / 3) for loss, kl in front]
    assert log_ratio(third, front, 5.0) == pytest.approx(math.log(1 / 3))
    assert log_ratio(front, third, 2.4) == pytest.approx(math.log(3))
    assert log_ratio([(1.0, 0.1)], [(3.0, 0.1), (2.0, 0.2)], 9.0) is None


def run_with(losses: list[float], kl: list[float], validation: list[float] | None = None) -> dict[str, Any]:
    curve = [
        {"factor": factor, "test": {"loss": loss}, "kl": {"t": {"kl": distance}}}
        | ({"validation": {"loss": validation[place]}} if validation else {})
        for place, (factor, loss, distance) in enumerate(zip(FACTORS, losses, kl, strict=True))
    ]
    return {"curve": curve, "test": {"loss": losses[0]}, "retention": {"t": {"kl": kl[0]}}}


def test_methods_are_compared_seed_by_seed() -> None:
    reference = {seed: run_with([2.0 + shift, 2.2, 3.0], [0.4, 0.1, 0.02]) for seed, shift in ((0, 0.0), (1, 0.1))}
    better = {
        seed: run_with([2.0 + shift, 2.2, 3.0], [0.1, 0.025, 0.005]) for seed, shift in ((0, 0.0), (1, 0.1), (7, 0.0))
    }
    found = compare_scaled(better, reference, "t", 5.0)
    assert found is not None
    assert (found.seeds, found.reached) == (2, 2)
    for ratio in (found.at_loss_ratio, found.own_ratio, found.area):
        assert ratio is not None
        assert ratio.value == pytest.approx(0.25)
        assert ratio.low == pytest.approx(ratio.high)  # the seeds differ, their ratios do not
    assert found.at_kl is not None
    assert found.at_kl.value == pytest.approx(0)
    # A method that only one seed brings to the reference's loss has no mean that would be the lucky seed's.
    found = compare_scaled({0: better[0], 1: run_with([2.5, 2.6, 3.0], [0.1, 0.02, 0.01])}, reference, "t", 5.0)
    assert found is not None
    assert (found.at_loss, found.reached) == (None, 1)


def test_the_smallest_factor_near_the_best_validation_loss_is_taken() -> None:
    run = run_with([2.0, 2.2, 3.0], [0.4, 0.1, 0.02], validation=[2.01, 2.0, 2.015])
    assert taken_point(run, "t") == (0.25, 3.0, 0.02)
    run = run_with([2.0, 2.2, 3.0], [0.4, 0.1, 0.02], validation=[2.01, 2.0, 2.03])
    assert taken_point(run, "t") == (0.5, 2.2, 0.1)
