"""Random access to the samples of a packed dataset through its Arrow indexes, local or remote."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import accumulate
from operator import attrgetter
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from cachetools import LRUCache, cachedmethod
from numpy.typing import NDArray
from PIL import Image

from pipeline.core.errors import DataError, OutputError
from pipeline.core.files import sha256_file, write_atomic
from pipeline.data.format.classes import ClassEntry, match_classes, unique_names
from pipeline.data.format.images import DECODING_ERRORS, decode_rgb, open_image
from pipeline.data.format.index import REMEDY, IndexRow, ShardIndex, map_file, parse_index
from pipeline.data.format.scan import index_bytes, scan_tar
from pipeline.data.format.schema import (
    DATASET_FILE,
    DatasetCategory,
    DatasetJson,
    Shard,
    index_path,
    parse_dataset_json,
    read_dataset_json,
)
from pipeline.data.storage.base import ByteRange, FileInfo, StorageConfig
from pipeline.data.storage.local import CHANGED_REMEDY, LocalStore
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
        class_order: order of the classes, such as a detector's; by default that of ``dataset.json``.

    Raises:
        DataError: if there is no dataset, or an index or image is not the one that was packed.
        ConfigError: if ``class_order`` has other names than the dataset.
    """

    def __init__(
        self,
        location: str | Path,
        storage: StorageConfig | None = None,
        class_order: Sequence[str] | None = None,
    ) -> None:
        self.location = location
        self.storage = storage
        self.class_order = class_order
        self.store = open_store(location, storage)
        self.description = self._read_description()
        self.store.register({shard.name: FileInfo(shard.bytes, shard.sha256) for shard in self.description.shards})
        self.shard_sizes = tuple(shard.samples for shard in self.description.shards)
        self._starts = [0, *accumulate(self.shard_sizes)]
        self.categories = self._ordered_categories()
        self._class_of = {category.id: index for index, category in enumerate(self.categories)}
        self._indexes: LRUCache[Any, ShardIndex] = LRUCache(MAX_OPEN_INDEXES)
        self._guard = Lock()

    def __len__(self) -> int:
        return self._starts[-1]

    def __reduce__(self) -> tuple[type[PackedDataset], tuple[Any, ...]]:
        return type(self), (self.location, self.storage, self.class_order)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.categories)

    @cached_property
    def identity(self) -> str:
        """Fingerprint of the dataset."""
        return self.description.identity()

    @property
    def class_names(self) -> list[str]:
        """Names in class order; those that several classes have are followed by the category id."""
        return unique_names(self.categories)

    @property
    def category_ids(self) -> dict[str, int]:
        """COCO's id of each class by its name."""
        return {name: category.id for name, category in zip(self.class_names, self.categories, strict=True)}

    @property
    def class_entries(self) -> list[ClassEntry]:
        """Name and text flag of each class, as checkpoints and caches record them."""
        pairs = zip(self.class_names, self.text_classes, strict=True)
        return [ClassEntry(name=name, text=text) for name, text in pairs]

    @property
    def text_classes(self) -> list[bool]:
        """Which classes are text, in class order."""
        return [category.text for category in self.categories]

    def locate(self, index: int) -> tuple[int, int]:
        """(shard, row) of sample number ``index``."""
        shard = bisect_right(self._starts, index) - 1
        return shard, index - self._starts[shard]

    def sample(self, index: int) -> Sample:
        """Sample number ``index``, without its image."""
        shard, number = self.locate(index)
        row = self.shard_index(shard).row(number)
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
        """Read and decode the image of a sample, RGB.

        Raises:
            BadSampleError: naming shard and key.
        """
        image = self.open_image(self.read_images([sample])[0], sample)
        try:
            return decode_rgb(image)
        except DECODING_ERRORS as error:
            raise self.bad_sample_error(sample, error) from error

    def open_image(self, content: bytes, sample: Sample) -> Image.Image:
        """Open an image file that was read, if it is the one that was packed.

        Raises:
            BadSampleError: naming shard and key.
        """
        try:
            return open_image(self._checked(content, sample))
        except DECODING_ERRORS as error:
            raise self.bad_sample_error(sample, error) from error

    def _checked(self, content: bytes, sample: Sample) -> bytes:
        if _is_packed(content, sample):
            return content
        if self.store.discard_copy(sample.shard):
            content = self.read_images([sample])[0]
        if not _is_packed(content, sample):
            raise self.bad_sample_error(sample, "its bytes are not those that were packed")
        return content

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

    def _ordered_categories(self) -> list[DatasetCategory]:
        found = self.description.categories
        if self.class_order is None:
            return found
        order = match_classes(self.class_order, unique_names(found), "the run", str(self.location))
        return [found[index] for index in order]

    def _class(self, category: int, key: str) -> int:
        if category not in self._class_of:
            raise DataError(
                f"{self.store.location}: sample {key!r} has category id {category}, which dataset.json does not list"
            )
        return self._class_of[category]

    def names_of(self, category_ids: NDArray[np.int64]) -> list[str]:
        """Names of the classes with these category ids."""
        names = {category.id: name for category, name in zip(self.categories, self.class_names, strict=True)}
        return [names.get(category, f"id {category}") for category in category_ids.tolist()]

    @cachedmethod(attrgetter("_indexes"), lock=attrgetter("_guard"))
    def shard_index(self, shard: int) -> ShardIndex:
        """Index of a shard, verified when this process first opens it."""
        entry = self.description.shards[shard]
        index = self._open_index(entry)
        if len(index) != entry.samples:
            raise DataError(
                f"the index of {self.store.location}/{entry.name} has {len(index)} samples, but dataset.json has "
                f"{entry.samples}; run `graphkd data index {self.store.location}`"
            )
        return index

    def _open_index(self, entry: Shard) -> ShardIndex:
        name = index_path(Path(entry.name)).name
        path = f"{self.store.location}/{name}"
        if not isinstance(self.store, LocalStore):
            content = pa.py_buffer(self.store.read(name))
        elif (self.store.folder / name).exists():
            content = map_file(self.store.folder / name)
        else:
            return _rebuild_index(self.store.folder / entry.name, entry)
        if entry.index_sha256 not in (None, sha256(content).hexdigest()):
            raise DataError(f"{path} is not the index that dataset.json describes; {REMEDY} {self.store.location}")
        return parse_index(content, path, entry.bytes)


def _is_packed(content: bytes, sample: Sample) -> bool:
    return sample.image_digest in (None, xxhash.xxh3_64_intdigest(content))


def _rebuild_index(tar: Path, entry: Shard) -> ShardIndex:
    """Index of a tar that lost it, written if it is the one that ``dataset.json`` describes."""
    if not tar.is_file() or sha256_file(tar) != entry.sha256:
        raise DataError(f"{tar} is missing or was changed since it was packed; {CHANGED_REMEDY}")
    table = scan_tar(tar, entry.excluded)
    content = index_bytes(table)
    if entry.index_sha256 in (None, sha256(content).hexdigest()):
        with suppress(OutputError):  # a read-only folder can still be read
            write_atomic(index_path(tar), content)
    return ShardIndex(table)
