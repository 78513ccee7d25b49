"""Target modules: which modules of a model an adapter would wrap."""

from __future__ import annotations

import re
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from dynalora.adapter.targets import targeted_modules
from dynalora.errors import ConfigError
from dynalora.lab.baselines import prompt_only


def check_targets(model: nn.Module, config: PeftConfig) -> list[str]:
    """Names of the modules that an adapter would wrap; none for methods that train virtual tokens instead.

    Args:
        model: The base model; one on the meta device will do.
        config: The adapter's configuration.

    Raises:
        ConfigError: Nothing matches, or one of the listed names matches nothing; says which linear modules exist.
    """
    if prompt_only(config):
        return []
    linear = {
        name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))
    }
    targets: Any = getattr(config, "target_modules", None)
    if targets is None:
        return list(linear)  # PEFT's own choice for the architecture
    kinds = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in linear)) or "none"
    exist = f"the model's linear modules are {kinds}"
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ConfigError(
                f"target_modules '{targets}' is not a valid regular expression ({error})."
            ) from None
    else:
        everything = [name for name, _ in model.named_modules()]
        for target in sorted(targets):
            if not any(name == target or name.endswith(f".{target}") for name in everything):
                raise ConfigError(f"target_modules '{target}' matches nothing; {exist}.")
    matched = targeted_modules(model, config)
    if not matched:
        names = targets if isinstance(targets, str) else ", ".join(sorted(targets))
        raise ConfigError(f"target_modules '{names}' matches nothing; {exist}.")
    return matched
