"""Writing one cache file: rows as they come, an index entry for each, and a hash of the whole."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from pipeline.cache.format import INDEX_SCHEMA, CachedShard, Compression, cache_schema
from pipeline.cache.index import write_cache_index
from pipeline.cache.quantize import Precision
from pipeline.core.files import atomic_path
from pipeline.teacher.identity import Identity

CacheRow = dict[str, Any]
"""Column name -> number or array."""
MAGIC_BYTES = 8  # of an Arrow file, before its schema


class CacheFileWriter:
    """Writer of one cache file. Call :meth:`finish` before :meth:`shard_info`."""

    def __init__(self, path: Path, precision: Precision, compression: Compression) -> None:
        self._schema = cache_schema(precision)
        self._compression = compression
        options = pa.ipc.IpcWriteOptions(compression=None if compression == "none" else compression)
        self._sink = _HashedFile(path, _header_bytes(self._schema, options))
        self._writer = pa.ipc.new_file(pa.PythonFile(self._sink, "w"), self._schema, options=options)
        self.columns: dict[str, list[int]] = {field.name: [] for field in INDEX_SCHEMA}

    def add(self, row: CacheRow) -> None:
        """Write one row."""
        start = max(self._sink.position, self._sink.header)  # the header is written with the first row
        self._sink.message = xxhash.xxh3_64()
        self._writer.write_batch(record_batch(row, self._schema))
        entry = {
            "sample": row["sample"],
            "view": row["view"],
            "nodes": len(row["scores"]),
            "offset": start,
            "bytes": self._sink.position - start,
            "digest": self._sink.message.intdigest(),
        }
        for name, value in entry.items():
            self.columns[name].append(int(value))

    def finish(self) -> None:
        """Write the footer."""
        self._writer.close()

    def close(self) -> None:
        """Close the file, finished or not."""
        self._sink.close()

    def shard_info(self, name: str, tar_sha256: str) -> CachedShard:
        """Entry of the file in ``cache.json``."""
        return CachedShard(
            name=name,
            tar_sha256=tar_sha256,
            compression=self._compression,
            rows=len(self.columns["sample"]),
            nodes=sum(self.columns["nodes"]),
            bytes=self._sink.position,
            sha256=self._sink.whole.hexdigest(),
        )


class _HashedFile(io.RawIOBase):
    """A file that counts and hashes what is written: the whole, and the current message without the header."""

    def __init__(self, path: Path, header: int) -> None:
        self._file = path.open("wb", buffering=0)
        self.header = header
        self.position = 0
        self.whole = sha256()
        self.message = xxhash.xxh3_64()

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        view = memoryview(content)
        rest = view
        while rest:
            rest = rest[self._file.write(rest) :]
        self.whole.update(view)
        self.message.update(view[min(len(view), max(0, self.header - self.position)) :])
        self.position += len(view)
        return len(view)

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def cache_file(
    folder: Path,
    name: str,
    *,
    tar_sha256: str,
    identity: Identity,
    precision: Precision,
    compression: Compression,
) -> Iterator[CacheFileWriter]:
    """Writer of the cache file ``name``. The file, then its index, get their names once all is written and synced.

    Raises:
        OutputError: if the disk is full or the folder cannot be written.
    """
    with atomic_path(folder / name) as temporary, closing(CacheFileWriter(temporary, precision, compression)) as writer:
        yield writer
        writer.finish()
    write_cache_index(folder, writer.shard_info(name, tar_sha256), identity, writer.columns)


def record_batch(row: CacheRow, schema: pa.Schema) -> pa.RecordBatch:
    """A row as a record batch. Columns that it lacks are empty."""
    return pa.RecordBatch.from_arrays([_column(row.get(field.name), field.type) for field in schema], schema=schema)


def _column(value: Any, kind: pa.DataType) -> pa.Array:
    if not pa.types.is_list(kind):
        return pa.array([value], type=kind)
    item = kind.value_type
    array: NDArray[Any] = np.zeros(0) if value is None else np.asarray(value)
    values = pa.array(array.ravel().astype(item.to_pandas_dtype(), copy=False), type=item)
    return pa.ListArray.from_arrays(pa.array([0, len(values)], type=pa.int32()), values)


def _header_bytes(schema: pa.Schema, options: pa.ipc.IpcWriteOptions) -> int:
    """Bytes of an Arrow file before its first record batch: magic number and schema."""
    sink = pa.BufferOutputStream()
    pa.ipc.new_file(sink, schema, options=options).close()
    reader = pa.BufferReader(sink.getvalue())
    reader.seek(MAGIC_BYTES)
    pa.ipc.read_message(reader)
    return int(reader.tell())
