"""The settings of a comparison's two stages: a short run that finds ranks, and all methods with a LoRA of these ranks.

First `python pattern.py ranks.yaml > first.yaml`: the variant `dira` alone, for a tenth of the steps. Then
`python pattern.py ranks.yaml CELL.json > all.yaml`: all variants, and `lora-pattern` with the ranks of that run's cell.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml


def first(settings: dict[str, Any]) -> dict[str, Any]:
    """The run that finds the ranks."""
    dira = {"dira": settings["variants"]["dira"]}
    return {**settings, "variants": dira, "reference": "dira", "steps": settings["steps"] // 10, "seeds": 1}


def with_pattern(settings: dict[str, Any], cell: dict[str, Any]) -> dict[str, Any]:
    """All variants, and a LoRA with a cell's ranks, each scaled as the others are."""
    ranks = {row["module"]: row["rank"] for row in cell["landscape"]}
    alphas = {module: 2 * rank for module, rank in ranks.items()}
    pattern = {"method": "lora", "match": False, "rank_pattern": ranks, "alpha_pattern": alphas}
    return {**settings, "variants": {**settings["variants"], "lora-pattern": pattern}}


if __name__ == "__main__":
    read = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    made = first(read) if len(sys.argv) < 3 else with_pattern(read, json.loads(Path(sys.argv[2]).read_text()))
    yaml.safe_dump(made, sys.stdout, sort_keys=False)
