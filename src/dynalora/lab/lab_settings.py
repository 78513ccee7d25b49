"""Settings of model, data and measuring, which all experiments have."""

from __future__ import annotations

from dataclasses import dataclass

from dynalora.errors import ConfigError
from dynalora.evaluation.kinds.base import Measuring
from dynalora.evaluation.prompts import TEMPLATES
from dynalora.lab.precision import DTYPES
from dynalora.lab.tasks.loading import load_experiment_task
from dynalora.lab.tasks.task import ExperimentTask


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
