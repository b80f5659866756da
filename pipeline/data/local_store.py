"""Datasets in a folder of this machine."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

from graphkd.errors import DataError
from pipeline.data.storage import CHUNK_BYTES, Range, unreadable

OPEN_FILES = 256  # per process; a rank reads 64 or so shards side by side


class LocalStore:
    """A folder of this machine (or mounted on it)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.location = str(folder)
        self._files: OrderedDict[str, int] = OrderedDict()

    def read(self, name: str) -> bytes:
        """A whole file."""
        return b"".join(self.chunks(name))

    def ranges(self, wanted: Sequence[Range]) -> list[bytes]:
        """Parts of files, by ``pread``."""
        return [self._range(part) for part in wanted]

    def chunks(self, name: str) -> Iterator[bytes]:
        """A whole file in pieces."""
        try:
            with (self.folder / name).open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
        except OSError as error:
            raise unreadable(f"{self.folder / name}", error) from error

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
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        self._files[name] = descriptor
        if len(self._files) > OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return descriptor

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)
