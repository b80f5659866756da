"""Datasets in a folder of this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from cachetools import LRUCache

from graphkd.errors import DataError
from pipeline.data.storage import FileFacts, Range, unreadable

OPEN_FILES = 256  # per process; a rank reads 64 or so shards side by side


class LocalStore:
    """A folder of this machine (or mounted on it)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.location = str(folder)
        self._files: LRUCache[str, int] = _Descriptors(OPEN_FILES)

    def read(self, name: str) -> bytes:
        """A whole file."""
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise unreadable(f"{self.folder / name}", error) from error

    def ranges(self, wanted: Sequence[Range]) -> list[bytes]:
        """Parts of files, by ``pread``."""
        return [self._range(part) for part in wanted]

    def expect(self, files: Mapping[str, FileFacts]) -> None:
        """Nothing to prepare."""

    def _range(self, part: Range) -> bytes:
        try:
            content = os.pread(self._file(part.name), part.size, part.start)
        except OSError as error:
            raise unreadable(f"{self.folder / part.name}", error) from error
        if len(content) != part.size:
            raise DataError(
                f"{self.folder / part.name} ends before byte {part.start + part.size}; it was cut short or replaced: "
                "copy or pack it again, then run `graphkd data verify`"
            )
        return content

    def _file(self, name: str) -> int:
        if name not in self._files:
            self._files[name] = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[name]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)


class _Descriptors(LRUCache[str, int]):
    """Open files, closed when they leave."""

    def popitem(self) -> tuple[str, int]:
        name, descriptor = super().popitem()
        os.close(descriptor)
        return name, descriptor
