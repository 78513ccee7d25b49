"""Fine-tune an encoder on a GLUE task with one adapter after another, and compare them on the dev split.

    python benchmarks/glue.py --model MODEL --data FOLDER --output FOLDER --task sst2 --method lora --method dislora

FOLDER of --data holds <task>.train.jsonl.gz and <task>.dev.jsonl.gz with the fields `text` and `label`. A cell is one
method with one seed and one learning rate; a finished one is kept in OUTPUT as JSON and not run again. `--table` prints
all cells of OUTPUT as a Markdown table. All methods see the same batches in the same order. AdaLoRA is PEFT's, with
`update_and_allocate` called after every step, as it must be.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch.optim.lr_scheduler import LambdaLR

import dynalora
from dynalora.common.files import write_file
from dynalora.common.statistics import standard_error
from dynalora.errors import DataError
from dynalora.lab.baselines import BASELINES, driver_of, optimizer_of
from dynalora.lab.settings import named_values
from dynalora.methods import METHODS, config_class


def rows_of(folder: Path, task: str, split: str) -> list[dict[str, Any]]:
    """The rows of a split."""
    path = folder / f"{task}.{split}.jsonl.gz"
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read ({error}); give its folder with --data.") from error


def adapter(method: str, given: argparse.Namespace, seed: int) -> Any:
    """The configuration of a method."""
    common: dict[str, Any] = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}
    options = named_values(given.set or [])
    if method in BASELINES and (baseline := BASELINES[method]).config is not None:
        if not baseline.adapts_modules:
            del common["target_modules"]
        return baseline.config(**{**common, **baseline.fields(given.r, None, 0.0), **options})
    if method not in METHODS:
        raise SystemExit(f"--method {method}: choose from {', '.join([*METHODS, *BASELINES])}.")
    return config_class(method)(**common, r=given.r, total_steps=given.steps, **options)


def run(method: str, seed: int, lr: float, given: argparse.Namespace) -> dict[str, Any]:
    """One cell."""
    torch.set_num_threads(given.threads)
    data = {split: rows_of(given.data, given.task, split) for split in ("train", "dev")}
    transformers.set_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=2)
    model = peft.get_peft_model(base, adapter(method, given, seed))

    def batch(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        made = tokenizer(
            [row["text"] for row in rows], truncation=True, max_length=128, padding=True, return_tensors="pt"
        )
        return {**made, "labels": torch.tensor([int(row["label"]) for row in rows])}

    driver = driver_of(model, given.steps)
    order = torch.Generator().manual_seed(seed)
    optimizer = optimizer_of(model, torch.optim.AdamW, {"lr": lr, "weight_decay": 0.0}) or torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0
    )
    warm = max(1, round(0.06 * given.steps))
    schedule = LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (given.steps - step) / (given.steps - warm))
    )
    before = measure(model, data["dev"], batch)
    losses, seconds = [], []
    model.train()
    for step in range(given.steps):
        picked = torch.randint(len(data["train"]), (given.batch_size,), generator=order).tolist()
        inputs = batch([data["train"][index] for index in picked])
        began = time.perf_counter()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        if driver is not None:
            driver(step)
        optimizer.zero_grad()
        schedule.step()
        seconds.append(time.perf_counter() - began)
        losses.append(loss.item())
        if step % 25 == 0 or step == given.steps - 1:
            print(
                f"{method} seed {seed}: step {step + 1} of {given.steps}, loss {losses[-1]:.4f}", flush=True
            )
    return {
        "method": method, "seed": seed, "lr": lr, "task": given.task, "r": given.r, "steps": given.steps,
        "batch_size": given.batch_size, "options": named_values(given.set or []), "before": before,
        "after": measure(model, data["dev"], batch), "step_seconds": statistics.median(seconds[3:] or seconds),
        "loss": losses, "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "versions": {"dynalora": dynalora.__version__, "torch": torch.__version__, "peft": peft.__version__},
    }  # fmt: skip


@torch.no_grad()
def measure(model: Any, rows: list[dict[str, Any]], batch: Any) -> dict[str, float]:
    """Accuracy, Matthews correlation and loss (nats) on the dev split."""
    model.eval()
    loss, table = 0.0, torch.zeros(2, 2)
    for start in range(0, len(rows), 64):
        inputs = batch(rows[start : start + 64])
        output = model(**inputs)
        loss += float(output.loss) * len(inputs["labels"])
        for truth, guess in zip(inputs["labels"].tolist(), output.logits.argmax(-1).tolist(), strict=True):
            table[truth, guess] += 1
    (tn, fp), (fn, tp) = table.tolist()
    norm = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return {
        "accuracy": (tp + tn) / len(rows),
        "matthews": (tp * tn - fp * fn) / norm if norm else 0.0,
        "loss": loss / len(rows),
    }


def table(folder: Path) -> str:
    """All cells of a folder, averaged over seeds."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        groups[cell["task"], path.name.partition("_seed")[0].partition("_")[2], cell["lr"]].append(cell)
    lines = [
        "| task | method | learning rate | seeds | accuracy | Matthews | dev loss | step (ms) | parameters |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (task, label, lr), cells in sorted(groups.items()):

        def mean(key: str, cells: list[dict[str, Any]] = cells) -> str:
            values = [cell["after"][key] for cell in cells]
            error = standard_error(values)
            return f"{statistics.fmean(values):.3f} ± {float('nan') if error is None else error:.3f}"

        step = 1000 * statistics.median(cell["step_seconds"] for cell in cells)
        lines.append(
            f"| {task} | {label} | {lr:g} | {len(cells)} | {mean('accuracy')} | {mean('matthews')} | {mean('loss')} "
            f"| {step:.0f} | {cells[0]['trainable_parameters']:,} |"
        )
    return "\n".join([*lines, "", "Means over seeds ± standard error of the mean."])


def main() -> None:
    """Run the cells that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder or Hub id of an encoder")
    parser.add_argument("--data", type=Path, help="folder with <task>.train.jsonl.gz and <task>.dev.jsonl.gz")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--table", action="store_true", help="print the results as a Markdown table and run nothing"
    )
    parser.add_argument(
        "--task", default="sst2", help="sst2 or cola, or any other two-class file of that form"
    )
    parser.add_argument(
        "--method",
        action="append",
        help="a method of dynalora, or one of PEFT's (lora, adalora, …); repeatable",
    )
    parser.add_argument("--set", action="append", metavar="FIELD=VALUE", help="a field of the configuration")
    parser.add_argument("--label", help="name of the variant (default: the method)")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    if given.table:
        print(table(given.output))
        return
    if not given.model or not given.data:
        parser.error("--model and --data are needed")
    given.output.mkdir(parents=True, exist_ok=True)
    for seed in (int(seed) for seed in given.seeds.split(",")):
        for method in given.method or ["lora"]:
            path = given.output / f"{given.task}_{given.label or method}_seed{seed}_lr{given.lr:g}.json"
            if path.exists():
                continue
            write_file(path, json.dumps(run(method, seed, given.lr, given)))
    print(table(given.output))


if __name__ == "__main__":
    sys.exit(main())
