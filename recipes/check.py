"""Compare the recipes with what their papers' tables print (`papers.yaml`), number by number.

    python recipes/check.py

Prints one line per difference and how many numbers were compared; exits with 1 if there is a difference.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dynalora.cli.commands import COMMANDS
from dynalora.jobs.finetune.settings import FinetuneSpec
from dynalora.lab.settings import describe, read_yaml, settings_from

RECIPES = Path(__file__).parent


def command_of(recipe: Path) -> str:
    """The command that a recipe is for, which stands on top of it."""
    found = re.search(r"^#   dynalora ([\w-]+)", recipe.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise SystemExit(f"{recipe} does not say its command.")
    return found[1]


def load(recipe: Path, **more: Any) -> Any:
    """A recipe as the settings of its command, with something in place of what only the command line says.

    Args:
        recipe: The file.
        more: Settings that override it.
    """
    kind = COMMANDS[command_of(recipe)].settings
    said = {name: "x" for name in ("output", "source", "adapter", "data") if describe(kind).get(name)}
    if kind is not FinetuneSpec:
        said.pop("data", None)
    return settings_from(kind, {**said, **read_yaml(recipe), **more})


def steps(spec: Any, rows: int) -> int:
    """Optimizer steps of a recipe on so many training rows."""
    return int(spec.epochs * math.ceil(rows / (spec.batch_size * spec.gradient_accumulation)))


def of_contestant(spec: Any, contestant: Any, field: str, rows: int | None) -> Any:
    """What a contestant has for a field: of its own, or of its method's configuration, defaults included."""
    if field == "learning_rate":
        return contestant.learning_rates[0] if len(contestant.learning_rates) == 1 else contestant.learning_rates
    if hasattr(contestant, field):
        return getattr(contestant, field)
    config = contestant.config("CAUSAL_LM").to_dict()
    if field == "final_phase":
        assert rows is not None
        return steps(spec, rows) - config["adjust_end"]
    return config[field]


def found(spec: Any, column: str, rows: int | None) -> list[tuple[str, Any]]:
    """What a recipe has for a column of `papers.yaml`: one value, or one for each contestant of a method."""
    if column == "batch":
        return [(column, spec.batch_size * getattr(spec, "gradient_accumulation", 1))]
    if column == "warmup_steps":
        assert rows is not None
        return [(column, round(spec.warmup * steps(spec, rows)))]
    for sign, name in (("/", "method"), ("@", "label")):
        chosen, parted, field = column.partition(sign)
        if parted:
            contestants = [one for one in spec.contestants() if getattr(one, name) == chosen]
            if not contestants:
                return [(column, "no such contestant")]
            return [(f"{one.label} {field}", of_contestant(spec, one, field, rows)) for one in contestants]
    return [(column, getattr(spec, column))]


def compared() -> Iterator[tuple[str, str, str, Any, Any]]:
    """Every number that a paper prints: recipe, source, name, the paper's value, the recipe's."""
    for entry in yaml.safe_load((RECIPES / "papers.yaml").read_text(encoding="utf-8")):
        folder, source, columns = RECIPES / entry["paper"], entry["source"], entry.get("columns", [])
        for name, values in entry.get("rows", {}).items():
            spec = load(folder / f"{name}.yaml")
            printed = dict(zip(columns, values, strict=True))
            rows = printed.pop("training_rows", None)
            for column, value in printed.items():
                for what, own in found(spec, column, rows):
                    yield f"{entry['paper']}/{name}", source, what, value, own
        for name, systems in entry.get("systems", {}).items():
            labels = [one.label for one in load(folder / f"{name}.yaml").contestants()]
            yield f"{entry['paper']}/{name}", source, "systems", sorted(systems), sorted(labels)


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same, numbers up to rounding."""
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (one, other))
    return math.isclose(one, other, rel_tol=1e-9) if numbers else bool(one == other)


def main() -> int:
    """Compare, and say what differs."""
    count = differences = 0
    for recipe, source, what, paper, own in compared():
        count += 1
        if not same(paper, own):
            differences += 1
            print(f"{recipe}: {what} is {own}, and the paper has {paper} ({source})")
    print(f"{count} values compared with the papers' tables, {differences} differ.")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
