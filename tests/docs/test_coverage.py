"""The documentation names what there is: modules, settings and their defaults, commands and flags."""

from __future__ import annotations

import ast
import dataclasses
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import typer

import dynalora
from dynalora.adapter.config import AdapterConfig
from dynalora.cli.program import app
from dynalora.methods import config_class, method_names

DOCS = Path(__file__).parents[2] / "docs"


def test_every_module_has_a_place_in_the_api_pages() -> None:
    modules = {
        module.name
        for module in pkgutil.walk_packages(dynalora.__path__, "dynalora.")
        # Packages are shown through their modules; the command line has a page of its own.
        if not module.ispkg and not module.name.startswith(("dynalora.cli.", "dynalora.__main__"))
    }
    shown = set()
    for page in (DOCS / "api").glob("*.md"):
        shown |= set(re.findall(r"^::: (dynalora\.\S+)", page.read_text(encoding="utf-8"), re.MULTILINE))
    # A package is shown with everything in it (`show_submodules` in mkdocs.yml).
    assert {m for m in modules if not any(f"{m}.".startswith(f"{room}.") for room in shown)} == set()


@pytest.mark.parametrize("method", method_names())
def test_every_setting_of_a_method_is_on_its_page_with_its_default(method: str) -> None:
    page = (DOCS / "methods" / f"{method}.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^|]+)` \|", page, re.MULTILINE))
    shared = {item.name for item in dataclasses.fields(AdapterConfig)}
    own = {item.name: item.default for item in dataclasses.fields(config_class(method)) if item.name not in shared}
    assert {name: _value(rows[name]) if name in rows else "missing" for name in own} == own


def _value(shown: str) -> object:
    """What a page's Python expression for a default says; a fraction is easier to read than its decimals."""
    numerator, slash, denominator = shown.partition("/")
    return int(numerator) / int(denominator) if slash else ast.literal_eval(shown)


def test_commands_and_flags_in_the_documentation_exist() -> None:
    program: Any = typer.main.get_command(app)
    known = {
        name: {flag for item in command.get_params(typer.Context(command)) for flag in item.opts}
        for name, command in program.commands.items()
    }
    guide = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^## ([\w-]+)$", guide, re.MULTILINE)) == set(known)
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8") + guide
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    fenced = "".join(block for language, block in blocks if language in ("", "bash"))
    lines = re.findall(r"^dynalora ([\w-]+)(.*)$", fenced, re.MULTILINE)
    assert {command for command, _ in lines} == set(known)
    for command, rest in lines:
        assert set(re.findall(r"--[a-z][a-z0-9-]*", rest.split("#")[0])) <= known[command], f"dynalora {command}{rest}"
    for heading, section in re.findall(r"^## ([\w-]+)$(.*?)(?=^## |\Z)", guide, re.MULTILINE | re.DOTALL):
        flags = set(re.findall(r"`(--[a-z][a-z0-9-]*)", section))
        assert flags <= known[heading], f"{heading}: {flags - known[heading]}"
