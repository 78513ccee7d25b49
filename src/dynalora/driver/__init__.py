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
    "restart_schedule",
    "track",
]
