"""Datasets in a folder of this machine."""

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

MAX_OPEN_FILES = 256  # per process; a rank reads 64 or so shards side by side


class LocalStore:
    """A folder of this machine (or mounted on it)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.location = str(folder)
        self._files: LRUCache[Any, FileIO] = LRUCache(MAX_OPEN_FILES)
        self._guard = Lock()

    def read(self, name: str) -> bytes:
        """A whole file."""
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise read_error(f"{self.folder / name}", error) from error

    def read_ranges(self, wanted: Sequence[ByteRange]) -> list[bytes]:
        """Parts of files, by ``pread``."""
        return [self._range(part) for part in wanted]

    def register(self, files: Mapping[str, FileInfo]) -> None:
        """Nothing to prepare."""

    def _range(self, part: ByteRange) -> bytes:
        try:
            file = self._file(part.name)  # held, so that another thread that makes room does not close it
            content = os.pread(file.fileno(), part.size, part.start)
        except OSError as error:
            raise read_error(f"{self.folder / part.name}", error) from error
        if len(content) != part.size:
            raise DataError(
                f"{self.folder / part.name} ends before byte {part.start + part.size}; it was cut short or replaced: "
                "copy or pack it again, then run `graphkd data verify`"
            )
        return content

    @cachedmethod(attrgetter("_files"), lock=attrgetter("_guard"))
    def _file(self, name: str) -> FileIO:
        return FileIO(self.folder / name)
