"""The methods, one file each. Every module in this folder is found and registered by itself.

To add a method, write one file here (see `docs/architecture.md`) and one row in the test matrix.
"""

from __future__ import annotations

import importlib
import pkgutil

from dynalora.adapter.config import AdapterConfig
from dynalora.adapter.register import METHODS
from dynalora.errors import ConfigError

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def method_names() -> list[str]:
    """Names of all methods, sorted."""
    return sorted(METHODS)


def config_class(name: str) -> type[AdapterConfig]:
    """The configuration class of a method.

    Args:
        name: The method's name, in any case.

    Raises:
        ConfigError: There is no such method; the message lists those there are.
    """
    method = METHODS.get(name.lower())
    if method is None:
        raise ConfigError(f"unknown method {name!r}; choose one of {', '.join(method_names())}.")
    return method.config_class


__all__ = ["METHODS", "config_class", "method_names"]
