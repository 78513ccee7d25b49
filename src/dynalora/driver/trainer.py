"""The link to transformers' Trainer and everything built on it (TRL, sentence-transformers)."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from dynalora.common.private import add_default_callback
from dynalora.driver.model import check_driven, drivers_of, fill_reference


class DriverCallback(TrainerCallback):
    """Tells the drivers how long the run is, and the user when something does not run.

    It is one of transformers' default callbacks, so no trainer needs to be given it. It forwards only: the schedules
    live with the adapter.
    """

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        if model is not None:
            fill_reference(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        for driver, layers in drivers_of(model) if model is not None else ():
            # A resumed run goes on where the loaded clock stands; any other run starts its schedule anew.
            if any(p.requires_grad for layer in layers for p in layer.adapter_parameters(driver.adapter).values()):
                driver.begin_run(layers[0], state.max_steps, fresh=state.global_step == 0)
                driver.in_trainer = True

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        if model is not None and state.global_step <= 2:  # early, while nothing is lost yet
            check_driven(model, f"after optimizer step {state.global_step}")

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        if model is None:
            return
        for driver, _layers in drivers_of(model):
            driver.in_trainer = False
        check_driven(model, "at the end of training")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        # Reporting callbacks (TensorBoard, W&B, …) come after the default ones and share this dictionary.
        if model is None or logs is None or "loss" not in logs:
            return
        for driver, layers in drivers_of(model):
            moment = driver.moment(layers)
            metrics = driver.method.metrics(moment)
            for part in driver.parts:
                metrics = {**metrics, **part.metrics(moment)}
            for key, value in metrics.items():
                name = key if driver.adapter == "default" else f"{driver.adapter}/{key}"
                logs[name] = value
                if state.log_history:  # what the trainer keeps in trainer_state.json
                    state.log_history[-1][name] = value


def install(callback: type[TrainerCallback] = DriverCallback) -> None:
    """Make a callback one of every Trainer's defaults."""
    add_default_callback(callback)
