"""Arrow indexes of webdataset tars: where each sample is, so that readers seek to it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.core.errors import DataError
from pipeline.data.format.schema import INDEX_SCHEMA, INDEX_SCHEMA_1

REMEDY = "run `graphkd data index`"


@dataclass(frozen=True, slots=True)
class IndexRow:
    """A sample's row in the index."""

    key: str
    image_id: int
    file_name: str
    size: tuple[int, int]
    """Width and height, image px."""
    boxes: NDArray[np.float32]
    """[n, 4]: x, y, width, height, image px."""
    category_ids: NDArray[np.int64]
    """[n]: the dataset's own ids."""
    crowd: NDArray[np.bool_]
    """[n]."""
    areas: NDArray[np.float32]
    """[n]: image px squared; of the mask if there was one."""
    image_offset: int
    image_bytes: int
    image_digest: int | None
    """xxh3_64 of the image's bytes; None in indexes of version 1."""
    source_digest: int | None
    """xxh3_64 of the image file that was packed; None in indexes of version 1."""


@dataclass(frozen=True, slots=True)
class IndexArrays:
    """All regions of a shard."""

    starts: NDArray[np.int64]
    """[pages + 1]: first region of each page."""
    sizes: NDArray[np.int64]
    """[pages, 2]: width and height, image px."""
    boxes: NDArray[np.float32]
    """[n, 4]: x, y, width, height, image px."""
    category_ids: NDArray[np.int64]
    crowd: NDArray[np.bool_]


class ShardIndex:
    """Index of one tar, in columns from which rows are sliced without copies."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self._columns = {name: table.column(name).combine_chunks() for name in table.column_names}
        integers = ("image_id", "width", "height", "image_offset", "image_bytes", "image_digest", "source_digest")
        self._numbers = {name: self._columns[name].to_numpy() for name in integers if name in self._columns}

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def row(self, number: int) -> IndexRow:
        """Row ``number``, 0 to len - 1."""
        numbers = {name: int(values[number]) for name, values in self._numbers.items()}
        boxes = self._list("boxes", number).reshape(-1, 4)
        return IndexRow(
            key=self._columns["key"][number].as_py(),
            image_id=numbers["image_id"],
            file_name=self._columns["file_name"][number].as_py(),
            size=(numbers["width"], numbers["height"]),
            boxes=boxes,
            category_ids=self._list("category_ids", number),
            crowd=self._list("iscrowd", number).astype(bool),
            areas=self._list("areas", number) if "areas" in self._columns else boxes[:, 2] * boxes[:, 3],
            image_offset=numbers["image_offset"],
            image_bytes=numbers["image_bytes"],
            image_digest=numbers.get("image_digest"),
            source_digest=numbers.get("source_digest"),
        )

    def arrays(self) -> IndexArrays:
        """All regions of the shard, for counting."""
        crowd = self._columns["iscrowd"]
        return IndexArrays(
            starts=np.asarray(crowd.offsets).astype(np.int64),
            sizes=np.stack([self._numbers["width"], self._numbers["height"]], axis=1).astype(np.int64),
            boxes=np.asarray(self._columns["boxes"].flatten()).reshape(-1, 4),
            category_ids=np.asarray(self._columns["category_ids"].flatten()),
            crowd=np.asarray(crowd.flatten()).astype(bool),
        )

    def entries(self) -> Iterator[dict[str, Any]]:
        """All rows as plain values, by column name."""
        return (row for batch in self.table.to_batches() for row in batch.to_pylist())

    def _list(self, name: str, number: int) -> NDArray[Any]:
        values: NDArray[Any] = self._columns[name][number].values.to_numpy(zero_copy_only=False)
        return values


def map_file(path: Path) -> pa.Buffer:
    """A file's content, memory-mapped. Arrow's own mapping takes only names that are UTF-8."""
    with path.open("rb") as file:
        empty = path.stat().st_size == 0
        return pa.py_buffer(b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def parse_index(source: Any, path: str, tar_bytes: int | None = None) -> ShardIndex:
    """Read and check an index from an Arrow source; images must lie within ``tar_bytes`` of the tar.

    Raises:
        DataError: if it is damaged or was made by another release.
    """
    try:
        table = pa.ipc.open_file(source).read_all()
        table.validate(full=True)
        fault = _fault(table, tar_bytes) if table.schema in (INDEX_SCHEMA, INDEX_SCHEMA_1) else None
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path} is damaged ({str(error).splitlines()[0]}); {REMEDY}") from error
    if table.schema not in (INDEX_SCHEMA, INDEX_SCHEMA_1):
        raise DataError(f"{path} was made by another release; {REMEDY}")
    if fault is not None:
        raise DataError(f"{path} is damaged ({fault}); {REMEDY}")
    return ShardIndex(table)


def _fault(table: pa.Table, tar_bytes: int | None) -> str | None:
    """What is impossible in an index whose Arrow structure is sound."""
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    lists = {name: column for name, column in columns.items() if pa.types.is_list(column.type)}
    if any(each.null_count for each in [*columns.values(), *(column.flatten() for column in lists.values())]):
        return "values are missing"
    lengths = {name: np.diff(np.asarray(column.offsets)) for name, column in lists.items()}
    regions = lengths.pop("boxes")
    if any((4 * count != regions).any() for count in lengths.values()):
        return "its lists have different lengths"
    floats = [np.asarray(columns[name].flatten()) for name in ("boxes", "areas") if name in columns]
    if not all(np.isfinite(values).all() for values in floats):
        return "a box is not finite"
    offset, size = (columns[name].to_numpy() for name in ("image_offset", "image_bytes"))
    if (offset < 0).any() or (size <= 0).any() or (tar_bytes is not None and (offset + size > tar_bytes).any()):
        return "an image lies outside its tar"
    return "a page has no size" if any((columns[name].to_numpy() <= 0).any() for name in ("width", "height")) else None
