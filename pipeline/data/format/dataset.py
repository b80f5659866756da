"""A packed dataset: random access to its samples through the Arrow indexes, wherever it lies."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import attrgetter
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
from cachetools import LRUCache, cachedmethod
from numpy.typing import NDArray
from PIL import Image

from pipeline.core.errors import DataError
from pipeline.data.format.index import IndexRow, ShardIndex, open_index, parse_index
from pipeline.data.format.schema import DATASET_FILE, DatasetJson, index_path, parse_dataset_json, read_dataset_json
from pipeline.data.loading.augmentation import DECODING_ERRORS
from pipeline.data.storage.base import ByteRange, FileInfo, StorageConfig
from pipeline.data.storage.local import LocalStore
from pipeline.data.storage.open import open_store

MAX_OPEN_INDEXES = 256  # per process; a rank reads 64 or so shards side by side


class BadSampleError(DataError):
    """One sample cannot be used; another may be shown in its stead where the run allows it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample(IndexRow):
    """What is known of one sample before its image is read: its row in the index, and what the dataset makes of it."""

    shard: str
    classes: NDArray[np.int64]
    """[n], 0-based."""


class PackedDataset:
    """A dataset opened for reading; cheap to send to another process, which opens its own files.

    Args:
        location: folder, or URL of one (http, https, s3, gs).
        storage: how a remote one is read.

    Raises DataError where there is no dataset or its index does not fit its shards.
    """

    def __init__(self, location: str | Path, storage: StorageConfig | None = None) -> None:
        self.location = location
        self.storage = storage
        self.store = open_store(location, storage)
        self.description = self._describe()
        self.store.register({shard.name: FileInfo(shard.bytes, shard.sha256) for shard in self.description.shards})
        self.shard_sizes = tuple(shard.samples for shard in self.description.shards)
        self._starts = [0, *accumulate(self.shard_sizes)]
        self._class_of = {category.id: place for place, category in enumerate(self.description.categories)}
        self._indexes: LRUCache[Any, ShardIndex] = LRUCache(MAX_OPEN_INDEXES)
        self._guard = Lock()

    def __len__(self) -> int:
        return self._starts[-1]

    def __reduce__(self) -> tuple[type[PackedDataset], tuple[str | Path, StorageConfig | None]]:
        return type(self), (self.location, self.storage)

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

    def sample(self, sample: int) -> Sample:
        """The index entry of a sample."""
        shard, number = self.locate(sample)
        row = self._index(shard).row(number)
        return Sample(
            **{name: getattr(row, name) for name in IndexRow.__slots__},
            shard=self.description.shards[shard].name,
            classes=np.array([self._class(category, row.key) for category in row.category_ids], dtype=np.int64),
        )

    def images(self, records: Sequence[Sample]) -> list[bytes]:
        """The files of several images, fetched side by side where they are far away."""
        return self.store.read_ranges(
            [ByteRange(name=sample.shard, start=sample.image_offset, size=sample.image_bytes) for sample in records]
        )

    def image(self, sample: Sample) -> Image.Image:
        """Open the image of a sample; pixels are decoded when used. Raises BadSampleError naming shard and key."""
        return self.open_image(self.images([sample])[0], sample)

    def open_image(self, content: bytes, sample: Sample) -> Image.Image:
        """Open an image that was read; raises BadSampleError naming shard and key."""
        try:
            return Image.open(io.BytesIO(content))
        except DECODING_ERRORS as error:
            raise self.bad_sample_error(sample, error) from error

    def bad_sample_error(self, sample: Sample, error: BaseException | str) -> BadSampleError:
        """The error of a sample whose image does not decode."""
        return BadSampleError(
            f"{self.store.location}/{sample.shard}: the image of {sample.key!r} cannot be read ({error}); take it out "
            "with `graphkd data verify --exclude`, or allow some with data.bad_samples"
        )

    def _describe(self) -> DatasetJson:
        if isinstance(self.store, LocalStore):
            return read_dataset_json(self.store.folder)
        return parse_dataset_json(self.store.read(DATASET_FILE), f"{self.store.location}/{DATASET_FILE}")

    def _class(self, category: int, key: str) -> int:
        if category not in self._class_of:
            raise DataError(
                f"{self.store.location}: sample {key!r} has category id {category}, which dataset.json does not list"
            )
        return self._class_of[category]

    @cachedmethod(attrgetter("_indexes"), lock=attrgetter("_guard"))
    def _index(self, shard: int) -> ShardIndex:
        index = self._open_index(shard)
        if len(index) != self.shard_sizes[shard]:
            name = self.description.shards[shard].name
            raise DataError(
                f"the index of {self.store.location}/{name} has {len(index)} samples, but dataset.json says "
                f"{self.shard_sizes[shard]}; run `graphkd data index {self.store.location}`"
            )
        return index

    def _open_index(self, shard: int) -> ShardIndex:
        entry = self.description.shards[shard]
        if isinstance(self.store, LocalStore):
            return open_index(self.store.folder / entry.name, entry.excluded)
        name = index_path(Path(entry.name)).name
        return parse_index(pa.BufferReader(self.store.read(name)), f"{self.store.location}/{name}")
