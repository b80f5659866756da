"""Getting rows of a cache: from memory-mapped files without a copy, or from afar, side by side; each is checked."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from cachetools import LRUCache
from numpy.typing import NDArray

from graphkd.errors import CacheError
from pipeline.data.local_store import LocalStore
from pipeline.data.storage import Range, Store
from pipeline.teacher.cache_format import CachedShard, CacheJson, cache_schema
from pipeline.teacher.cache_index import CacheIndex, read_cache_index

OPEN_FILES = 64  # per process
REMEDY = "copy it again, or build the cache again"


@dataclass(frozen=True, slots=True)
class Row:
    """A page in one of its views, as it lies in the cache."""

    sample: int
    view: int
    arrays: dict[str, NDArray[Any]]
    """Column name -> flat array, read-only and not copied."""


class CacheRows:
    """The rows of a finished cache by place: shard of the dataset and row of its file.

    Each row's bytes are checked against their digest when this process first reads them. Raises CacheError naming the
    file where one is missing, cut short, damaged, or of another cache.
    """

    def __init__(self, store: Store, description: CacheJson) -> None:
        self.store = store
        self.description = description
        self._schema = cache_schema(description.precision)
        self._indexes: LRUCache[int, CacheIndex] = LRUCache(OPEN_FILES)
        self._maps: LRUCache[int, pa.Buffer] = LRUCache(OPEN_FILES)
        self._checked = [np.zeros(shard.rows, dtype=bool) for shard in description.shards]

    def rows(self, places: Sequence[tuple[int, int]]) -> list[Row]:
        """Rows at (shard, row) each."""
        buffers = self._buffers([self._range(shard, row) for shard, row in places], places)
        return [self._row(*place, buffer) for place, buffer in zip(places, buffers, strict=True)]

    def index(self, shard: int) -> CacheIndex:
        """The index of a cache file."""
        if shard not in self._indexes:
            entry = self.description.shards[shard]
            index = read_cache_index(self.store, entry.name)
            self._indexes[shard] = index.require(entry, self.description.identity, self._path(entry))
        return self._indexes[shard]

    def _range(self, shard: int, row: int) -> Range:
        index = self.index(shard)
        name = self.description.shards[shard].name
        return Range(name=name, start=int(index.offset[row]), size=int(index.bytes[row]))

    def _buffers(self, ranges: list[Range], places: Sequence[tuple[int, int]]) -> list[pa.Buffer]:
        if isinstance(self.store, LocalStore):
            return [
                self._mapped(shard).slice(part.start, part.size)
                for (shard, _), part in zip(places, ranges, strict=True)
            ]
        return [pa.py_buffer(content) for content in self.store.ranges(ranges)]

    def _mapped(self, shard: int) -> pa.Buffer:
        if shard not in self._maps:
            assert isinstance(self.store, LocalStore)
            self._maps[shard] = _map(self.store, self.description.shards[shard])
        return self._maps[shard]

    def _row(self, shard: int, row: int, buffer: pa.Buffer) -> Row:
        index = self.index(shard)
        if not self._checked[shard][row]:
            if xxhash.xxh3_64_intdigest(buffer) != int(index.digest[row]):
                sample, path = int(index.sample[row]), self._path(self.description.shards[shard])
                raise CacheError(f"{path}: the row of sample {sample} is damaged (its digest differs); {REMEDY}")
            self._checked[shard][row] = True
        batch = pa.ipc.read_record_batch(pa.ipc.read_message(buffer), self._schema)
        lists = {
            name: batch.column(place).values.to_numpy(zero_copy_only=True)
            for place, name in enumerate(self._schema.names)
            if pa.types.is_list(self._schema.types[place])
        }
        return Row(sample=int(index.sample[row]), view=int(index.view[row]), arrays=lists)

    def _path(self, shard: CachedShard) -> str:
        return f"{self.store.location}/{shard.name}"


def require_file(store: LocalStore, shard: CachedShard) -> None:
    """Raise CacheError where a cache file is missing or has another length than ``cache.json`` says."""
    path = store.folder / shard.name
    if not path.exists():
        raise CacheError(f"{path} is missing from the cache; {REMEDY}")
    size = path.stat().st_size
    if size != shard.bytes:
        raise CacheError(f"{path} has {size} bytes, but cache.json says {shard.bytes}; {REMEDY}")


def _map(store: LocalStore, shard: CachedShard) -> pa.Buffer:
    require_file(store, shard)
    with (store.folder / shard.name).open("rb") as file:
        return pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
