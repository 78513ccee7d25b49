"""Which modules of a model an adapter is for: how `target_modules` is resolved, by injection and by checks."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from dynalora.adapter.base_weight import BaseWeight
from dynalora.common.private import resolve_all_linear

#: Heads by task which PEFT trains in full, but does so only after `all-linear` has taken them for a layer to adapt.
_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def leave_out_head(config: Any) -> None:
    """Keep `all-linear` from the head of token classification and question answering, of PEFT's methods as of ours."""
    every = str(getattr(config, "target_modules", None)).lower() == "all-linear"
    heads = _HEADS.get(config.task_type, ()) if every and hasattr(config, "exclude_modules") else ()
    if heads and not isinstance(config.exclude_modules, str):
        config.exclude_modules = sorted({*(config.exclude_modules or ()), *heads})


def targeted_modules(model: nn.Module, config: PeftConfig) -> list[str]:
    """Names of the modules that an adapter would wrap, resolved as PEFT does when it is made.

    Args:
        model: The base model; one on the meta device will do.
        config: The adapter's configuration with target modules, of any of PEFT's methods; not changed.
    """
    config = copy.copy(config)
    leave_out_head(config)
    config = resolve_all_linear(config, model)
    return [name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)]


def describe_linear_layers(model: nn.Module) -> str:
    """A sentence that names the linear layers of a model, for messages."""
    kinds: dict[str, int] = {}
    for name, module in model.named_modules():
        if name and BaseWeight.supports(module):
            kind = name.rpartition(".")[2]
            kinds[kind] = kinds.get(kind, 0) + 1
    if not kinds:
        return "This model has no linear layers."
    named = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items(), key=lambda item: -item[1])[:20])
    hint = "target_modules='all-linear' takes all but the output layer"
    return f"The linear layers of this model are named: {named}; {hint}."
