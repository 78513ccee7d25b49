"""`dynalora trim`: the adapter it writes, the curve beside it, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dynalora.forgetting.retention import retention
from dynalora.forgetting.texts import own_text
from dynalora.forgetting.trim import smallest_near_best
from dynalora.jobs.finetune.run import finetune
from dynalora.jobs.finetune.settings import FinetuneSpec
from dynalora.lab.adapters import base_tokenizer, load_adapter

from . import tiny
from .program import Program


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned DISeL adapter that has forgotten something."""
    place = tmp_path_factory.mktemp("trim")
    tiny.saved_model(place / "model")
    rows = tiny.write_jsonl(place / "rows.jsonl", tiny.rows(24))
    (place / "text.txt").write_text("One line of text.\n\nAnother line of it.\n", encoding="utf-8")
    finetune(
        FinetuneSpec(
            model=str(place / "model"), data=str(rows), output=str(place / "run"), steps=20, batch_size=4, r=2,
            learning_rate=5e-2, eval_fraction=0.25, retention=False, method_options={"gate_bias_init": 1.0},
        )
    )  # fmt: skip
    return place / "run"


def kl_of(adapter: Path) -> float:
    model = load_adapter(str(adapter))
    words = base_tokenizer(str(adapter), None)
    return retention(model, own_text(model, words)).kl


def test_the_written_adapter_is_within_the_bound_and_has_its_curve(run: Path, tmp_path: Path, program: Program) -> None:
    bound = 0.3 * kl_of(run)
    shown = program("trim", str(run), str(tmp_path / "out"), "--max-kl", f"{bound}", "--factors", "1,0.5,0.25")
    assert shown.code == 0, shown.err
    kl = kl_of(tmp_path / "out")
    assert 0.8 * bound < kl <= bound * (1 + 1e-5)
    content = json.loads((tmp_path / "out" / "trim.json").read_text())
    points = {point["factor"]: point for point in content["points"]}
    assert set(points) >= {1.0, 0.5, 0.25, content["factor"]}
    assert 0 < content["factor"] < 1
    assert points[1.0]["kl"] == pytest.approx(bound / 0.3, rel=1e-4)
    assert points[content["factor"]]["kl"] == pytest.approx(kl, rel=1e-3)
    # The run's held-out data give the loss of the adapter as trained.
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [record["held_out_loss"] for record in metrics if "held_out_loss" in record][-1]
    assert points[1.0]["loss"] == pytest.approx(trained, rel=1e-4)
    with (tmp_path / "out" / "trim.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(points)
    assert (tmp_path / "out" / "trim.png").read_bytes().startswith(b"\x89PNG")
    assert "(taken)" in shown.out
    assert f"dynalora evaluate {tmp_path / 'out'}" in shown.out.replace("\n", "")


def test_every_text_is_kept_within_the_bound(run: Path, tmp_path: Path, program: Program) -> None:
    lines = f"lines={run.parent / 'text.txt'}"
    bound = 0.3 * kl_of(run)
    shown = program(
        "trim", str(run / "adapter"), str(tmp_path / "out"), "--max-kl", f"{bound}", "--text", lines, "--factors", "1"
    )  # fmt: skip
    assert shown.code == 0, shown.err
    content = json.loads((tmp_path / "out" / "trim.json").read_text())
    at_end = {}
    for point in content["points"]:
        if point["factor"] == pytest.approx(content["factor"]):
            at_end[point["text"]] = point["kl"]
        assert point["loss"] is None  # an adapter's folder names no data
    assert at_end["lines"] <= bound
    assert kl_of(tmp_path / "out") <= bound * (1 + 1e-5)


def test_what_cannot_be_done_is_said_and_nothing_is_overwritten(run: Path, tmp_path: Path, program: Program) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    shown = program("trim", str(run), str(tmp_path / "full"), "--max-kl", "0.1")
    assert shown.code == 2
    assert "is not an empty folder; give another place" in shown.err.replace("\n", " ")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["mine.txt"]
    for flags, why in (
        (["--max-kl", "0"], "--max-kl"),
        (["--max-kl", "0.1", "--factors", "1,0"], "factors"),
        ([], "--max-kl"),
        (["--max-kl", "0.1", "--factor", "0.5"], "one of --max-kl"),
        (["--factor", "2"], "factor"),
        (["--max-kl", "0.1", "--text", "own text=x"], "uses a name twice"),
    ):
        shown = program("trim", str(run), str(tmp_path / "new"), *flags)
        assert shown.code == 2
        assert why in shown.err.replace("\n", " ")
    assert not (tmp_path / "new").exists()


def test_a_factor_may_be_given_instead_of_a_bound(run: Path, tmp_path: Path, program: Program) -> None:
    shown = program("trim", str(run), str(tmp_path / "out"), "--factor", "0.5", "--factors", "0.25", "--no-loss")
    assert shown.code == 0, shown.err
    content = json.loads((tmp_path / "out" / "trim.json").read_text())
    points = {point["factor"]: point for point in content["points"]}
    assert set(points) == {1.0, 0.5, 0.25}
    assert {point["loss"] for point in points.values()} == {None}
    assert kl_of(tmp_path / "out") == pytest.approx(points[0.5]["kl"], rel=1e-3)
    assert points[1.0]["kl"] == pytest.approx(kl_of(run), rel=1e-3)


def test_a_run_says_which_factor_it_would_take(run: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = dict(
        model=str(run.parent / "model"), data=str(run.parent / "rows.jsonl"), steps=20, batch_size=4, r=2,
        learning_rate=5e-2, eval_fraction=0.25, monitor_every=0, method_options={"gate_bias_init": 1.0},
    )  # fmt: skip
    console = Console(file=io.StringIO(), width=200)
    result = finetune(FinetuneSpec(output=str(tmp_path / "run"), **given), console=console)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (curve,) = (record["scaled"] for record in records if "scaled" in record)
    points = {point["factor"]: point for point in curve}
    assert list(points) == [1.0, 0.7, 0.5, 0.35, 0.25]
    assert points[1.0]["loss"] == pytest.approx(result.held_out_after)
    best = min(point["loss"] for point in curve)
    taken = min(factor for factor, point in points.items() if point["loss"] <= 1.01 * best)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "If less is to be forgotten" in page
    assert f"{taken:g} (taken)" in page
    assert (tmp_path / "run" / "plots" / "scaled.png").exists()
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    if taken == 1.0:
        assert "would cost more than 1 %" in shown
    else:
        assert f"OUTPUT --factor {taken:g}" in shown.replace("\n", "")
    # The adapter that was saved and returned is the one that was trained.
    assert load_adapter(str(tmp_path / "run")).peft_config["default"].alpha == result.model.peft_config["default"].alpha
    finetune(FinetuneSpec(output=str(tmp_path / "off"), scaled=False, **given))
    assert "scaled" not in (tmp_path / "off" / "metrics.jsonl").read_text()


def test_the_smallest_factor_near_the_lowest_loss() -> None:
    assert smallest_near_best({1.0: 2.0, 0.5: 1.99, 0.25: 2.02}) == 0.5
    assert smallest_near_best({1.0: 2.0, 0.5: 1.99, 0.25: 2.005}) == 0.25
    assert smallest_near_best({1.0: 2.0, 0.5: 2.5}) == 1.0


def test_data_that_are_gone_leave_the_curve_without_loss(
    run: Path, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = run.parent / "rows.jsonl"
    content = rows.read_bytes()
    rows.unlink()
    try:
        shown = program("trim", str(run), str(tmp_path / "out"), "--max-kl", "0.1", "--factors", "1")
    finally:
        rows.write_bytes(content)
    assert shown.code == 0, shown.err
    assert "held-out loss is not measured" in shown.out.replace("\n", " ")
    points: list[dict[str, Any]] = json.loads((tmp_path / "out" / "trim.json").read_text())["points"]
    assert {point["loss"] for point in points} == {None}
    assert torch.isfinite(torch.tensor([point["kl"] for point in points])).all()
