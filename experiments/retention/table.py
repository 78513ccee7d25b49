"""The table and the curves of all runs in a folder: what each learned of GSM8K, and how far it moved from the base.

    python experiments/retention/table.py OUT

Writes OUT/retention.md, OUT/curves.png and OUT/curves.svg.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dynalora.drawing.retention import plot_retention_curves
from dynalora.forgetting.curves import RetentionPoint, read_retention
from dynalora.forgetting.monitor import OWN_TEXT
from dynalora.lab.report import Table, markdown_table
from dynalora.lab.run_folder import read_metrics


def main(out: Path) -> None:
    """Read all runs, write the table and the plot."""
    curves: dict[str, list[RetentionPoint]] = {}
    rows: list[list[str | int | float | None]] = []
    folders = [entry.parent for entry in out.glob("*/retention.jsonl")]
    for folder in sorted(folders, key=lambda entry: (int(entry.name.split("-")[1]), entry.name)):
        (points,) = read_retention(folder / "retention.jsonl").values()
        curves[folder.name] = points
        records = list(read_metrics(folder))
        held = [(record["step"], record["held_out_loss"]) for record in records if "held_out_loss" in record]
        last = {point.text: point.retention for point in points}
        losses = [record["loss"] for record in records if "loss" in record]
        rows.append(
            [
                folder.name,
                f"{held[0][1]:.4f}",
                f"{held[-1][1]:.4f}",
                f"{sum(losses[-10:]) / len(losses[-10:]):.3f}",
                f"{last[OWN_TEXT].kl:.4f} ± {last[OWN_TEXT].kl_error:.4f}",
                f"{last['WikiText'].kl:.4f} ± {last['WikiText'].kl_error:.4f}",
                f"{last['WikiText'].loss_shift:+.4f}",
            ]
        )
    table = Table(
        ["run", "held-out loss before", "after", "training loss, last 10 steps", "KL, own text", "KL, WikiText",
         "loss shift, WikiText"],
        rows,
        note="Held-out loss: nats per token of the solutions of 75 problems of GSM8K's training file that were "
        "set aside. "
        "KL(base ‖ tuned) in nats per token with its standard error over the texts, at the last step.",
    )  # fmt: skip
    (out / "retention.md").write_text(markdown_table(table), encoding="utf-8")
    plot_retention_curves(
        curves, out / "curves.png", title="Distance from the base model while fine-tuning on GSM8K (method-rank)",
        overwrite=True,
    )  # fmt: skip
    print(markdown_table(table))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
