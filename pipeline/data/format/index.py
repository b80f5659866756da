"""Arrow indexes of webdataset tars: where each sample is, so that readers seek to it."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Collection
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import ValidationError

from pipeline.core.errors import DataError, OutputError
from pipeline.core.files import atomic_path
from pipeline.data.format.schema import IMAGE_EXTENSIONS, INDEX_SCHEMA, SampleJson, index_path

SampleFiles = dict[str, list[tarfile.TarInfo]]
"""Members of one sample by extension; more than one of an extension are duplicates."""


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
    image_offset: int
    image_bytes: int


class ShardIndex:
    """Index of one tar, in columns from which rows are sliced without copies."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self._columns = {name: table.column(name).combine_chunks() for name in table.column_names}
        self._numbers = {
            name: self._columns[name].to_numpy()
            for name in ("image_id", "width", "height", "image_offset", "image_bytes")
        }

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def row(self, number: int) -> IndexRow:
        """Row ``number``, 0 to len - 1."""
        numbers = {name: int(values[number]) for name, values in self._numbers.items()}
        return IndexRow(
            key=self._columns["key"][number].as_py(),
            image_id=numbers["image_id"],
            file_name=self._columns["file_name"][number].as_py(),
            size=(numbers["width"], numbers["height"]),
            boxes=self._list("boxes", number).reshape(-1, 4),
            category_ids=self._list("category_ids", number),
            crowd=self._list("iscrowd", number).astype(bool),
            image_offset=numbers["image_offset"],
            image_bytes=numbers["image_bytes"],
        )

    def digest(self, number: int) -> bytes:
        """SHA-256 of the bytes of a sample's image and json."""
        return bytes(self._columns["digest"][number].as_py())

    def keys(self) -> list[str]:
        """Keys of all rows."""
        return list(self.table.column("key").to_pylist())

    def _list(self, name: str, number: int) -> NDArray[Any]:
        values: NDArray[Any] = self._columns[name][number].values.to_numpy(zero_copy_only=False)
        return values


def build_index(shard: Path, excluded: Collection[str] = ()) -> ShardIndex:
    """Scan a tar and write its index beside it, without samples whose keys are ``excluded``.

    Raises:
        DataError: naming the tar and the sample at fault.
        OutputError: if the index cannot be written.
    """
    table = scan_tar(shard, excluded)
    with (
        atomic_path(index_path(shard)) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, INDEX_SCHEMA) as writer,
    ):
        writer.write_table(table)
    return ShardIndex(table)


def open_index(shard: Path, excluded: Collection[str] = ()) -> ShardIndex:
    """Memory-map the index of a tar, building it first if it is missing."""
    path = index_path(shard)
    if not path.exists():
        try:
            return build_index(shard, excluded)
        except OutputError:  # a read-only folder can still be read
            return ShardIndex(scan_tar(shard, excluded))
    return parse_index(pa.memory_map(str(path)), str(path))


def parse_index(source: Any, path: str) -> ShardIndex:
    """Read an index from an Arrow source.

    Raises:
        DataError: if it is damaged or was made by another release.
    """
    try:
        table = pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is damaged ({error}); delete it and run `graphkd data index`") from error
    if table.schema != INDEX_SCHEMA:
        raise DataError(f"{path} was made by another release; delete it and run `graphkd data index`")
    return ShardIndex(table)


def scan_tar(shard: Path, excluded: Collection[str] = ()) -> pa.Table:
    """Index of a tar as a table, rows in the order in which keys first appear."""
    try:
        with tarfile.open(shard, "r:") as tar:
            rows = [_row(tar, shard, key, files) for key, files in group_samples(tar).items() if key not in excluded]
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{shard} is not a readable tar ({error}); copy or pack it again") from error
    return pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)


def group_samples(tar: tarfile.TarFile) -> dict[str, SampleFiles]:
    """Members of an open tar by sample key, then by extension."""
    from webdataset.tariterators import base_plus_ext  # slow to import, and only indexing needs it

    samples: dict[str, SampleFiles] = {}
    for member in tar:
        key, extension = base_plus_ext(member.name)
        if member.isfile() and key is not None:
            samples.setdefault(key, {}).setdefault(extension.lower(), []).append(member)
    return samples


def find_image(files: SampleFiles) -> tuple[str, tarfile.TarInfo] | None:
    """Extension and member of a sample's image, or None."""
    return next(((extension, files[extension][0]) for extension in IMAGE_EXTENSIONS if extension in files), None)


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Bytes of a member. Raises EOFError if the tar ends within it."""
    file = tar.extractfile(member)
    assert file is not None
    content = file.read()
    if len(content) != member.size:
        raise EOFError(f"it ends within {member.name}")
    return content


def parse_sample(content: bytes) -> SampleJson:
    """Parse a sample's json. Raises ValueError with the first mistake in one line."""
    try:
        return SampleJson.model_validate(json.loads(content))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}") from error


def sample_digest(image: bytes, annotation: bytes) -> bytes:
    """SHA-256 of a sample's content."""
    digest = sha256(image)
    digest.update(annotation)
    return digest.digest()


def _row(tar: tarfile.TarFile, shard: Path, key: str, files: SampleFiles) -> dict[str, Any]:
    duplicate = next((members[0].name for members in files.values() if len(members) > 1), None)
    if duplicate is not None:
        raise DataError(f"{shard} holds {duplicate!r} twice; keys must be unique within a tar")
    found = find_image(files)
    if found is None or "json" not in files:
        raise DataError(f"{shard}: sample {key!r} has {sorted(files)}, but needs an image and a json; pack it again")
    image, annotation = found[1], read_member(tar, files["json"][0])
    try:
        sample = parse_sample(annotation)
    except ValueError as error:
        raise DataError(f"{shard}: the json of sample {key!r} is malformed ({error})") from error
    return sample.model_dump(exclude={"boxes"}) | {
        "key": key,
        "image_offset": image.offset_data,
        "image_bytes": image.size,
        "boxes": [value for box in sample.boxes for value in box],
        "digest": sample_digest(read_member(tar, image), annotation),
    }
