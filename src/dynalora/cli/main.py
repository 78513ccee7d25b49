"""The start of the program `dynalora`, which needs the extra `lab`."""

from __future__ import annotations

import importlib.util
import sys

NEEDED = ("datasets", "filelock", "jinja2", "matplotlib", "rich", "scipy", "typer", "yaml")
"""Modules of the packages that `pip install dynalora` alone does not bring."""


def main() -> None:
    """Run the program, or say in one sentence what it takes to run it."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"Error: The command dynalora needs the extra lab ({', '.join(missing)} not installed); install it with "
            'pip install "dynalora[lab]", or in a clone of the repository with pip install ".[lab]".',
            file=sys.stderr,
        )
        sys.exit(2)
    from dynalora.cli.program import run  # needs those packages

    run()


if __name__ == "__main__":
    main()
