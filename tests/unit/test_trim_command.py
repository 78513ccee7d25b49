"""`dynalora trim`: the adapter it writes, the curve beside it, and what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dynalora.forgetting.retention import retention
from dynalora.forgetting.texts import own_text
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


def test_the_written_adapter_is_within_the_bound_and_has_its_curve(
    run: Path, tmp_path: Path, program: Program
) -> None:
    bound = 0.3 * kl_of(run)
    shown = program(
        "trim", str(run), str(tmp_path / "out"), "--max-kl", f"{bound}", "--factors", "1,0.5,0.25"
    )
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


def test_what_cannot_be_done_is_said_and_nothing_is_overwritten(
    run: Path, tmp_path: Path, program: Program
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    shown = program("trim", str(run), str(tmp_path / "full"), "--max-kl", "0.1")
    assert shown.code == 2
    assert "choose another output folder" in shown.err.replace("\n", " ")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["mine.txt"]
    for flags, why in (
        (["--max-kl", "0"], "max_kl"),
        (["--max-kl", "0.1", "--factors", "1,0"], "factors"),
        (["--max-kl", "0.1", "--text", "own text=x"], "uses a name twice"),
    ):
        shown = program("trim", str(run), str(tmp_path / "new"), *flags)
        assert shown.code == 2
        assert why in shown.err.replace("\n", " ")
    assert not (tmp_path / "new").exists()


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
