"""Units of work: completed once, by one process at a time, with a file that is whole or not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import pytest

from dynalora.errors import RunFolderError
from dynalora.lab.units import UnitStore


@dataclass(frozen=True)
class Unit:
    name: str


def test_a_unit_is_worked_for_once(tmp_path: Path) -> None:
    store: UnitStore[Unit] = UnitStore(tmp_path, ending="/result.json")
    calls: list[int] = []

    def work() -> Mapping[str, Any]:
        calls.append(1)
        return {"pair": (1, 2)}

    first = store.complete(Unit("a/b"), work)
    assert first == store.complete(Unit("a/b"), work) == store.read(Unit("a/b"))
    assert (calls, first["pair"]) == ([1], [1, 2])
    assert first["seconds"] >= 0
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["result.json"]
    assert store.read(Unit("a/c")) is None


def test_work_that_fails_leaves_no_file(tmp_path: Path) -> None:
    store: UnitStore[Unit] = UnitStore(tmp_path)
    with pytest.raises(ZeroDivisionError):
        store.complete(Unit("a"), lambda: {"x": 1 / 0})
    with pytest.raises(TypeError):
        store.complete(Unit("a"), lambda: {"x": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_shared_folders_unit_belongs_to_one_process(tmp_path: Path) -> None:
    store: UnitStore[Unit] = UnitStore(tmp_path, shared=True)
    with store.lock(Unit("a")), pytest.raises(filelock.Timeout):
        UnitStore(tmp_path, shared=True).complete(Unit("a"), dict)
    assert store.complete(Unit("a"), dict).keys() == {"seconds"}


def test_a_unit_of_other_settings_is_refused(tmp_path: Path) -> None:
    class Checked(UnitStore[Unit]):
        def content(self, unit: Unit, result: Mapping[str, Any]) -> dict[str, Any]:
            return {"of": unit.name, **result}

        def verify(self, unit: Unit, content: Mapping[str, Any]) -> None:
            if content["of"] != unit.name:
                raise RunFolderError("other settings")

    store = Checked(tmp_path)
    store.write(Unit("a"), {"x": 1})
    assert json.loads(store.file(Unit("a")).read_text(encoding="utf-8")) == {"of": "a", "x": 1}
    store.file(Unit("a")).rename(store.file(Unit("b")))
    with pytest.raises(RunFolderError, match="other settings"):
        store.complete(Unit("b"), lambda: pytest.fail("worked for"))
