"""What the experiments on forgetting share: one base model, several tasks, adapters that go on and come off again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from dynalora.common.progress import Progress, rich_progress
from dynalora.common.statistics import Estimate, Interval, mean_interval
from dynalora.errors import CheckpointError, ConfigError, RunFolderError
from dynalora.evaluation.prompts import TEMPLATES
from dynalora.evaluation.run import within_window
from dynalora.forgetting.landscape import LandscapeRow
from dynalora.jobs.finetune import (
    DTYPES,
    check_targets,
    empty_model,
    load_model,
    load_tokenizer,
    local_model_name,
)
from dynalora.lab import data
from dynalora.lab.tasks import KINDS, ExperimentTask, Measuring, TaskScore, load_experiment_task
from dynalora.lab.training import TrainResult, TrainSettings, take_off, train_adapter

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LANDSCAPE = "landscape.json"
RESULT = "result.json"
ADAPTER = "adapter"


@dataclass(frozen=True, kw_only=True)
class LabSettings:
    """Model, data and measuring.

    Attributes:
        model: Id of a causal language model on the Hugging Face Hub, a folder that holds one, or `smollm2`, the demo's.
        data: Folder with the files of benchmarks, as for `dynalora evaluate`; None: the Hub.
        held_out: Number of held-out questions per task; a file that has fewer gives all of its.
        train_limit: Number of training questions per task; None: all of a file, 1000 of a generated task.
        generated: Number of questions per task that are answered by generation where that must be, which is slow; 0:
            none.
        generated_tokens: Longest generated answer.
        max_length: Longer training questions, in tokens with their answer, are left out.
        eval_batch_size: Questions per forward pass when measuring.
        system: System message of every question; None: what the model's chat template adds by itself.
        template: Prompts in the model's own chat format (`chat`) or a paper's, see
            [`prompts`][dynalora.evaluation.prompts].
        by_generation: Multiple choice is learned and answered in words, and scored by keywords, as LLM-Adapters does;
            False: options are compared by likelihood.
        run_code: Execute the code that the model writes (HumanEval, MBPP), in a sandbox.
        data_seed: Of generated questions. It does not change with the seeds of the runs.
        dtype: Of the base model's weights: `float32`, `bfloat16`, `float16`, or `auto`.
        threads: Threads that torch computes with; None: torch's choice.
    """

    model: str = "smollm2"
    data: str | None = None
    held_out: int = 200
    train_limit: int | None = None
    generated: int = 64
    generated_tokens: int = 256
    max_length: int = 256
    eval_batch_size: int = 8
    system: str | None = None
    template: str = "chat"
    by_generation: bool = False
    run_code: bool = False
    data_seed: int = 0
    dtype: str = "auto"
    threads: int | None = None

    def _check_lab(self) -> None:
        for name in ("held_out", "train_limit", "generated_tokens", "eval_batch_size", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; give a whole number of at least 1.")
        for name in ("generated", "data_seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; give 0 or more.")
        if self.max_length < 2:
            raise ConfigError(f"max_length is {self.max_length}; give at least 2 tokens.")
        if self.template not in ("chat", *TEMPLATES):
            raise ConfigError(
                f"template is '{self.template}'; choose one of {', '.join(['chat', *TEMPLATES])}."
            )
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is '{self.dtype}'; choose one of {', '.join(DTYPES)}.")

    @property
    def measuring(self) -> Measuring:
        """How tasks are measured."""
        return Measuring(
            batch_size=self.eval_batch_size,
            generated=self.generated,
            generated_tokens=self.generated_tokens,
            system=self.system or "",
        )

    def load_task(self, source: str) -> ExperimentTask:
        """A task with as many questions as the settings say."""
        return load_experiment_task(
            source,
            data=self.data,
            held_out=self.held_out,
            train_limit=self.train_limit,
            seed=self.data_seed,
            by_generation=self.by_generation,
            run_code=self.run_code,
        )


class Lab:
    """A base model with its tasks, loaded once for many runs.

    Args:
        settings: Model, data and measuring.
        sources: The tasks, as [`load_experiment_task`][dynalora.lab.tasks.load_experiment_task] names them.
        console: Where progress is shown; None: nowhere.

    Attributes:
        tasks: The tasks by their source, in the order given.

    Raises:
        ConfigError: A task or the model is unknown, or a task is for encoders.
        DataError: A task's files.
    """

    def __init__(self, settings: LabSettings, sources: Sequence[str], console: Console | None = None) -> None:
        self.settings, self.console = settings, console
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.tasks = {source: settings.load_task(source) for source in sources}
        for source, task in self.tasks.items():
            if task.head != "text":
                raise ConfigError(
                    f"The task '{source}' is {KINDS[task.head]}, and language models that say their answers are "
                    "trained here; choose another, or take `dynalora compare`."
                )
        with rich_progress(console) as progress:
            self._model_path = local_model_name(settings.model, progress=progress)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self._model_path, template=settings.template)
        self._model: PreTrainedModel | None = None
        self._training: dict[str, data.TokenizedSet] = {}

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
        check_targets(empty_model(self._model_path), config)

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
    def collator(self) -> data.Collator:
        """Makes batches of tokenised questions."""
        return data.Collator(self.tokenizer.pad_token_id or 0)

    def training(self, source: str) -> data.TokenizedSet:
        """A task's training questions as tokens."""
        if source not in self._training:
            how = self.settings
            longest = within_window(how.max_length, self.model, self.tokenizer)
            made = self.tasks[source].training(self.tokenizer, system=how.system or "", max_length=longest)
            if made.dropped:
                self.say(
                    f"{self.tasks[source].name}: {made.dropped:,} of {made.dropped + len(made):,} training questions "
                    f"are longer than {longest} tokens and are left out."
                )
            self._training[source] = made
        return self._training[source]

    def measure(self, model: torch.nn.Module, name: str) -> dict[str, TaskScore]:
        """A model's scores on all tasks, by source."""
        with rich_progress(self.console) as progress:
            return {source: self.measure_on(source, model, name, progress) for source in self.tasks}

    def measure_on(self, source: str, model: torch.nn.Module, name: str, progress: Progress) -> TaskScore:
        """A model's score on one task."""
        return self.tasks[source].measure(
            model, self.tokenizer, self.settings.measuring, name=name, progress=progress
        )

    def train(
        self, start: PeftConfig | Path, source: str, how: TrainSettings, *, seed: int, label: str
    ) -> TrainResult:
        """Train an adapter on a task; the result's model is the base model with it, until it is taken off.

        Args:
            start: The configuration of a fresh adapter, or the folder of a saved one to go on with.
            source: The task.
            how: How to train.
            seed: Of the start, the order of the data and dropout.
            label: Name of the run in progress.
        """
        settings = replace(how, seed=seed, eval_every=0, save_every=0)
        model = self.attach(start) if isinstance(start, Path) else self.model
        config = None if isinstance(start, Path) else start
        return train_adapter(
            model, self.tokenizer, config, self.training(source), settings=settings, label=label,
            console=self.console,
        )  # fmt: skip

    def attach(self, folder: Path) -> PeftModel:
        """The base model with a saved adapter, which can be trained on."""
        from peft import PeftModel

        return PeftModel.from_pretrained(self.model, str(folder), is_trainable=True)

    def take_off(self, model: PeftModel) -> None:
        """Give the base model back, unchanged."""
        self._model = take_off(model)


def train_settings(spec: TrainSettings, *, steps: int | None = None) -> TrainSettings:
    """The settings of one training run out of an experiment's.

    Args:
        spec: The experiment's settings.
        steps: Optimizer steps; None: the experiment's own.
    """
    own = {name: getattr(spec, name) for name in TrainSettings.__dataclass_fields__}
    return TrainSettings(**{**own, "steps": steps if steps is not None else spec.steps})


UNUSED = ("epochs", "eval_every", "save_every")
"""Fields of [`TrainSettings`][dynalora.lab.training.TrainSettings] that staged experiments do not have."""


def refuse_unused(spec: TrainSettings) -> None:
    """Do not let a setting be given that nothing looks at.

    Raises:
        ConfigError: One of [`UNUSED`][dynalora.lab.lab.UNUSED] is given.
    """
    for name in UNUSED:
        value = getattr(spec, name)
        if value != TrainSettings.__dataclass_fields__[name].default:
            raise ConfigError(
                f"{name} is {value}, and this experiment does not use it: runs are as long as steps says, and are "
                "measured and kept at their end; leave it out."
            )


# --- what is kept -----------------------------------------------------------------------------------------------


def write_landscape(folder: Path, rows: Sequence[LandscapeRow]) -> None:
    """Keep a landscape with all its singular values."""
    (folder / LANDSCAPE).write_text(json.dumps([asdict(row) for row in rows]) + "\n", encoding="utf-8")


def read_landscape(folder: Path) -> list[LandscapeRow]:
    """A landscape that was kept.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    try:
        rows = json.loads((folder / LANDSCAPE).read_text(encoding="utf-8"))
        return [LandscapeRow(**{**row, "singular_values": tuple(row["singular_values"])}) for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"'{folder / LANDSCAPE}' cannot be read ({type(error).__name__}); run the stage again."
        ) from error


def as_json(content: Mapping[str, Any]) -> str:
    """A result as the text of its file."""
    return json.dumps(content, indent=1) + "\n"


def listing(settings: Mapping[str, Any]) -> str:
    """Settings as YAML, for a report."""
    return yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)


def read_result(path: Path) -> dict[str, Any] | None:
    """The content of a result file; None if there is none.

    Raises:
        RunFolderError: It is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"'{path}' cannot be read ({error}); delete it to measure anew.") from error
    if not isinstance(content, dict):
        raise RunFolderError(f"'{path}' holds no result; delete it to measure anew.")
    return content


# --- numbers over seeds -----------------------------------------------------------------------------------------


def mean_accuracy(records: Sequence[Mapping[str, Any]]) -> Interval | None:
    """Mean accuracy over runs with its 95 % interval: Student's t over the runs; of a single one over its questions.

    Args:
        records: What [`TaskScore.record`][dynalora.lab.tasks.TaskScore] gave, one per run.
    """
    values = [record["accuracy"] for record in records]
    if not values or any(value is None for value in values):
        return None
    if len(records) == 1:
        return Interval(values[0], records[0]["accuracy_low"], records[0]["accuracy_high"])
    mean = mean_interval(values)
    return Interval(mean.value, max(0.0, mean.low), min(1.0, mean.high))


def mean_loss(records: Sequence[Mapping[str, Any]]) -> Interval:
    """Mean loss over runs with its 95 % interval: Student's t; of a single run normal, over its questions."""
    if len(records) == 1:
        return Estimate(records[0]["loss"], records[0]["loss_error"]).interval
    return mean_interval([record["loss"] for record in records])


def percent(interval: Interval | None) -> Interval | None:
    """A share as percent; None stays None."""
    if interval is None:
        return None
    return Interval(100 * interval.value, 100 * interval.low, 100 * interval.high)


def shown_accuracy(interval: Interval | None) -> str | None:
    """An accuracy for a table, in percent."""
    if interval is None:
        return None
    return f"{100 * interval.value:.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def shown_loss(interval: Interval) -> str:
    """A loss for a table."""
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"
