"""What makes adapters drive themselves, under any trainer.

Methods act around optimizer steps: they add to gradients, count steps for their schedules, change ranks. No trainer
knows of this, so the adapters find out by themselves. `hooks` is called by torch before and after every step of every
optimizer, looks up in `registry` which adapters the optimizer owns, and has each adapter's
[`Driver`][dynalora.driver.driver.Driver] act. The driver keeps the clock, hands the method a
[`Moment`][dynalora.driver.moment.Moment], and raises or warns where something would silently not happen. It does the
same with each [`Part`][dynalora.driver.part.Part], which an adapter of any method can have besides. `groups` gives
parameters a learning rate of their own during the step, `losses` reads the task loss where it becomes gradients,
`carry` changes a parameter's size in the middle of a run, and `trainer` tells the drivers how long a run of
transformers' `Trainer` is.
"""

from dynalora.driver.carry import carry_state, mix_state, scale_copies
from dynalora.driver.driver import Driver
from dynalora.driver.finite import first_bad, first_bad_of
from dynalora.driver.groups import param_groups
from dynalora.driver.losses import making_gradients
from dynalora.driver.model import (
    accept_undriven,
    check_driven,
    drivers_of,
    prepare_unloaded,
    report_task_loss,
    restart_schedule,
)
from dynalora.driver.moment import Moment, OptimizerOverride
from dynalora.driver.part import Part
from dynalora.driver.registry import invalidate, track

__all__ = [
    "Driver",
    "Moment",
    "OptimizerOverride",
    "Part",
    "accept_undriven",
    "carry_state",
    "check_driven",
    "drivers_of",
    "first_bad",
    "first_bad_of",
    "invalidate",
    "making_gradients",
    "mix_state",
    "param_groups",
    "prepare_unloaded",
    "report_task_loss",
    "restart_schedule",
    "scale_copies",
    "track",
]
