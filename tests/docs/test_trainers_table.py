"""The table of trainers and methods in the guide is what its script finds."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).parents[2]
QUICK = [("loop", "disel"), ("loop", "pedyra"), ("trainer", "dira")]


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("benchmarks/trainers.py")


def printed() -> dict[tuple[str, str], str]:
    """The cells of the page, by titles of trainer and method."""
    text = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    lines = re.search(r"^\| trainer \|(?:.*\n\|)*.*", text, re.MULTILINE)
    assert lines is not None
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.group().splitlines()]
    return {(row[0], method): cell for row in rows for method, cell in zip(head[1:], row[1:], strict=True)}


def check(script: Any, trainer: str, method: str) -> None:
    pytest.importorskip(script.TRAINERS[trainer].needs, reason="its package is not installed")
    results = script.cell(trainer, method)
    assert script.mark(results) == printed()[script.TRAINERS[trainer].title, script.TITLES[method]], results


@pytest.mark.parametrize(("trainer", "method"), QUICK)
def test_some_cells(script: Any, trainer: str, method: str) -> None:
    check(script, trainer, method)


def test_the_page_has_every_cell(script: Any) -> None:
    cells = {(row.title, title) for row in script.TRAINERS.values() for title in script.TITLES.values()}
    assert printed().keys() == cells


@pytest.mark.slow
def test_every_cell(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    for trainer in script.TRAINERS:
        for method in script.METHODS:
            if importlib.util.find_spec(script.TRAINERS[trainer].needs) is not None:
                check(script, trainer, method)
