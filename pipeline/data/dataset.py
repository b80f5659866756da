"""A packed dataset: random access to its samples through the Arrow indexes."""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from graphkd.errors import DataError
from pipeline.data.format import read_dataset_json
from pipeline.data.index import read_index


@dataclass(frozen=True, slots=True)
class Record:
    """What the index says of one sample."""

    key: str
    image_id: int
    file_name: str
    size: tuple[int, int]
    """Width and height, image px."""
    boxes: NDArray[np.float32]
    """[n, 4]: x, y, width, height, image px."""
    classes: NDArray[np.int64]
    """[n], 0-based."""
    crowd: NDArray[np.bool_]
    """[n]."""
    image_offset: int
    image_bytes: int


class PackedDataset:
    """A dataset folder opened for reading; cheap to send to another process, which opens its own files.

    Raises DataError where the folder is no dataset or its index does not fit its shards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.description = read_dataset_json(folder)
        self.shard_sizes = tuple(shard.samples for shard in self.description.shards)
        self._starts = [0, *accumulate(self.shard_sizes)]
        self._class_of = {category.id: place for place, category in enumerate(self.description.categories)}
        self._tables: dict[int, pa.Table] = {}
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.description.categories)

    @cached_property
    def identity(self) -> str:
        """Fingerprint of the dataset."""
        return self.description.identity()

    @property
    def class_names(self) -> list[str]:
        """Names in class order."""
        return [category.name for category in self.description.categories]

    @property
    def text_classes(self) -> list[bool]:
        """Which classes are text, in class order."""
        return [category.text for category in self.description.categories]

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard, row) of a sample number."""
        shard = bisect_right(self._starts, sample) - 1
        return shard, sample - self._starts[shard]

    def record(self, sample: int) -> Record:
        """The index entry of a sample."""
        shard, row = self.locate(sample)
        table = self._table(shard)
        values = {name: table.column(name)[row].as_py() for name in table.column_names}
        return Record(
            key=values["key"],
            image_id=values["image_id"],
            file_name=values["file_name"],
            size=(values["width"], values["height"]),
            boxes=np.array(values["boxes"], dtype=np.float32).reshape(-1, 4),
            classes=np.array(
                [self._class(category, values["key"]) for category in values["category_ids"]], dtype=np.int64
            ),
            crowd=np.array(values["iscrowd"], dtype=bool),
            image_offset=values["image_offset"],
            image_bytes=values["image_bytes"],
        )

    def image(self, sample: int, record: Record) -> Image.Image:
        """Open the image of a sample; pixels are decoded when used. Raises DataError naming shard and key."""
        shard, _ = self.locate(sample)
        content = os.pread(self._file(shard), record.image_bytes, record.image_offset)
        try:
            return Image.open(io.BytesIO(content))
        except OSError as error:
            name = self.description.shards[shard].name
            raise DataError(f"{self.folder / name}: the image of {record.key!r} cannot be read ({error})") from error

    def _class(self, category: int, key: str) -> int:
        if category not in self._class_of:
            raise DataError(
                f"{self.folder}: sample {key!r} has category id {category}, which dataset.json does not list"
            )
        return self._class_of[category]

    def _table(self, shard: int) -> pa.Table:
        if shard not in self._tables:
            table = read_index(self.folder / self.description.shards[shard].name)
            if table.num_rows != self.shard_sizes[shard]:
                name = self.description.shards[shard].name
                raise DataError(
                    f"the index of {self.folder / name} has {table.num_rows} samples, but dataset.json says "
                    f"{self.shard_sizes[shard]}; run `graphkd data index {self.folder}`"
                )
            self._tables[shard] = table
        return self._tables[shard]

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            path = self.folder / self.description.shards[shard].name
            try:
                self._files[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise DataError(f"shard {path} cannot be opened ({error.strerror}); copy or pack it again") from error
        return self._files[shard]
