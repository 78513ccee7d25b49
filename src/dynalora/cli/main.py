"""The start of the program `dynalora`, which needs the extra `lab`."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from dynalora.common.extras import require
from dynalora.errors import UnsupportedError

NEEDED = ("datasets", "filelock", "jinja2", "matplotlib", "rich", "scipy", "typer", "yaml")
"""Modules of the packages that `pip install dynalora` alone does not bring."""


def main() -> None:
    """Run the program, or say in one sentence what it takes to run it."""
    try:
        for module in NEEDED:
            if importlib.util.find_spec(module) is None:
                require(module, "The command dynalora")
    except UnsupportedError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    from dynalora.cli.program import run  # needs those packages

    run()


def __getattr__(name: str) -> Any:
    """`app`, the program as typer has it, for who runs commands from Python; made when it is asked for."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dynalora.cli.program import app

    return app


if __name__ == "__main__":
    main()
