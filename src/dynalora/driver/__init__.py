"""What makes adapters drive themselves: clock, schedules, optimizer hooks, the link to transformers' "
"Trainer.
"""

from dynalora.driver.carry import carry_state, mix_state
from dynalora.driver.driver import (
    Driver,
    Moment,
    OptimizerOverride,
    accept_undriven,
    check_driven,
    drivers_of,
    report_task_loss,
    restart_schedule,
)
from dynalora.driver.hooks import invalidate, layers_of, param_groups, prepare_unloaded, track

__all__ = [
    "Driver",
    "Moment",
    "OptimizerOverride",
    "accept_undriven",
    "carry_state",
    "check_driven",
    "drivers_of",
    "invalidate",
    "layers_of",
    "mix_state",
    "param_groups",
    "prepare_unloaded",
    "report_task_loss",
    "restart_schedule",
    "track",
]
