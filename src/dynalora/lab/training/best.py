"""Keep the best weights of a run, and measure at regular steps of it, without changing how it goes on."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import torch
from torch import nn
from transformers import TrainerCallback

from dynalora.common.processes import first_process, from_first
from dynalora.errors import ConfigError, UnsupportedError
from dynalora.forgetting.base_model import adapter_tensors
from dynalora.forgetting.best import BestState, better_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynalora.evaluation.kinds.base import Measuring
    from dynalora.evaluation.results import TaskScore
    from dynalora.lab.tasks.task import ExperimentTask


class KeepBest(TrainerCallback):
    """Puts the weights of the lowest score back at the end of a run; checkpoints hold them for resumed runs.

    Scores come from `consider`, which whoever measures calls.

    Args:
        by_held_out: Whether the run's held-out loss is the score.

    Attributes:
        best: The best state so far; None: nothing was scored.
        scores: All scores of this process's run, as (step, score).
    """

    def __init__(self, *, by_held_out: bool = False) -> None:
        self.by_held_out = by_held_out
        self.best: BestState | None = None
        self.scores: list[tuple[int, float]] = []

    def consider(self, model: nn.Module, step: int, score: float) -> None:
        """Score a model's present weights, lower is better; of equal scores the earlier one stays."""
        score = float(from_first(score))
        self.scores.append((step, score))
        self.best = better_state(self.best, model, step, score)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if any(hasattr(value, "to_local") for value in adapter_tensors(model).values()):
            raise UnsupportedError("keep_best cannot keep weights that are sharded over processes; leave it out.")
        if state.global_step > 0:
            self.best = BestState.load(_checkpoint(args, state))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = _checkpoint(args, state)
        if self.best is not None and first_process() and folder.is_dir():
            self.best.save(folder)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.best is None or self.best.step == state.global_step:
            return
        self.best.put_back(model)
        config = model.active_peft_config if isinstance(model, peft.PeftModel) else None
        if isinstance(config, peft.AdaLoraConfig) and self.best.step < (config.total_step or 0) - config.tfinal:
            config.rank_pattern = None  # the last cut, by which PEFT would save these weights, came later


class AtSteps(TrainerCallback):
    """Does something at regular steps of a run and at its last one; random numbers go on as if it had not.

    Args:
        every: Optimizer steps between, or below 1 the part of the run.
        action: Is given the model and the number of steps done.
    """

    def __init__(self, every: float, action: Callable[[nn.Module, int], None]) -> None:
        self.every, self.action = every, action

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.every < 1:
            self.every = max(1, math.ceil(self.every * state.max_steps))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % int(self.every) == 0 or state.global_step == state.max_steps:
            with randomness_untouched():
                self.action(model, state.global_step)


@contextmanager
def randomness_untouched() -> Iterator[None]:
    """Whatever happens inside, random numbers of Python, NumPy and torch go on as before."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def score_of(by: str, measured: TaskScore, task: str) -> float:
    """The score of weights, lower is better.

    Args:
        by: One of [`KEEP_BEST`][dynalora.lab.choices.KEEP_BEST].
        measured: What they achieved on the questions that this names.
        task: The task's name, for errors.

    Raises:
        ConfigError: The task has no accuracy.
    """
    if by.endswith("loss"):
        return measured.loss.value
    if measured.accuracy is None:
        raise ConfigError(f"keep_best is '{by}', and {task} has no accuracy (or none is generated); choose another.")
    return -measured.accuracy.value


def best_on(
    by: str, part: ExperimentTask, tokenizer: PreTrainedTokenizerBase, how: Measuring, every: float
) -> tuple[KeepBest, AtSteps]:
    """What keeps the best weights of a run, and what measures them at its steps.

    Args:
        by: One of [`KEEP_BEST`][dynalora.lab.choices.KEEP_BEST].
        part: The task, with the questions that this names as its held-out ones.
        tokenizer: The model's.
        how: How tasks are measured.
        every: Optimizer steps between measurements, or below 1 the part of the run.
    """
    best = KeepBest()
    how = replace(how, losses_only=by.endswith("loss"))

    def look(model: nn.Module, step: int) -> None:
        measured = part.measure(model, tokenizer, how, name=f"step {step}")
        best.consider(model, step, score_of(by, measured, part.name))

    return best, AtSteps(every, look)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
