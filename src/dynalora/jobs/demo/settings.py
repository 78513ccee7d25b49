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
        output: Write the run into this folder, which must be new or empty; None: runs/demo, or the first of
            runs/demo-2, runs/demo-3 … that is free.
        model: Fine-tune another causal language model: its id on the Hugging Face Hub, or a folder that holds one;
            None: SmolLM2-135M-Instruct.
        methods: Train an adapter with each of these methods, in this order; lora is PEFT's LoRA.
        r: Give every adapter this rank. A higher rank can learn more, and takes more memory.
        alpha: Multiply every update by alpha / rank; None: each method's default.
        target_modules: Adapt these modules: names with commas, a regular expression, or all-linear.
        retain: Weigh the penalty on forgetting, which keeps what the base model says, with this number; PEFT's methods
            have none. Write null in a settings file to switch it off.
        gate_bias_init: Start DISeL's gates at this bias. The lower it is, the less an adapter acts before it has
            learned where to.
        task: Train on another task of reasoning-gym; None: the demo's own.
        task_options: Change an option of the task's generator, which needs `--task`; give the flag again for more.
        system: Begin every question with this system message; None: a short one for the demo's own model, none for
            others.
        held_out: Measure accuracy and loss on this many questions that are not trained on.
        shots: Show the base model this many solved training questions before each held-out one, in a second measurement
            that is fair to it; 0: no second measurement. It is shown fewer where they do not fit into its window.
        retention_texts: Measure forgetting on this many texts, which the base model writes itself.
        retention_tokens: End these texts after so many tokens.
        log_every: Log the loss every so many optimizer steps; None: a hundredth of the run.
    """

    unused: ClassVar[Mapping[str, Any]] = {"epochs": 1.0, "eval_every": 0, "save_every": 0}

    output: Annotated[str | None, Setting("-o", recorded=False, home=True)] = None
    model: Annotated[str | None, Setting("-m", place=True)] = None
    methods: Annotated[list[str], Setting(commas=True, panel=_METHOD)] = field(default_factory=lambda: ["dira", "lora"])
    r: Annotated[int, Setting("-r", name="--rank", least=1, most=MOST_RANK, panel=_METHOD)] = 16
    alpha: Annotated[float | None, Setting(above=0, panel=_METHOD)] = None
    target_modules: Annotated[list[str] | str, Setting("-t", panel=_METHOD)] = "all-linear"
    retain: Annotated[float | None, Setting(panel=_METHOD)] = 3000.0
    gate_bias_init: Annotated[float, Setting(panel=_METHOD)] = -3.0
    task: str | None = None
    task_options: Annotated[dict[str, Any], Setting(metavar="NAME=VALUE", merge=True)] = field(default_factory=dict)
    system: Annotated[str | None, Setting(blank=True)] = None
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
        if self.task is None and self.task_options:
            raise ConfigError("task_options are given without a task; name the task they belong to.")
