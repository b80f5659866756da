"""Interface and settings of dataset storage, and how its failures are reported."""

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
# Errors that another try does not change.
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, ConfigError)


class StorageConfig(BaseModel):
    """How remote datasets are read. Ignored for local ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cache: Path | None = None
    """Local folder for copies of remote shards, kept across restarts; None reads remotely every time."""
    cache_gb: float = Field(default=100.0, gt=0)
    """Size limit of that folder, GB (10^9 bytes); least recently used shards are removed first."""
    attempts: int = Field(default=6, ge=1)
    """Attempts per read, with exponential backoff and jitter."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Timeout of connecting and of waiting for data, seconds."""


class ByteRange(NamedTuple):
    """A range of bytes in one file of a dataset."""

    name: str
    start: int
    size: int


class FileInfo(NamedTuple):
    """Expected size and hash of a file."""

    bytes: int
    sha256: str
    """Hex."""


class Store(Protocol):
    """The files of one folder, read-only."""

    location: str
    """Path or URL, for messages."""

    def read(self, name: str) -> bytes:
        """Read a whole file. Raises DataError if it is missing or cannot be read."""
        ...

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """Read ranges of files, in order and of full size. Raises DataError naming a file that cannot be read."""
        ...

    def register(self, files: Mapping[str, FileInfo]) -> None:
        """Announce the files that ranges will be read from, so that their size is checked and copies may be kept."""
        ...

    def discard_copy(self, name: str) -> bool:
        """Remove a local copy that turned out to be damaged. Returns whether reading again may help."""
        ...


def is_transient(error: BaseException) -> bool:
    """Whether another try may succeed. HTTP 4xx is permanent, except 408 and 429."""
    if isinstance(error, PERMANENT) or not isinstance(error, Exception):
        return False
    status = getattr(error, "status", None)
    return not (isinstance(status, int) and 400 <= status < 500 and status not in (408, 429))


def read_error(where: str, error: BaseException, attempts: int = 1) -> DataError:
    """Error of a file that cannot be read, in one line."""
    missing = isinstance(error, FileNotFoundError) or getattr(error, "errno", None) == errno.ENOENT
    reason = "does not exist" if missing else f"cannot be read ({_first_line(error)})"
    tried = f" after {attempts} tries" if attempts > 1 and is_transient(error) else ""
    return DataError(f"{where} {reason}{tried}; check the location, its access rights and the network")


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return re.sub(r"\s+", " ", text)[:160]
