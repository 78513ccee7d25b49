"""The folder of a comparison: where cells are kept and taken."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from dynalora.common.files import plain, write_file
from dynalora.common.version import __version__
from dynalora.errors import RunFolderError, TrainingError
from dynalora.jobs.compare.contestants import BASE, Cell
from dynalora.jobs.compare.settings import CompareSpec
from dynalora.jobs.compare.shape import wrong_in
from dynalora.lab.run_folder import CONFIG
from dynalora.lab.settings import defaults_of, read_yaml
from dynalora.lab.units import UnitStore
from dynalora.methods import METHODS

CELLS = "cells"
_GROWS = (
    "tasks", "output", "methods", "variants", "reference", "learning_rates", "learning_rate", "seeds", "all_rates",
    "jobs", "threads", "factors", "choose",
)  # fmt: skip
"""Settings that may differ between calls on the same folder: what more to run or to measure, and how many at once."""
_OF_EACH_CELL = ("r", "alpha", "dropout", "target_modules", "quantization", "weight_decay", "match_parameters")
"""Settings that each cell records for itself."""


def shared_settings(spec: CompareSpec) -> dict[str, Any]:
    """The settings that all cells of a folder have in common, as JSON holds them."""
    separate = {*_GROWS, *_OF_EACH_CELL}
    settings: dict[str, Any] = plain({name: value for name, value in spec.settings().items() if name not in separate})
    return settings


def changed_defaults(cell: Cell, content: Mapping[str, Any]) -> list[str]:
    """Fields of the method's configuration that are not what they were when the cell was run.

    Fields that came or went since are left out, for a new one has the effect of before by default; but for those whose
    class says what configurations from before meant (`AdapterConfig.before`).

    Args:
        cell: The cell as it would be run today.
        content: What its file holds.
    """
    now, then = cell.configuration() or {}, content.get("configuration") or {}
    then = {**before(cell.method), **then} if then else then
    return [
        f"{name} was {then[name]!r}, now {value!r}"
        for name, value in now.items()
        if name in then and then[name] != value
    ]


def before(method: str) -> Mapping[str, Any]:
    """What fields of a method's configuration meant before they came, for those that changed what it does."""
    return METHODS[method].config_class.before if method in METHODS else {}


def refuse_wrong(file: Path, content: Mapping[str, Any]) -> None:
    """Refuse a cell's file of which no tables could be made.

    Raises:
        RunFolderError: It holds other values than cells do; names the first.
    """
    if wrong := wrong_in(content):
        raise RunFolderError(f"The cell '{file}' is damaged ({wrong}); delete it to run it anew.")


class CellStore(UnitStore[Cell]):
    """The cells of a comparison, which any number of processes may work on at once.

    A cell's file holds, beside its result, the settings that all cells share, its own, the version of the package that
    ran it, and every field of its method's configuration. So a cell that was run before a default changed is told
    from one of today. Cells of versions that recorded no configuration are taken as they are; see
    [`provenance`][dynalora.jobs.compare.store.CellStore.provenance].

    Args:
        folder: The comparison's folder.
        shared: What all cells have in common.
        report_only: Nothing will be run, so cells whose method had other defaults are read, and not refused.
    """

    def __init__(self, folder: str | os.PathLike[str], shared: Mapping[str, Any], *, report_only: bool = False) -> None:
        super().__init__(folder, shared=True)
        self.settings, self.report_only = dict(shared), report_only

    def file(self, unit: Cell) -> Path:
        """Where a cell's result is, or will be."""
        return self.folder / CELLS / f"{unit.name}.json"

    def log(self, cell: Cell) -> Path:
        """Where a cell says what it does."""
        return self.folder / "logs" / f"{cell.name}.log"

    def content(self, unit: Cell, result: Mapping[str, Any]) -> dict[str, Any]:
        """What a cell's file holds.

        Raises:
            TrainingError: Its numbers are none, as of a model that has diverged.
        """
        content = {
            "version": __version__,
            "settings": self.settings,
            "cell": asdict(unit),
            "configuration": unit.configuration(),
            **result,
        }
        if wrong := wrong_in(plain(content)):
            raise TrainingError(
                f"what was measured of {unit.title} cannot be compared ({wrong}); lower the learning rate, or take "
                "float32 or bfloat16 in place of float16."
            )
        return content

    def verify(self, unit: Cell, content: Mapping[str, Any]) -> None:
        """Make sure that tables can be made of a cell, and that it was run with today's settings.

        Raises:
            RunFolderError: They cannot, or it was not.
        """
        refuse_wrong(self.file(unit), content)
        expected = {**self.settings, **plain(asdict(unit))}
        recorded = {**defaults_of(CompareSpec), **content.get("settings", {}), **content.get("cell", {})}
        # An option that gives, by name, what the cell was run with before there was such a field.
        named = {name: value for name, value in before(unit.method).items() if name in expected["options"]}
        later = named.keys() - (content.get("configuration") or {}).keys()
        recorded["options"] = {**{name: named[name] for name in later}, **recorded.get("options", {})}
        # The same files may lie elsewhere, as on another machine.
        differing = [
            f"{name} was {recorded.get(name)!r}, now {value!r}"
            for name, value in expected.items()
            if recorded.get(name) != value and name not in ("task", "data", "model", "texts")
        ]
        if differing:
            raise RunFolderError(
                f"The cell '{self.file(unit)}' was run with other settings ({'; '.join(differing)}); take the same "
                "ones, choose another output folder, or delete the cell to run it anew."
            )
        changed = [] if self.report_only else changed_defaults(unit, content)
        if changed:
            raise RunFolderError(
                f"The cell '{self.file(unit)}' was run by dynalora {content.get('version')}, where {unit.method} had "
                f"other defaults ({'; '.join(changed)}); delete the cell to run it anew, choose another output folder, "
                "or call the command with --report to see what is there."
            )

    def provenance(self, results: Iterable[tuple[Cell, Mapping[str, Any]]]) -> list[str]:
        """Sentences on cells that another version of the package may have run otherwise; none if there are none.

        Args:
            results: The cells with their files' content.
        """
        trained = [(cell, content) for cell, content in results if cell.method != BASE]
        older = sum("configuration" not in content for _, content in trained)
        sentences = []
        if older:
            sentences.append(
                f"{older} of the {len(trained)} trained cells in '{self.folder}' come from an older version of "
                "dynalora, which did not record the defaults of its methods; they are used as they are, and run anew "
                "if you delete them."
            )
        changed = {
            (cell.label, str(content.get("version")), "; ".join(changes))
            for cell, content in trained
            if (changes := changed_defaults(cell, content))
        }
        sentences += [
            f"{label} was run by dynalora {version}, where it had other defaults ({changes})."
            for label, version, changes in sorted(changed)
        ]
        return sentences

    def check(self) -> None:
        """Make sure that the folder is new or holds cells of a comparison; changes nothing.

        Raises:
            RunFolderError: It is a file or holds something else.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise RunFolderError(f"The output '{self.folder}' is a file; choose another folder.")
        entries = sorted(entry.name for entry in self.folder.iterdir()) if self.folder.exists() else []
        entries = [name for name in entries if not name.endswith((".tmp", ".lock"))]
        if entries and not {CONFIG, CELLS} & set(entries):
            raise RunFolderError(
                f"The folder '{self.folder}' is not empty and holds no comparison (found {', '.join(entries[:3])}); "
                "choose another output folder."
            )
        if entries and "tasks" not in (read_yaml(self.folder / CONFIG) if CONFIG in entries else {"tasks": []}):
            raise RunFolderError(f"The folder '{self.folder}' holds another kind of run; choose another output folder.")

    def open(self, settings: Mapping[str, Any]) -> None:
        """Make the folder, and write the settings of whoever came last.

        Raises:
            RunFolderError: As `check`, or it cannot be written.
        """
        self.check()
        try:
            (self.folder / CELLS).mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(plain(dict(settings)), sort_keys=False, allow_unicode=True)
            write_file(self.folder / CONFIG, text)
        except OSError as error:
            raise RunFolderError(
                f"The folder '{self.folder}' cannot be written ({error.strerror or error}); choose another."
            ) from error
