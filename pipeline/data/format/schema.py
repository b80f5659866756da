"""The dataset on disk: ``dataset.json``, plain webdataset tars, and one Arrow index per tar.

A sample in a tar is ``<key>.jpg`` or ``<key>.png`` with ``<key>.json`` (:class:`SampleJson`).

Version 2 added the SHA-256 of indexes, and to each sample areas, the digest of its image and what packing saw. Version
1 is read, and turned into version 2 by ``graphkd data index``.
"""

from __future__ import annotations

import json
import re
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.core.errors import DataError
from pipeline.core.files import fingerprint, shown, write_atomic

FORMAT_VERSION = 2
READ_VERSIONS = (1, 2)
IDENTITY_VERSION = 1
"""Version of a dataset's fingerprint, which caches and checkpoints of earlier releases have recorded."""
DATASET_FILE = "dataset.json"
_CHECKSUM = re.compile(r'"checksum": "[^"]*"')
_CHECKSUM_BYTES = re.compile(rb'"checksum": "[^"]*"')
MAX_REGIONS = 10_000
"""Of a page. Matching them with proposals takes memory that grows with their square."""
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")

INDEX_SCHEMA_1 = pa.schema(
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
INDEX_SCHEMA = pa.schema(
    [
        *INDEX_SCHEMA_1,
        pa.field("areas", pa.list_(pa.float32())),  # of each region, image px squared; of its mask if it has one
        pa.field("image_digest", pa.uint64()),  # xxh3_64 of the image's bytes
        pa.field("source_digest", pa.uint64()),  # xxh3_64 of the file that was packed; of the image's bytes if unknown
    ]
)


class SampleJson(BaseModel):
    """Annotation of one sample in a tar. Boxes are x, y, width, height in image px."""

    model_config = ConfigDict(frozen=True)

    file_name: str
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    image_id: int
    boxes: list[tuple[float, float, float, float]] = Field(max_length=MAX_REGIONS)
    category_ids: list[int]
    iscrowd: list[int]
    areas: list[float] | None = None
    """COCO's ``area`` of each region, image px squared; None: those of the boxes."""
    source_digest: int | None = None
    """xxh3_64 of the image file that was packed."""
    thumbnail: str | None = Field(default=None, pattern="^[0-9a-f]{128}$")
    """The page as packing decoded it: mean luminance in 8 x 8 fields, hexadecimal."""

    @model_validator(mode="after")
    def _check(self) -> SampleJson:
        if not len(self.boxes) == len(self.category_ids) == len(self.iscrowd) == len(self.region_areas):
            raise ValueError(
                f"{len(self.boxes)} boxes, {len(self.category_ids)} category_ids, {len(self.iscrowd)} iscrowd and "
                f"{len(self.region_areas)} areas, which must be one of each for every region"
            )
        return self

    @property
    def region_areas(self) -> list[float]:
        """Area of each region, image px squared."""
        return [box[2] * box[3] for box in self.boxes] if self.areas is None else self.areas


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
    index_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the tar's index; None in version 1."""
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
    repairs: dict[str, int] = {}
    """Regions that packing changed or dropped, by what was done."""
    checksum: str = ""
    """SHA-256 of the file with an empty checksum; empty once that was checked."""

    @property
    def samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    def identity(self) -> str:
        """Fingerprint of everything that a sample or its number depends on."""
        # Text lines instead of dumped models: a tenth of the time to a first batch with 100,000 shards.
        lines = [fingerprint([IDENTITY_VERSION, [category.model_dump() for category in self.categories]])]
        lines += [
            f"{shard.name} {shard.samples} {shard.bytes} {shard.sha256} {' '.join(shard.excluded)}"
            for shard in self.shards
        ]
        return sha256("\n".join(lines).encode()).hexdigest()


def write_dataset_json(folder: Path, dataset: DatasetJson) -> None:
    """Write ``dataset.json`` with its checksum, atomically."""
    text = json.dumps(dataset.model_dump() | {"checksum": ""}, indent=1, ensure_ascii=False) + "\n"
    write_atomic(folder / DATASET_FILE, _CHECKSUM.sub(f'"checksum": "{_checksum(text.encode())}"', text))


def _checksum(text: bytes) -> str:
    return sha256(_CHECKSUM_BYTES.sub(b'"checksum": ""', text)).hexdigest()


def read_dataset_json(folder: Path, *, changed: bool = False) -> DatasetJson:
    """Read ``dataset.json`` of ``folder``; with ``changed``, also if it was changed by hand.

    Raises:
        DataError: if it is missing, malformed, or of another version.
    """
    path = folder / DATASET_FILE
    if not path.exists():
        raise DataError(
            f"{shown(folder)} is no dataset: {DATASET_FILE} is missing; make one with `graphkd data pack`, or "
            "`graphkd data index` for existing tars"
        )
    try:
        return parse_dataset_json(path.read_bytes(), str(path), changed=changed)
    except OSError as error:
        raise DataError(f"{path} is not readable ({error}); pack the dataset again") from error


def parse_dataset_json(text: bytes, path: str, *, changed: bool = False) -> DatasetJson:
    """Parse and check the content of a ``dataset.json``.

    Raises:
        DataError: if it is malformed, of another version, or, unless ``changed``, does not have its checksum.
    """
    try:
        dataset = DatasetJson.model_validate_json(text)  # twice as fast as through dicts, for 100,000 shards
    except ValidationError as error:
        _check_version(text, path)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the top"
        raise DataError(f"{path} is malformed at {where}: {first['msg']}; pack the dataset again") from error
    _check_version(text, path, dataset.version)
    if dataset.version > 1 and not changed and dataset.checksum != _checksum(text):
        raise DataError(
            f"{path} does not have its own checksum: it is damaged or was changed by hand; run `graphkd data index` on "
            "its folder if the change is meant"
        )
    return dataset.model_copy(update={"checksum": ""})


def _check_version(text: bytes, path: str, version: int | None = None) -> None:
    try:
        found = json.loads(text).get("version") if version is None else version
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise DataError(f"{path} is not readable ({error}); pack the dataset again") from error
    if found not in READ_VERSIONS:
        raise DataError(
            f"{path} has version {found}, but this release reads {READ_VERSIONS}; install a release that reads it"
        )


def index_path(shard: Path) -> Path:
    """Path of a tar's index, beside it."""
    return shard.with_suffix(".index.arrow")
