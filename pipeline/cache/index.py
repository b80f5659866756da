"""Index of one cache file: offset, size and digest of each row."""

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
from pipeline.teacher.identity import Identity

REMEDY = "copy it again, or build the cache again"


class CacheEntry(NamedTuple):
    """One row of a cache file, with the fields of ``INDEX_SCHEMA``."""

    sample: int
    view: int
    nodes: int
    offset: int
    bytes: int
    digest: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheIndex:
    """Index of one cache file."""

    shard: CachedShard
    identity: str
    """Fingerprint of the cache's identity."""
    entries: list[CacheEntry]

    def check(self, shard: CachedShard, identity: Identity, path: str) -> CacheIndex:
        """Return this index. Raises CacheError if it belongs to another file or cache than ``cache.json`` says."""
        if self.shard != shard or self.identity != fingerprint(identity) or len(self.entries) != shard.rows:
            raise CacheError(f"{path} does not belong to this cache; {REMEDY}")
        return self


def write_cache_index(folder: Path, shard: CachedShard, identity: Identity, columns: dict[str, list[int]]) -> None:
    """Write the index of a finished cache file."""
    metadata = json.dumps({"shard": shard.model_dump(), "identity": fingerprint(identity)})
    schema = INDEX_SCHEMA.with_metadata({SHARD_METADATA_KEY: metadata.encode()})
    with (
        atomic_path(folder / cache_index_name(shard.name)) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        writer.write_table(pa.table(columns, schema=schema))


def read_cache_index(store: Store, name: str, expected_sha256: str | None = None) -> CacheIndex:
    """Read the index of the cache file ``name``.

    Raises:
        CacheError: if it is damaged or has another SHA-256 than expected.
        DataError: if it is missing.
    """
    index_name = cache_index_name(name)
    path, content = f"{store.location}/{index_name}", store.read(index_name)
    if expected_sha256 is not None and sha256(content).hexdigest() != expected_sha256:
        raise CacheError(f"{path} is damaged (its SHA-256 differs); {REMEDY}")
    return parse_cache_index(content, path)


def parse_cache_index(content: bytes, path: str) -> CacheIndex:
    """Parse the bytes of an index. Raises CacheError if they are damaged."""
    try:
        table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
        metadata = json.loads(table.schema.metadata[SHARD_METADATA_KEY])
        if not table.schema.equals(INDEX_SCHEMA):
            raise ValueError("made by another release")
        entries = [CacheEntry(*row) for row in zip(*(column.to_pylist() for column in table.columns), strict=True)]
        shard = CachedShard.model_validate(metadata["shard"])
        return CacheIndex(shard=shard, identity=metadata["identity"], entries=entries)
    except (pa.ArrowInvalid, ValidationError, ValueError, KeyError, TypeError, OSError) as error:
        raise CacheError(f"{path} is damaged ({str(error).splitlines()[0]}); {REMEDY}") from error
