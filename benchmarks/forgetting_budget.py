"""Train adapters with a budget of forgetting, with drawn methods, rates, ranks and seeds, and see who holds it.

    python benchmarks/forgetting_budget.py TASK
    python benchmarks/forgetting_budget.py ARC-Easy --data DATA --runs 20 --json runs.json
    python benchmarks/forgetting_budget.py ARC-Easy --data DATA --runs 1 --fix method=dira,rate=5e-3,r=8,budget=0.05

Each run is made in three ways, called arms, under transformers' Trainer: `budget` has `max_forgetting`, `retain` keeps
the first weight of its penalty, and `plain` has no penalty. The latter two are scaled down to the budget afterwards, as
[`trim`][dynalora.forgetting.trim.trim] does: a budget is worth having where its held-out loss is below theirs. The end
is measured on all of the text that `retain` keeps, as [`hold_budget`][dynalora.forgetting.budget.hold_budget] does, and
on text of the base model from openings that training never saw; the held-out loss is that of questions which were not
trained on. Held is a run that ends within a tenth of its budget. The last column is the ratio of the KL at the end to
the penalty's value there, which leaves out how layers add up: how far it differs between runs says how well one number
could correct the penalty.
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
from dynalora.common.progress import silent
from dynalora.driver import drivers_of
from dynalora.forgetting.budget import TextMeter, retain_part
from dynalora.forgetting.retain import prepare_retain
from dynalora.forgetting.retention import retention
from dynalora.forgetting.texts import anchor_text, own_text
from dynalora.forgetting.trim import trim
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


ARMS = ("budget", "retain", "plain")

_LINE = "{:8} {:>6} {:>3} {:>6} {:>7} {:>5} {:7} {:>7} {:>8} {:>8} {:>7} {:>6} {:>7} {:>5} {:>13}"


def plan(runs: int, seed: int, fixed: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Settings of every run: methods and budgets in turns, the rest drawn, but for those that are given."""
    draw = random.Random(seed)
    return [
        {
            "method": list(METHODS)[index % len(METHODS)],
            "budget": BUDGETS[index % len(BUDGETS)],
            "rate": draw.choice(RATES),
            "r": draw.choice(RANKS),
            "retain": draw.choice(START_WEIGHTS),
            "seed": draw.randrange(1000),
            **(fixed or {}),
        }
        for index in range(runs)
    ]


class Bench:
    """The base model, its texts and what the layers read of them, which all runs share."""

    def __init__(self, task: str, data: str | None, steps: int, questions: int, console: Console) -> None:
        settings = LabSettings(
            data=data, system="Answer.", max_length=80, dtype="float32", held_out=questions, generated=0
        )
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

    def run(self, run: dict[str, Any], arm: str) -> dict[str, Any]:
        """One run's result, made in one of the three ways."""
        penalty = {} if arm == "plain" else {"retain": run["retain"]}
        budget = {"max_forgetting": run["budget"]} if arm == "budget" else {}
        config = METHODS[run["method"]](
            r=run["r"], target_modules="all-linear", total_steps=self.steps, **penalty, **budget
        )
        adapted = peft.get_peft_model(self.bench.model, config)
        for name, layer in adapter_layers(adapted).items():
            layer.curvatures["default"] = self.curvatures[name]
        (driver, _), *_ = drivers_of(adapted)
        part = retain_part(driver)
        if part is not None:
            part.meter = TextMeter(adapted, self.anchors)
        how = TrainSettings(
            steps=self.steps, learning_rate=run["rate"], seed=run["seed"], schedule="linear", warmup=0.1, eval_every=0,
            save_every=0, bf16=True,
        )  # fmt: skip
        rows = self.bench.training(self.task)
        result = train_adapter(adapted, self.bench.tokenizer, None, rows, settings=how, console=self.bench.console)
        if arm == "budget":
            assert part is not None
            ended = part.outcome
            assert ended is not None
            trained, factor, end, held, says = ended.trained_kl, ended.factor, ended.kl, ended.held, str(ended)
        else:
            cut = trim(result.model, self.anchors, max_kl=run["budget"], factors=(1.0,))
            trained, factor, end = cut.points[0].kl, cut.factor, cut.taken.kl
            held = 0.9 * run["budget"] <= end <= 1.1 * run["budget"]
            says = f"it forgets {end:.4g} of {run['budget']:.4g} nats per token"
        layers = list(adapter_layers(result.model).values())
        with torch.no_grad():
            value = float(RetentionPenalty(layers, "default")(layers))
        record = {
            **run,
            "arm": arm,
            "loss": statistics.mean(row["loss"] for row in result.records[-5:] if "loss" in row),
            "held_out": self.bench.measure_on(self.task, result.model, arm, silent).loss.value,
            "trained": trained / run["budget"],
            "factor": factor,
            "end": end / run["budget"],
            "unseen": retention(result.model, self.unseen).kl / run["budget"],
            "held": held,
            "says": says,
            "ratio": end / value,
        }
        self.bench.take_off(result.model)
        return record


def fixed_settings(text: str) -> dict[str, Any]:
    """`method=dira,rate=5e-3`: what is not to be drawn."""
    kinds: dict[str, Any] = {
        "method": str, "budget": float, "rate": float, "r": int, "retain": float, "seed": int,
    }  # fmt: skip
    settings = {}
    for pair in text.split(","):
        name, _, value = pair.partition("=")
        if not value or name not in kinds or (name == "method" and value not in METHODS):
            raise argparse.ArgumentTypeError(f"{pair!r}: give NAME=VALUE with {', '.join(kinds)}")
        settings[name] = kinds[name](value)
    return settings


def main() -> None:
    """Run, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", help="a task as dynalora compare takes it")
    parser.add_argument("--data", help="folder with the files of benchmarks")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--questions", type=int, default=120, help="held-out questions that are measured")
    parser.add_argument("--arms", type=lambda names: names.split(","), default=list(ARMS), help=f"of {', '.join(ARMS)}")
    parser.add_argument("--fix", type=fixed_settings, help="settings that are not drawn: method=dira,rate=5e-3,r=8")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--first", type=int, default=0, help="runs to leave out, which other processes make")
    parser.add_argument("--json", type=Path, help="where every run's numbers go")
    options = parser.parse_args()
    if options.json is not None and options.json.exists():
        parser.error(f"{options.json} exists; name another file, or remove it")
    if unknown := sorted({*options.arms} - {*ARMS}):
        parser.error(f"no arm is called {', '.join(unknown)}; known are {', '.join(ARMS)}")
    bench = Bench(options.task, options.data, options.steps, options.questions, Console(stderr=True))
    columns = ("method", "rate", "r", "start", "budget", "seed", "arm", "loss", "held-out", "trained", "factor", "end")
    print(_LINE.format(*columns, "unseen", "held", "KL / penalty"), flush=True)
    records = []
    for run in plan(options.first + options.runs, options.seed, options.fix)[options.first :]:
        for arm in options.arms:
            record = bench.run(run, arm)
            records.append(record)
            names = ("method", "rate", "r", "retain", "budget", "seed", "arm")
            numbers = [
                f"{record[name]:.3f}" for name in ("loss", "held_out", "trained", "factor", "end", "unseen")
            ]  # fmt: skip
            held = "yes" if record["held"] else "no"
            print(_LINE.format(*(record[name] for name in names), *numbers, held, f"{record['ratio']:.1f}"), flush=True)
            if not record["held"]:
                print(f"    {record['says']}", flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps(records, indent=1))
    for arm in options.arms:
        of_arm = [record for record in records if record["arm"] == arm]
        losses = statistics.mean(record["held_out"] for record in of_arm)
        ratios = sorted(record["ratio"] for record in of_arm)
        held = sum(record["held"] for record in of_arm)
        print(
            f"{arm}: held {held} of {len(of_arm)}; mean held-out loss {losses:.3f}; "
            f"KL / penalty from {ratios[0]:.1f} to {ratios[-1]:.1f}, median {statistics.median(ratios):.1f}"
        )


if __name__ == "__main__":
    main()
