from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest

from dynalora.errors import ConfigError
from dynalora.lab.settings import Setting, Settings, coerce, describe, named_values, read_yaml, settings_from


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
        ("just words\n", "holds text"),
    ],
)
def test_broken_file_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message) as told:
        read_yaml(tmp_path / "s.yaml")
    assert str(tmp_path / "s.yaml") in str(told.value)


def of_aliases(levels: int) -> str:
    """Lines of which each repeats the one before nine times."""
    lines = [f"a{at}: &a{at} [{', '.join([f'*a{at - 1}'] * 9)}]" for at in range(1, levels)]
    return "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x]", *lines])


@pytest.mark.parametrize(
    "text",
    [
        of_aliases(9),
        of_aliases(9).replace("[", "{k: [").replace("]", "]}"),
        "a: &a [*a]",
        "a: &a {b: {c: *a}}",
        "a0: &a0 {x: 1}\n" + "\n".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 9)),
    ],
    ids=["lists", "mappings", "a list in itself", "a mapping in itself", "merges"],
)
def test_aliases_that_mean_endlessly_many_values_are_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml', line 1 is not valid YAML \(its aliases repeat more than"):
        read_yaml(file)
    assert named_values([f"a={text}"]) == {"a": text}


def test_aliases_may_be_used(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("usual: &usual {r: 4, alpha: 8}\nfirst: {<<: *usual, r: 2}\nsecond: *usual\n")
    usual = {"r": 4, "alpha": 8}
    assert read_yaml(file) == {"usual": usual, "first": {**usual, "r": 2}, "second": usual}


def test_a_value_that_would_fill_the_screen_is_cut(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(of_aliases(5))
    with pytest.raises(ConfigError, match="n must be a whole number") as refused:
        coerce(read_yaml(file)["a4"], int, "n")
    assert len(str(refused.value)) < 500


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file or directory\)"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert read_yaml(tmp_path / "empty.yaml") == {}


def test_named_values() -> None:
    assert named_values(["a=1", "b=x=y", "c=[1, 2]", "d=true"]) == {"a": 1, "b": "x=y", "c": [1, 2], "d": True}
    with pytest.raises(ConfigError, match="'novalue' is not of the form NAME=VALUE"):
        named_values(["novalue"])


def test_lists_are_made_of_what_the_field_says() -> None:
    assert coerce(["1e-4", 2], list[float], "rates") == [1e-4, 2.0]
    assert coerce(("a", 1), list[str], "names") == ["a", "1"]
    for wrong in (["x"], 0.1, [True]):
        with pytest.raises(ConfigError, match=r"rates (must be a list|holds 'x'; give numbers|holds True)"):
            coerce(wrong, list[float], "rates")


@dataclass(frozen=True, kw_only=True)
class Walk(Settings, panel="Way"):
    """How to walk.

    Attributes:
        steps: How far to go; None: to the end; 0: nowhere. Said in
            two lines.
        rate: How fast, see [`Sample`][tests.Sample].
        pace: In words.
    """

    steps: Annotated[int | None, Setting("-s", least=0)] = None
    rate: Annotated[float, Setting(above=0, below=1, panel="Speed")] = 0.5
    pace: Annotated[list[str], Setting(choices=("slow", "fast"))] = field(default_factory=lambda: ["slow"])


@dataclass(frozen=True, kw_only=True)
class LongWalk(Walk):
    """How to walk far.

    Attributes:
        goal: Where to.
        again: Go on.
    """

    unused: ClassVar[Mapping[str, Any]] = {"shoes": None}

    goal: str
    steps: int | None = 100
    again: Annotated[bool, Setting(recorded=False)] = False


@dataclass(frozen=True, kw_only=True)
class Same(Settings, like=Walk, absent="as before"):
    """Like another walk.

    Attributes:
        goal: Where to.
    """

    goal: str = "home"
    steps: int | None = None


def test_a_field_says_all_there_is_to_say() -> None:
    steps = describe(Walk)["steps"]
    assert (steps.text, steps.summary, steps.absent) == (
        "How far to go; None: to the end; 0: nowhere. Said in two lines.",
        "How far to go; 0: nowhere. Said in two lines.",
        "to the end",
    )
    assert (steps.setting.alias, steps.panel, steps.default) == ("-s", "Way", None)
    assert describe(Walk)["rate"].panel == "Speed"
    assert describe(Walk)["pace"].default == ["slow"]


def test_a_subclass_may_change_the_default_alone() -> None:
    described = describe(LongWalk)
    assert list(described) == ["goal", "steps", "again", "rate", "pace"]
    assert (described["steps"].default, described["steps"].setting.alias, described["steps"].panel) == (
        100,
        "-s",
        "Way",
    )
    assert described["steps"].summary == "How far to go; 0: nowhere. Said in two lines."
    assert (described["goal"].default, described["goal"].panel) == (MISSING, None)


def test_descriptions_of_another_class_hold_for_equal_names() -> None:
    steps, goal = (describe(Same)[name] for name in ("steps", "goal"))
    assert (steps.summary, steps.absent, steps.setting.alias) == (
        "How far to go; 0: nowhere. Said in two lines.",
        "as before",
        "-s",
    )
    assert goal.absent is None


def test_settings_of_a_run_leave_out_what_changes_no_result() -> None:
    assert LongWalk(goal="sea", again=True).settings() == {
        "goal": "sea", "steps": 100, "rate": 0.5, "pace": ["slow"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": -1}, "steps is -1; give at least 0."),
        ({"rate": 0.0}, "rate is 0.0; give more than 0 and less than 1."),
        ({"rate": float("nan")}, "rate is nan; give a finite number and more than 0 and less than 1."),
        ({"pace": ["fast", "none"]}, "pace is 'none'; choose one of slow, fast."),
    ],
)
def test_values_out_of_bounds_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Walk(**values)
    assert str(raised.value) == message


def test_settings_that_never_had_an_effect_may_stand_in_old_files_only() -> None:
    assert settings_from(LongWalk, {"goal": "sea", "shoes": None}) == LongWalk(goal="sea")
    with pytest.raises(ConfigError, match="shoes is red, and this experiment does not use it"):
        settings_from(LongWalk, {"goal": "sea", "shoes": "red"})
