"""What all places that datasets lie in have in common: settings, interface, and how failures are told."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field

from graphkd.errors import ConfigError
from pipeline.core.errors import DataError

CHUNK_BYTES = 8 << 20
# What trying again cannot mend.
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, ConfigError)


class StorageConfig(BaseModel):
    """How remote datasets are read. Local ones take none of this."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cache: Path | None = None
    """Local folder that keeps copies of remote shards, also over crashes; None reads from afar every time."""
    cache_gb: float = Field(default=100.0, gt=0)
    """Bound of that folder in GB (10^9 bytes); the shards used longest ago go first."""
    attempts: int = Field(default=6, ge=1)
    """Tries of every read before the run fails, with growing random pauses between them."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Seconds without an answer after which a read counts as failed."""


class ByteRange(NamedTuple):
    """Some bytes of one file of a dataset."""

    name: str
    start: int
    size: int


class FileInfo(NamedTuple):
    """What a file must be."""

    bytes: int
    sha256: str
    """Hex."""


class Store(Protocol):
    """The files of one folder, read-only."""

    location: str
    """What users call it."""

    def read(self, name: str) -> bytes:
        """A whole file; raises DataError where it is missing or cannot be had."""
        ...

    def read_ranges(self, wanted: Sequence[ByteRange]) -> list[bytes]:
        """Parts of files, in order, each of the size asked for; raises DataError naming one that cannot be had."""
        ...

    def register(self, files: Mapping[str, FileInfo]) -> None:
        """Say of which files ranges will be read, so that copies of them may be kept."""
        ...


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help; answers of the kind 4xx (but 408 and 429) will not change."""
    if isinstance(error, PERMANENT) or not isinstance(error, Exception):
        return False
    status = getattr(error, "status", None)
    return not (isinstance(status, int) and 400 <= status < 500 and status not in (408, 429))


def read_error(where: str, error: BaseException, attempts: int = 1) -> DataError:
    """The error of a file that cannot be had, in one line, with how often it was tried."""
    missing = isinstance(error, FileNotFoundError) or getattr(error, "errno", None) == errno.ENOENT
    reason = "does not exist" if missing else f"cannot be read ({_first_line(error)})"
    tried = f" after {attempts} tries" if attempts > 1 and is_transient(error) else ""
    return DataError(f"{where} {reason}{tried}; look at the location, its access rights and the network")


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return re.sub(r"\s+", " ", text)[:160]
