"""Errors of data, files and training that a user can fix, and the exit code of those that another try may fix."""

from __future__ import annotations

from graphkd.errors import UserError

TEMPORARY_FAILURE = 75
"""Exit code (EX_TEMPFAIL of sysexits.h) of a command that may succeed if run again; its Slurm job is requeued."""


class DataError(UserError):
    """A dataset, annotation file, image or shard is missing, malformed or damaged."""


class CacheError(UserError):
    """A teacher cache is missing or damaged, or was built from something else."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, unreadable, or of another architecture."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is incomplete, or its content is not what its manifest says; an older one may be used instead."""


class OutputError(UserError):
    """An output folder holds something else or cannot be written."""


class NoLocksError(OutputError):
    """An output folder is on a file system without locks, so processes cannot share it."""


class StoppedError(UserError):
    """Training stopped early because of a signal; ``signal`` is its number."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class TrainingError(UserError):
    """Training cannot continue, for example after a non-finite loss."""


class LostWorkersError(TrainingError):
    """Workers kept dying for reasons other than a user error; another try, or other nodes, may succeed."""


def first_line(error: BaseException) -> str:
    """First line of an error's text, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
