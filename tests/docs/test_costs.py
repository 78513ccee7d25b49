"""The costs in the guide are what the code behind `--dry-run` counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dynalora.lab.report import markdown_table
from tests.scripts import load_script

ROOT = Path(__file__).parents[2]


def script() -> Any:
    return load_script("benchmarks/costs.py")


def test_a_row_of_the_smallest_model() -> None:
    guide = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    costs = script()
    cost = costs.cost_of(costs.model_of("1B"), costs.adapter_config("disel", r=16), dtype=costs.torch.bfloat16)
    row = f"| DISeL | {cost.trained:,} | {costs.amount(cost.adapter)} | {costs.amount(cost.gradients)} |"
    assert row in guide


@pytest.mark.slow
@pytest.mark.parametrize("size", ["1B", "8B", "70B"])
def test_the_tables_are_those_of_the_script(size: str) -> None:
    guide = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    assert markdown_table(script().table(size)).strip() in guide
