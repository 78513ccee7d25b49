from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dynalora.errors import ConfigError
from dynalora.lab.settings import coerce, named_values, read_yaml, settings_from


@dataclass(frozen=True)
class Sample:
    name: str
    rate: float = 0.1
    steps: int | None = None
    fast: bool = False
    modules: list[str] | str = "all"
    options: dict[str, Any] = field(default_factory=dict)


def test_values_take_the_types_of_the_fields(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("name: 7\nrate: 2e-4\nsteps: '30'\nmodules: [q, v]\noptions: {a: 1}\n")
    made = settings_from(Sample, read_yaml(tmp_path / "s.yaml"))
    assert made == Sample("7", 2e-4, 30, False, ["q", "v"], {"a": 1})
    assert settings_from(Sample, {"name": "x", "steps": None, "modules": "q"}) == Sample("x", modules="q")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"name": "x", "rte": 1},
            r"Unknown setting 'rte' in the settings; did you mean 'rate'\? Known are fast, modules",
        ),
        ({"name": "x", "zzz": 1}, "Unknown setting 'zzz' in the settings; known are fast"),
        ({}, "Missing 'name' in the settings; give them a value"),
        ({"name": None}, "Missing 'name'"),
        ({"name": "x", "rate": "fast"}, "rate must be a number, got 'fast'"),
        ({"name": "x", "steps": 1.5}, "steps must be a whole number, got 1.5"),
        ({"name": "x", "steps": True}, "steps must be a whole number, got True"),
        ({"name": "x", "fast": "yes"}, "fast must be true or false, got 'yes'"),
        ({"name": ["x"]}, r"name must be text, got \['x'\]"),
        ({"name": "x", "modules": {"a": 1}}, "modules must be a list or text"),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_from(Sample, values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1\nb: 2\n", "line 2 is not valid YAML"),
        ("- 1\n", "holds a list; write lines of 'name: value'"),
        ("just words\n", "holds a str"),
    ],
)
def test_broken_file_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message) as told:
        read_yaml(tmp_path / "s.yaml")
    assert str(tmp_path / "s.yaml") in str(told.value)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file or directory\)"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert read_yaml(tmp_path / "empty.yaml") == {}


def test_named_values() -> None:
    assert named_values(["a=1", "b=x=y", "c=[1, 2]", "d=true"]) == {
        "a": 1,
        "b": "x=y",
        "c": [1, 2],
        "d": True,
    }
    with pytest.raises(ConfigError, match="'novalue' is not of the form NAME=VALUE"):
        named_values(["novalue"])


def test_lists_are_made_of_what_the_field_says() -> None:
    assert coerce(["1e-4", 2], list[float], "rates") == [1e-4, 2.0]
    assert coerce(("a", 1), list[str], "names") == ["a", "1"]
    for wrong in (["x"], 0.1, [True]):
        with pytest.raises(ConfigError, match="rates must be a list"):
            coerce(wrong, list[float], "rates")
