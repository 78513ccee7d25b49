"""The costs in the guide are what the code behind `--dry-run` counts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from dynalora.lab.report import markdown_table

ROOT = Path(__file__).parents[2]


def script() -> Any:
    spec = importlib.util.spec_from_file_location("costs", ROOT / "benchmarks" / "costs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
