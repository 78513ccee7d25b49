"""`finetune` in two processes, from the first check to the report, with all that is measured by default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dynalora.errors import ConfigError
from dynalora.jobs.finetune import run as finetune_run
from dynalora.jobs.finetune.run import finetune
from dynalora.jobs.finetune.settings import FinetuneSpec
from dynalora.lab.run_folder import RunFolder
from tests.processes import run_two
from tests.unit import tiny

WORKER = """
import os, sys
from pathlib import Path
rank, place, port = sys.argv[1:]
os.environ.update(RANK=rank, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
from dynalora.jobs.finetune.run import finetune
from dynalora.jobs.finetune.settings import FinetuneSpec
finetune(FinetuneSpec(
    model=f"{place}/model", data=f"{place}/rows.jsonl", output=f"{place}/run", method="dira", r=2, steps=3,
    batch_size=4, learning_rate=1e-2, eval_fraction=0.25, samples=1,
))
"""


def test_a_run_of_two_processes_ends_with_its_report(tmp_path: Path) -> None:
    tiny.saved_model(tmp_path / "model")
    tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(24))
    run_two(WORKER, str(tmp_path))
    run = tmp_path / "run"
    assert json.loads((run / "run.json").read_text())["finished"]
    page = (run / "report.html").read_text()
    assert "What it says" in page
    assert "If less is to be forgotten" in page
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in ("retention", "scaled", "samples"):
        assert len([record for record in records if name in record]) == 1
    assert not (run / "checkpoints").exists()


KILLED = """
import os, sys
rank, place, port = sys.argv[1:]
os.environ.update(RANK=rank, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
from tests.unit import test_finetune_processes as this
from dynalora.lab.training.recorder import Recorder
went_on = Recorder.on_step_end
def dies(self, args, state, control, **more):
    if state.global_step == 4:
        os._exit(0)
    return went_on(self, args, state, control, **more)
Recorder.on_step_end = dies
this.finetune(this.spec(place, "run"))
"""


def spec(place: Any, output: str, **more: Any) -> FinetuneSpec:
    """A run that is saved after three steps of six."""
    given = {
        "method": "pedyra", "r": 3, "steps": 6, "batch_size": 2, "learning_rate": 1e-2, "save_every": 3, "samples": 0,
        "eval_fraction": 0.25, "retention": False,
        "method_options": {"adjust_start": 1, "adjust_interval": 2, "adjust_end": 5, "adjust_size": 1},
    }  # fmt: skip
    return FinetuneSpec(model=f"{place}/model", data=f"{place}/rows.jsonl", output=f"{place}/{output}", **given, **more)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many rows at a step, in the same order, so that it ends where one process ends."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    tiny.saved_model(tmp_path / "model")
    tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(24))
    run_two(KILLED, str(tmp_path))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2
    finetune(spec(tmp_path, "run", resume=True))
    finetune(spec(tmp_path, "alone", gradient_accumulation=2))
    resumed, alone = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("run", "alone"))
    weights = [name for name in alone if name.endswith(("_down", "_up", "_e"))]
    assert weights
    for name in weights:
        torch.testing.assert_close(resumed[name], alone[name], atol=2e-4, rtol=2e-3)


def test_processes_that_cannot_share_a_step_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder.create(tmp_path / "run", {"seed": 1}) as run:
        run.log({"step": 1})
    status = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**status, "processes": 2}))
    monkeypatch.setattr(finetune_run, "process_count", lambda: 3)
    given = spec(tmp_path, "run", gradient_accumulation=2)
    with RunFolder.create(tmp_path / "run", {"seed": 1}, resume=True) as run:
        with pytest.raises(ConfigError, match=r"begun by 2 processes, which took 4 batches of 2 rows.*that divides 4"):
            finetune_run._with_as_many_rows(given, run, None)
        monkeypatch.setattr(finetune_run, "process_count", lambda: 4)
        assert finetune_run._with_as_many_rows(given, run, None).gradient_accumulation == 1
