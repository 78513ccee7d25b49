"""dynalora: low-rank adapters that decide for themselves.

`import dynalora` registers its methods with PEFT; everything PEFT does with an adapter then works with them. What a
model is measured and drawn with is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dynalora import hub as _hub
from dynalora import methods as _methods
from dynalora.adapter.compaction import Compaction, compact
from dynalora.adapter.state import StateReport, state_report
from dynalora.common.version import __version__ as __version__
from dynalora.driver import accept_undriven, hooks, param_groups, report_task_loss, restart_schedule, trainer
from dynalora.errors import DynaloraError
from dynalora.export import export_lora, rank_pattern
from dynalora.forgetting.budget import hold_budget
from dynalora.forgetting.retain import RetainCallback, prepare_retain

if TYPE_CHECKING:
    from dynalora.drawing.gates import plot_gates as plot_gates
    from dynalora.drawing.landscape import plot_rank_landscape as plot_rank_landscape
    from dynalora.drawing.landscape import plot_rank_trajectory as plot_rank_trajectory
    from dynalora.drawing.retention import plot_retention_curves as plot_retention_curves
    from dynalora.forgetting.curves import read_retention as read_retention
    from dynalora.forgetting.gate_recording import record_gates as record_gates
    from dynalora.forgetting.landscape import rank_landscape as rank_landscape
    from dynalora.forgetting.monitor import RetentionMonitor as RetentionMonitor
    from dynalora.forgetting.recovery import ablated as ablated
    from dynalora.forgetting.recovery import recover as recover
    from dynalora.forgetting.texts import given_text as given_text
    from dynalora.forgetting.texts import own_text as own_text
    from dynalora.forgetting.trajectory import rank_trajectory as rank_trajectory
    from dynalora.forgetting.trim import trim as trim
    from dynalora.forgetting.trim import trim_curve as trim_curve
    from dynalora.methods.dira import DiraConfig as DiraConfig
    from dynalora.methods.disel import DiselConfig as DiselConfig
    from dynalora.methods.dislora import DisloraConfig as DisloraConfig
    from dynalora.methods.pedyra import PedyraConfig as PedyraConfig

# Every method's configuration by its own name: DiraConfig, DiselConfig, …
_configs = {method.config_class.__name__: method.config_class for method in _methods.METHODS.values()}
globals().update(_configs)

# Names that are imported at their first use, and the modules they stand in.
_LAZY = {
    "RetentionMonitor": "forgetting.monitor",
    "ablated": "forgetting.recovery",
    "given_text": "forgetting.texts",
    "own_text": "forgetting.texts",
    "plot_gates": "drawing.gates",
    "plot_rank_landscape": "drawing.landscape",
    "plot_rank_trajectory": "drawing.landscape",
    "plot_retention_curves": "drawing.retention",
    "rank_landscape": "forgetting.landscape",
    "rank_trajectory": "forgetting.trajectory",
    "read_retention": "forgetting.curves",
    "record_gates": "forgetting.gate_recording",
    "recover": "forgetting.recovery",
    "trim": "forgetting.trim",
    "trim_curve": "forgetting.trim",
}

hooks.install()
trainer.install()
trainer.install(RetainCallback)
_hub.install()

__all__ = [
    "Compaction",
    "DynaloraError",
    "StateReport",
    "accept_undriven",
    "compact",
    "export_lora",
    "hold_budget",
    "param_groups",
    "prepare_retain",
    "rank_pattern",
    "report_task_loss",
    "restart_schedule",
    "state_report",
    *_configs,
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'dynalora' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dynalora.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
