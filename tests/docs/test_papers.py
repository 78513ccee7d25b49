"""The papers: recipes hold their tables' numbers, and the documentation has a command for every table and figure."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes import check

from dynalora.cli.commands import COMMANDS
from dynalora.lab.choices import method_names
from dynalora.lab.settings import Described, describe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
# Tables and figures of each paper, the appendices' included.
THINGS = {
    "DiRA": {"Table": 12, "Figure": 10}, "DISeL": {"Table": 10, "Figure": 14}, "DisLoRA": {"Table": 6, "Figure": 4},
    "PE-DyRA": {"Table": 14, "Figure": 11},
}  # fmt: skip


def flag(item: Described) -> str:
    return item.setting.name or f"--{item.name.replace('_', '-')}"


def section(paper: str) -> str:
    return PAGE.split(f"\n## {paper}\n")[1].split("\n## ")[0]


def test_recipes_hold_what_the_papers_tables_print(capsys: pytest.CaptureFixture[str]) -> None:
    code = check.main()
    said = capsys.readouterr().out
    assert code == 0, said
    count = re.fullmatch(r"(\d+) values compared with the papers' tables, 0 differ\.\n", said)
    assert count is not None
    assert int(count[1]) > 800


def test_a_number_that_differs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entries: list[dict[str, Any]] = [
        {"paper": "pe-dyra", "source": "Table 7", "columns": ["learning_rate", "training_rows", "pedyra/final_phase"],
         "rows": {"table14.rte": [1.2e-3, 2490, 2601]}, "systems": {"table14.rte": ["k-4", "k-8", "k-12"]}},
    ]  # fmt: skip
    (tmp_path / "papers.yaml").write_text(yaml.safe_dump(entries), encoding="utf-8")
    (tmp_path / "pe-dyra").symlink_to(ROOT / "recipes" / "pe-dyra")
    monkeypatch.setattr(check, "RECIPES", tmp_path)
    assert check.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "pe-dyra/table14.rte: k-12 final_phase is 2600, and the paper has 2601 (Table 7)"
    assert sum("final_phase" in line for line in lines) == 4
    assert any("systems is" in line for line in lines)
    assert lines[-1] == "6 values compared with the papers' tables, 5 differ."


def test_every_recipe_is_compared() -> None:
    compared = {recipe for recipe, *_ in check.compared()}
    recipes = {f"{path.parent.name}/{path.stem}" for path in (ROOT / "recipes").glob("*/*.yaml")}
    assert {name for name in recipes if not name.endswith(".small")} == compared


@pytest.mark.parametrize("paper", THINGS)
def test_every_table_and_figure_is_named(paper: str) -> None:
    named: dict[str, set[int]] = {"Table": set(), "Figure": set()}
    for kind, numbers in re.findall(r"(Table|Figure)s? ((?:\d+[ab]?(?:, | and | to )?)+)", section(paper)):
        whole = re.sub(r"(\d+) to (\d+)", lambda m: ", ".join(map(str, range(int(m[1]), int(m[2]) + 1))), numbers)
        named[kind] |= {int(number) for number in re.findall(r"\d+", whole)}
    for kind, count in THINGS[paper].items():
        assert named[kind] == set(range(1, count + 1)), kind


def test_the_commands_are_those_of_recipes_and_exist() -> None:
    recipes = set()
    for paper in THINGS:
        for text in re.findall(r"^\|.*\|$", section(paper), re.MULTILINE):
            whole = ""
            for call in re.findall(r"`([^`]+)`", text):
                if call.startswith("…/"):  # the same command with another file
                    folder = re.search(r"(recipes/[\w\-]+)/", whole)
                    assert folder is not None, text
                    call = f"compare --config {folder[1]}/{call[2:]}"
                words = shlex.split(call)
                if words[0] in COMMANDS:
                    whole = call
                    flags = {word for word in words if word.startswith("--")}
                    known = {"--config", *map(flag, describe(COMMANDS[words[0]].settings).values())}
                    assert flags <= known, (call, flags - known)
                for name in re.findall(r"recipes/[\w\-]+/[\w.\-]+\.yaml", call):
                    pattern = re.sub("MODEL-TASK|TASK", "*", name)
                    found = list(ROOT.glob(pattern))
                    assert found, name
                    recipes |= {str(path.relative_to(ROOT)) for path in found}
    every = {str(path.relative_to(ROOT)) for path in (ROOT / "recipes").glob("*/*.yaml")}
    assert {name for name in every if not name.endswith(".small.yaml")} == {
        name for name in recipes if not name.endswith(".small.yaml")
    }


def test_systems_have_names_that_compare_takes() -> None:
    table = PAGE.split("\n## Systems\n")[1].split("\n## ")[0]
    rows = [row.split("|")[3] for row in re.findall(r"^\|.*\|$", table, re.MULTILINE)[1:]]
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    known = {*method_names(), "full"}
    assert [name for name in names if name not in known and "quantization" not in name] == []
    assert known <= set(names)
