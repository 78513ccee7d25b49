"""Sending a run's numbers to experiment trackers, through transformers' own integrations."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers.integrations.integration_utils import get_available_reporting_integrations

from dynalora.errors import ConfigError
from dynalora.lab.run_folder import RunFolder

_TENSORBOARD = "TENSORBOARD_LOGGING_DIR"


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is not installed, before anything is loaded.

    Raises:
        ConfigError: One is not.
    """
    available = get_available_reporting_integrations()
    missing = [name for name in names if name not in available]
    if missing:
        listed = " ".join(missing)
        raise ConfigError(
            f"report_to names {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; "
            f"run: pip install {listed}, or leave it out."
        )


@contextmanager
def tracker_files(run: RunFolder | None) -> Iterator[None]:
    """Inside, trackers that write files are made to write into the run's folder, unless the user said where."""
    said = _TENSORBOARD in os.environ
    if run is not None and not said:
        os.environ[_TENSORBOARD] = str(run.path / "tensorboard")
    try:
        yield
    finally:
        if not said:
            os.environ.pop(_TENSORBOARD, None)
