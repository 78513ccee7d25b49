"""Two tasks one after the other: what is left of the first, and of the base model, after the second was learned.

    python experiments/continual/continual.py DATA OUT
    python experiments/continual/continual.py DATA OUT --seeds 3 --arms lora,retain-both

SmolLM2-135M-Instruct learns ARC-Easy with `retain`; that adapter is merged. From there GSM8K is learned with a fresh
adapter, in several ways ("arms"), each measured along factors of the second update: LoRA, LoRA with `retain` on text
that the merged model writes by itself, and LoRA with `retain` on that text and on the merged model's answers to 64
training questions of ARC-Easy. Every arm leaves a file in OUT when it is done, and what is there is not run again; the
table is made from the files (`--table` runs nothing).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
from rich.console import Console

import dynalora
from dynalora.common.files import write_file
from dynalora.common.names import IGNORED_LABEL
from dynalora.common.progress import silent
from dynalora.common.statistics import mean_interval
from dynalora.forgetting.retain import prepare_retain
from dynalora.forgetting.retention import base_predictions, retention
from dynalora.forgetting.texts import MeasuredText, anchor_text, answered_text, own_text
from dynalora.forgetting.trim import update_scaled
from dynalora.lab.lab_settings import LabSettings
from dynalora.lab.training.settings import TrainSettings
from dynalora.lab.training.train import answered, take_off, train_adapter
from dynalora.lab.workbench import Workbench

FACTORS = (1.0, 0.6, 0.35, 0.2)
WEIGHT = 5000.0  # of retain
RATE = 5e-3
PROMPTS = 64  # of the first task, whose answers are kept


def lora() -> peft.PeftConfig:
    """PEFT's LoRA."""
    return peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def retaining() -> peft.PeftConfig:
    """The same with `retain`: DiRA without its penalty."""
    return dynalora.DiraConfig(
        r=8, alpha=16, penalty_weight=0.0, target_modules="all-linear", retain=WEIGHT, task_type="CAUSAL_LM"
    )


ARMS: dict[str, tuple[Callable[[], peft.PeftConfig], float]] = {
    "lora": (lora, RATE),
    "lora-slow": (lora, 1.5e-3),
    "retain-own": (retaining, RATE),
    "retain-both": (retaining, RATE),
}
START = "start"
LABELS = {
    START: "after ARC-Easy",
    "lora": f"LoRA, {RATE:g}",
    "lora-slow": "LoRA, 1.5e-3",
    "retain-own": "`retain`, own text",
    "retain-both": "`retain`, own text and answers to ARC-Easy",
}


class Continual:
    """The first task of a seed, and the arms that go on from there."""

    def __init__(self, options: argparse.Namespace) -> None:
        settings = LabSettings(
            system="Answer.", max_length=200, dtype="float32", held_out=options.held_out, generated=0
        )
        self.a, self.b = str(options.data / "commonsense" / "ARC-Easy"), str(options.data / "math" / "gsm8k")
        self.bench = Workbench(settings, [self.a, self.b], Console(stderr=True))
        self.options = options

    def run(self, seed: int) -> None:
        """All arms of a seed that have no file yet."""
        arms = [arm for arm in self.options.arms if not self.file(arm, seed).exists()]
        if not arms and self.file(START, seed).exists():
            return
        base: Any = self.bench.model
        weights = {name: value.clone() for name, value in base.state_dict().items()}
        self.text = own_text(base, self.bench.tokenizer)
        self.before = base_predictions(base, self.text, dtype=None, max_bytes=2**30)
        first = peft.get_peft_model(base, retaining())
        learned = self.merged(self.train(first, self.a, RATE, seed, "ARC-Easy"))
        self.write(START, seed, [self.point(learned, 1.0)])
        for arm in arms:
            self.write(arm, seed, self.second_task(arm, learned, seed))
        learned.load_state_dict(weights)
        self.bench._model = learned

    def second_task(self, arm: str, learned: Any, seed: int) -> list[dict[str, Any]]:
        """The second task, learned in one way, at every factor of its update."""
        configure, rate = ARMS[arm]
        model = peft.get_peft_model(learned, configure())
        if arm.startswith("retain"):
            keep: MeasuredText = anchor_text(model, self.bench.tokenizer, cache=False)
            if arm == "retain-both":
                keep += answered_text(model, self.bench.tokenizer, self.prompts(), tokens=16, cache=False)
            prepare_retain(model, self.bench.tokenizer, keep, bf16=True)
        trained = self.train(model, self.b, rate, seed, arm)
        points = []
        for factor in FACTORS:
            with update_scaled(trained, factor):
                points.append(self.point(trained, factor))
        take_off(trained)
        return points

    def train(self, model: peft.PeftModel, source: str, rate: float, seed: int, label: str) -> peft.PeftModel:
        how = TrainSettings(
            steps=self.options.steps, batch_size=8, learning_rate=rate, seed=seed, schedule="linear", warmup=0.1,
            eval_every=0, save_every=0, bf16=True,
        )  # fmt: skip
        rows = self.bench.training(source)
        result = train_adapter(
            model, self.bench.tokenizer, None, rows, settings=how, label=label, console=self.bench.console
        )
        return result.model  # type: ignore[return-value]

    def merged(self, model: peft.PeftModel) -> Any:
        """The base model with an adapter in its weights, and no trace of PEFT."""
        merged: Any = model.merge_and_unload()
        for name in ("peft_config", "_hf_peft_config_loaded"):
            merged.__dict__.pop(name, None)
        return merged.eval()

    def prompts(self) -> list[list[int]]:
        """Training questions of the first task as the model is asked them: what comes before the answer."""
        rows = answered(self.bench.training(self.a))[:PROMPTS]
        return [
            list(row["input_ids"][: next(i for i, label in enumerate(row["labels"]) if label != IGNORED_LABEL)])
            for row in rows
        ]

    def point(self, model: Any, factor: float) -> dict[str, Any]:
        """What a model has learned of both tasks, and forgotten of the base model."""
        scores = {
            name: self.bench.measure_on(source, model, name, silent) for name, source in (("a", self.a), ("b", self.b))
        }
        return {
            "factor": factor,
            **{f"loss_{name}": score.loss.value for name, score in scores.items()},
            "accuracy_a": sum(scores["a"].correct) / max(1, len(scores["a"].correct)),
            "kl": retention(model, self.text, base=self.before).kl,
        }

    def file(self, arm: str, seed: int) -> Path:
        return file_of(self.options.out, arm, seed)

    def write(self, arm: str, seed: int, points: list[dict[str, Any]]) -> None:
        write_file(self.file(arm, seed), json.dumps(points, indent=1) + "\n")


def file_of(out: Path, arm: str, seed: int) -> Path:
    """Where an arm's numbers are kept."""
    return out / f"{arm}_seed{seed}.json"


def table(out: Path, arms: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """One line for each arm and factor, means over the seeds with half of a 95 % interval."""
    lines = [
        "| | factor | loss, ARC-Easy | − before, paired | loss, GSM8K | KL, base's own text |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    starts = [json.loads(file_of(out, START, seed).read_text())[0] for seed in seeds]
    for arm in (START, *arms):
        runs = [json.loads(file_of(out, arm, seed).read_text()) for seed in seeds]
        for place, point in enumerate(runs[0]):
            points = [run[place] for run in runs]
            lost = [point["loss_a"] - start["loss_a"] for point, start in zip(points, starts, strict=True)]
            cells = [
                spread([point["loss_a"] for point in points]),
                "" if arm == START else spread(lost),
                spread([point["loss_b"] for point in points]),
                spread([point["kl"] for point in points]),
            ]
            lines.append(f"| {LABELS[arm]} | {point['factor']:g} | {' | '.join(cells)} |")
    return lines


def spread(values: Sequence[float]) -> str:
    """A mean, with half of its 95 % interval where there are several values."""
    interval = mean_interval(list(values))
    return f"{interval.value:.3f}" + ("" if len(values) < 2 else f" ± {interval.high - interval.value:.3f}")


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with commonsense/ and math/")
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--arms", type=lambda names: names.split(","), default=list(ARMS), help="with commas")
    parser.add_argument("--seed", type=int, default=0, help="the first; others can be run by other processes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps on each task")
    parser.add_argument("--held-out", type=int, default=100, help="questions of each task that are measured on")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    if unknown := sorted({*options.arms} - {*ARMS}):
        parser.error(f"no arm is called {', '.join(unknown)}; known are {', '.join(ARMS)}")
    seeds = range(options.seed, options.seed + options.seeds)
    if not options.table:
        options.out.mkdir(parents=True, exist_ok=True)
        experiment = Continual(options)
        for seed in seeds:
            experiment.run(seed)
    print("\n".join(table(options.out, options.arms, seeds)))


if __name__ == "__main__":
    main()
