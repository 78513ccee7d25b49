"""Every job starts where nothing is installed but what the extra of the demo asks for."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from dynalora.cli.commands import COMMANDS

# A module that stands as None among the loaded ones counts as not installed.
IMPORT = """
import importlib, sys
for name in sys.argv[2:]:
    sys.modules[name] = None
importlib.import_module("dynalora").register_methods()
importlib.import_module(sys.argv[1])
"""


def installed_by(name: str, extra: str) -> set[str]:
    """Names of the distributions that installing one brings along, itself included, by what each declares."""
    seen: set[tuple[str, str]] = set()
    waiting = [(name, extra)]
    while waiting:
        entry = waiting.pop()
        if entry in seen:
            continue
        seen.add(entry)
        try:
            declared = importlib.metadata.requires(entry[0]) or []
        except importlib.metadata.PackageNotFoundError:  # of another platform
            continue
        for requirement in map(Requirement, declared):
            if requirement.marker is None or requirement.marker.evaluate({"extra": entry[1]}):
                waiting += [(normal(requirement.name), further) for further in ("", *requirement.extras)]
    return {distribution for distribution, _ in seen}


def normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


@pytest.mark.parametrize("module", sorted({command.job.partition(":")[0] for command in COMMANDS.values()}))
def test_a_job_imports_nothing_that_is_not_declared(module: str) -> None:
    declared = installed_by("dynalora", "demo")
    others = [
        name
        for name, distributions in importlib.metadata.packages_distributions().items()
        if name.isidentifier() and declared.isdisjoint(map(normal, distributions))
    ]
    assert "hypothesis" in others
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, module, *others], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
