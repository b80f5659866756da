"""Getting rows of a cache: from memory-mapped files without a copy, or from afar, side by side; each is checked."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from cachetools import LRUCache, cachedmethod
from numpy.typing import NDArray

from pipeline.cache.format import CachedShard, CacheJson, cache_schema
from pipeline.cache.index import CacheEntry, CacheIndex, read_cache_index
from pipeline.core.errors import CacheError
from pipeline.data.storage.base import ByteRange, Store
from pipeline.data.storage.local import LocalStore

MAX_OPEN_FILES = 256  # per process; a rank reads 64 or so shards side by side
REMEDY = "copy it again, or build the cache again"


Layout = list[tuple[str, "np.dtype[Any]", int, int]]
"""Column name, type, length and first byte in the message."""


@dataclass(frozen=True, slots=True)
class Row:
    """A page in one of its views, as it lies in the cache."""

    sample: int
    view: int
    arrays: dict[str, NDArray[Any]]
    """Column name -> flat array, read-only and not copied."""


class CacheReader:
    """The rows of a finished cache by place: shard of the dataset and row of its file.

    Each row's bytes are checked against their digest when this process first reads them, from afar every time. Raises
    CacheError naming the file where one is missing, cut short, damaged, or of another cache.
    """

    def __init__(self, store: Store, description: CacheJson) -> None:
        self.store = store
        self.description = description
        self._local = isinstance(store, LocalStore)
        self._schema = cache_schema(description.precision)
        types = enumerate(zip(self._schema.names, self._schema.types, strict=True))
        self._lists = [(place, name) for place, (name, kind) in types if pa.types.is_list(kind)]
        self._indexes: LRUCache[Any, CacheIndex] = LRUCache(MAX_OPEN_FILES)
        self._maps: LRUCache[Any, pa.Buffer] = LRUCache(MAX_OPEN_FILES)
        self._guard = Lock()  # rows are read by several threads
        self._checked = [np.zeros(shard.rows, dtype=bool) for shard in description.shards]
        self._layouts: dict[int, Layout | None] = {}

    def rows(self, places: Sequence[tuple[int, int]]) -> list[Row]:
        """Rows at (shard, row) each."""
        entries = [self.index(shard).entries[row] for shard, row in places]
        buffers = self._buffers([shard for shard, _ in places], entries)
        return [self._row(*item) for item in zip(places, entries, buffers, strict=True)]

    @cachedmethod(attrgetter("_indexes"), lock=attrgetter("_guard"))
    def index(self, shard: int) -> CacheIndex:
        """The index of a cache file."""
        entry = self.description.shards[shard]
        index = read_cache_index(self.store, entry.name, self.description.indexes.get(entry.name))
        return index.check(entry, self.description.identity, self._path(entry))

    def _buffers(self, shards: list[int], entries: list[CacheEntry]) -> list[pa.Buffer]:
        pairs = zip(shards, entries, strict=True)
        if isinstance(self.store, LocalStore):
            return [self._mapped(shard).slice(entry.offset, entry.bytes) for shard, entry in pairs]
        all_shards = self.description.shards
        wanted = [
            ByteRange(name=all_shards[shard].name, start=entry.offset, size=entry.bytes) for shard, entry in pairs
        ]
        return [pa.py_buffer(content) for content in self.store.read_ranges(wanted)]

    @cachedmethod(attrgetter("_maps"), lock=attrgetter("_guard"))
    def _mapped(self, shard: int) -> pa.Buffer:
        assert isinstance(self.store, LocalStore)
        return _map(self.store, self.description.shards[shard])

    def _row(self, place: tuple[int, int], entry: CacheEntry, buffer: pa.Buffer) -> Row:
        shard, row = place
        layout = self._layouts.get(entry.nodes)
        mapped = self.description.shards[shard].compression == "none"
        # What comes from afar comes anew each time, and may have been replaced; what is compressed is parsed anyway.
        if self._local and self._checked[shard][row] and mapped and layout is not None:
            found = {name: np.frombuffer(buffer, kind, count, start) for name, kind, count, start in layout}
            return Row(entry.sample, entry.view, found)
        if xxhash.xxh3_64_intdigest(buffer) != entry.digest:
            path = self._path(self.description.shards[shard])
            raise CacheError(f"{path}: the row of sample {entry.sample} is damaged (its digest differs); {REMEDY}")
        arrays = self._parsed(buffer)
        if mapped:
            self._learn(entry.nodes, arrays, buffer)
        self._checked[shard][row] = True
        return Row(entry.sample, entry.view, arrays)

    def _parsed(self, buffer: pa.Buffer) -> dict[str, NDArray[Any]]:
        columns = pa.ipc.read_record_batch(pa.ipc.read_message(buffer), self._schema).columns
        return {name: columns[place].values.to_numpy() for place, name in self._lists}  # never copies

    def _learn(self, nodes: int, arrays: dict[str, NDArray[Any]], buffer: pa.Buffer) -> None:
        """Note where the arrays of a row with so many nodes lie, for rows to come; None once two rows differ in that.

        Lengths follow from the number of nodes, and Arrow lays equal lengths out alike; parsing every row again would
        take a third of the time of copying its features.
        """
        found = [(name, values.dtype, len(values), _start(values, buffer)) for name, values in arrays.items()]
        if self._layouts.setdefault(nodes, found) != found:
            self._layouts[nodes] = None

    def _path(self, shard: CachedShard) -> str:
        return f"{self.store.location}/{shard.name}"


def _start(values: NDArray[Any], buffer: pa.Buffer) -> int:
    return int(values.__array_interface__["data"][0]) - int(buffer.address) if len(values) else 0


def check_file(store: LocalStore, shard: CachedShard) -> None:
    """Raise CacheError where a cache file is missing or has another length than ``cache.json`` says."""
    path = store.folder / shard.name
    if not path.exists():
        raise CacheError(f"{path} is missing from the cache; {REMEDY}")
    size = path.stat().st_size
    if size != shard.bytes:
        raise CacheError(f"{path} has {size} bytes, but cache.json says {shard.bytes}; {REMEDY}")


def _map(store: LocalStore, shard: CachedShard) -> pa.Buffer:
    check_file(store, shard)
    with (store.folder / shard.name).open("rb") as file:
        return pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
