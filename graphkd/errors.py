"""Errors that a user can mend: each message gives the value, the rule it breaks and the remedy, in one line."""

from __future__ import annotations

TEMPORARY_FAILURE = 75
"""Exit code, after sysexits.h, of a command that may succeed when it is run again; its job is queued again."""


class UserError(Exception):
    """Base of every error that the command line prints as one line instead of a traceback."""


class ConfigError(UserError):
    """A config file or override is wrong; the message lists every mistake, one per line."""


class DataError(UserError):
    """A dataset, annotation file, image or shard does not hold what it should."""


class CacheError(UserError):
    """A teacher cache is missing, damaged, or was made for something else."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, unreadable, or of another architecture."""


class OutputError(UserError):
    """An output folder cannot be used: it holds something else, or cannot be written."""


class NoLocksError(OutputError):
    """An output folder is on a file system without locks, so processes cannot share it."""


class StoppedError(UserError):
    """Training left early because a signal asked for it; ``signal`` is its number."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class TrainingError(UserError):
    """Training cannot go on, such as after a loss that is not finite."""


class LostWorkersError(TrainingError):
    """Workers died again and again, by what was not the user's mistake; another try, elsewhere, may succeed."""
