"""Arrow indexes of webdataset tars: where each sample lies, so that a reader seeks instead of skipping."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from graphkd.errors import DataError
from pipeline.data.format import IMAGE_EXTENSIONS, INDEX_SCHEMA, SampleJson, index_path
from pipeline.files import replaced


def build_index(shard: Path) -> pa.Table:
    """Scan a tar once and write its index beside it; raises DataError naming the tar and the sample at fault."""
    table = pa.Table.from_pylist(list(_rows(shard)), schema=INDEX_SCHEMA)
    with (
        replaced(index_path(shard)) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, INDEX_SCHEMA) as writer,
    ):
        writer.write_table(table)
    return table


def read_index(shard: Path) -> pa.Table:
    """Memory-map the index of a tar, building it first where it is missing."""
    path = index_path(shard)
    if not path.exists():
        return build_index(shard)
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is damaged ({error}); delete it and run `graphkd data index`") from error
    if table.schema != INDEX_SCHEMA:
        raise DataError(f"{path} was made by another release; delete it and run `graphkd data index`")
    return table


def _rows(shard: Path) -> Iterator[dict[str, Any]]:
    try:
        with tarfile.open(shard, "r:") as tar:
            members = [member for member in tar if member.isfile()]
            for key, parts in _grouped(members, shard).items():
                yield _row(tar, shard, key, parts)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{shard} is not a readable tar ({error}); copy or pack it again") from error


def _grouped(members: list[tarfile.TarInfo], shard: Path) -> dict[str, dict[str, tarfile.TarInfo]]:
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in members:
        key, _, extension = member.name.partition(".")
        parts = samples.setdefault(key, {})
        if extension in parts:
            raise DataError(f"{shard} holds {member.name!r} twice; keys must be unique within a tar")
        parts[extension] = member
    return samples


def _row(tar: tarfile.TarFile, shard: Path, key: str, parts: dict[str, tarfile.TarInfo]) -> dict[str, Any]:
    image = next((parts[extension] for extension in IMAGE_EXTENSIONS if extension in parts), None)
    if image is None or "json" not in parts:
        raise DataError(f"{shard}: sample {key!r} has {sorted(parts)}, but needs an image and a json; pack it again")
    annotation = tar.extractfile(parts["json"])
    assert annotation is not None
    try:
        sample = SampleJson.model_validate(json.loads(annotation.read()))
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise DataError(f"{shard}: the json of sample {key!r} is malformed ({str(error).splitlines()[0]})") from error
    return sample.model_dump(exclude={"boxes"}) | {
        "key": key,
        "image_offset": image.offset_data,
        "image_bytes": image.size,
        "boxes": [value for box in sample.boxes for value in box],
    }
