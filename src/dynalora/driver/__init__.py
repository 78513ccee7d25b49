"""What makes adapters drive themselves: clock, schedules, optimizer hooks, the link to transformers' "
"Trainer.
"""

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
from dynalora.driver.hooks import invalidate, param_groups, track

__all__ = [
    "Driver",
    "Moment",
    "OptimizerOverride",
    "accept_undriven",
    "check_driven",
    "drivers_of",
    "invalidate",
    "param_groups",
    "report_task_loss",
    "restart_schedule",
    "track",
]
