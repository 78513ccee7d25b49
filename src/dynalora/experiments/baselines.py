"""PEFT's own methods, to compare with: how each is configured by name, and what must be called while it trains.

AdaLoRA is the reason for the second part: without a call of its `update_and_allocate` after every optimizer step it
trains as plain LoRA in the form of an SVD, and says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import peft
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import TrainerCallback

from dynalora.errors import ScheduleError

__all__ = ["BASELINES", "Baseline", "DriveBaseline", "driver_of"]

# AdaLoRA's schedule where none is given, as parts of the run: ranks are cut from the first to the second.
_ADALORA_START, _ADALORA_END, _ADALORA_CUTS = 0.1, 0.7, 20


@dataclass(frozen=True)
class Baseline:
    """One of PEFT's methods.

    Attributes:
        title: its name as its paper writes it.
        config: the class of its configuration.
        alpha_per_rank: alpha, where none is given, as a multiple of the rank.
        options: fields that make the method what it is.
        rank: the field of the rank.
        edits_base: whether it changes the base weights, so that disabling the adapter does not give the base model.
        more: further fields by rank.
    """

    title: str
    config: type[PeftConfig]
    alpha_per_rank: float
    options: Mapping[str, Any] = field(default_factory=dict)
    rank: str = "r"
    edits_base: bool = False
    more: Callable[[int], dict[str, Any]] = lambda r: {}

    def fields(self, r: int, alpha: float | None, dropout: float) -> dict[str, Any]:
        """Fields of the configuration for a rank, a scaling alpha / r and a dropout on the adapter's input."""
        chosen = self.alpha_per_rank * r if alpha is None else alpha
        return {
            self.rank: r,
            "lora_alpha": int(chosen) if chosen == int(chosen) else chosen,
            "lora_dropout": dropout,
            **self.more(r),
            **self.options,
        }


BASELINES: dict[str, Baseline] = {
    "lora": Baseline("LoRA", peft.LoraConfig, alpha_per_rank=2),
    "rslora": Baseline("rsLoRA", peft.LoraConfig, alpha_per_rank=1, options={"use_rslora": True}),
    "dora": Baseline("DoRA", peft.LoraConfig, alpha_per_rank=2, options={"use_dora": True}),
    # Its factors start at the length of the weight's own singular values.
    "pissa": Baseline(
        "PiSSA",
        peft.LoraConfig,
        alpha_per_rank=1,
        options={"init_lora_weights": "pissa"},
        edits_base=True,
    ),
    # total_step is set when training begins and its length is known; PEFT asks for a number before that.
    "adalora": Baseline(
        "AdaLoRA",
        peft.AdaLoraConfig,
        alpha_per_rank=2,
        rank="target_r",
        options={"total_step": 2**31},
        more=lambda r: {"init_r": round(1.5 * r)},
    ),
}


def driver_of(model: nn.Module, total_steps: int) -> Callable[[int], None] | None:
    """What must be called after every optimizer step and before the gradients are cleared.

    AdaLoRA's own fields `tinit`, `tfinal` (steps before the first and after the last cut) and `deltaT` (steps between)
    are kept where any is given; else ranks are cut from 10 % to 70 % of the run, about 20 times.

    Args:
        model: A model with an adapter.
        total_steps: Optimizer steps of the run.

    Returns:
        A function of the number of steps done before, or None if the method needs nothing.

    Raises:
        ScheduleError: The run is too short for AdaLoRA's schedule.
    """
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    if not isinstance(config, peft.AdaLoraConfig):
        return None
    if (config.tinit, config.tfinal, config.deltaT) == (0, 0, 1):
        config.tinit = round(_ADALORA_START * total_steps)
        config.tfinal = total_steps - round(_ADALORA_END * total_steps)
        config.deltaT = max(1, (total_steps - config.tfinal - config.tinit) // _ADALORA_CUTS)
    config.total_step = total_steps
    if config.tinit >= total_steps - config.tfinal:
        raise ScheduleError(
            f"AdaLoRA with tinit={config.tinit} and tfinal={config.tfinal} has no step to cut ranks at in a run of "
            f"{total_steps} optimizer steps; train longer, or lower tinit and tfinal."
        )
    tuner: Any = model.base_model
    return cast("Callable[[int], None]", tuner.update_and_allocate)


class DriveBaseline(TrainerCallback):
    """Calls what `driver_of` returns, under transformers' Trainer."""

    def __init__(self) -> None:
        self._driver: Callable[[int], None] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        """The length of the run is known."""
        self._driver = driver_of(getattr(model, "module", model), state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """The weights have moved, and the gradients are still there."""
        if self._driver is not None:
            self._driver(state.global_step)
