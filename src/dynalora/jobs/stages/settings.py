"""The settings of the experiments in stages: forgetting, recovery and transfer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from dynalora.errors import ConfigError
from dynalora.forgetting.defaults import PAPER_TAU, STRATEGIES
from dynalora.lab.choices import method_names
from dynalora.lab.lab_settings import MEASURING, MODEL_AND_DATA, RUN, AdapterSettings, LabSettings
from dynalora.lab.settings import Setting, Settings
from dynalora.lab.training.settings import BestSettings, OptimizerSettings

if TYPE_CHECKING:
    from peft import PeftConfig

_METHOD, _TRAINING, _RECOVERY = "Method", "Training", "Recovery"


@dataclass(frozen=True, kw_only=True)
class StagedSettings(AdapterSettings, LabSettings, OptimizerSettings, BestSettings, panel=RUN):
    """What forgetting and transfer share: adapters that are trained for a number of steps, task after task.

    Attributes:
        output: Write the run into this folder, which must be new or empty.
        seeds: Repeat everything this many times, with the seeds `seed`, `seed` + 1 and so on.
        log_every: Write a log line every so many optimizer steps; None: a hundredth of the run.
        resume: Continue the killed run in the run folder.
    """

    unused: ClassVar[Mapping[str, Any]] = {"epochs": 1.0, "eval_every": None, "save_every": None}

    output: Annotated[str, Setting("-o", panel=MODEL_AND_DATA, home=True)]
    steps: int | None = 60
    seeds: Annotated[int, Setting(least=1)] = 1
    log_every: Annotated[int | None, Setting(least=1)] = None
    resume: Annotated[bool, Setting(recorded=False)] = False

    def _check(self) -> None:
        super()._check()
        if self.steps is None:
            raise ConfigError("steps is missing; give the number of optimizer steps.")


@dataclass(frozen=True, kw_only=True)
class ForgettingSpec(StagedSettings, panel=MODEL_AND_DATA):
    """The two tasks of `dynalora forgetting`, and how its three stages are trained and measured.

    Attributes:
        task_a: Learn this task, forget it, and learn it again. See [`dynalora.lab.tasks`][dynalora.lab.tasks].
        task_b: Learn this task in between, which makes Task A forgotten.
        method: Train an adapter of this method.
        method_options: Set a further field of the method's configuration; give the flag again for more.
        steps_b: Train on Task B for this many optimizer steps; None: as many as on Task A.
        steps_recovered: Train on Task A the second time for this many optimizer steps; None: as many as the first time.
        tau: Count singular values of s·ΔW above this threshold as effective rank.
        ablation: Measure Task A after the first stage also without the updates of the first and of the second half of
            the layers, as in DiRA's appendix B.3.
    """

    task_a: str
    task_b: str
    method: Annotated[str, Setting(suggested=method_names, panel=_METHOD)] = "dira"
    method_options: Annotated[
        dict[str, Any], Setting("-O", name="--option", metavar="NAME=VALUE", merge=True, panel=_METHOD)
    ] = field(default_factory=dict)
    steps_b: Annotated[int | None, Setting(least=1, panel=_TRAINING)] = None
    steps_recovered: Annotated[int | None, Setting(least=1, panel=_TRAINING)] = None
    tau: Annotated[float, Setting(least=0, panel=MEASURING)] = PAPER_TAU
    ablation: Annotated[bool, Setting(panel=MEASURING)] = False

    def _check(self) -> None:
        super()._check()
        if self.task_a == self.task_b:
            raise ConfigError(f"task_a and task_b are both '{self.task_a}'; give two different tasks.")

    def config(self) -> PeftConfig:
        """A fresh adapter's configuration.

        Raises:
            ConfigError: The method or one of its settings, or the update's ranks cannot be measured.
        """
        from dynalora.lab.baselines import BASELINES
        from dynalora.lab.configs import adapter_config

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
class RecoverSpec(Settings, like=LabSettings, absent="SOURCE's", panel=_RECOVERY):
    """From which adapters `dynalora recover` starts, and how it brings Task A back.

    Model, data and measuring are as in [`LabSettings`][dynalora.lab.lab_settings.LabSettings]; what is None there is
    taken from the source run.

    Attributes:
        source: Recover from this run folder of `dynalora forgetting`, or from an adapter that was trained on Task A and
            then on Task B.
        output: Write the run into this folder, which must be new or empty.
        initial: Take the rank landscape from this adapter, saved after Task A, where SOURCE is an adapter.
        task_a: Recover what was learned of this task; None: SOURCE's. See [`dynalora.lab.tasks`][dynalora.lab.tasks].
        task_b: Measure this other task, too; None: SOURCE's.
        strategies: Recover in these ways: rlgr (guided by the rank landscape), random and naive.
        examples: Train on this many examples of Task A. Every seed draws others.
        batch_size: Process this many examples per optimizer step.
        epochs: Go through the examples this many times.
        learning_rate: Train with this learning rate of AdamW, which is constant.
        weight_decay: Pull weights towards 0 with this weight decay of AdamW, which never applies to gates.
        max_grad_norm: Scale gradients down whose norm is above this value; 0: never.
        tau: Say that a matrix has low rank if at most one singular value of s·ΔW after Task A is above this threshold.
        seed: Draw the examples of the first recovery from this seed.
        seeds: Repeat every strategy with this many seeds on each checkpoint: `seed`, `seed` + 1 and so on.
        checkpoints: Use this many seeds of the source run, from the first; None: all that have finished Task B.
        resume: Continue the killed run in the run folder.
    """

    source: Annotated[str, Setting(positional=True, metavar="SOURCE", home=True)]
    output: Annotated[str, Setting("-o", panel=MODEL_AND_DATA, home=True)]
    initial: Annotated[str | None, Setting(panel=MODEL_AND_DATA, home=True)] = None
    task_a: Annotated[str | None, Setting(panel=MODEL_AND_DATA)] = None
    task_b: Annotated[str | None, Setting(panel=MODEL_AND_DATA)] = None
    strategies: Annotated[list[str], Setting(commas=True)] = field(default_factory=lambda: list(STRATEGIES))
    examples: Annotated[int, Setting("-n", least=1)] = 8
    batch_size: Annotated[int, Setting("-b", least=1)] = 8
    epochs: Annotated[int, Setting(least=1)] = 2
    learning_rate: Annotated[float, Setting("--lr", above=0)] = 1e-4
    weight_decay: Annotated[float, Setting(least=0)] = 0.0
    max_grad_norm: Annotated[float, Setting(least=0)] = 1.0
    tau: Annotated[float, Setting(least=0)] = PAPER_TAU
    seed: Annotated[int, Setting(least=0, most=2**32 - 1, panel=RUN)] = 0
    seeds: Annotated[int, Setting(least=1, panel=RUN)] = 5
    checkpoints: Annotated[int | None, Setting(least=1)] = None
    model: str | None = None
    data: str | None = None
    held_out: int | None = None
    train_limit: int | None = None
    generated: int | None = None
    generated_tokens: int | None = None
    beams: int | None = None
    max_length: int | None = None
    eval_batch_size: int | None = None
    system: str | None = None
    template: str | None = None
    by_generation: bool | None = None
    run_code: bool | None = None
    data_seed: int | None = None
    dtype: str | None = None
    threads: int | None = None
    resume: Annotated[bool, Setting(panel=RUN, recorded=False)] = False

    def _check(self) -> None:
        super()._check()
        unknown = [name for name in self.strategies if name not in STRATEGIES]
        if unknown or not self.strategies or len(set(self.strategies)) < len(self.strategies):
            value = f"'{unknown[0]}'" if unknown else (", ".join(self.strategies) or "empty")
            raise ConfigError(f"strategies is {value}; name some of {', '.join(STRATEGIES)}, each at most once.")

    @property
    def run_seeds(self) -> range:
        """The seeds of the recoveries."""
        return range(self.seed, self.seed + self.seeds)


@dataclass(frozen=True, kw_only=True)
class TransferSpec(StagedSettings, panel=MODEL_AND_DATA):
    """The tasks and methods of `dynalora transfer`.

    Attributes:
        tasks: Train on each of these tasks, and measure on all of them; give at least two. See
            [`dynalora.lab.tasks`][dynalora.lab.tasks].
        methods: Compare these methods; lora is PEFT's LoRA.
        method_options: Set a further field of a method's configuration, by method and name, such as
            dira.penalty_weight.
    """

    tasks: Annotated[list[str], Setting(name="--task")]
    methods: Annotated[list[str], Setting(commas=True, panel=_METHOD)] = field(default_factory=lambda: ["lora", "dira"])
    method_options: Annotated[
        dict[str, Any], Setting("-O", name="--option", metavar="METHOD.NAME=VALUE", merge=True, panel=_METHOD)
    ] = field(default_factory=dict)

    def _check(self) -> None:
        super()._check()
        for name, least in (("tasks", 2), ("methods", 1)):
            values = getattr(self, name)
            if len(set(values)) < max(least, len(values)):
                raise ConfigError(
                    f"{name} is {', '.join(values) or 'empty'}; name at least {least}, each at most once."
                )
        wrong = [name for name in self.method_options if name.partition(".")[0] not in self.methods]
        if wrong:
            raise ConfigError(
                f"The method option '{wrong[0]}' belongs to none of {', '.join(self.methods)}; "
                "write METHOD.NAME, such as dira.penalty_weight."
            )

    def config(self, method: str) -> PeftConfig:
        """A fresh adapter's configuration.

        Raises:
            ConfigError: The method or one of its settings.
        """
        from dynalora.lab.configs import adapter_config

        options = {
            name.partition(".")[2]: value
            for name, value in self.method_options.items()
            if name.partition(".")[0] == method
        }
        return adapter_config(
            method, r=self.r, alpha=self.alpha, dropout=self.dropout, target_modules=self.target_modules,
            options=options,
        )  # fmt: skip
