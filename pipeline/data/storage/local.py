"""Datasets in a local folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from io import FileIO
from operator import attrgetter
from pathlib import Path
from threading import Lock
from typing import Any

from cachetools import LRUCache, cachedmethod

from pipeline.core.errors import DataError
from pipeline.data.storage.base import ByteRange, FileInfo, read_error

MAX_OPEN_FILES = 256  # per process; a rank reads about 64 shards at a time
CHANGED_REMEDY = "copy or pack it again, or run `graphkd data index` if it was replaced on purpose"


class LocalStore:
    """A folder on this machine or mounted on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.location = str(folder)
        self._registered: Mapping[str, FileInfo] = {}
        self._files: LRUCache[Any, FileIO] = LRUCache(MAX_OPEN_FILES)
        self._guard = Lock()

    def read(self, name: str) -> bytes:
        """Read a whole file."""
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise read_error(f"{self.folder / name}", error) from error

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """Read ranges of files with ``pread``."""
        return [self._read_range(part) for part in ranges]

    def register(self, files: Mapping[str, FileInfo]) -> None:
        """Check the size of these files when they are opened."""
        self._registered = files

    def discard_copy(self, name: str) -> bool:
        """These files are no copies."""
        return False

    def _read_range(self, part: ByteRange) -> bytes:
        try:
            file = self._file(part.name)  # a reference, so that another thread's eviction does not close it
            content = os.pread(file.fileno(), part.size, part.start)
        except OSError as error:
            raise read_error(f"{self.folder / part.name}", error) from error
        if len(content) != part.size:
            raise DataError(
                f"{self.folder / part.name} ends before byte {part.start + part.size}; it was cut short or replaced: "
                f"{CHANGED_REMEDY}"
            )
        return content

    @cachedmethod(attrgetter("_files"), lock=attrgetter("_guard"))
    def _file(self, name: str) -> FileIO:
        file = FileIO(self.folder / name)
        size = os.fstat(file.fileno()).st_size
        if name in self._registered and size != self._registered[name].bytes:
            file.close()
            raise DataError(
                f"{self.folder / name} has {size} bytes, but dataset.json says {self._registered[name].bytes}; it was "
                f"cut short or replaced: {CHANGED_REMEDY}"
            )
        return file
