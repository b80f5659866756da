"""The teacher cache on disk: one Arrow IPC file with an index per dataset shard, and ``cache.json``, written last.

Each page and view is one record batch, ordered by sample, then view. The index gives its offset and digest, so that any
row takes one read and can be checked. Legend: ``n`` nodes of a page, ``K`` classes, ``C`` channels, ``P`` pooled side.
Every list holds its array in C order.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.cache.quantize import Precision
from pipeline.core.errors import CacheError, DataError
from pipeline.data.format.classes import ClassEntry
from pipeline.data.format.schema import index_path
from pipeline.data.storage.base import Store
from pipeline.teacher.identity import SIGNALS_VERSION, Identity

CACHE_VERSION = SIGNALS_VERSION
CACHE_FILE = "cache.json"
ARROW_TYPES: dict[Precision, pa.DataType] = {"fp16": pa.float16(), "fp32": pa.float32(), "int8": pa.int8()}

NodeStore = Literal["pooled", "descriptors"]
Compression = Literal["none", "lz4", "zstd"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a cache file."""

    name: str
    kind: str
    """Arrow type of the value or list item; ``feature`` is the cache's precision."""
    shape: str
    """Shape of one page's array, or scalar."""
    unit: str


COLUMNS = (
    Column("sample", "int64", "scalar", "number of the sample in its dataset"),
    Column("view", "int32", "scalar", "number of the view"),
    Column("affine", "float32", "4", "a, b, c, d of the view: x_canvas = a x_image + c, y_canvas = b y_image + d, px"),
    Column("boxes", "float32", "n, 4", "xyxy, canvas px"),
    Column("scores", "float32", "n", "foreground probability, 0 to 1"),
    Column("classes", "int32", "n", "0-based class"),
    Column("logits", "float32", "n, K + 1", "class logits, background last; empty without a region head"),
    Column("deltas", "float32", "n, K, 4", "box deltas, unit coder weights; empty without a region head"),
    Column("pooled", "feature", "n, C, P, P", "pooled features; n, C, 1, 2 if store is descriptors"),
    Column("pooled_scale", "float32", "C", "scale of int8 features per channel; empty otherwise"),
)

INDEX_SCHEMA = pa.schema(
    [
        pa.field("sample", pa.int64()),
        pa.field("view", pa.int32()),
        pa.field("nodes", pa.int32()),
        pa.field("offset", pa.int64()),  # first byte of the record batch's message in the cache file
        pa.field("bytes", pa.int64()),
        pa.field("digest", pa.uint64()),  # xxh3_64 of those bytes
    ]
)
SHARD_METADATA_KEY = b"graphkd"
"""Metadata key of an index, for its :class:`CachedShard` and the fingerprint of the cache's identity."""


def cache_schema(precision: Precision) -> pa.Schema:
    """Arrow schema of a cache file."""
    return pa.schema([pa.field(column.name, _arrow_type(column, precision)) for column in COLUMNS])


def _arrow_type(column: Column, precision: Precision) -> pa.DataType:
    named = {"int64": pa.int64(), "int32": pa.int32(), "float32": pa.float32(), "feature": ARROW_TYPES[precision]}
    item = named[column.kind]
    return item if column.shape == "scalar" else pa.list_(item)


class CachedShard(BaseModel):
    """One file of the cache."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+\.arrow$")
    tar_sha256: str
    """SHA-256 of the dataset's tar that it was made from."""
    compression: Compression
    rows: int
    nodes: int
    """Nodes of all rows."""
    bytes: int
    sha256: str


class CacheJson(BaseModel):
    """Content of ``cache.json``."""

    model_config = ConfigDict(frozen=True)

    version: int
    identity: Identity
    precision: Precision
    store: NodeStore
    views: int
    nodes: int
    """N, maximum number of nodes per page."""
    classifies: bool
    """Whether the teacher gave logits and deltas."""
    feature_shape: tuple[int, int, int]
    """Shape of one node's ``pooled``."""
    num_classes: int
    classes: list[ClassEntry] = []
    """Name and text flag of each class; empty in caches of earlier releases."""
    shards: list[CachedShard]
    indexes: dict[str, str]
    """SHA-256 of each file's index, by the file's name."""

    @property
    def rows(self) -> int:
        """Pages times views."""
        return sum(shard.rows for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of all cache files, without their indexes."""
        return sum(shard.bytes for shard in self.shards)


def read_cache_json(store: Store) -> CacheJson:
    """Read ``cache.json``.

    Raises:
        CacheError: if it is missing (the cache is unfinished), malformed or of another version.
    """
    path = f"{store.location}/{CACHE_FILE}"
    try:
        content = json.loads(store.read(CACHE_FILE))
        _check_version(content.get("version", 2), path)
        return CacheJson.model_validate(content)
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise CacheError(
                f"{store.location} holds no finished cache; run `graphkd cache build` with the student's config"
            ) from error
        raise
    except (ValidationError, ValueError, TypeError, AttributeError) as error:
        raise CacheError(f"{path} is damaged ({str(error).splitlines()[0]}); build the cache again") from error


def _check_version(found: int, path: str) -> None:
    if found == CACHE_VERSION:
        return
    remedy = "build the cache again" if found < CACHE_VERSION else "install a release that reads it"
    age = "an older" if found < CACHE_VERSION else "a newer"
    raise CacheError(f"{path} has version {found}, of {age} release, but this one reads {CACHE_VERSION}; {remedy}")


def cache_shard_name(shard: str) -> str:
    """Name of the cache file of a tar."""
    return shard.removesuffix(".tar") + ".arrow"


def cache_index_name(name: str) -> str:
    """Name of the index of a cache file."""
    return index_path(Path(name)).name


def is_built(folder: Path, name: str) -> bool:
    """Whether a cache file is complete: its index is written last."""
    return (folder / cache_index_name(name)).exists()
