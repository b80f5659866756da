"""The teacher cache on disk: one Arrow IPC file per shard, one record batch per page and view, ``cache.json`` last.

Legend: ``n`` nodes of a page, ``K`` classes, ``C`` channels, ``P`` pooled side. Every list holds its array in C order.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graphkd.errors import CacheError
from pipeline.teacher.precision import Precision

CACHE_FILE = "cache.json"
ARROW_TYPES: dict[Precision, pa.DataType] = {"fp16": pa.float16(), "fp32": pa.float32(), "int8": pa.int8()}


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a cache file."""

    name: str
    kind: str
    """Arrow type of a value or list item; ``feature`` is the cache's precision."""
    shape: str
    """Shape of one page's array, or scalar."""
    unit: str


COLUMNS = (
    Column("sample", "int64", "scalar", "number of the sample in its dataset"),
    Column("view", "int32", "scalar", "number of the view"),
    Column("boxes", "float32", "n, 4", "xyxy, canvas px"),
    Column("scores", "float32", "n", "foreground probability, 0 to 1"),
    Column("classes", "int32", "n", "0-based class"),
    Column("logits", "float32", "n, K + 1", "class logits, background last"),
    Column("deltas", "float32", "n, K, 4", "box deltas, unit coder weights"),
    Column("pooled", "feature", "n, C, P, P", "pooled features"),
    Column("pooled_scale", "float32", "C", "what int8 features of each channel are multiplied by; empty otherwise"),
)


def cache_schema(precision: Precision) -> pa.Schema:
    """The Arrow schema of a cache file."""
    return pa.schema([pa.field(column.name, _arrow_type(column, precision)) for column in COLUMNS])


def _arrow_type(column: Column, precision: Precision) -> pa.DataType:
    named = {"int64": pa.int64(), "int32": pa.int32(), "float32": pa.float32(), "feature": ARROW_TYPES[precision]}
    item = named[column.kind]
    return item if column.shape == "scalar" else pa.list_(item)


class CachedShard(BaseModel):
    """One file of the cache."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+\.arrow$")
    rows: int
    bytes: int
    sha256: str


class CacheJson(BaseModel):
    """The content of ``cache.json``."""

    model_config = ConfigDict(frozen=True)

    identity: dict[str, str]
    """What the cache was made from, by name."""
    precision: Precision
    views: int
    classifies: bool
    """Whether the teacher gave logits and deltas."""
    channels: int
    pooled_side: int
    num_classes: int
    shards: list[CachedShard]


def read_cache_json(folder: Path) -> CacheJson:
    """Read ``cache.json``; raises CacheError where it is missing (not finished) or malformed."""
    path = folder / CACHE_FILE
    try:
        return CacheJson.model_validate(json.loads(path.read_text(encoding="utf8")))
    except FileNotFoundError as error:
        raise CacheError(
            f"{folder} holds no finished cache; run `graphkd cache build` with the student's config"
        ) from error
    except (ValidationError, json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise CacheError(f"{path} is damaged ({str(error).splitlines()[0]}); build the cache again") from error


def cache_shard_name(shard: str) -> str:
    """Name of the cache file that belongs to a tar."""
    return shard.removesuffix(".tar") + ".arrow"
