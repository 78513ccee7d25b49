"""A comparison out of what its folder holds, for a report: no data, no model and no text is looked for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynalora.common.files import plain, write_file
from dynalora.errors import ConfigError
from dynalora.jobs.compare.contestants import Contestant
from dynalora.jobs.compare.settings import CompareSpec
from dynalora.jobs.compare.store import CELLS, refuse_wrong
from dynalora.lab.units import read_result

PLAN = "plan.json"
"""The file with what was decided before anything ran: each method's rank, options and number of parameters."""
_DECIDED = ("method", "r", "alpha", "target_modules", "options", "parameters", "off")


def write_plan(folder: Path, contestants: Iterable[Contestant]) -> None:
    """Keep the contestants as they were planned, beside those of earlier calls."""
    planned = {contestant.label: {name: getattr(contestant, name) for name in _DECIDED} for contestant in contestants}
    write_file(folder / PLAN, json.dumps(plain({**(read_result(folder / PLAN) or {}), **planned}), indent=1) + "\n")


class Recorded:
    """What a comparison's folder says of its tasks and its methods.

    Args:
        spec: What is compared.

    Raises:
        ConfigError: No cell has been run.
        RunFolderError: A cell is damaged.
    """

    def __init__(self, spec: CompareSpec) -> None:
        self.spec, self.folder = spec, Path(spec.output)
        files = sorted((self.folder / CELLS).glob("*/*.json"))
        self.cells = []
        for file in files:
            if (content := read_result(file)) and "cell" in content:
                refuse_wrong(file, content)
                self.cells.append(content)
        if not self.cells:
            raise ConfigError(f"No cell of '{spec.output}' has been run yet; call the command without --report.")

    def places(self) -> dict[str, str]:
        """Each task's name in file names; a task whose files have moved is known by its last part.

        Raises:
            ConfigError: No cell is of a task.
        """
        exact = {cell["task"]: cell["place"] for cell in self._of("cell")}
        loose = {Path(task).name: place for task, place in exact.items()}
        places = {}
        for task in self.spec.tasks:
            place = exact.get(task) or loose.get(Path(task).name)
            if place is None:
                listed = ", ".join(dict.fromkeys(exact))
                raise ConfigError(f"tasks names {task}, of which '{self.folder}' has no cell; it has {listed}.")
            places[task] = place
        return places

    def contestants(self) -> list[Contestant]:
        """What is compared, with the ranks and numbers of parameters that the cells were run with."""
        plan = read_result(self.folder / PLAN) or {}
        known = [self._known(contestant, plan) for contestant in self.spec.contestants()]
        of_reference = known[0].parameters
        return [
            replace(each, off=each.parameters / of_reference - 1) if each.parameters and of_reference else each
            for each in known
        ]

    def _known(self, contestant: Contestant, plan: Mapping[str, Any]) -> Contestant:
        """A contestant as its cells have it; as the settings say where it has none."""
        cells = [content for content in self.cells if content["cell"]["label"] == contestant.label]
        planned = plan.get(contestant.label) or {}
        decided = {name: planned[name] for name in ("r", "options", "parameters") if name in planned}
        for content in cells[:1]:
            trained = (content.get("training") or {}).get("trainable_parameters")
            recorded = {name: content["cell"][name] for name in ("r", "options") if name in content["cell"]}
            if recorded != {name: decided.get(name) for name in recorded}:
                decided = {**recorded, "parameters": trained}
        return replace(contestant, **decided)

    def _of(self, name: str) -> Sequence[Mapping[str, Any]]:
        return [content[name] for content in self.cells]
