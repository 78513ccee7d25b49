"""How to train."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from dynalora.errors import ConfigError
from dynalora.lab.choices import KEEP_BEST
from dynalora.lab.settings import SEED, Setting, Settings

SCHEDULES = ("cosine", "linear", "constant_with_warmup")
TRACKERS = ("wandb", "trackio", "mlflow", "tensorboard")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Settings, panel="Training"):
    """Settings that every training has. The optimizer is AdamW (0.9, 0.999, 1e-8).

    Attributes:
        steps: Train for this many optimizer steps; None: as many as the epochs need.
        learning_rate: Let the learning rate of AdamW rise to this value, from which the schedule lowers it.
        schedule: Choose how the learning rate goes on after warm-up: cosine and linear end at 0, constant_with_warmup
            stays.
        warmup: Raise the learning rate from 0 during this part of the steps, such as 0.03 for 3 % of them.
        weight_decay: Pull weights towards 0 with this weight decay of AdamW, which never applies to biases, norms and
            gates.
        batch_size: Process this many sequences at once on each device. A smaller number takes less memory.
        gradient_accumulation: Add up the gradients of this many batches before each optimizer step, which trains like a
            larger batch without its memory.
        max_grad_norm: Scale gradients down whose norm is above this value; 0: never.
        seed: Draw the adapter's start, the order of the data and dropout from this seed. The same seed gives the same
            run.
        gradient_checkpointing: Recompute activations in the backward pass, which takes less memory and about a third
            more time.
        bf16: Compute in bfloat16 where that is safe (autocast) while training. The weights keep their data type.
        loss_on_prompts: Train on the prompts' tokens, too, as LLM-Adapters does, and not on the answers alone. For
            causal models only. The loss that is measured stays that of the answers.
    """

    steps: Annotated[int | None, Setting(least=1)] = None
    learning_rate: Annotated[float, Setting("--lr", above=0)] = 2e-4
    schedule: Annotated[str, Setting(choices=SCHEDULES)] = "cosine"
    warmup: Annotated[float, Setting(least=0, below=1)] = 0.03
    weight_decay: Annotated[float, Setting(least=0)] = 0.0
    batch_size: Annotated[int, Setting("-b", least=1)] = 8
    gradient_accumulation: Annotated[int, Setting(least=1)] = 1
    max_grad_norm: Annotated[float, Setting(least=0)] = 1.0
    seed: Annotated[int, SEED] = 42
    gradient_checkpointing: bool = False
    bf16: bool = False
    loss_on_prompts: bool = False


@dataclass(frozen=True, kw_only=True)
class BestSettings(Settings, panel="Training"):
    """Which weights of a run count, where tasks are measured.

    Attributes:
        keep_best: End with the best of the weights that are measured during training, instead of the last: those of the
            lowest loss or the highest accuracy on the training questions set aside (`validation`), or of the highest
            accuracy on the held-out ones, which then no longer judge alone; None: the last.
        validation: Set this many training questions of each task aside, to choose on.
        measure_every: Make the measurements that choose the best weights every so many optimizer steps; below 1 this is
            a part of the run. There is one at the end besides.
    """

    keep_best: Annotated[str | None, Setting(choices=KEEP_BEST)] = None
    validation: Annotated[int, Setting(least=0)] = 0
    measure_every: Annotated[float, Setting(above=0)] = 0.1

    def _check(self) -> None:
        super()._check()
        if self.measure_every > 1 and self.measure_every != int(self.measure_every):
            raise ConfigError(
                f"measure_every is {self.measure_every:g}; give a whole number of steps, or a part of the run below 1."
            )
        if self.keep_best is not None and self.keep_best.startswith("validation") and not self.validation:
            raise ConfigError(
                f"keep_best is '{self.keep_best}', and no questions are set aside; set `validation` to their number."
            )


@dataclass(frozen=True, kw_only=True)
class TrainSettings(OptimizerSettings, panel="Run"):
    """How to train one adapter, with what is measured and saved on the way.

    Attributes:
        epochs: Go through the training data this many times, where no steps are given.
        log_every: Log the loss every so many optimizer steps; None: a hundredth of the run.
        eval_every: Measure the held-out loss every so many optimizer steps; None: a fifth of the run; 0: only before
            and after.
        early_stopping: Stop the run when so many measurements of the held-out loss in a row brought no new lowest one;
            None: never.
        save_every: Save a checkpoint, from which a killed run is resumed, every so many optimizer steps; None: a tenth
            of the run; 0: none.
        report_to: Send the losses to these experiment trackers while training. They are set up by their own environment
            variables; tensorboard writes into the run folder.
    """

    epochs: Annotated[float, Setting(above=0, panel="Training", instead_of="steps")] = 1.0
    log_every: Annotated[int | None, Setting(least=1)] = None
    eval_every: Annotated[int | None, Setting(least=0)] = None
    early_stopping: Annotated[int | None, Setting(least=1)] = None
    save_every: Annotated[int | None, Setting(least=0)] = None
    report_to: Annotated[list[str], Setting(commas=True, choices=TRACKERS, recorded=False)] = field(
        default_factory=list
    )

    def _check(self) -> None:
        super()._check()
        if self.steps is not None and self.epochs != TrainSettings.epochs:
            raise ConfigError(
                f"steps is {self.steps} and epochs is {self.epochs:g}, but each says how long to train; give one of "
                "them."
            )


def train_settings(spec: OptimizerSettings, **changes: Any) -> TrainSettings:
    """The settings of one training run: a job's, as far as a run has them, with some changed."""
    names = [item.name for item in fields(TrainSettings)]
    values = {name: getattr(spec, name) for name in names if hasattr(spec, name)}
    return TrainSettings(**{**values, **changes})
