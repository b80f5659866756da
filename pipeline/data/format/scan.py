"""Scanning a webdataset tar, and building its Arrow index."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Collection
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
from pydantic import ValidationError

from pipeline.core.errors import DataError
from pipeline.core.files import write_atomic
from pipeline.data.format.schema import IMAGE_EXTENSIONS, INDEX_SCHEMA, SampleJson, index_path

SampleFiles = dict[str, list[tarfile.TarInfo]]
"""Members of one sample by extension; more than one of an extension are duplicates."""


def build_index(shard: Path, excluded: Collection[str] = ()) -> pa.Table:
    """Scan a tar and write its index beside it, without samples whose keys are ``excluded``.

    Raises:
        DataError: naming the tar and the sample at fault.
        OutputError: if the index cannot be written.
    """
    table = scan_tar(shard, excluded)
    write_atomic(index_path(shard), index_bytes(table))
    return table


def index_bytes(table: pa.Table) -> bytes:
    """An index as the content of its file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, INDEX_SCHEMA) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


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


def index_row(key: str, image_offset: int, image: bytes, annotation: bytes, sample: SampleJson) -> dict[str, Any]:
    """A sample's row in the index."""
    image_digest = xxhash.xxh3_64_intdigest(image)
    return {
        **sample.model_dump(include={"image_id", "file_name", "width", "height", "category_ids", "iscrowd"}),
        "key": key,
        "image_offset": image_offset,
        "image_bytes": len(image),
        "boxes": [value for box in sample.boxes for value in box],
        "areas": sample.region_areas,
        "digest": sha256(image + annotation).digest(),
        "image_digest": image_digest,
        "source_digest": image_digest if sample.source_digest is None else sample.source_digest,
    }


def _row(tar: tarfile.TarFile, shard: Path, key: str, files: SampleFiles) -> dict[str, Any]:
    duplicate = next((members[0].name for members in files.values() if len(members) > 1), None)
    if duplicate is not None:
        raise DataError(f"{shard} holds {duplicate!r} twice; keys must be unique within a tar")
    found = find_image(files)
    if found is None or "json" not in files:
        raise DataError(f"{shard}: sample {key!r} has {sorted(files)}, but needs an image and a json; pack it again")
    annotation = read_member(tar, files["json"][0])
    try:
        sample = parse_sample(annotation)
    except ValueError as error:
        raise DataError(f"{shard}: the json of sample {key!r} is malformed ({error})") from error
    return index_row(key, found[1].offset_data, read_member(tar, found[1]), annotation, sample)
