"""What zeroing alone does, before any recovery: Task A's loss with the matrices zeroed that were weakest after Task A.

    python experiments/forgetting/thresholds.py DATA OUT METHOD [QUESTIONS]

Takes seed 42 of the run OUT/METHOD of run.sh, zeroes a fifth and a half of the matrices in
the adapter after Task B, those of the smallest second singular value after Task A first (which is what RLGR does at a
threshold that makes as many low-rank) or drawn at random, and measures Task A. Writes OUT/METHOD-thresholds.md.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from rich.console import Console

from dynalora.common.files import write_file
from dynalora.common.statistics import mean_interval
from dynalora.forgetting.recovery import low_rank_modules, zero_updates
from dynalora.jobs.stages.stage_files import ADAPTER, read_landscape, stage_folder
from dynalora.lab.lab_settings import LabSettings
from dynalora.lab.report import Table, markdown_table
from dynalora.lab.workbench import Workbench

PARTS = (0.2, 0.5)
DRAWS = 2


def main(data: Path, out: Path, method: str, questions: int) -> None:
    """Measure all of it and write the table."""
    source = str(data / "commonsense" / "ARC-Easy")
    how = LabSettings(held_out=questions, system="Answer.", max_length=200, dtype="float32", threads=1)
    lab = Workbench(how, [source], Console())
    run = out / method
    landscape = read_landscape(stage_folder(run, 42, "initial"))
    names = [row.module for row in landscape]
    second = sorted(row.singular_values[1] for row in landscape)

    def loss(zeroed: list[str], told: str) -> float:
        model = lab.attach(stage_folder(run, 42, "interference") / ADAPTER)
        zero_updates(model, zeroed)
        found = lab.measure(model, told)[source].loss.value
        lab.take_off(model)
        return found

    rows: list[list[str | int | float | None]] = [[0, None, f"{loss([], 'nothing zeroed'):.3f}", None]]
    for part in PARTS:
        tau = second[round(part * len(second)) - 1]
        weak = low_rank_modules(landscape, tau=tau)
        guided = loss(weak, f"{part:.0%}, guided")
        drawn = [
            loss(random.Random(seed).sample(names, len(weak)), f"{part:.0%}, random {seed}") for seed in range(DRAWS)
        ]
        spread = mean_interval(drawn)
        rows.append(
            [len(weak), f"{tau:.3f}", f"{guided:.3f}", f"{spread.value:.3f} ({min(drawn):.3f} to {max(drawn):.3f})"]
        )
    table = Table(
        ["matrices zeroed", "τ", "loss A, weakest after A", "loss A, drawn at random"], rows,
        title=f"{method}: zeroing updates after Task B, without any training",
        note=f"{len(names)} matrices, {questions} questions of ARC-Easy, nats per token of the right answers. "
        f"Random: mean of {DRAWS} draws, with the smallest and the largest.",
    )  # fmt: skip
    write_file(out / f"{method}-thresholds.md", markdown_table(table))
    print(markdown_table(table))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]) if len(sys.argv) > 4 else 60)
