"""benchmarks/budget.py from end to end on a tiny model, and the settings of experiments/."""

from __future__ import annotations

import argparse
import gzip
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dynalora.jobs.compare.settings import CompareSpec
from dynalora.lab.settings import read_yaml, settings_from
from tests.scripts import load_script

from . import benchmark_files, tiny

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = sorted([*ROOT.glob("experiments/compare/*.yaml"), *ROOT.glob("experiments/same_learning/*.yaml")])


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("benchmarks/budget.py")


def test_a_run_becomes_smaller_and_is_compared(script: Any, tmp_path: Path) -> None:
    data = benchmark_files.write(tmp_path / "data")
    for split in ("train", "dev"):
        target = data / "commonsense" / f"ARC-Easy.{split}.jsonl.gz"
        if not target.exists():
            target.write_bytes(gzip.compress(target.with_suffix("").read_bytes()))
    arguments = argparse.Namespace(
        data=data, model=str(tiny.saved_model(tmp_path / "model")), r=4, target_rank=2.0, steps=20, batch_size=2,
        length=10_000, lr=1e-2, questions=2, rounds=2, seed=0, threads=1,
    )  # fmt: skip
    screen = io.StringIO()
    result = script.main(arguments, Console(file=screen, width=200))
    for name, run in result["runs"].items():
        assert [tenth["step"] for tenth in run["tenths"]] == list(range(2, 21, 2))
        assert sum(run["ranks"]) == 2 * len(run["ranks"]), name
        assert f"{name}: held-out loss {run['held_out']:.4f}" in screen.getvalue()
    proximal, uniform = (result["runs"][name]["tenths"] for name in ("proximal", "uniform"))
    assert proximal[-1]["rank"] == uniform[0]["rank"] == 2
    assert proximal[-1]["bytes"] < proximal[0]["bytes"]
    assert result["turns"]["bytes"]["at the end"] < result["turns"]["bytes"]["at the start"]


@pytest.mark.parametrize("path", SETTINGS, ids=[f"{path.parent.name}/{path.name}" for path in SETTINGS])
def test_an_experiments_settings_can_be_run(path: Path) -> None:
    values = {"tasks": ["arc_easy"], "output": "runs/x", **read_yaml(path)}
    spec = settings_from(CompareSpec, values)
    for contestant in spec.contestants():
        contestant.config("SEQ_CLS" if path.name in ("minilm.yaml", "ranks.yaml") else "CAUSAL_LM")


def test_runs_with_a_budget_of_forgetting_can_be_shared_out_and_fixed() -> None:
    script = load_script("benchmarks/forgetting_budget.py")
    runs = script.plan(6, 0)
    assert runs[:4] == script.plan(4, 0)  # so that another process can go on behind the first four
    assert [run["method"] for run in runs[:4]] == list(script.METHODS)
    fixed = script.fixed_settings("method=dira,rate=5e-3,r=8")
    assert fixed == {"method": "dira", "rate": 5e-3, "r": 8}
    assert all(run | fixed == run for run in script.plan(3, 0, fixed))
    for wrong in ("method=qlora", "rank=8", "r"):
        with pytest.raises(argparse.ArgumentTypeError, match="give NAME=VALUE with method, budget"):
            script.fixed_settings(wrong)
