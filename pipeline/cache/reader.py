"""Reading rows of a cache: memory-mapped without a copy, or concurrently from remote storage. Each row is checked."""

from __future__ import annotations

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
from pipeline.cache.index import REMEDY, CacheEntry, CacheIndex, read_cache_index
from pipeline.core.errors import CacheError
from pipeline.data.format.index import map_file
from pipeline.data.storage.base import ByteRange, Store
from pipeline.data.storage.local import LocalStore

MAX_OPEN_FILES = 256  # per process; a rank reads about 64 shards at a time

Layout = list[tuple[str, "np.dtype[Any]", int, int]]
"""Name, dtype, length and offset in the message of each column."""


@dataclass(frozen=True, slots=True)
class Row:
    """One view of a page, as stored in the cache."""

    sample: int
    view: int
    arrays: dict[str, NDArray[Any]]
    """Column name -> flat array, read-only and not copied."""


class CacheReader:
    """Rows of a finished cache by position: shard of the dataset, and row of its file.

    The digest of a row is checked when this process first reads it; for remote storage, at every read.

    Raises:
        CacheError: naming a file that is missing, cut short, damaged, or of another cache.
    """

    def __init__(self, store: Store, description: CacheJson) -> None:
        self.store = store
        self.description = description
        self._local = isinstance(store, LocalStore)
        self._schema = cache_schema(description.precision)
        types = enumerate(zip(self._schema.names, self._schema.types, strict=True))
        self._lists = [(position, name) for position, (name, kind) in types if pa.types.is_list(kind)]
        self._indexes: LRUCache[Any, CacheIndex] = LRUCache(MAX_OPEN_FILES)
        self._maps: LRUCache[Any, pa.Buffer] = LRUCache(MAX_OPEN_FILES)
        self._guard = Lock()  # rows are read by several threads
        self._checked = [np.zeros(shard.rows, dtype=bool) for shard in description.shards]
        self._layouts: dict[int, Layout | None] = {}

    def rows(self, positions: Sequence[tuple[int, int]]) -> list[Row]:
        """Rows at (shard, row) positions."""
        entries = [self.index(shard).entries[row] for shard, row in positions]
        buffers = self._buffers([shard for shard, _ in positions], entries)
        return [self._row(*item) for item in zip(positions, entries, buffers, strict=True)]

    @cachedmethod(attrgetter("_indexes"), lock=attrgetter("_guard"))
    def index(self, shard: int) -> CacheIndex:
        """Index of a cache file."""
        entry = self.description.shards[shard]
        index = read_cache_index(self.store, entry.name, self.description.indexes.get(entry.name))
        return index.check(entry, self.description.identity, self._path(entry))

    def _buffers(self, shards: list[int], entries: list[CacheEntry]) -> list[pa.Buffer]:
        pairs = zip(shards, entries, strict=True)
        if isinstance(self.store, LocalStore):
            return [self._mapped(shard).slice(entry.offset, entry.bytes) for shard, entry in pairs]
        names = [shard.name for shard in self.description.shards]
        ranges = [ByteRange(name=names[shard], start=entry.offset, size=entry.bytes) for shard, entry in pairs]
        return [pa.py_buffer(content) for content in self.store.read_ranges(ranges)]

    @cachedmethod(attrgetter("_maps"), lock=attrgetter("_guard"))
    def _mapped(self, shard: int) -> pa.Buffer:
        assert isinstance(self.store, LocalStore)
        return _map(self.store, self.description.shards[shard])

    def _row(self, position: tuple[int, int], entry: CacheEntry, buffer: pa.Buffer) -> Row:
        shard, row = position
        layout = self._layouts.get(entry.nodes)
        mapped = self.description.shards[shard].compression == "none"
        # A remote row is new at each read and may have been replaced; a compressed one is parsed in any case.
        if self._local and self._checked[shard][row] and mapped and layout is not None:
            found = {name: np.frombuffer(buffer, dtype, count, start) for name, dtype, count, start in layout}
            return Row(entry.sample, entry.view, found)
        if xxhash.xxh3_64_intdigest(buffer) != entry.digest:
            path = self._path(self.description.shards[shard])
            raise CacheError(f"{path}: the row of sample {entry.sample} is damaged (its digest differs); {REMEDY}")
        arrays = self._parse(buffer)
        if mapped:
            self._remember_layout(entry.nodes, arrays, buffer)
        self._checked[shard][row] = True
        return Row(entry.sample, entry.view, arrays)

    def _parse(self, buffer: pa.Buffer) -> dict[str, NDArray[Any]]:
        columns = pa.ipc.read_record_batch(pa.ipc.read_message(buffer), self._schema).columns
        return {name: columns[position].values.to_numpy() for position, name in self._lists}  # without a copy

    def _remember_layout(self, nodes: int, arrays: dict[str, NDArray[Any]], buffer: pa.Buffer) -> None:
        """Remember the array offsets of rows with ``nodes`` nodes; None once two such rows differ.

        Lengths follow from the number of nodes, and Arrow lays out equal lengths alike. Parsing every row instead would
        take a third of the time of copying its features.
        """
        found = [(name, values.dtype, len(values), _offset(values, buffer)) for name, values in arrays.items()]
        if self._layouts.setdefault(nodes, found) != found:
            self._layouts[nodes] = None

    def _path(self, shard: CachedShard) -> str:
        return f"{self.store.location}/{shard.name}"


def _offset(values: NDArray[Any], buffer: pa.Buffer) -> int:
    return int(values.__array_interface__["data"][0]) - int(buffer.address) if len(values) else 0


def check_file(store: LocalStore, shard: CachedShard) -> None:
    """Raise CacheError if a cache file is missing or has another size than ``cache.json`` says."""
    path = store.folder / shard.name
    if not path.exists():
        raise CacheError(f"{path} is missing from the cache; {REMEDY}")
    size = path.stat().st_size
    if size != shard.bytes:
        raise CacheError(f"{path} has {size} bytes, but cache.json says {shard.bytes}; {REMEDY}")


def _map(store: LocalStore, shard: CachedShard) -> pa.Buffer:
    check_file(store, shard)
    return map_file(store.folder / shard.name)
