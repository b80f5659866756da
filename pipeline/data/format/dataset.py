"""Random access to the samples of a packed dataset through its Arrow indexes, local or remote."""

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
from pipeline.data.format.images import DECODING_ERRORS
from pipeline.data.format.index import IndexRow, ShardIndex, open_index, parse_index
from pipeline.data.format.schema import DATASET_FILE, DatasetJson, index_path, parse_dataset_json, read_dataset_json
from pipeline.data.storage.base import ByteRange, FileInfo, StorageConfig
from pipeline.data.storage.local import LocalStore
from pipeline.data.storage.open import open_store

MAX_OPEN_INDEXES = 256  # per process; a rank reads about 64 shards at a time


class BadSampleError(DataError):
    """One sample cannot be used. The run may substitute another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample(IndexRow):
    """A sample without its image: its row in the index, its shard and its classes."""

    shard: str
    classes: NDArray[np.int64]
    """[n], 0-based."""


class PackedDataset:
    """A dataset opened for reading. Pickled by location: another process opens its own files.

    Args:
        location: folder, or URL (http, https, s3, gs).
        storage: how a remote one is read.

    Raises:
        DataError: if there is no dataset, or an index does not match its shard.
    """

    def __init__(self, location: str | Path, storage: StorageConfig | None = None) -> None:
        self.location = location
        self.storage = storage
        self.store = open_store(location, storage)
        self.description = self._read_description()
        self.store.register({shard.name: FileInfo(shard.bytes, shard.sha256) for shard in self.description.shards})
        self.shard_sizes = tuple(shard.samples for shard in self.description.shards)
        self._starts = [0, *accumulate(self.shard_sizes)]
        self._class_of = {category.id: index for index, category in enumerate(self.description.categories)}
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

    def locate(self, index: int) -> tuple[int, int]:
        """(shard, row) of sample number ``index``."""
        shard = bisect_right(self._starts, index) - 1
        return shard, index - self._starts[shard]

    def sample(self, index: int) -> Sample:
        """Sample number ``index``, without its image."""
        shard, number = self.locate(index)
        row = self._index(shard).row(number)
        return Sample(
            **{name: getattr(row, name) for name in IndexRow.__slots__},
            shard=self.description.shards[shard].name,
            classes=np.array([self._class(category, row.key) for category in row.category_ids], dtype=np.int64),
        )

    def read_images(self, samples: Sequence[Sample]) -> list[bytes]:
        """Read the image files of several samples, concurrently from remote storage."""
        return self.store.read_ranges(
            [ByteRange(name=sample.shard, start=sample.image_offset, size=sample.image_bytes) for sample in samples]
        )

    def image(self, sample: Sample) -> Image.Image:
        """Open the image of a sample; pixels are decoded at first use.

        Raises:
            BadSampleError: naming shard and key.
        """
        return self.open_image(self.read_images([sample])[0], sample)

    def open_image(self, content: bytes, sample: Sample) -> Image.Image:
        """Open an image file that was read. Raises BadSampleError naming shard and key."""
        try:
            return Image.open(io.BytesIO(content))
        except DECODING_ERRORS as error:
            raise self.bad_sample_error(sample, error) from error

    def bad_sample_error(self, sample: Sample, error: BaseException | str) -> BadSampleError:
        """Error of a sample whose image cannot be decoded."""
        return BadSampleError(
            f"{self.store.location}/{sample.shard}: the image of {sample.key!r} cannot be read ({error}); exclude it "
            "with `graphkd data verify --exclude`, or tolerate some with data.bad_samples"
        )

    def _read_description(self) -> DatasetJson:
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
                f"the index of {self.store.location}/{name} has {len(index)} samples, but dataset.json has "
                f"{self.shard_sizes[shard]}; run `graphkd data index {self.store.location}`"
            )
        return index

    def _open_index(self, shard: int) -> ShardIndex:
        entry = self.description.shards[shard]
        if isinstance(self.store, LocalStore):
            return open_index(self.store.folder / entry.name, entry.excluded)
        name = index_path(Path(entry.name)).name
        return parse_index(pa.BufferReader(self.store.read(name)), f"{self.store.location}/{name}")
