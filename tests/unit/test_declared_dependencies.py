"""Every job starts where nothing is installed but what the extra of the demo asks for."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from dynalora.cli.commands import COMMANDS

# A module that stands as None among the loaded ones counts as not installed. Jobs are imported in forks of one process,
# so that none finds what another has loaded, and what all of them need is loaded once.
IMPORT = """
import importlib, json, os, sys, traceback
jobs, missing = map(json.loads, sys.argv[1:])
for name in missing:
    sys.modules[name] = None
importlib.import_module("dynalora").register_methods()
for job in jobs:
    reading, writing = os.pipe()
    if not os.fork():
        try:
            importlib.import_module(job)
            said = "imported"
        except BaseException:
            said = traceback.format_exc()[-2000:]
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        print(json.dumps([job, pipe.read().decode()]))
    os.wait()
"""
JOBS = sorted({command.job.partition(":")[0] for command in COMMANDS.values()})


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


@pytest.fixture(scope="module")
def imported() -> dict[str, str]:
    """What importing each job came to where only declared distributions are installed."""
    declared = installed_by("dynalora", "demo")
    others = [
        name
        for name, distributions in importlib.metadata.packages_distributions().items()
        if name.isidentifier() and declared.isdisjoint(map(normal, distributions))
    ]
    assert "hypothesis" in others
    # The last cannot be imported, which has to be seen.
    command = [sys.executable, "-c", IMPORT, json.dumps([*JOBS, "hypothesis"]), json.dumps(others)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize("module", JOBS)
def test_a_job_imports_nothing_that_is_not_declared(module: str, imported: dict[str, str]) -> None:
    assert imported[module] == "imported"
    assert "ModuleNotFoundError" in imported["hypothesis"]
