"""Train adapters with a budget of forgetting, with drawn methods, rates, ranks and seeds, and see who holds it.

    python benchmarks/forgetting_budget.py TASK
    python benchmarks/forgetting_budget.py ARC-Easy --data DATA --runs 20 --json runs.json

Each run trains under transformers' Trainer with `max_forgetting`; its end is measured on all of the text that `retain`
keeps, as [`hold_budget`][dynalora.forgetting.budget.hold_budget] does, and on text of the base model from openings that
training never saw. Held is a run that ends within a tenth of its budget. The last column is the ratio of the KL at the
end to the penalty's value there, which leaves out how layers add up: how far it differs between runs says how well one
number could correct the penalty.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console

import dynalora
from dynalora.adapter.layer import adapter_layers
from dynalora.adapter.retain import RetentionPenalty
from dynalora.driver import drivers_of
from dynalora.forgetting.budget import TextMeter, retain_part
from dynalora.forgetting.retain import prepare_retain
from dynalora.forgetting.retention import retention
from dynalora.forgetting.texts import anchor_text, own_text
from dynalora.lab.lab_settings import LabSettings
from dynalora.lab.training.settings import TrainSettings
from dynalora.lab.training.train import train_adapter
from dynalora.lab.workbench import Workbench

METHODS: dict[str, Any] = {
    "dira": dynalora.DiraConfig,
    "disel": dynalora.DiselConfig,
    "dislora": dynalora.DisloraConfig,
    "pedyra": dynalora.PedyraConfig,
}
RATES = (1e-3, 2e-3, 5e-3, 1e-2)
RANKS = (4, 8, 16, 32)
BUDGETS = (0.02, 0.05, 0.1)
TEXTS = 64  # that the base model writes and retain keeps
START_WEIGHTS = (300.0, 1000.0, 3000.0)


_LINE = "{:8} {:>6} {:>3} {:>6} {:>7} {:>5} {:>7} {:>8} {:>7} {:>6} {:>7} {:>5} {:>13}"


def plan(runs: int, seed: int) -> list[dict[str, Any]]:
    """Settings of every run: methods and budgets in turns, the rest drawn."""
    draw = random.Random(seed)
    return [
        {
            "method": list(METHODS)[index % len(METHODS)],
            "budget": BUDGETS[index % len(BUDGETS)],
            "rate": draw.choice(RATES),
            "r": draw.choice(RANKS),
            "retain": draw.choice(START_WEIGHTS),
            "seed": draw.randrange(1000),
        }
        for index in range(runs)
    ]


class Bench:
    """The base model, its texts and what the layers read of them, which all runs share."""

    def __init__(self, task: str, data: str | None, steps: int, console: Console) -> None:
        settings = LabSettings(data=data, system="Answer.", max_length=80, dtype="float32", held_out=1)
        self.bench, self.task, self.steps = Workbench(settings, [task], console), task, steps
        model, tokenizer = self.bench.model, self.bench.tokenizer
        self.anchors, self.unseen = anchor_text(model, tokenizer, texts=TEXTS), own_text(model, tokenizer)
        # The moments of inputs and gradients are the base model's, so one reading serves all runs. That of an adapter
        # with gates holds stored inputs as well.
        config = dynalora.DiselConfig(r=4, target_modules="all-linear", retain=1.0)
        reader = peft.get_peft_model(model, config)
        prepare_retain(reader, tokenizer, self.anchors, bf16=True)
        self.curvatures = {name: layer.curvatures["default"] for name, layer in adapter_layers(reader).items()}
        self.bench.take_off(reader)

    def run(self, run: dict[str, Any]) -> dict[str, Any]:
        """One run's result."""
        config = METHODS[run["method"]](
            r=run["r"], target_modules="all-linear", retain=run["retain"], max_forgetting=run["budget"],
            total_steps=self.steps,
        )  # fmt: skip
        adapted = peft.get_peft_model(self.bench.model, config)
        for name, layer in adapter_layers(adapted).items():
            layer.curvatures["default"] = self.curvatures[name]
        (driver, _), *_ = drivers_of(adapted)
        part = retain_part(driver)
        assert part is not None
        part.meter = TextMeter(adapted, self.anchors)
        how = TrainSettings(
            steps=self.steps, learning_rate=run["rate"], seed=run["seed"], schedule="linear", warmup=0.1, eval_every=0,
            save_every=0, bf16=True,
        )  # fmt: skip
        result = train_adapter(
            adapted,
            self.bench.tokenizer,
            None,
            self.bench.training(self.task),
            settings=how,
            console=self.bench.console,
        )
        outcome = part.outcome
        assert outcome is not None
        layers = list(adapter_layers(result.model).values())
        with torch.no_grad():
            penalty = float(RetentionPenalty(layers, "default")(layers))
        record = {
            **run,
            "loss": statistics.mean(row["loss"] for row in result.records[-5:] if "loss" in row),
            "trained": outcome.trained_kl / run["budget"],
            "factor": outcome.factor,
            "end": outcome.kl / run["budget"],
            "unseen": retention(result.model, self.unseen).kl / run["budget"],
            "held": outcome.held,
            "says": str(outcome),
            "ratio": outcome.kl / penalty,
        }
        self.bench.take_off(result.model)
        return record


def main() -> None:
    """Run, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", help="a task as dynalora compare takes it")
    parser.add_argument("--data", help="folder with the files of benchmarks")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--part", default="1/1", help="2/4: only the second, sixth, … of the runs, to share them out")
    parser.add_argument("--json", type=Path, help="where every run's numbers go")
    options = parser.parse_args()
    part, parts = (int(number) for number in options.part.split("/"))
    if options.json is not None and options.json.exists():
        parser.error(f"{options.json} exists; name another file, or remove it")
    bench = Bench(options.task, options.data, options.steps, Console(stderr=True))
    columns = ("method", "rate", "r", "start", "budget", "seed", "loss", "trained", "factor", "end", "unseen", "held")
    print(_LINE.format(*columns, "KL / penalty"), flush=True)
    records = []
    for run in plan(options.runs, options.seed)[part - 1 :: parts]:
        record = bench.run(run)
        records.append(record)
        names = ("method", "rate", "r", "retain", "budget", "seed")
        numbers = [f"{record[name]:.3f}" for name in ("loss", "trained", "factor", "end", "unseen")]
        held = "yes" if record["held"] else "no"
        print(_LINE.format(*(record[name] for name in names), *numbers, held, f"{record['ratio']:.1f}"), flush=True)
        if not record["held"]:
            print(f"    {record['says']}", flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(records, indent=1))
    ratios = sorted(record["ratio"] for record in records)
    print(f"held: {sum(record['held'] for record in records)} of {len(records)}; KL / penalty from {ratios[0]:.1f} to "
          f"{ratios[-1]:.1f}, median {statistics.median(ratios):.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
