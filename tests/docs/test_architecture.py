"""The arrows of docs/architecture.md are those of the code: no room imports another that its row does not name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "dynalora"
ROOMS = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Full names of dynalora's modules, or of names in them, that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    names = [name.split(".") for name in imported(path)]
    inside = [parts for parts in names if parts[0] == "dynalora"]
    return {parts[1] if len(parts) > 1 and parts[1] in ROOMS else "__init__" for parts in inside}


def table() -> dict[str, set[str]]:
    """The rows of the table of rooms: room → the rooms that it may import."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|[^|\n]*\| ([^|\n]*) \|$", text, re.MULTILINE)
    return {room: set(re.findall(r"`(\w+)`", arrows)) for room, arrows in rows}


def test_every_room_has_its_row() -> None:
    assert set(table()) == ROOMS - {"__init__", "__main__"}


@pytest.mark.parametrize("room", sorted(ROOMS - {"__init__", "__main__"}))
def test_a_room_imports_only_what_its_row_names(room: str) -> None:
    arrows = {
        (path.relative_to(PACKAGE).as_posix(), target)
        for path in modules()
        if room_of(path) == room
        for target in rooms_imported(path) - {room}
    }
    assert {(file, target) for file, target in arrows if target not in table()[room]} == set()


def test_no_row_names_an_arrow_that_nothing_draws() -> None:
    drawn: dict[str, set[str]] = {room: set() for room in table()}
    for path in modules():
        if room_of(path) in drawn:
            drawn[room_of(path)] |= rooms_imported(path) - {room_of(path)}
    assert {room: arrows - drawn[room] for room, arrows in table().items() if arrows - drawn[room]} == {}


def test_the_rows_have_no_circle() -> None:
    tuple(TopologicalSorter(table()).static_order())


def test_modules_import_each_other_in_one_direction() -> None:
    """No two modules need each other, directly or over others; what only type checkers read does not count."""
    files = {".".join(("dynalora", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in modules()}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        if path.name in ("__init__.py", "__main__.py"):
            continue  # a package re-exports its modules
        targets = {_module(target, files) for target in _imported_at_run_time(path)}
        graph[name] = {target for target in targets if target and target != name}
    tuple(TopologicalSorter(graph).static_order())


def _module(name: str, files: dict[str, Path]) -> str | None:
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name if name in files and files[name].name != "__init__.py" else None


def _imported_at_run_time(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
