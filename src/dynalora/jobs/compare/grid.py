"""Which cells a comparison has, and which are to be run next."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from dynalora.jobs.compare.contestants import BASE, Cell, Contestant, Setup
from dynalora.jobs.compare.settings import CompareSpec
from dynalora.jobs.compare.store import CellStore

if TYPE_CHECKING:
    from dynalora.lab.tasks.task import ExperimentTask


class Grid:
    """Which cells there are, and which are to be run next.

    Args:
        spec: What is compared.
        contestants: With their ranks.
        places: Each task's name in file names.
        store: The cells' results.
    """

    def __init__(
        self, spec: CompareSpec, contestants: Sequence[Contestant], places: Mapping[str, str], store: CellStore
    ) -> None:
        self.spec, self.contestants, self.places, self.store = spec, list(contestants), dict(places), store
        self._results: dict[str, dict[str, Any]] = {}

    @property
    def total(self) -> int:
        """Number of cells in all."""
        runs = 0
        for contestant in self.contestants:
            rates, seeds = len(contestant.learning_rates), self.spec.seeds
            runs += rates * seeds if self.spec.all_rates else rates + seeds - 1
        return len(self.places) * (1 + runs)

    @property
    def chooses(self) -> bool:
        """Whether each method is judged at one learning rate: its only one, or one chosen on questions set aside.

        Where all were run and no questions are set aside, methods are compared at every one.
        """
        return self.spec.validation > 0 or all(len(each.learning_rates) == 1 for each in self.contestants)

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """A cell's result, read once."""
        if cell.name not in self._results:
            result = self.store.read(cell)
            if result is None:
                return None
            self._results[cell.name] = result
        return self._results[cell.name]

    def cell(self, task: str, contestant: Contestant, rate: float, seed: int) -> Cell:
        """One cell of a contestant."""
        setup = {item.name: getattr(contestant, item.name) for item in fields(Setup)}
        return Cell(task=task, place=self.places[task], learning_rate=rate, seed=seed, **setup)

    def base(self, task: str) -> Cell:
        """The untouched model on a task."""
        return Cell(
            task=task, place=self.places[task], label=BASE, method=BASE, quantization=self.spec.quantization,
            weight_decay=self.spec.weight_decay,
        )  # fmt: skip

    def tried(self, task: str, contestant: Contestant) -> list[Cell]:
        """The cells that the learning rate is chosen from."""
        return [self.cell(task, contestant, rate, self.spec.seed) for rate in contestant.learning_rates]

    def chosen_rate(self, task: str, contestant: Contestant) -> float | None:
        """The learning rate of the lowest loss on the questions set aside; None: not all have been tried."""
        if len(contestant.learning_rates) == 1:
            return contestant.learning_rates[0]
        losses = {}
        for cell in self.tried(task, contestant):
            result = self.result(cell)
            if result is None:
                return None
            losses[cell.learning_rate] = min(self._validation_losses(result), default=math.inf)
        return min(losses, key=lambda rate: (losses[rate], rate))

    def _validation_losses(self, result: Mapping[str, Any]) -> list[float]:
        """A run's losses on the questions set aside: as trained, or at every factor where the best one chooses."""
        scores = [result.get("validation") or {}]
        if self.spec.choose == "best-factor":
            scores += [point.get("validation") or {} for point in result.get("curve") or []]
        return [float(score["loss"]) for score in scores if score.get("loss") is not None]

    def known(self) -> Iterator[Cell]:
        """All cells that can be named now; more come to be known as learning rates are chosen.

        Ordered so that what others wait for comes first, and one seed of everything before the next.
        """
        spec = self.spec
        for task in self.places:
            yield self.base(task)
        for task in self.places:
            for contestant in self.contestants:
                yield from self.tried(task, contestant)
        for seed in spec.run_seeds[1:]:
            for task in self.places:
                for contestant in self.contestants:
                    if spec.all_rates:
                        yield from (self.cell(task, contestant, rate, seed) for rate in contestant.learning_rates)
                    elif (rate := self.chosen_rate(task, contestant)) is not None:
                        yield self.cell(task, contestant, rate, seed)

    def open_cells(self) -> list[Cell]:
        """Known cells without a result."""
        return [cell for cell in self.known() if self.result(cell) is None]

    def results(self) -> list[tuple[Cell, dict[str, Any]]]:
        """The known cells that have a result, each with it."""
        return [(cell, result) for cell in self.known() if (result := self.result(cell)) is not None]

    def done(self) -> int:
        """Number of cells with a result."""
        return len(self.results())

    def provenance(self) -> list[str]:
        """Sentences on cells that another version of the package may have run otherwise."""
        return self.store.provenance(self.results())


@dataclass(frozen=True)
class Comparison:
    """What a comparison came to.

    Attributes:
        grid: The cells with their results.
        tasks: By their source; empty where nothing is run.
        failed: Cells that failed in this call, each with the last line it said.
    """

    grid: Grid
    tasks: Mapping[str, ExperimentTask]
    failed: tuple[tuple[Cell, str], ...]

    def about(self, task: str) -> str:
        """A task in a sentence, as the cells have it."""
        results = (result for cell, result in self.grid.results() if cell.task == task)
        return next((str(result["task"]) for result in results if result.get("task")), "")
