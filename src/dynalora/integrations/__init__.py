"""Other tools' ways in: what makes a tool that builds PEFT adapters by itself build one of ours instead.

A tool that takes a `PeftConfig` or a `PeftModel` needs nothing of this: give it
[`DiselConfig`][dynalora.methods.disel.DiselConfig] where it takes a `LoraConfig`. Each module here is for one tool that
makes its `LoraConfig` from a file or a command line, imports that tool, and is imported by nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dynalora.common.names import did_you_mean
from dynalora.errors import ConfigError
from dynalora.methods import config_class

if TYPE_CHECKING:
    from peft import PeftConfig

OPTIONS_VARIABLE = "DYNALORA_OPTIONS"
"""Environment variable with a method's options as a JSON object, for tools that have no place for them."""


def tool_config(
    method: str,
    *,
    r: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    target_modules: str | Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    task_type: str = "CAUSAL_LM",
) -> PeftConfig:
    """The configuration of one of our methods, from what a tool's settings say about a LoRA.

    Args:
        method: The method's name, such as `disel`.
        r: Rank; None: the method's default.
        alpha: The update is scaled by alpha / r; None: the method's default.
        dropout: On the adapter's input; None: none.
        target_modules: Names, a regular expression, or `all-linear`, also as a list of one; None: all linear layers.
        options: Further fields of the method's configuration.
        task_type: PEFT's name of what the model does.

    Raises:
        ConfigError: An unknown method or option, or a value that cannot be.
    """
    kind = config_class(method)
    targets: str | list[str] = "all-linear"
    if target_modules:
        targets = target_modules if isinstance(target_modules, str) else list(target_modules)
        if targets == ["all-linear"]:
            targets = "all-linear"
    given: dict[str, Any] = {
        name: value for name, value in (("r", r), ("alpha", alpha), ("dropout", dropout)) if value is not None
    }
    options = dict(options or {})
    for option in options:
        if option not in kind.own_fields():
            raise ConfigError(f"Method '{method}' has no option '{option}'; {did_you_mean(option, kind.own_fields())}.")
        if option in given or option == "target_modules":
            raise ConfigError(f"'{option}' is set twice, by the tool's own setting and as an option; set it once.")
    return kind(target_modules=targets, task_type=task_type, **given, **options)


def options_from_environment() -> dict[str, Any]:
    """The method's options from [`OPTIONS_VARIABLE`][dynalora.integrations.OPTIONS_VARIABLE]; none if it is not set.

    Raises:
        ConfigError: It holds no JSON object.
    """
    return parsed_options(os.environ.get(OPTIONS_VARIABLE, "{}"), OPTIONS_VARIABLE)


def parsed_options(text: str, source: str) -> dict[str, Any]:
    """Options that are written as a JSON object.

    Args:
        text: The object.
        source: Where it is from, for the message.

    Raises:
        ConfigError: It is none.
    """
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f'{source} is no JSON ({error}); give an object such as {{"retain": 3000}}.') from error
    if not isinstance(options, dict):
        raise ConfigError(f'{source} is {text}; give a JSON object such as {{"retain": 3000}}.')
    return options
