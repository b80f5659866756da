"""The dataset on disk: ``dataset.json``, plain webdataset tars, and one Arrow index per tar.

A sample in a tar is ``<key>.jpg`` or ``<key>.png`` with ``<key>.json`` (:class:`SampleJson`).
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.core.errors import DataError
from pipeline.core.files import fingerprint

FORMAT_VERSION = 1
DATASET_FILE = "dataset.json"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")

INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),  # of the sample in its tar
        pa.field("image_offset", pa.int64()),  # first byte of the image in the tar
        pa.field("image_bytes", pa.int64()),
        pa.field("image_id", pa.int64()),  # COCO image id
        pa.field("file_name", pa.string()),
        pa.field("width", pa.int32()),  # image px
        pa.field("height", pa.int32()),
        pa.field("boxes", pa.list_(pa.float32())),  # x, y, width, height of each region, flattened, image px
        pa.field("category_ids", pa.list_(pa.int64())),  # the dataset's own ids
        pa.field("iscrowd", pa.list_(pa.int8())),
        pa.field("digest", pa.binary(32)),  # SHA-256 of the image's bytes followed by the json's
    ]
)


class SampleJson(BaseModel):
    """Annotation of one sample in a tar. Boxes are x, y, width, height in image px."""

    model_config = ConfigDict(frozen=True)

    file_name: str
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    image_id: int
    boxes: list[tuple[float, float, float, float]]
    category_ids: list[int]
    iscrowd: list[int]

    @model_validator(mode="after")
    def _check(self) -> SampleJson:
        if not len(self.boxes) == len(self.category_ids) == len(self.iscrowd):
            raise ValueError(
                f"{len(self.boxes)} boxes, {len(self.category_ids)} category_ids and {len(self.iscrowd)} iscrowd, "
                "which must be one of each for every region"
            )
        return self


class DatasetCategory(BaseModel):
    """A class. Its position in the list is the 0-based class of every detector."""

    model_config = ConfigDict(frozen=True)

    id: int
    """Category id in COCO files."""
    name: str
    text: bool
    """Whether its regions are text."""


class Shard(BaseModel):
    """One tar."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+\.tar$")
    """File name beside ``dataset.json``, without folders, so that a dataset never reaches outside its own."""
    samples: int = Field(ge=1)
    """Samples in use: those in the tar minus those excluded."""
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    excluded: tuple[str, ...] = ()
    """Keys of samples that are no part of the dataset, such as bad ones found by ``graphkd data verify``."""


class DatasetJson(BaseModel):
    """Content of ``dataset.json``."""

    model_config = ConfigDict(frozen=True)

    version: int
    categories: list[DatasetCategory] = Field(min_length=1)
    shards: list[Shard] = Field(min_length=1)
    source: str = ""
    """Fingerprint of what was packed, by which packing again recognises its own result."""

    @property
    def samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    def identity(self) -> str:
        """Fingerprint of everything that a sample or its number depends on."""
        # Text lines instead of dumped models: a tenth of the time to a first batch with 100,000 shards.
        lines = [fingerprint([self.version, [category.model_dump() for category in self.categories]])]
        lines += [
            f"{shard.name} {shard.samples} {shard.bytes} {shard.sha256} {' '.join(shard.excluded)}"
            for shard in self.shards
        ]
        return sha256("\n".join(lines).encode()).hexdigest()


def read_dataset_json(folder: Path) -> DatasetJson:
    """Read ``dataset.json`` of ``folder``.

    Raises:
        DataError: if it is missing, malformed, or of another version.
    """
    path = folder / DATASET_FILE
    if not path.exists():
        raise DataError(
            f"{folder} is no dataset: {DATASET_FILE} is missing; make one with `graphkd data pack`, or "
            "`graphkd data index` for existing tars"
        )
    try:
        return parse_dataset_json(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"{path} is not readable ({error}); pack the dataset again") from error


def parse_dataset_json(text: bytes, path: str) -> DatasetJson:
    """Parse and check the content of a ``dataset.json``.

    Raises:
        DataError: if it is malformed or of another version.
    """
    try:
        dataset = DatasetJson.model_validate_json(text)  # twice as fast as through dicts, for 100,000 shards
    except ValidationError as error:
        _check_version(text, path)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the top"
        raise DataError(f"{path} is malformed at {where}: {first['msg']}; pack the dataset again") from error
    _check_version(text, path, dataset.version)
    return dataset


def _check_version(text: bytes, path: str, version: int | None = None) -> None:
    try:
        found = json.loads(text).get("version") if version is None else version
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise DataError(f"{path} is not readable ({error}); pack the dataset again") from error
    if found != FORMAT_VERSION:
        raise DataError(
            f"{path} has version {found}, but this release reads {FORMAT_VERSION}; install one that reads it"
        )


def index_path(shard: Path) -> Path:
    """Path of a tar's index, beside it."""
    return shard.with_suffix(".index.arrow")
