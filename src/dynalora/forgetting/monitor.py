"""A callback that measures forgetting during training, and stops a run or chooses its weights by it.

Fine-tuning moves a model away from its base model, which the training loss does not show. The monitor measures the
distance at regular steps: KL(base ‖ tuned) and the loss shift, as [`retention`][dynalora.forgetting.retention] defines
them, on text that the base model wrote itself and on other text that is named.

There is no second model: the base model is the model in training with its adapters switched off. Its predictions on
the texts are computed once, when training begins, so that a measurement costs one forward pass over the texts. A
measurement leaves weights, gradients, random states, modes and `requires_grad` as they were; a run with a monitor
trains bit for bit as it would without.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import TrainerCallback

from dynalora.common.devices import device_of
from dynalora.common.processes import first_process, from_first
from dynalora.common.progress import Progress, silent
from dynalora.errors import ConfigError, UnsupportedError, check_least
from dynalora.forgetting.base_model import adapter_tensors, base_weights
from dynalora.forgetting.best import BestState, better_state
from dynalora.forgetting.curves import RetentionPoint, RetentionPoints, append_points, read_points, write_points
from dynalora.forgetting.defaults import OWN_TEXT as OWN_TEXT
from dynalora.forgetting.retention import BasePredictions, Retention, predictions_within, retention
from dynalora.forgetting.texts import MeasuredText, OwnText, given_text, own_text


class RetentionMonitor(TrainerCallback):
    """Follows KL(base ‖ tuned) and loss shift during training, and keeps forgetting within a budget.

    With transformers' Trainer it is a callback:

    ```python
    Trainer(model, arguments, callbacks=[RetentionMonitor(max_forgetting=0.1)], processing_class=tokenizer, ...)
    ```

    In a loop of your own, `begin` is called before it, and `step` after every optimizer step:

    ```python
    monitor = RetentionMonitor(tokenizer=tokenizer, every=100, max_forgetting=0.1)
    monitor.begin(model)
    for batch in batches:
        ...
        optimizer.step()
        if monitor.step(model):
            break
    monitor.end(model)
    ```

    It works with every adapter of a `PeftModel` that can be switched off. On several processes all of them measure
    the same texts, and the first one's numbers count everywhere, so all stop at the same step.

    Args:
        texts: Further texts by name, as lists of strings or from `given_text`; all of their tokens but the first count.
        own: Text that the base model wrote itself, from `own_text`; True lets it write when training begins (32 texts
            of up to 48 tokens; kept in the user's cache), False does without.
        tokenizer: The model's, for writing and for `texts`. A Trainer's own `processing_class` is used if None.
        every: Optimizer steps between measurements, or below 1 the fraction of a Trainer's run; there is one at the
            start and one at the end besides.
        max_forgetting: KL in nats per token that no text may exceed; None only watches.
        keep_best: False stops the run at the first measurement above `max_forgetting`, with the weights as they are
            then. True lets the run go to its end and then puts back the best weights among those measured under the
            budget (without one, among all): those of the lowest score, or without scores those of the latest step.
        score: Called with the model at measurements under the budget if `keep_best`; lower is better. A Trainer that
            evaluates needs none: its `eval_loss` is taken, at the steps at which it evaluates.
        name: Of the run, in files and plots.
        path: File to which every measurement is appended as a line of JSON; several runs may share one.
        batch_size: Texts per forward pass.
        cache_bytes: Memory for the base model's predictions; what does not fit is computed anew at every measurement.
            They are kept as the model gives them, so that the cache changes no bit of the result: number of tokens ×
            vocabulary × 4 bytes, or 2 for a model in half precision; 300 MB for 1500 tokens and 50,000 words. 1 GiB.
        progress: Called during the base model's first passes.

    Attributes:
        points: All measurements of the run, in order.
        exceeded: The first measurement above `max_forgetting` (the text that forgot most); None if there was none.
        best: The state that is kept with `keep_best`; None before the start.

    Raises:
        ConfigError: A setting has a value that cannot work, or there is no text at all.
    """

    def __init__(
        self,
        texts: Mapping[str, Sequence[str] | MeasuredText] | None = None,
        *,
        own: OwnText | bool = True,
        tokenizer: PreTrainedTokenizerBase | None = None,
        every: float = 50,
        max_forgetting: float | None = None,
        keep_best: bool = False,
        score: Callable[[nn.Module], float] | None = None,
        name: str = "run",
        path: str | os.PathLike[str] | None = None,
        batch_size: int = 8,
        cache_bytes: int = 2**30,
        progress: Progress = silent,
    ) -> None:
        _check(texts, own, every, max_forgetting, keep_best, batch_size, cache_bytes)
        self.texts: dict[str, Sequence[str] | MeasuredText] = dict(texts or {})
        self.own = own
        self.tokenizer = tokenizer
        self.every = every
        self.max_forgetting = max_forgetting
        self.keep_best = keep_best
        self.score = score
        self.name = name
        self.path = None if path is None else Path(path)
        self.batch_size = batch_size
        self.cache_bytes = cache_bytes
        self.progress = progress
        self.points = RetentionPoints()
        self.exceeded: RetentionPoint | None = None
        self.best: BestState | None = None
        self._references: dict[str, BasePredictions] = {}
        self._step = 0
        self._every = int(every)  # 0: a fraction of a run whose length is not known yet
        self._begun = False

    @property
    def forgetting(self) -> float:
        """The largest KL over the texts at the last measurement, in nats per token; 0 before the first."""
        last = (point.retention.kl for point in self.points if point.step == self.points[-1].step)
        return max(last, key=_order, default=0.0)

    @property
    def _within_budget(self) -> bool:
        """Whether the last measurement allows these weights; under a budget, one that is not a number does not."""
        return self.max_forgetting is None or self.forgetting <= self.max_forgetting

    # --- the work -----------------------------------------------------------------------------------------

    def begin(self, model: nn.Module, *, step: int = 0) -> None:
        """Begin a run: write or tokenise the texts, keep the base model's predictions, and measure.

        Args:
            model: The PEFT model that is going to be trained.
            step: Optimizer steps done, if the run is being continued. Measurements after that step are taken again, and
                none is added at it where earlier ones are known.

        Raises:
            ConfigError: There is no tokenizer to make the texts with; weights of the base model are trained too, so
                that there is nothing to compare with; the model has already forgotten more than it may; or the file
                holds another run of this name.
            UnsupportedError: The adapters are merged or cannot be switched off, or weights are sharded and `keep_best`
                is set.
        """
        self._refuse(model)
        self._take_file(step)
        self._reset(step)
        self._look_back()
        texts = self._prepare(model)
        self._references = predictions_within(
            model, texts, self.cache_bytes, batch_size=self.batch_size, progress=self.progress
        )
        self._begun = True
        if not self.points:
            self._measure(model)
        if self.exceeded is not None and step == 0:
            raise ConfigError(
                f"The model is at {self.exceeded.retention.kl:.4g} nats per token from its base on "
                f"'{self.exceeded.text}' before training, above max_forgetting ({self.max_forgetting:g}); raise it, or "
                "begin with a fresh adapter."
            )

    def step(self, model: nn.Module) -> bool:
        """Count one optimizer step of a loop of your own, and measure when it is time to.

        Returns:
            Whether to stop, because more was forgotten than `max_forgetting`; never with `keep_best`.

        Raises:
            ConfigError: `begin` was not called.
        """
        if not self._begun:
            raise ConfigError("The monitor has not begun; call begin(model) before the first optimizer step.")
        self._step += 1
        if self._step % self._every == 0:
            self._measure(model)
        return self.stopping

    @property
    def stopping(self) -> bool:
        """Whether the run is to end, because more was forgotten than it may."""
        return self.exceeded is not None and not self.keep_best

    def end(self, model: nn.Module) -> None:
        """Close a run: measure unless that was just done, and with `keep_best` put the best weights back."""
        if not self._begun:
            return
        if not self.points or self.points[-1].step != self._step:
            self._measure(model)
        if self.keep_best:
            self.restore_best(model)
        self._begun = False
        self._references = {}

    def restore_best(self, model: nn.Module) -> None:
        """Put the best weights under the budget back into the model; without any, the model stays as it is."""
        if self.best is None:
            warnings.warn(
                f"no state within max_forgetting ({self.max_forgetting}) was kept, so the weights stay as they are.",
                stacklevel=2,
            )
            return
        if self.best.step != self._step:
            self.best.put_back(model)

    def _refuse(self, model: nn.Module) -> None:
        """Refuse a model that cannot be compared with its base."""
        if self._every < 1:
            raise ConfigError(f"every={self.every} is a fraction of a Trainer's run; give a number of steps here.")
        trained = next((name for name, value in base_weights(model) if value.requires_grad), None)
        if trained is not None:
            raise ConfigError(
                f"The base model's weight '{trained}' is trained too, so what the base model says will be lost; "
                "train adapters only, or do without the monitor."
            )
        if self.keep_best and any(hasattr(value, "to_local") for value in adapter_tensors(model).values()):
            raise UnsupportedError(
                "keep_best cannot keep weights that are sharded over processes; use keep_best=False."
            )

    def _reset(self, step: int) -> None:
        self._step, self.exceeded = step, None
        if step == 0:
            self.best = None

    def _look_back(self) -> None:
        """See whether the run that is being continued had forgotten too much."""
        over = [point for point in self.points if not point.retention.kl <= (self.max_forgetting or math.inf)]
        first = [point for point in over if point.step == over[0].step]
        self.exceeded = max(first, key=lambda point: _order(point.retention.kl), default=None)

    def _prepare(self, model: nn.Module) -> dict[str, MeasuredText]:
        texts: dict[str, MeasuredText] = {}
        needs = self.own is True or any(not isinstance(text, MeasuredText) for text in self.texts.values())
        if needs and self.tokenizer is None:
            raise ConfigError(
                "The monitor's texts have to be tokenised; pass RetentionMonitor(tokenizer=...), or the Trainer's "
                "processing_class."
            )
        if isinstance(self.own, OwnText):
            texts[OWN_TEXT] = self.own
        elif self.own:
            assert self.tokenizer is not None
            texts[OWN_TEXT] = from_first(own_text(model, self.tokenizer, progress=self.progress))
        for name, text in self.texts.items():
            if not isinstance(text, MeasuredText):
                assert self.tokenizer is not None
                text = given_text(text, self.tokenizer)
            texts[name] = text
        return texts

    def _measure(self, model: nn.Module) -> None:
        """Measure on all texts without touching the random state, write it down, and see whether it is too much."""
        device = device_of(model)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            measured: list[tuple[str, Retention, float]] = []
            for name, reference in self._references.items():
                began = time.perf_counter()
                value = retention(model, reference.text, base=reference, batch_size=self.batch_size)
                measured.append((name, value, time.perf_counter() - began))
            new = [RetentionPoint(self.name, self._step, *values) for values in from_first(measured)]
            self.points.extend(new)
            if self.path is not None and first_process():
                append_points(self.path, new)
            self._judge(model, new)

    def _judge(self, model: nn.Module, new: Sequence[RetentionPoint]) -> None:
        """See whether too much was forgotten, and if not whether this is the state to keep."""
        if not self._within_budget:
            if self.exceeded is None:
                self.exceeded = max(new, key=lambda point: _order(point.retention.kl))
        elif self.keep_best:
            self._consider(model, None if self.score is None else float(self.score(model)))

    def _consider(self, model: nn.Module, score: float | None) -> None:
        """Keep the model's present state if it is better than the one kept; any score is better than none."""
        self.best = better_state(self.best, model, self._step, from_first(score), self.forgetting)

    # --- files --------------------------------------------------------------------------------------------

    def _take_file(self, step: int) -> None:
        """Make the file ready: drop what this run is going to measure again, and leave other runs as they are."""
        again = bool(self.points)

        def stays(point: RetentionPoint) -> bool:
            return step > 0 and point.step <= step

        self.points = RetentionPoints(point for point in self.points if stays(point))
        if self.path is None:
            return
        if first_process():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            before = read_points(self.path) if self.path.exists() else []
            if step == 0 and not again and any(point.run == self.name for point in before):
                raise ConfigError(
                    f"'{self.path}' holds a run named '{self.name}' already; give the monitor another name or path."
                )
            if not self.points:
                self.points = RetentionPoints(point for point in before if point.run == self.name and stays(point))
            kept = [point for point in before if point.run != self.name or stays(point)]
            # A line that a kill cut short must not be continued by the next one.
            content = self.path.read_bytes() if self.path.exists() else b""
            cut = bool(content) and not content.endswith(b"\n")
            if cut or len(kept) < len(before):
                write_points(self.path, kept)
        self.points = from_first(self.points)

    # --- transformers' Trainer ----------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        if model is None:
            return
        if self.tokenizer is None:
            self.tokenizer = more.get("processing_class")
        if self.every < 1:
            self._every = max(1, math.ceil(self.every * state.max_steps))
        if self.keep_best and state.global_step > 0:
            self.best = BestState.load(_checkpoint(args, state)) or self.best
        self.begin(model, step=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        if model is None:
            return
        self._step = state.global_step
        if self._step % self._every == 0 or self._step == state.max_steps:
            self._measure(model)
        if self.stopping:
            control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        scored = self._begun and self.keep_best and self.score is None
        if model is None or not scored:
            return
        if self.points[-1].step != self._step:
            self._measure(model)
        if self._within_budget:
            loss = (more.get("metrics") or {}).get("eval_loss")
            self._consider(model, None if loss is None else float(loss))

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        folder = _checkpoint(args, state)
        if self.keep_best and self.best is not None and first_process() and folder.is_dir():
            self.best.save(folder)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        if model is not None:
            self.end(model)


def _check(
    texts: Mapping[str, Sequence[str] | MeasuredText] | None,
    own: OwnText | bool,
    every: float,
    max_forgetting: float | None,
    keep_best: bool,
    batch_size: int,
    cache_bytes: int,
) -> None:
    """Refuse settings that cannot work."""
    check_least(1, batch_size=batch_size)
    check_least(0, cache_bytes=cache_bytes)
    if not every > 0 or (every > 1 and every != int(every)):
        raise ConfigError(f"every is {every}; give a whole number of steps, or a fraction of the run below 1.")
    if max_forgetting is not None and not (math.isfinite(max_forgetting) and max_forgetting > 0):
        raise ConfigError(f"max_forgetting is {max_forgetting}; give nats per token, above 0.")
    if own is False and not texts:
        raise ConfigError("There is no text to monitor; leave own=True, or name texts.")
    if OWN_TEXT in (texts or {}):
        raise ConfigError(f"'{OWN_TEXT}' is the name of the base model's own text; name yours otherwise.")


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _order(value: float) -> float:
    """What not-a-number is compared as: larger than everything."""
    return math.inf if math.isnan(value) else value
