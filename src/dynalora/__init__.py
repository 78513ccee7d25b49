"""dynalora: low-rank adapters that decide for themselves.

`import dynalora` registers its methods with PEFT; everything PEFT does with an adapter then works with them. What a
model is measured and drawn with is imported when it is first asked for.

In the program `dynalora`, which must show its help at once, all of this waits until a job begins.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from dynalora.common.version import __version__ as __version__

if TYPE_CHECKING:
    from dynalora.adapter.compaction import Compaction as Compaction
    from dynalora.adapter.compaction import compact as compact
    from dynalora.adapter.state import StateReport as StateReport
    from dynalora.adapter.state import state_report as state_report
    from dynalora.drawing.gates import plot_gates as plot_gates
    from dynalora.drawing.landscape import plot_rank_landscape as plot_rank_landscape
    from dynalora.drawing.landscape import plot_rank_trajectory as plot_rank_trajectory
    from dynalora.drawing.retention import plot_retention_curves as plot_retention_curves
    from dynalora.driver import accept_undriven as accept_undriven
    from dynalora.driver import param_groups as param_groups
    from dynalora.driver import report_task_loss as report_task_loss
    from dynalora.driver import restart_schedule as restart_schedule
    from dynalora.errors import DynaloraError as DynaloraError
    from dynalora.export import export_lora as export_lora
    from dynalora.export import rank_pattern as rank_pattern
    from dynalora.forgetting.budget import hold_budget as hold_budget
    from dynalora.forgetting.curves import read_retention as read_retention
    from dynalora.forgetting.gate_recording import record_gates as record_gates
    from dynalora.forgetting.landscape import rank_landscape as rank_landscape
    from dynalora.forgetting.monitor import RetentionMonitor as RetentionMonitor
    from dynalora.forgetting.recovery import ablated as ablated
    from dynalora.forgetting.recovery import recover as recover
    from dynalora.forgetting.retain import prepare_retain as prepare_retain
    from dynalora.forgetting.texts import anchor_text as anchor_text
    from dynalora.forgetting.texts import answered_text as answered_text
    from dynalora.forgetting.texts import given_text as given_text
    from dynalora.forgetting.texts import own_text as own_text
    from dynalora.forgetting.trajectory import rank_trajectory as rank_trajectory
    from dynalora.forgetting.trim import trim as trim
    from dynalora.forgetting.trim import trim_curve as trim_curve
    from dynalora.methods.dira import DiraConfig as DiraConfig
    from dynalora.methods.disel import DiselConfig as DiselConfig
    from dynalora.methods.dislora import DisloraConfig as DisloraConfig
    from dynalora.methods.dylora import DyloraConfig as DyloraConfig
    from dynalora.methods.increlora import IncreloraConfig as IncreloraConfig
    from dynalora.methods.loradash import LoraDashConfig as LoraDashConfig
    from dynalora.methods.milora import MiloraConfig as MiloraConfig
    from dynalora.methods.pedyra import PedyraConfig as PedyraConfig
    from dynalora.methods.rasa import RasaConfig as RasaConfig
    from dynalora.methods.sorsa import SorsaConfig as SorsaConfig
    from dynalora.methods.triadaptlora import TriAdaptLoraConfig as TriAdaptLoraConfig

# Names that come with the methods, and the modules they stand in.
_EAGER = {
    "Compaction": "adapter.compaction",
    "DynaloraError": "errors",
    "StateReport": "adapter.state",
    "accept_undriven": "driver",
    "compact": "adapter.compaction",
    "export_lora": "export",
    "hold_budget": "forgetting.budget",
    "param_groups": "driver",
    "prepare_retain": "forgetting.retain",
    "rank_pattern": "export",
    "report_task_loss": "driver",
    "restart_schedule": "driver",
    "state_report": "adapter.state",
}

# Names that are imported at their first use, and the modules they stand in.
_LAZY = {
    "RetentionMonitor": "forgetting.monitor",
    "ablated": "forgetting.recovery",
    "anchor_text": "forgetting.texts",
    "answered_text": "forgetting.texts",
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


_registered = False


def register_methods() -> None:
    """Register the methods with PEFT, and hook into torch's optimizers and transformers' `Trainer`.

    `import dynalora` has done it, except in the program `dynalora`. A second call changes nothing.
    """
    global _registered
    if _registered:
        return
    _registered = True  # before the imports, which may ask this module for its parts
    from dynalora import hub, methods
    from dynalora.driver import hooks, trainer
    from dynalora.forgetting.retain import RetainCallback

    hooks.install()
    trainer.install()
    trainer.install(RetainCallback)
    hub.install()
    # Every method's configuration by its own name: DiraConfig, DiselConfig, …
    configs = {method.config_class.__name__: method.config_class for method in methods.METHODS.values()}
    globals().update(configs)
    globals().update({name: _value(name, module) for name, module in _EAGER.items()})
    globals()["__all__"] = [*_EAGER, *configs, *_LAZY]


def _value(name: str, module: str) -> Any:
    return getattr(importlib.import_module(f"dynalora.{module}"), name)


def __getattr__(name: str) -> Any:
    if not _registered and (name == "__all__" or not name.startswith("__")):
        register_methods()
        if name in globals():
            return globals()[name]
    if name not in _LAZY:
        raise AttributeError(f"module 'dynalora' has no attribute {name!r}")
    value = _value(name, _LAZY[name])
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


def _in_the_program() -> bool:
    """Whether this is the process of the program `dynalora`, which registers the methods when a job begins."""
    if "dynalora_program" in sys.modules:  # its console script has come here
        return True
    # While Python looks for the module of `python -m`, its place among the arguments holds "-m".
    words = sys.orig_argv
    return sys.argv[:1] == ["-m"] and "-m" in words and words[words.index("-m") + 1 :][:1] == ["dynalora"]


if not _in_the_program():
    register_methods()
