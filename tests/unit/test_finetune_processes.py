"""`finetune` in two processes, from the first check to the report, with all that is measured by default."""

from __future__ import annotations

import json
from pathlib import Path

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
