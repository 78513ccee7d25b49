"""The errors dynalora raises on purpose.

Each carries one sentence that names what is wrong, the value that was found and what to do about it. Each also
derives from the built-in exception that Python users would expect in its place, so that existing ``except
ValueError`` clauses keep working.
"""

from __future__ import annotations


class DynaloraError(Exception):
    """Base class of every error that dynalora raises on purpose."""


class ConfigError(DynaloraError, ValueError):
    """A setting has a value that cannot work."""


class UnknownSettingError(ConfigError, TypeError):
    """A configuration does not have the setting that it was given."""


class DataError(DynaloraError, ValueError):
    """A data set cannot be read, or lacks the fields that training needs."""


class RunFolderError(DynaloraError, RuntimeError):
    """A run folder cannot be used, because it is in use or holds something else."""


class CheckpointError(DynaloraError, ValueError):
    """A saved adapter is damaged, incomplete or was made by another method."""


class HubError(DynaloraError, RuntimeError):
    """The Hugging Face Hub cannot be reached, or does not take what it was given."""


class ScheduleError(DynaloraError, RuntimeError):
    """A method's schedule cannot run, or should have run and did not."""


class TrainingError(DynaloraError, RuntimeError):
    """Training cannot go on, because the loss or the gradients are no longer numbers.

    Attributes:
        of_gradients: Whether gradients were found to be NaN or infinite, before anything is known of the loss.
    """

    of_gradients: bool = False


class UnsupportedError(DynaloraError, TypeError):
    """The method or layer cannot do what was asked."""


def check_least(least: int, **values: float | None) -> None:
    """Raise ConfigError for a value that is less than it may be; None is left out."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}; give {least} or more.")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its full stop, and the next where that ends with a colon.

    Without a message, the error's class; of one that would fill the screen, the beginning.
    """
    # A KeyError's text is its key with quotes.
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    lines = str(message).strip().splitlines()
    if not lines:
        return type(error).__name__
    told = f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and lines[1:] else lines[0]
    return told.rstrip(".") if len(told) <= 500 else f"{told[:500]} …"
