"""Where a benchmark's rows come from: the Hugging Face Hub, or a folder of files.

A folder holds one file per split, `<group>/<name>.<split>.jsonl` (or another kind of data file, or
`.txt` for running text), with or without `.gz`:
`commonsense/boolq.train.jsonl.gz`, `math/gsm8k.dev.jsonl`, `text/wikitext2.valid.txt.gz`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from dynalora.errors import DataError
from dynalora.evaluation.files import FILE_KINDS, SAME_SPLIT, file_rows, hub_rows, split_files, text_lines


class MissingSplitError(DataError):
    """A source has no such split; other splits of it may be there."""


Row = tuple[str, Mapping[str, Any]]
"""Where a row lies, for errors, and its fields."""


@dataclass(frozen=True)
class Source:
    """Where a task's rows are.

    Attributes:
        file: Group and name in a folder, such as `"commonsense/boolq"`.
        hub: Id on the Hub; empty: it has no usual place there.
        subsets: The Hub configurations to read, one after the other.
        splits: The Hub's name of each split.
        revision: The Hub's branch; for data sets that the Hub converts to Parquet itself.
        text: Whether the rows are running text, in the field `text`; files may then be plain text, one row per line.
        measured_on: The splits to measure on, in order of preference.
    """

    file: str
    hub: str = ""
    subsets: tuple[str | None, ...] = (None,)
    splits: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None
    text: bool = False
    measured_on: tuple[str, ...] = ("test", "dev")

    def rows(
        self, split: str | None = None, *, folder: str | os.PathLike[str] | None = None, limit: int | None = None
    ) -> tuple[str, list[Row]]:
        """The rows of a split.

        Args:
            split: `train`, `dev` or `test`; None: the first of `measured_on` that there is.
            folder: Read from this folder; None: from the Hub.
            limit: The first rows only; None: all.

        Returns:
            The split that was read, and its rows.

        Raises:
            MissingSplitError: There is no such split.
            DataError: The folder is missing, or the split cannot be read or is empty.
        """
        if split is not None:
            split = SAME_SPLIT.get(split, split)
        name, rows = self._folder(split, Path(folder)) if folder is not None else self._hub(split)
        lines = list(islice(rows, limit))
        if not lines:
            raise DataError(f"The split '{name}' of '{self.file}' holds no row; give data with at least one.")
        return name, lines

    def _folder(self, split: str | None, folder: Path) -> tuple[str, Iterator[Row]]:
        if not folder.is_dir():
            raise DataError(f"There is no folder '{folder}'; give the one that holds '{self.file}.*'.")
        kinds = (".txt", *FILE_KINDS) if self.text else FILE_KINDS
        files = split_files(folder / self.file, kinds)
        chosen = split or next((name for name in self.measured_on if name in files), None)
        if chosen is None or chosen not in files:
            missing = f"split '{chosen}'" if chosen else f"split {' or '.join(self.measured_on)}"
            present = f"there is {', '.join(sorted(files))}" if files else "there is none of its files"
            raise MissingSplitError(
                f"'{self.file}' has no {missing} in '{folder}' ({present}); name another split, or put "
                f"'{self.file}.{chosen or self.measured_on[0]}{kinds[0]}' there."
            )
        path = files[chosen]
        plain = self.text and path.name.removesuffix(".gz").lower().endswith(".txt")
        rows = text_lines(path) if plain else file_rows(path)
        return chosen, ((f"'{path}', {where}", row) for where, row in rows)

    def _hub(self, split: str | None) -> tuple[str, Iterator[Row]]:
        if not self.hub:
            raise MissingSplitError(
                f"'{self.file}' has no usual place on the Hub; give a folder that holds '{self.file}.test.jsonl'."
            )
        chosen = split or next((name for name in self.measured_on if name in self.splits), None)
        if chosen is None or chosen not in self.splits:
            raise MissingSplitError(
                f"'{self.hub}' has no split '{chosen or 'test'}'; its splits are {', '.join(self.splits)}."
            )
        return chosen, self._hub_rows(self.splits[chosen])

    def _hub_rows(self, split: str) -> Iterator[Row]:
        remedy = f"connect to the Hub, or give a folder that holds '{self.file}.*'"
        for subset in self.subsets:
            label = f"'{self.hub}'" + (f" ({subset})" if subset else "")
            for where, row in hub_rows(self.hub, split, subset, revision=self.revision, remedy=remedy):
                yield f"{label}, {where}", row
