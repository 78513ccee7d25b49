"""Retention against the optimizer step: single measurements, the files they are kept in, and curves of finished runs.

A file holds a line of JSON for every measurement, and may hold several runs.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from dynalora.common.files import plain, write_file
from dynalora.common.notebook import Shown
from dynalora.common.progress import Progress, counted, silent
from dynalora.errors import CheckpointError, DataError
from dynalora.forgetting.retention import Retention, predictions_within, retention
from dynalora.forgetting.texts import MeasuredText


@dataclass(frozen=True)
class RetentionPoint:
    """One measurement.

    Attributes:
        run: Name of the run.
        step: Optimizer steps done.
        text: Name of the text.
        retention: What was measured on it.
        seconds: Time that it took.
    """

    run: str
    step: int
    text: str
    retention: Retention
    seconds: float

    def as_record(self) -> dict[str, Any]:
        """The point as one flat mapping, for a line of JSON."""
        record = asdict(self)
        measured = record.pop("retention")
        seconds = record.pop("seconds")
        flat: dict[str, Any] = plain({**record, **measured, "seconds": seconds}, finite=True)
        return flat

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> RetentionPoint:
        """The point that `as_record` wrote; raises KeyError, TypeError or ValueError for anything else."""
        kl, shift, base, error, seconds = (
            math.nan if record[name] is None else float(record[name])
            for name in ("kl", "loss_shift", "base_loss", "kl_error", "seconds")
        )
        measured = Retention(kl, shift, base, int(record["tokens"]), error)
        return cls(str(record["run"]), int(record["step"]), str(record["text"]), measured, seconds)


class RetentionPoints(list[RetentionPoint], Shown):
    """Measurements in order, which a notebook shows as a table and a picture."""


class RetentionCurves(dict[str, list[RetentionPoint]], Shown):
    """Measurements by the name of their run, which a notebook shows as a table and a picture."""


def read_retention(*paths: str | os.PathLike[str]) -> RetentionCurves:
    """The measurements in files that monitors wrote.

    Args:
        paths: The files. A last line that a kill cut short is left out.

    Returns:
        Points by the name of their run, by step. Runs of the same name in different files get the file's folder's name
        before theirs.

    Raises:
        DataError: A file cannot be read, or a line in it is no measurement.
    """
    curves = RetentionCurves()
    for path in map(Path, paths):
        runs: dict[str, list[RetentionPoint]] = {}
        for point in read_points(path):
            runs.setdefault(point.run, []).append(point)
        for run, points in runs.items():
            name = run if run not in curves else f"{path.resolve().parent.name}: {run}"
            while name in curves:
                name += "'"
            curves[name] = sorted(points, key=lambda point: point.step)
    return curves


def read_points(path: Path) -> list[RetentionPoint]:
    """The measurements in a file, in order; a last line that a kill cut short is left out.

    Raises:
        DataError: The file cannot be read, or another line in it is no measurement.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The measurements in '{path}' cannot be read ({error}).") from error
    points = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            points.append(RetentionPoint.from_record(json.loads(line)))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            if number == len(lines):
                break
            raise DataError(f"Line {number} of '{path}' is no measurement of a RetentionMonitor.") from error
    return points


def append_points(path: Path, points: Iterable[RetentionPoint]) -> None:
    """Add measurements to a file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(_lines(points))


def write_points(path: Path, points: Iterable[RetentionPoint]) -> None:
    """Write a file of measurements, whole or not at all."""
    write_file(path, _lines(points))


def _lines(points: Iterable[RetentionPoint]) -> str:
    return "".join(json.dumps(point.as_record()) + "\n" for point in points)


def checkpoint_retention(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    texts: Mapping[str, MeasuredText],
    *,
    name: str = "run",
    batch_size: int = 8,
    cache_bytes: int = 2**30,
    progress: Progress = silent,
) -> list[RetentionPoint]:
    """The retention curve of a run that was trained without a monitor, from its checkpoints.

    Args:
        model: The base model, without adapters; it is left as it was.
        folder: What the Trainer's `output_dir` was: each `checkpoint-N` in it is an adapter after N steps.
        texts: What to measure on, by name, from `own_text` and `given_text`.
        name: Of the run.
        batch_size: Texts per forward pass.
        cache_bytes: Memory for the base model's predictions; what does not fit is computed anew for every checkpoint.
        progress: Called with the number of checkpoints done.

    Returns:
        Points by step.

    Raises:
        CheckpointError: There is no checkpoint.
    """
    checkpoints = sorted(
        (int(entry.name.rpartition("-")[2]), entry)
        for entry in Path(folder).glob("checkpoint-*")
        if entry.name.rpartition("-")[2].isdigit() and (entry / "adapter_config.json").exists()
    )
    if not checkpoints:
        raise CheckpointError(f"'{folder}' holds no checkpoint-N with an adapter; give a Trainer's output_dir.")
    references = predictions_within(model, texts, cache_bytes, batch_size=batch_size)
    points = []
    for step, checkpoint in counted(checkpoints, f"Retention of checkpoints: {name}", progress):
        adapted = PeftModel.from_pretrained(model, str(checkpoint))
        for text_name, base in references.items():
            began = time.perf_counter()
            measured = retention(adapted, base.text, base=base, batch_size=batch_size)
            points.append(RetentionPoint(name, step, text_name, measured, time.perf_counter() - began))
        if not adapted.active_peft_config.is_prompt_learning:  # which leaves the base model as it is
            adapted.unload()
    return points
