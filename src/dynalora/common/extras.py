"""Packages that only some parts of dynalora need: importing them, or saying what to install."""

from __future__ import annotations

import importlib
from typing import Any

from dynalora.errors import UnsupportedError

# Names of packages that differ from those of their modules.
_PACKAGES = {"lm_eval": "lm-eval", "reasoning_gym": "reasoning-gym", "sklearn": "scikit-learn", "yaml": "pyyaml"}


def require(module: str, purpose: str, extra: str = "lab") -> Any:
    """Import a module of a package that a plain installation does not have.

    Args:
        module: The module, such as `"scipy.stats"`.
        purpose: What it is needed for, as the subject of a sentence.
        extra: The extra of dynalora that brings it along.

    Raises:
        UnsupportedError: It is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing(module, purpose, extra) from error


def missing(module: str, purpose: str, extra: str = "lab") -> UnsupportedError:
    """The error that says how to install a module's package; the arguments are those of `require`."""
    root = module.partition(".")[0]
    package = _PACKAGES.get(root, root)
    return UnsupportedError(f"{purpose} needs the package {package}, which is not installed; run: {install(extra)}.")


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'dynalora[{extra}]' (in a clone of the repository: pip install '.[{extra}]')"
