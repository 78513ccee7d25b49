"""benchmarks/compaction.py from end to end on a tiny model."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import load_script

from . import benchmark_files, tiny

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "compaction.py"


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("benchmarks/compaction.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = benchmark_files.write(tmp_path_factory.mktemp("data"))
    for split in ("train", "dev"):
        target = folder / "commonsense" / f"ARC-Easy.{split}.jsonl.gz"
        if not target.exists():
            source = folder / "commonsense" / f"ARC-Easy.{split}.jsonl"
            target.write_bytes(gzip.compress(source.read_bytes()))
    return folder


def call(script: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["compaction.py", *map(str, arguments)])
    code: int = script.main()
    return code


def test_from_training_to_the_table(
    script: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = tiny.saved_model(tmp_path / "model"), tmp_path / "results"
    given = (
        "--model", model, "--data", data, "--output", output, "--penalty-weight", 1, "--steps", 6, "--lr", 0.05,
        "--r", 3, "--batch-size", 2, "--thresholds", "0,0.5", "--texts", 2, "--rounds", 2, "--length", 6,
        "--questions", 3,
    )  # fmt: skip
    assert call(script, monkeypatch, *given) == 0
    (file,) = output.glob("*.json")
    result = json.loads(file.read_text())
    whole, exact, half = result["variants"]
    assert [one["threshold"] for one in result["variants"]] == [None, 0.0, 0.5]
    # Exactly zero is nothing here, so threshold 0 is the adapter as it was.
    assert exact["parameters"] == whole["parameters"]
    assert exact["held_out_loss"] == pytest.approx(whole["held_out_loss"], rel=1e-5)
    assert exact["kl"] == pytest.approx(whole["kl"], rel=1e-3, abs=1e-6)
    assert half["removed"] == whole["rank"] - half["rank"] > 0
    assert half["parameters"] < whole["parameters"]
    assert half["file_bytes"] < whole["file_bytes"]
    # AdamW keeps two numbers per parameter, and a float32 step count per tensor.
    tensors = 2 * result["matrices"]
    for one in result["variants"]:
        assert one["optimizer_bytes"] == 8 * one["parameters"] + 4 * tensors
        assert len(one["step_seconds"]) == 2
    assert whole["step_ratio"] == 1.0

    made = file.stat().st_mtime_ns
    assert call(script, monkeypatch, *given) == 0
    assert file.stat().st_mtime_ns == made
    assert "there already" in capsys.readouterr().out
    assert call(script, monkeypatch, *given, "--lr", 0.01) == 1
    assert "was made with another lr" in capsys.readouterr().out

    assert call(script, monkeypatch, "--output", output, "--table") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("| 1 | 0 |")]) == 3
    assert f"{half['parameters']:,}" in "\n".join(lines)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--thresholds", "1.5", "--thresholds has 1.5; give shares"),
        ("--seeds", "a", "--seeds is 'a'; give numbers"),
        ("--rounds", "0", "--rounds is 0; give a whole number"),
    ],
)
def test_wrong_settings_are_named(
    flag: str,
    value: str,
    message: str,
    script: Any,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(script, monkeypatch, "--data", data, "--output", tmp_path, flag, value) == 2
    assert message in capsys.readouterr().out
