"""Which checkpoints a killed run goes on from, and that it takes no more steps than it was asked for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dynalora.lab.run_folder import RunFolder
from dynalora.lab.training.checkpoints import last_checkpoint
from dynalora.lab.training.settings import TrainSettings
from dynalora.lab.training.train import TrainResult, train_adapter
from tests.unit import tiny
from tests.unit.test_baselines import compared_config, tokenized

METHODS = ["dira", "disel", "dislora", "pedyra", "lora", "p-tuning", "full"]


def trained(folder: Path, method: str = "dira", *, resume: bool = False) -> TrainResult:
    tokenizer, rows = tokenized()
    settings = TrainSettings(steps=6, batch_size=2, save_every=2, learning_rate=5e-3)
    with RunFolder.create(folder, {"method": method}, resume=resume) as run:  # never finished, as after a kill
        config = compared_config(method, r=2)
        return train_adapter(tiny.model(len(tokenizer)), tokenizer, config, rows, settings=settings, run=run)


def same(one: Any, other: Any) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_after_its_last_step_trains_no_further(method: str, tmp_path: Path) -> None:
    whole = trained(tmp_path / "run", method)
    for _ in range(2):
        again = trained(tmp_path / "run", method, resume=True)
        assert again.steps == 6
        assert same(again.model, whole.model)
        assert last_checkpoint(tmp_path / "run" / "checkpoints").name == "checkpoint-6"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, trained(folder).model


PARTS = ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


@pytest.mark.parametrize("how", ["missing", "cut", "empty", "flipped"])
@pytest.mark.parametrize("part", PARTS)
def test_the_older_whole_checkpoint_is_taken_and_that_is_said(
    part: str, how: str, whole: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, model = whole
    run = Path(shutil.copytree(folder, tmp_path / "run"))
    file = run / "checkpoints" / "checkpoint-6" / part
    content = bytearray(file.read_bytes())
    if how == "flipped":
        if part.endswith(("json", "safetensors")):
            pytest.skip("has no check sum")
        for place in range(0, len(content), 50):  # some of it is padding
            content[place] ^= 0xFF
    file.unlink()
    if how != "missing":
        file.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "flipped": content}[how])
    with pytest.warns(UserWarning, match=r"checkpoint-6' is not whole \(.*passed over"):
        again = trained(run, resume=True)
    assert again.steps == 6
    assert same(again.model, model)


def test_a_checkpoint_of_another_step_is_not_taken(whole: tuple[Path, Any], tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole[0], tmp_path / "run"))
    (run / "checkpoints" / "checkpoint-6").rename(run / "checkpoints" / "checkpoint-8")
    assert last_checkpoint(run / "checkpoints").name == "checkpoint-4"
