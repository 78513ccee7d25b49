"""A run ends early where its held-out loss falls no more, resumed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dynalora.errors import ConfigError
from dynalora.jobs.finetune.run import finetune
from dynalora.jobs.finetune.settings import FinetuneSpec
from dynalora.lab.training import train
from tests.unit import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("early")
    tiny.saved_model(place / "model")
    tiny.write_jsonl(place / "rows.jsonl", tiny.rows(24))
    return place


def spec_of(place: Path, output: Path, **given: Any) -> FinetuneSpec:
    wanted = {"r": 2, "batch_size": 4, "steps": 12, "eval_every": 2, "eval_fraction": 0.25, "method": "dira", **given}
    more = {"retention": False, "samples": 0, "learning_rate": 1e-3, "schedule": "constant_with_warmup"}
    return FinetuneSpec(
        model=str(place / "model"), data=str(place / "rows.jsonl"), output=str(output), **{**more, **wanted}
    )


def held_out(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> list[float]:
    """Let the held-out loss be these values, one after the other."""
    left = list(losses)
    monkeypatch.setattr(train, "held_out_loss", lambda *_, **__: left.pop(0))
    return left


@pytest.mark.parametrize(
    ("losses", "patience", "steps"),
    [
        ([5.0, 4.0, 3.0, 3.0, 3.5, 3.1, 3.1], 2, 8),
        ([5.0, 4.0, 4.5, 3.0, 3.5, 2.0, 1.0], 2, 12),
        ([5.0, 6.0], 1, 2),
        ([5.0, 6.0, 6.0, 6.0, 6.0, 6.0, 6.0], None, 12),
    ],
)
def test_a_run_ends_after_so_many_measurements_without_a_new_lowest(
    losses: list[float], patience: int | None, steps: int, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out(monkeypatch, losses)
    result = finetune(spec_of(place, tmp_path / "run", early_stopping=patience))
    assert result.steps == steps
    assert result.stopped is (steps < 12)
    assert ("The run was stopped there" in (tmp_path / "run" / "report.html").read_text()) is result.stopped
    assert result.held_out_after == losses[steps // 2]


def test_the_best_weights_are_put_back(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out(monkeypatch, [5.0, 3.0, 4.0, 4.0, 3.0])
    result = finetune(spec_of(place, tmp_path / "run", early_stopping=2, keep_best=True))
    assert (result.steps, result.best_step) == (6, 2)


def test_a_killed_run_counts_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: Any, **__: Any) -> float:
        if not losses:
            raise KeyboardInterrupt
        return losses.pop(0)

    losses = [5.0, 3.0, 4.0]
    monkeypatch.setattr(train, "held_out_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        finetune(spec_of(place, tmp_path / "run", early_stopping=2, save_every=2))
    losses = [4.0]
    result = finetune(spec_of(place, tmp_path / "run", early_stopping=2, save_every=2, resume=True))
    assert result.steps == 6


@pytest.mark.parametrize("given", [{"eval_fraction": 0.0}, {"eval_every": 0}])
def test_without_a_held_out_loss_it_is_refused(given: dict[str, Any], place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="early_stopping goes by the held-out loss"):
        spec_of(place, tmp_path / "run", early_stopping=2, **given)
