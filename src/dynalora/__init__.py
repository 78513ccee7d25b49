"""dynalora: low-rank adapters that decide for themselves.

`import dynalora` registers its methods with PEFT; everything PEFT does with an adapter then works with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynalora import hub as _hub
from dynalora import methods as _methods
from dynalora.adapter.compaction import Compaction, compact
from dynalora.adapter.state import StateReport, state_report
from dynalora.drawing.gates import plot_gates
from dynalora.drawing.landscape import plot_rank_landscape
from dynalora.drawing.retention import plot_retention_curves
from dynalora.drawing.trajectory import plot_rank_trajectory
from dynalora.driver import (
    accept_undriven,
    hooks,
    param_groups,
    report_task_loss,
    restart_schedule,
    trainer,
)
from dynalora.errors import DynaloraError
from dynalora.export import export_lora, rank_pattern
from dynalora.forgetting.curves import read_retention
from dynalora.forgetting.gate_recording import record_gates
from dynalora.forgetting.landscape import rank_landscape
from dynalora.forgetting.monitor import RetentionMonitor
from dynalora.forgetting.recovery import ablated, recover
from dynalora.forgetting.texts import given_text, own_text
from dynalora.forgetting.trajectory import rank_trajectory

if TYPE_CHECKING:
    from dynalora.methods.dira import DiraConfig as DiraConfig
    from dynalora.methods.disel import DiselConfig as DiselConfig
    from dynalora.methods.dislora import DisloraConfig as DisloraConfig
    from dynalora.methods.pedyra import PedyraConfig as PedyraConfig

__version__ = "0.1.0"

# Every method's configuration by its own name: DiraConfig, DiselConfig, …
_configs = {method.config_class.__name__: method.config_class for method in _methods.METHODS.values()}
globals().update(_configs)

hooks.install()
trainer.install()
_hub.install()

__all__ = [
    "Compaction",
    "DynaloraError",
    "RetentionMonitor",
    "StateReport",
    "ablated",
    "accept_undriven",
    "compact",
    "export_lora",
    "given_text",
    "own_text",
    "param_groups",
    "plot_gates",
    "plot_rank_landscape",
    "plot_rank_trajectory",
    "plot_retention_curves",
    "rank_landscape",
    "rank_pattern",
    "rank_trajectory",
    "read_retention",
    "record_gates",
    "recover",
    "report_task_loss",
    "restart_schedule",
    "state_report",
    *_configs,
]
