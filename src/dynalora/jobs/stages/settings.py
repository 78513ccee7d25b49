"""The settings of the experiments in stages: forgetting, recovery and transfer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from dynalora.errors import ConfigError
from dynalora.forgetting.landscape import PAPER_TAU
from dynalora.forgetting.recovery import STRATEGIES
from dynalora.lab.baselines import BASELINES
from dynalora.lab.configs import adapter_config
from dynalora.lab.lab_settings import LabSettings
from dynalora.lab.training.settings import TrainSettings

if TYPE_CHECKING:
    from peft import PeftConfig


UNUSED = ("epochs", "eval_every", "save_every")
"""Fields of [`TrainSettings`][dynalora.lab.training.settings.TrainSettings] that staged experiments do not have."""


def refuse_unused(spec: TrainSettings) -> None:
    """Do not let a setting be given that nothing looks at.

    Raises:
        ConfigError: One of [`UNUSED`][dynalora.jobs.stages.settings.UNUSED] is given.
    """
    for name in UNUSED:
        value = getattr(spec, name)
        if value != TrainSettings.__dataclass_fields__[name].default:
            raise ConfigError(
                f"{name} is {value}, and this experiment does not use it: runs are as long as steps says, and are "
                "measured and kept at their end; leave it out."
            )


@dataclass(frozen=True, kw_only=True)
class ForgettingSpec(LabSettings, TrainSettings):
    """What `dynalora forgetting` does.

    Attributes:
        task_a: The task that is learned, forgotten and learned again; see
            [`dynalora.lab.tasks`][dynalora.lab.tasks].
        task_b: The task that makes it forgotten.
        output: The run folder, new or empty.
        method: `dira`, any other method, or `lora` (PEFT's LoRA, to compare with).
        r: Rank of the adapter.
        alpha: The update is scaled by alpha / r; None: the method's default (twice the rank for `lora`).
        dropout: On the adapter's input, in [0, 1).
        target_modules: Names of the modules to adapt, a regular expression, or `all-linear`.
        method_options: Further fields of the method's configuration, by name.
        steps: Optimizer steps on Task A.
        steps_b: Optimizer steps on Task B; None: as many as on A.
        steps_recovered: Optimizer steps on Task A the second time; None: as many as the first.
        seeds: Number of runs; their seeds are `seed`, `seed` + 1, …
        tau: Threshold on singular values for effective ranks.
        ablation: Also measure Task A after the first stage without the updates of the first and of the second half of
            the layers (DiRA App. B.3).
        resume: Continue the killed run in `output`.
    """

    task_a: str
    task_b: str
    output: str
    method: str = "dira"
    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"
    method_options: dict[str, Any] = field(default_factory=dict)
    steps: int | None = 60
    steps_b: int | None = None
    steps_recovered: int | None = None
    seeds: int = 1
    tau: float = PAPER_TAU
    ablation: bool = False
    resume: bool = False

    def _check(self) -> None:
        super()._check()
        self._check_lab()
        refuse_unused(self)
        for name in ("steps_b", "steps_recovered"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; give a whole number of at least 1.")
        if self.steps is None:
            raise ConfigError("steps is missing; give the number of optimizer steps.")
        if self.seeds < 1:
            raise ConfigError(f"seeds is {self.seeds}; give the number of runs, at least 1.")
        if not (math.isfinite(self.tau) and self.tau >= 0):
            raise ConfigError(f"tau is {self.tau}; give a number of at least 0.")
        if self.task_a == self.task_b:
            raise ConfigError(f"task_a and task_b are both '{self.task_a}'; give two different tasks.")

    def settings(self) -> dict[str, Any]:
        """What `config.yaml` holds: everything but `resume`, which does not change the result."""
        names = [item.name for item in fields(self) if item.name not in ("resume", *UNUSED)]
        own = [name for name in ForgettingSpec.__annotations__ if name in names]
        return {name: getattr(self, name) for name in [*own, *(n for n in names if n not in own)]}

    def config(self) -> PeftConfig:
        """A fresh adapter's configuration.

        Raises:
            ConfigError: The method or one of its settings, or the update's ranks cannot be measured.
        """
        known = BASELINES.get(self.method.lower())
        if known is not None and not known.has_factors and known.config is not None:
            raise ConfigError(
                f"The update of {known.title} has no factors, so its ranks cannot be measured; choose another method."
            )
        return adapter_config(
            self.method, r=self.r, alpha=self.alpha, dropout=self.dropout, target_modules=self.target_modules,
            options=self.method_options,
        )  # fmt: skip

    @property
    def stage_steps(self) -> dict[str, int]:
        """Optimizer steps by stage."""
        assert self.steps is not None  # checked
        later = {"interference": self.steps_b, "recovered": self.steps_recovered}
        return {"initial": self.steps, **{name: count or self.steps for name, count in later.items()}}


@dataclass(frozen=True, kw_only=True)
class RecoverSpec:
    """What `dynalora recover` does. Settings of model, data and measuring that are None are those of the source run.

    Attributes:
        source: Run folder of `dynalora forgetting`, or an adapter that was trained on Task A and then on Task B.
        output: The run folder, new or empty.
        initial: The adapter after Task A, for its landscape; only where `source` is an adapter.
        task_a: The task to recover; see [`dynalora.lab.tasks`][dynalora.lab.tasks].
        task_b: The other task.
        strategies: Which of `rlgr`, `random` and `naive`.
        examples: Number of examples of Task A; another draw for every seed.
        batch_size: Examples per optimizer step.
        epochs: Passes over the examples.
        learning_rate: Of AdamW, constant.
        weight_decay: Never applied to gates.
        max_grad_norm: Gradients are scaled down to this norm; 0: never.
        tau: A matrix counts as low-rank if at most one singular value of s·ΔW after Task A is above this.
        seed: Of the first recovery.
        seeds: Recoveries per strategy and checkpoint; their seeds are `seed`, `seed` + 1, …
        checkpoints: Use only the first so many seeds of the source run; None: all that have finished Task B.
        model: As in [`LabSettings`][dynalora.lab.lab_settings.LabSettings], as all that follow.
        data: Folder with the files of benchmarks.
        held_out: Number of held-out questions per task.
        train_limit: Number of training questions to draw examples from.
        generated: Number of word problems that are solved by generation.
        generated_tokens: Longest generated solution.
        max_length: Longer training questions are left out.
        eval_batch_size: Questions per forward pass when measuring.
        system: System message of every question.
        template: Prompts in the model's own chat format, or a paper's.
        by_generation: Multiple choice in words instead of by likelihood.
        run_code: Execute the code that the model writes.
        data_seed: Of generated questions.
        dtype: Of the base model's weights.
        threads: Threads that torch computes with.
        resume: Continue the killed run in `output`.
    """

    source: str
    output: str
    initial: str | None = None
    task_a: str | None = None
    task_b: str | None = None
    strategies: list[str] = field(default_factory=lambda: list(STRATEGIES))
    examples: int = 8
    batch_size: int = 8
    epochs: int = 2
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    tau: float = PAPER_TAU
    seed: int = 0
    seeds: int = 5
    checkpoints: int | None = None
    model: str | None = None
    data: str | None = None
    held_out: int | None = None
    train_limit: int | None = None
    generated: int | None = None
    generated_tokens: int | None = None
    max_length: int | None = None
    eval_batch_size: int | None = None
    system: str | None = None
    template: str | None = None
    by_generation: bool | None = None
    run_code: bool | None = None
    data_seed: int | None = None
    dtype: str | None = None
    threads: int | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("examples", "batch_size", "epochs", "seeds", "checkpoints"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; give a whole number of at least 1.")
        for name in ("weight_decay", "max_grad_norm", "tau"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} is {value}; give a number of at least 0.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"learning_rate is {self.learning_rate}; give a number above 0.")
        unknown = [name for name in self.strategies if name not in STRATEGIES]
        if unknown or not self.strategies or len(set(self.strategies)) < len(self.strategies):
            told = f"'{unknown[0]}'" if unknown else (", ".join(self.strategies) or "empty")
            raise ConfigError(
                f"strategies is {told}; name some of {', '.join(STRATEGIES)}, each at most once."
            )

    def settings(self) -> dict[str, Any]:
        """What `config.yaml` holds: everything but `resume`, which does not change the result."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "resume"}

    @property
    def run_seeds(self) -> range:
        """The seeds of the recoveries."""
        return range(self.seed, self.seed + self.seeds)


@dataclass(frozen=True, kw_only=True)
class TransferSpec(LabSettings, TrainSettings):
    """What `dynalora transfer` does.

    Attributes:
        tasks: At least two; see [`dynalora.lab.tasks`][dynalora.lab.tasks].
        output: The run folder, new or empty.
        methods: What to compare; `lora` is PEFT's LoRA.
        r: Rank of every adapter.
        alpha: The update is scaled by alpha / r; None: each method's default.
        target_modules: Names of the modules to adapt, a regular expression, or `all-linear`.
        method_options: Further fields of a method's configuration, by method and name: `dira.penalty_weight`.
        steps: Optimizer steps on each task.
        seeds: Number of runs per cell; their seeds are `seed`, `seed` + 1, …
        resume: Continue the killed run in `output`.
    """

    tasks: list[str]
    output: str
    methods: list[str] = field(default_factory=lambda: ["lora", "dira"])
    r: int = 16
    alpha: float | None = None
    target_modules: list[str] | str = "all-linear"
    method_options: dict[str, Any] = field(default_factory=dict)
    steps: int | None = 60
    seeds: int = 1
    resume: bool = False

    def _check(self) -> None:
        super()._check()
        self._check_lab()
        refuse_unused(self)
        for name, least in (("tasks", 2), ("methods", 1)):
            given = getattr(self, name)
            if len(set(given)) < max(least, len(given)):
                raise ConfigError(
                    f"{name} is {', '.join(given) or 'empty'}; name at least {least}, each at most once."
                )
        if self.steps is None:
            raise ConfigError("steps is missing; give the number of optimizer steps.")
        if self.seeds < 1:
            raise ConfigError(f"seeds is {self.seeds}; give the number of runs, at least 1.")
        wrong = [name for name in self.method_options if name.partition(".")[0] not in self.methods]
        if wrong:
            raise ConfigError(
                f"The method option '{wrong[0]}' belongs to none of {', '.join(self.methods)}; "
                "write METHOD.NAME, such as dira.penalty_weight."
            )

    def settings(self) -> dict[str, Any]:
        """What `config.yaml` holds: everything but `resume`, which does not change the result."""
        names = [item.name for item in fields(self) if item.name not in ("resume", *UNUSED)]
        own = [name for name in TransferSpec.__annotations__ if name in names]
        return {name: getattr(self, name) for name in [*own, *(n for n in names if n not in own)]}

    def config(self, method: str) -> PeftConfig:
        """A fresh adapter's configuration.

        Raises:
            ConfigError: The method or one of its settings.
        """
        options = {
            name.partition(".")[2]: value
            for name, value in self.method_options.items()
            if name.partition(".")[0] == method
        }
        return adapter_config(
            method, r=self.r, alpha=self.alpha, target_modules=self.target_modules, options=options
        )
