"""The index of one cache file: where each row lies, and what its bytes hash to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from pydantic import ValidationError

from pipeline.cache.format import INDEX_SCHEMA, SHARD_METADATA_KEY, CachedShard, cache_index_name
from pipeline.core.errors import CacheError
from pipeline.core.files import atomic_path, fingerprint
from pipeline.data.storage.base import Store


class CacheEntry(NamedTuple):
    """One row of a cache file, as ``INDEX_SCHEMA`` has it."""

    sample: int
    view: int
    nodes: int
    offset: int
    bytes: int
    digest: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheIndex:
    """The index of one cache file."""

    shard: CachedShard
    identity: str
    """Fingerprint of the cache's identity."""
    entries: list[CacheEntry]
    """One a row."""

    def check(self, shard: CachedShard, identity: dict[str, str], path: str) -> CacheIndex:
        """Give this index, or raise CacheError where it belongs to another file or cache than ``cache.json`` says."""
        if self.shard != shard or self.identity != fingerprint(identity) or len(self.entries) != shard.rows:
            raise CacheError(f"{path} does not belong to this cache; copy it again, or build the cache again")
        return self


def write_cache_index(
    folder: Path, shard: CachedShard, identity: dict[str, str], columns: dict[str, list[int]]
) -> None:
    """Write the index of ``shard``, whose file lies there already."""
    facts = json.dumps({"shard": shard.model_dump(), "identity": fingerprint(identity)})
    schema = INDEX_SCHEMA.with_metadata({SHARD_METADATA_KEY: facts.encode()})
    with (
        atomic_path(folder / cache_index_name(shard.name)) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        writer.write_table(pa.table(columns, schema=schema))


def read_cache_index(store: Store, name: str, expected: str | None = None) -> CacheIndex:
    """Read the index of the cache file ``name``, whose SHA-256 is to be ``expected``.

    Raises CacheError where it is damaged, DataError where it is missing.
    """
    index_name = cache_index_name(name)
    path, content = f"{store.location}/{index_name}", store.read(index_name)
    if expected is not None and sha256(content).hexdigest() != expected:
        raise CacheError(f"{path} is damaged (its SHA-256 differs); copy it again, or build the cache again")
    return parse_cache_index(content, path)


def parse_cache_index(content: bytes, path: str) -> CacheIndex:
    """Check the bytes of an index; raises CacheError where they are damaged."""
    try:
        table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
        facts = json.loads(table.schema.metadata[SHARD_METADATA_KEY])
        if not table.schema.equals(INDEX_SCHEMA):
            raise ValueError("made by another release")
        entries = [CacheEntry(*row) for row in zip(*(column.to_pylist() for column in table.columns), strict=True)]
        return CacheIndex(shard=CachedShard.model_validate(facts["shard"]), identity=facts["identity"], entries=entries)
    except (pa.ArrowInvalid, ValidationError, ValueError, KeyError, TypeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CacheError(f"{path} is damaged ({reason}); copy it again, or build the cache again") from error
