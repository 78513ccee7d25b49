"""A base model with its tasks, loaded once for many runs: adapters go on, are trained and measured, and come off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel

from dynalora.common.progress import Progress, rich_progress
from dynalora.errors import ConfigError
from dynalora.evaluation.heads import CAUSAL_LM
from dynalora.evaluation.results import TaskScore
from dynalora.evaluation.tokens import TokenizedSet
from dynalora.evaluation.windows import within_window
from dynalora.lab.configs import check_rank, check_targets
from dynalora.lab.data.collator import Collator
from dynalora.lab.lab_settings import LabSettings
from dynalora.lab.models import empty_model, load_model, load_tokenizer, local_model_name
from dynalora.lab.training.best import best_on
from dynalora.lab.training.settings import BestSettings, TrainSettings
from dynalora.lab.training.train import TrainResult, take_off, train_adapter

if TYPE_CHECKING:
    from peft import PeftConfig
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dynalora.lab.tasks.task import ExperimentTask


class Workbench:
    """A base model with its tasks, loaded once for many runs.

    Args:
        settings: Model, data and measuring.
        sources: The tasks, as [`load_experiment_task`][dynalora.lab.tasks.loading.load_experiment_task] names them.
        console: Where progress is shown; None: nowhere.
        validation: Number of training questions of each task to set aside.

    Attributes:
        tasks: The tasks by their source, in the order given.
        aside: The same with the training questions that are set aside as their held-out ones; none where none are.

    Raises:
        ConfigError: A task or the model is unknown, or a task is for encoders.
        DataError: A task's files.
    """

    def __init__(
        self, settings: LabSettings, sources: Sequence[str], console: Console | None = None, *, validation: int = 0
    ) -> None:
        self.settings, self.console = settings, console
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.tasks = {source: settings.load_task(source) for source in sources}
        self.aside: dict[str, ExperimentTask] = {}
        if validation:
            for source, task in self.tasks.items():
                parts = task.validation(validation, seed=settings.data_seed)
                self.tasks[source], self.aside[source] = parts
        for source, task in self.tasks.items():
            if CAUSAL_LM not in task.heads:
                raise ConfigError(
                    f"The task '{source}' is {task.noun}, and language models that say their answers are "
                    "trained here; choose another, or take `dynalora compare`."
                )
        with rich_progress(console) as progress:
            self._model_path = local_model_name(settings.model, progress=progress)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self._model_path, template=settings.template)
        self._model: PreTrainedModel | None = None
        self._training: dict[str, TokenizedSet] = {}

    def check(self, config: PeftConfig) -> None:
        """Make sure that an adapter fits the model, before its weights are loaded.

        Raises:
            ConfigError: It does not, or it would change the base weights, which later runs start from.
        """
        start = getattr(config, "init_lora_weights", True)
        if not isinstance(start, bool) and start not in ("gaussian", "orthogonal"):
            raise ConfigError(
                f"init_lora_weights '{start}' edits the base weights, from which later runs start; "
                "leave it out or choose gaussian or orthogonal."
            )
        empty = empty_model(self._model_path)
        check_rank(empty, config, check_targets(empty, config))

    @property
    def model(self) -> PreTrainedModel:
        """The base model, without adapters; loaded when first asked for."""
        if self._model is None:
            self.say(f"Loading {self.settings.model} …")
            self._model = load_model(self._model_path, dtype=self.settings.dtype)
            if torch.accelerator.is_available():
                self._model.to(torch.accelerator.current_accelerator())  # type: ignore[arg-type]
        return self._model

    def say(self, line: str) -> None:
        """One line on the console, if there is one."""
        if self.console is not None:
            self.console.print(line, highlight=False, markup=False)

    @property
    def collator(self) -> Collator:
        """Makes batches of tokenised questions."""
        return Collator(self.tokenizer.pad_token_id or 0)

    def training(self, source: str) -> TokenizedSet:
        """A task's training questions as tokens."""
        if source not in self._training:
            settings = self.settings
            longest = within_window(settings.max_length, self.model, self.tokenizer)
            rows = self.tasks[source].training(self.tokenizer, system=settings.system or "", max_length=longest)
            if rows.dropped:
                self.say(
                    f"{self.tasks[source].name}: {rows.dropped:,} of {rows.dropped + len(rows):,} training questions "
                    f"are longer than {longest} tokens and are left out."
                )
            self._training[source] = rows
        return self._training[source]

    def measure(self, model: torch.nn.Module, name: str) -> dict[str, TaskScore]:
        """A model's scores on all tasks, by source."""
        with rich_progress(self.console) as progress:
            return {source: self.measure_on(source, model, name, progress) for source in self.tasks}

    def measure_on(self, source: str, model: torch.nn.Module, name: str, progress: Progress) -> TaskScore:
        """A model's score on one task."""
        return self.tasks[source].measure(model, self.tokenizer, self.settings.measuring, name=name, progress=progress)

    def train(
        self,
        start: PeftConfig | Path,
        source: str,
        how: TrainSettings,
        *,
        seed: int,
        label: str,
        choice: BestSettings | None = None,
    ) -> TrainResult:
        """Train an adapter on a task; the result's model is the base model with it, until it is taken off.

        Args:
            start: The configuration of a fresh adapter, or the folder of a saved one to go on with.
            source: The task.
            how: How to train.
            seed: Of the start, the order of the data and dropout.
            label: Name of the run in progress.
            choice: Which weights the result has; None: the last.
        """
        best = at_steps = None
        if choice is not None and choice.keep_best is not None:
            by = choice.keep_best
            part = self.tasks[source] if by.startswith("held-out") else self.aside[source]
            best, at_steps = best_on(by, part, self.tokenizer, self.settings.measuring, choice.measure_every)
        settings = replace(how, seed=seed, eval_every=0, save_every=0)
        model = self.attach(start) if isinstance(start, Path) else self.model
        config = None if isinstance(start, Path) else start
        return train_adapter(
            model, self.tokenizer, config, self.training(source), settings=settings, label=label,
            console=self.console, best=best, at_steps=at_steps,
        )  # fmt: skip

    def attach(self, folder: Path) -> PeftModel:
        """The base model with a saved adapter, which can be trained on."""
        return PeftModel.from_pretrained(self.model, str(folder), is_trainable=True)

    def take_off(self, model: PeftModel) -> None:
        """Give the base model back, unchanged."""
        self._model = take_off(model)
