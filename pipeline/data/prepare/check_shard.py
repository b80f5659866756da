"""Checking every byte of one shard."""

from __future__ import annotations

import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.core.errors import DataError
from pipeline.core.files import sha256_file
from pipeline.data.format.images import DECODING_ERRORS, THUMBNAIL_SIDE, decode_rgb, open_image, thumbnail
from pipeline.data.format.index import parse_index
from pipeline.data.format.scan import SampleFiles, find_image, group_samples, index_row, parse_sample, read_member
from pipeline.data.format.schema import INDEX_SCHEMA, SampleJson, Shard, index_path
from pipeline.data.prepare.coco import EDGE_TOLERANCE_PX
from pipeline.data.prepare.other_decoder import other_thumbnail

FORMATS = {"jpg": ("JPEG", "MPO"), "jpeg": ("JPEG", "MPO"), "png": ("PNG",)}
SAME_LEVELS = 4  # difference of mean luminance, of 255, that versions of libjpeg may cause
PLACE = ("image_offset", "image_bytes")
IndexRows = dict[str, dict[str, Any]]
"""Rows of an index by key."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of a dataset."""

    shard: str
    key: str | None
    """The sample at fault; None for the whole shard."""
    what: str

    def __str__(self) -> str:
        return f"{self.shard}{'' if self.key is None else f' {self.key}'}: {self.what}"


@dataclass(frozen=True, slots=True)
class ShardReport:
    """Result of checking one shard."""

    shard: Shard
    problems: list[Problem]
    readable: bool
    """Whether the tar could be read to its end; otherwise none of it can be used."""
    keys: list[str]
    image_ids: dict[str, int]
    """Image ids of the samples whose json could be read, by key."""


@dataclass(frozen=True, slots=True)
class ShardCheck:
    """A shard to check, and the category ids that its samples may have."""

    folder: Path
    shard: Shard
    categories: frozenset[int]


def check_shard(task: ShardCheck) -> ShardReport:
    """Read one tar and its index completely."""
    path, shard = task.folder / task.shard.name, task.shard
    if not path.is_file():
        return ShardReport(shard, [Problem(shard.name, None, "is missing")], False, [], {})
    rows, faults = _read_index(path, shard)
    file_faults = list(_file_faults(path, shard))
    if file_faults:  # in another tar, samples may have moved
        rows = {key: {name: row[name] for name in row if name not in PLACE} for key, row in rows.items()}
    problems = [Problem(shard.name, None, text) for text in [*file_faults, *faults]]
    seen: dict[str, SampleJson | None] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for key, files in group_samples(tar).items():
                if key not in shard.excluded:
                    found, seen[key] = _check_sample(tar, key, files, rows, task.categories)
                    problems += [Problem(shard.name, key, text) for text in found]
    except (tarfile.TarError, EOFError, OSError) as error:
        problems.append(Problem(shard.name, None, f"is no readable tar ({error}), after {len(seen)} samples"))
        return ShardReport(shard, problems, False, list(seen), {})
    problems += [Problem(shard.name, key, "is in the index, but not in the tar") for key in rows if key not in seen]
    image_ids = {key: sample.image_id for key, sample in seen.items() if sample is not None}
    return ShardReport(shard, problems, True, list(seen), image_ids)


def _file_faults(path: Path, shard: Shard) -> Iterator[str]:
    size = path.stat().st_size
    if size != shard.bytes:
        yield f"has {size} bytes, but dataset.json says {shard.bytes}"
    elif (digest := sha256_file(path)) != shard.sha256:
        yield f"has SHA-256 {digest[:12]}, but dataset.json says {shard.sha256[:12]}"


def _read_index(path: Path, shard: Shard) -> tuple[IndexRows, list[str]]:
    index_file = index_path(path)
    if not index_file.exists():
        return {}, ["has no index; run `graphkd data index`"]
    if shard.index_sha256 not in (None, sha256_file(index_file)):
        return {}, ["has another index than dataset.json says; run `graphkd data index`"]
    try:
        rows = list(parse_index(index_file.read_bytes(), str(index_file), shard.bytes).entries())
    except DataError as error:
        return {}, [str(error)]
    wrong = len(rows) != shard.samples
    faults = [f"has {len(rows)} samples in its index, but dataset.json says {shard.samples}"] if wrong else []
    return {row["key"]: row for row in rows}, faults


def _check_sample(
    tar: tarfile.TarFile, key: str, files: SampleFiles, rows: IndexRows, categories: frozenset[int]
) -> tuple[list[str], SampleJson | None]:
    """Faults of one sample, and its json if that can be read."""
    duplicates = [extension for extension, members in files.items() if len(members) > 1]
    if duplicates:
        return [f"its key is used {len(files[duplicates[0]])} times"], None
    found = find_image(files)
    if found is None or "json" not in files:
        return [f"has {sorted(files)}, but needs an image and a json"], None
    image, annotation = read_member(tar, found[1]), read_member(tar, files["json"][0])
    same = key not in rows or rows[key]["digest"] == sha256(image + annotation).digest()
    faults = [] if same else ["its bytes are not those that were indexed"]
    try:
        sample = parse_sample(annotation)
    except ValueError as error:
        return [*faults, f"its json is malformed ({error})"], None
    if same and key in rows:
        row = index_row(key, found[1].offset_data, image, annotation, sample)
        faults += _index_faults(rows[key], row)
    faults += _image_faults(image, found[0], sample)
    faults += _region_faults(sample, categories)
    return faults, sample


def _index_faults(found: dict[str, Any], expected: dict[str, Any]) -> Iterator[str]:
    as_stored = pa.Table.from_pylist([expected], schema=INDEX_SCHEMA).to_pylist()[0]
    differing = [name for name, value in found.items() if value != as_stored[name]]
    if differing:
        yield f"its row in the index has another {', '.join(differing)} than its json"


def _image_faults(content: bytes, extension: str, sample: SampleJson) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = open_image(content)
            kind = image.format
            page = decode_rgb(image)
    except (*DECODING_ERRORS, Image.DecompressionBombWarning) as error:
        yield f"its image does not decode ({error})"
        return
    if kind not in FORMATS[extension]:
        yield f"its image is a {kind}, but named .{extension}"
    if page.size != (sample.width, sample.height):
        yield f"its image is {page.size[0]} x {page.size[1]} px, but its json says {sample.width} x {sample.height}"
    yield from _pixel_faults(content, page, sample)


def _pixel_faults(content: bytes, page: Image.Image, sample: SampleJson) -> Iterator[str]:
    """Compare what training decodes with what packing saw, and with another decoder."""
    decoded = thumbnail(page).astype(int)
    stored = bytes.fromhex(sample.thumbnail or "")
    packed = np.frombuffer(stored, np.uint8).reshape(THUMBNAIL_SIDE, -1).astype(int) if stored else None
    if packed is not None and abs(packed - decoded).max() > SAME_LEVELS:
        yield "its image does not decode to the pixels that packing saw"
    other = other_thumbnail(content)
    if other is not None and abs(other - decoded).max() > SAME_LEVELS:
        yield "its image decodes to other pixels with libpng or libjpeg than in training"


def _region_faults(sample: SampleJson, categories: frozenset[int]) -> Iterator[str]:
    for number, (x, y, width, height) in enumerate(sample.boxes):
        inside = (
            min(x, y) >= -EDGE_TOLERANCE_PX
            and x + width <= sample.width + EDGE_TOLERANCE_PX
            and y + height <= sample.height + EDGE_TOLERANCE_PX
        )
        if not (inside and width > 0 and height > 0):  # also for NaN
            yield f"box {number} {[x, y, width, height]} is not on its page of {sample.width} x {sample.height} px"
    unknown = sorted(set(sample.category_ids) - categories)
    if unknown:
        yield f"has category id {unknown[0]}, which dataset.json does not list"
