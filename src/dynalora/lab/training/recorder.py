"""What a training run records and shows: losses, step times, progress."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import TrainerCallback

from dynalora.common.processes import from_first
from dynalora.common.progress import duration, live_bar
from dynalora.errors import TrainingError
from dynalora.forgetting.monitor import RetentionMonitor
from dynalora.lab.run_folder import RunFolder
from dynalora.lab.training.best import KeepBest

UNTIMED_STEPS = 3
"""Steps at the start that are left out of the step time: they pay for allocation and warm-up once."""


_LONG = 2 * 86400.0  # seconds: a run that is told how to be made shorter


class Recorder(TrainerCallback):
    """Times steps, measures the held-out loss, and passes both to the run folder and the progress display."""

    def __init__(
        self,
        label: str,
        run: RunFolder | None,
        display: Display,
        measure: Callable[[], float] | None,
        eval_every: int | None,
        records: list[dict[str, Any]],
        best: KeepBest | None = None,
        patience: int | None = None,
    ) -> None:
        self.patience = patience
        self.best = best
        self.label, self.run, self.display, self.measure = label, run, display, measure
        self.eval_every, self.records = eval_every, records
        self.durations: list[float] = []
        self.report: Callable[[dict[str, float]], None] | None = None  # to trackers, besides what the trainer logs
        self.held_out: float | None = None
        self._began = 0.0

    def record(self, values: Mapping[str, Any]) -> None:
        """Add one record, in memory and in the run folder."""
        self.records.append({"run": self.label, **values})
        if self.run is not None:
            self.run.log(self.records[-1])

    def loss_before(self) -> float | None:
        """The held-out loss before the first step; a resumed run has it in its records."""
        if self.measure is None:
            return None
        for record in self.records:
            if record.get("step") == 0 and "held_out_loss" in record:
                return float(record["held_out_loss"])
        before = self.measure()
        self.record({"step": 0, "held_out_loss": before})
        return before

    def loss_after(self, step: int, monitor: RetentionMonitor | None) -> float | None:
        """The held-out loss of the weights that the run ends with, after its last step."""
        if self.measure is None:
            return None
        kept = next((keeper.best for keeper in (monitor, self.best) if keeper is not None and keeper.best), None)
        if kept is not None and kept.step != step:
            return self.measure()  # of the weights that were put back
        if monitor is not None and monitor.stopping:
            self.held_out = self.measure()
            self.record({"step": step, "held_out_loss": self.held_out})
        if self.held_out is None:  # nothing was left to train after a resume
            recorded = [record["held_out_loss"] for record in self.records if "held_out_loss" in record]
            return recorded[-1] if recorded else None
        return self.held_out

    @property
    def stuck(self) -> bool:
        """Whether the held-out loss has not fallen below its lowest for as many measurements as the patience allows.

        It goes by the records, which a resumed run has, too.
        """
        if self.patience is None:
            return False
        losses = [record["held_out_loss"] for record in self.records if "held_out_loss" in record]
        return bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= self.patience

    def step_seconds(self) -> tuple[float | None, tuple[float, float] | None]:
        """Median and quartiles of the time of a step, without the first few; None where there are too few others."""
        timed = self.durations[UNTIMED_STEPS:]
        if len(timed) < 2:
            return (timed[0] if timed else None), None
        low, _, high = statistics.quantiles(timed, n=4)
        return statistics.median(timed), (low, high)

    def diverged(self, loss: float, step: int, learning_rate: float) -> TrainingError:
        """The error to raise where the loss of a step is no number."""
        return TrainingError(
            f"The loss of {self.label} is {loss} at step {step}: training has diverged; lower learning_rate "
            f"({learning_rate:g}), or train in float32 or bfloat16 if this is float16."
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.eval_every is None:
            self.eval_every = max(1, math.ceil(state.max_steps / 5))
        self.display.begin(state.max_steps, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        wait_for_device()
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        wait_for_device()
        self.durations.append(time.perf_counter() - self._began)
        if len(self.durations) == UNTIMED_STEPS + 1:
            self.display.pace(self.durations[-1], state.max_steps - state.global_step)
        due = bool(self.eval_every) and state.global_step % self.eval_every == 0
        if self.measure is not None and (due or state.global_step == state.max_steps):
            self.held_out = self.measure()
            self.record({"step": state.global_step, "held_out_loss": self.held_out})
            if self.best is not None and self.best.by_held_out:
                self.best.consider(model, state.global_step, self.held_out)
            control.should_training_stop = control.should_training_stop or bool(from_first(self.stuck))
            if self.report is not None:
                self.report({"eval_loss": self.held_out})
        self.display.step(state.global_step, held_out=self.held_out)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        # The trainer's closing line has totals only.
        if logs and "loss" in logs:
            if not math.isfinite(float(logs["loss"])):
                raise self.diverged(float(logs["loss"]), state.global_step, args.learning_rate)
            seconds = {"step_seconds": self.durations[-1]} if self.durations else {}
            self.record({"step": state.global_step, **logs, **seconds})
            self.display.step(state.global_step, loss=logs["loss"])


def wait_for_device() -> None:
    """Wait until a GPU has done what it was given, so that clocks tell how long that took."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Display:
    """Progress: a live bar in a terminal, about ten plain lines in a file or pipe, nothing without a console."""

    def __init__(self, label: str, console: Console | None) -> None:
        self.label, self.console = label, console
        self.loss: float | None = None
        self.held_out: float | None = None
        self._progress: Progress | None = None
        self._task: Any = None
        self._total = 0
        self._printed = -1

    def begin(self, total: int, done: int) -> None:
        self._total = total
        if self.console is None:
            return
        if self.console.is_terminal:
            self._progress = live_bar(self.console, "losses")
            self._progress.start()
            self._task = self._progress.add_task(self.label, total=total, completed=done, losses="")

    def step(self, step: int, *, loss: float | None = None, held_out: float | None = None) -> None:
        self.loss = self.loss if loss is None else loss
        self.held_out = self.held_out if held_out is None else held_out
        losses = "  ".join(
            f"{name} {value:.4f}"
            for name, value in (("loss", self.loss), ("held out", self.held_out))
            if value is not None
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=step, losses=losses)
        elif self.console is not None and loss is not None and self._due(step):
            self._printed = step
            self.console.print(f"{self.label}: step {step}/{self._total}  {losses}", highlight=False, markup=False)

    def _due(self, step: int) -> bool:
        return self._printed < 0 or step - self._printed >= max(1, self._total // 10) or step == self._total

    def pace(self, seconds: float, left: int) -> None:
        """Say how long the steps that are left take: always if that is days, else where no bar shows it."""
        if self.console is None or (self._progress is not None and seconds * left < _LONG):
            return
        rest = duration(seconds * left)
        told = f"{self.label}: a step takes {seconds:.2g} s, and the {left:,} that are left about {rest}."
        further = " Ctrl-C ends the run; --steps or --epochs make it shorter." if seconds * left >= _LONG else ""
        self.console.print(told + further, highlight=False, markup=False, soft_wrap=True)

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
