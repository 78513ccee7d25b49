"""`dynalora finetune --dry-run`: what a run takes, from its shapes and a few real steps, before it is begun."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback

from dynalora.common.progress import duration
from dynalora.jobs.finetune.prepare import Prepared, prepare
from dynalora.jobs.finetune.settings import FinetuneSpec
from dynalora.lab.choices import label_of
from dynalora.lab.configs import title_of
from dynalora.lab.costs import Cost, amount, cost_of, cost_table
from dynalora.lab.machine import forget_training_peak, training_peak
from dynalora.lab.models import empty_model, load_model, resolve_dtype
from dynalora.lab.report import say
from dynalora.lab.training.recorder import wait_for_device
from dynalora.lab.training.train import train_adapter

STEPS = 3
"""Steps that are made; the first, which pays for allocation and warm-up, is not timed."""


@dataclass(frozen=True)
class DryRun:
    """What a run takes.

    Attributes:
        cost: Memory that is held for the whole run.
        steps: Optimizer steps of the run.
        step_seconds: Mean time of those that were timed; None if the run has one step only.
        peak: The most memory that was held in a step, activations included, in bytes: of the GPU, else of this process;
            None: not known.
    """

    cost: Cost
    steps: int
    step_seconds: float | None
    peak: int | None


class _FewSteps(TrainerCallback):
    """Times the first steps of a training and then ends it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.steps = 0
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps = state.max_steps
        forget_training_peak()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        wait_for_device()
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        wait_for_device()
        self.seconds.append(time.perf_counter() - self._began)
        control.should_training_stop = len(self.seconds) >= STEPS


def dry_run(spec: FinetuneSpec, *, console: Console | None = None) -> DryRun:
    """Check a run's settings, show what it takes, and make a few real steps on weights that are thrown away.

    Nothing is written.

    Raises:
        DynaloraError: As [`prepare`][dynalora.jobs.finetune.prepare.prepare].
    """
    ready = prepare(spec)
    cost = cost_of(
        empty_model(ready.model, trust_remote_code=spec.trust_remote_code),
        ready.config,
        dtype=resolve_dtype(spec.dtype),
        quantization=spec.quantization,
    )
    label = title_of(label_of(spec.method))
    say(
        console,
        cost_table([(label, cost)], title=f"{spec.model}: {cost.base_parameters:,} parameters"),
        f"{len(ready.training):,} training and {len(ready.held_out):,} held-out conversations, "
        f"{ready.training.response_tokens:,} tokens to learn from.",
        *([ready.rate] if ready.rate else []),
    )
    timed = _timed(ready)
    seconds = sum(timed.seconds[1:]) / (len(timed.seconds) - 1) if len(timed.seconds) > 1 else None
    most = training_peak()
    say(console, *_lines(timed.steps, seconds, most))
    return DryRun(cost, timed.steps, seconds, most)


def _timed(ready: Prepared) -> _FewSteps:
    spec = ready.spec
    model = load_model(
        ready.model, dtype=spec.dtype, quantization=spec.quantization, trust_remote_code=spec.trust_remote_code
    )
    few = _FewSteps()
    train_adapter(model, ready.tokenizer, ready.config, ready.training, settings=spec, callbacks=[few])
    return few


def _lines(steps: int, seconds: float | None, most: int | None) -> list[str]:
    lines = [f"{steps:,} optimizer steps."]
    if seconds is not None:
        lines[0] = (
            f"{steps:,} optimizer steps of {seconds:.2f} s (mean of {STEPS - 1} real ones, after one to warm up): "
            f"about {duration(steps * seconds)}, and what measuring takes."
        )
    if most is not None:
        place = "on the GPU" if torch.cuda.is_available() else "in this process"
        lines.append(f"Most memory {place} during a step: {amount(most)}.")
    return [*lines, "Nothing was trained or written; leave --dry-run out to begin."]
