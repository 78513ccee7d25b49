"""Settings of `dynalora demo`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from dynalora.errors import ConfigError
from dynalora.lab.choices import MOST_RANK
from dynalora.lab.lab_settings import MEASURING, MODEL_AND_DATA, RUN
from dynalora.lab.settings import Setting
from dynalora.lab.training.settings import OptimizerSettings

_METHOD = "Method"


@dataclass(frozen=True, kw_only=True)
class DemoSpec(OptimizerSettings, panel=MODEL_AND_DATA):
    """What the demo does. Every setting has a default, and the defaults take a few minutes on two cores.

    Attributes:
        output: Run folder, new or empty; None: runs/demo, or the first of runs/demo-2, runs/demo-3 … that is free.
        model: Id of another causal language model on the Hugging Face Hub, or a folder that holds one; None:
            SmolLM2-135M-Instruct.
        methods: Methods to compare, in this order, with commas; lora is PEFT's LoRA.
        r: Rank of every adapter.
        alpha: Numerator of the scale alpha / rank of every update; None: each method's default.
        target_modules: Modules to adapt: names, a regular expression, or all-linear.
        retain: Weight of keeping what the base model says, for dynalora's own methods. Write null in a settings file to
            switch it off.
        gate_bias_init: Start of DISeL's gate biases.
        task: Another task of reasoning-gym; None: the demo's own.
        task_options: Options of the task's generator, which are given only together with a task.
        system: System message of every question; None: a short one for the demo's own model, none for others.
        held_out: Number of held-out questions.
        shots: Number of solved training questions that the base model is shown before each held-out one, in a second
            measurement of it that is fair to it; fewer where they do not fit into the model's window, and 0: no second
            measurement.
        retention_texts: Number of texts that the base model writes for measuring retention.
        retention_tokens: Longest of these texts, in tokens.
        log_every: Number of optimizer steps between log lines; None: a hundredth of the run.
    """

    unused: ClassVar[Mapping[str, Any]] = {"epochs": 1.0, "eval_every": 0, "save_every": 0}

    output: Annotated[str | None, Setting("-o", recorded=False)] = None
    model: Annotated[str | None, Setting("-m", place=True)] = None
    methods: Annotated[list[str], Setting(commas=True, panel=_METHOD)] = field(default_factory=lambda: ["dira", "lora"])
    r: Annotated[int, Setting("-r", name="--rank", least=1, most=MOST_RANK, panel=_METHOD)] = 16
    alpha: Annotated[float | None, Setting(above=0, panel=_METHOD)] = None
    target_modules: Annotated[list[str] | str, Setting("-t", panel=_METHOD)] = "all-linear"
    retain: Annotated[float | None, Setting(panel=_METHOD)] = 3000.0
    gate_bias_init: Annotated[float, Setting(panel=_METHOD)] = -3.0
    task: str | None = None
    task_options: Annotated[dict[str, Any], Setting(metavar="NAME=VALUE", merge=True)] = field(default_factory=dict)
    system: str | None = None
    held_out: Annotated[int, Setting(least=1, panel=MEASURING)] = 200
    shots: Annotated[int, Setting(least=0, panel=MEASURING)] = 2
    retention_texts: Annotated[int, Setting(least=1, panel=MEASURING)] = 32
    retention_tokens: Annotated[int, Setting(least=1, panel=MEASURING)] = 48

    steps: int | None = 40
    learning_rate: float = 1e-3
    warmup: float = 0.1
    log_every: Annotated[int | None, Setting(least=1, panel=RUN)] = 1

    def _check(self) -> None:
        super()._check()
        if self.steps is None:
            raise ConfigError("steps is missing; give the number of optimizer steps.")
        if not self.methods:
            raise ConfigError("methods is empty; name at least one.")
        twice = {name for name in self.methods if self.methods.count(name) > 1}
        if twice:
            raise ConfigError(f"methods lists {', '.join(sorted(twice))} more than once; name each at most once.")
        if self.task is None and self.task_options:
            raise ConfigError("task_options are given without a task; name the task they belong to.")
