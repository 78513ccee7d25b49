"""Packages that only some parts of dynalora need: importing them, or saying what to install."""

from __future__ import annotations

import importlib
from typing import Any

from dynalora.errors import UnsupportedError

# Names of packages that differ from those of their modules.
_PACKAGES = {
    "lm_eval": "lm-eval",
    "reasoning_gym": "reasoning-gym",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


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
        root = module.partition(".")[0]
        raise UnsupportedError(
            f"{purpose} needs the package {_PACKAGES.get(root, root)}, which is not installed; run: pip install "
            f"'dynalora[{extra}]' (in a clone of the repository: pip install '.[{extra}]')."
        ) from error
