"""Checking every byte of one shard."""

from __future__ import annotations

import io
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.core.errors import DataError
from pipeline.core.files import sha256_file
from pipeline.data.format.images import DECODING_ERRORS
from pipeline.data.format.index import (
    SampleFiles,
    ShardIndex,
    find_image,
    group_samples,
    parse_index,
    parse_sample,
    read_member,
    sample_digest,
)
from pipeline.data.format.schema import SampleJson, Shard, index_path
from pipeline.data.prepare.coco import EDGE_TOLERANCE_PX

FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG"}


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
    index, faults = _read_index(path, shard)
    problems = [Problem(shard.name, None, text) for text in [*_file_faults(path, shard), *faults]]
    digests = {} if index is None else {key: index.digest(row) for row, key in enumerate(index.keys())}
    seen: dict[str, SampleJson | None] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for key, files in group_samples(tar).items():
                if key not in shard.excluded:
                    found, seen[key] = _check_sample(tar, files, digests.get(key), task.categories)
                    problems += [Problem(shard.name, key, text) for text in found]
    except (tarfile.TarError, EOFError, OSError) as error:
        problems.append(Problem(shard.name, None, f"is no readable tar ({error}), after {len(seen)} samples"))
        return ShardReport(shard, problems, False, list(seen), {})
    problems += [Problem(shard.name, key, "is in the index, but not in the tar") for key in digests if key not in seen]
    image_ids = {key: sample.image_id for key, sample in seen.items() if sample is not None}
    return ShardReport(shard, problems, True, list(seen), image_ids)


def _file_faults(path: Path, shard: Shard) -> Iterator[str]:
    size = path.stat().st_size
    if size != shard.bytes:
        yield f"has {size} bytes, but dataset.json says {shard.bytes}"
    elif (digest := sha256_file(path)) != shard.sha256:
        yield f"has SHA-256 {digest[:12]}, but dataset.json says {shard.sha256[:12]}"


def _read_index(path: Path, shard: Shard) -> tuple[ShardIndex | None, list[str]]:
    index_file = index_path(path)
    if not index_file.exists():
        return None, ["has no index; run `graphkd data index`"]
    try:
        index = parse_index(index_file.read_bytes(), str(index_file))
    except DataError as error:
        return None, [str(error)]
    if len(index) != shard.samples:
        return index, [f"has {len(index)} samples in its index, but dataset.json says {shard.samples}"]
    return index, []


def _check_sample(
    tar: tarfile.TarFile, files: SampleFiles, digest: bytes | None, categories: frozenset[int]
) -> tuple[list[str], SampleJson | None]:
    """Faults of one sample, and its json if that can be read."""
    duplicates = [extension for extension, members in files.items() if len(members) > 1]
    if duplicates:
        return [f"its key is used {len(files[duplicates[0]])} times"], None
    found = find_image(files)
    if found is None or "json" not in files:
        return [f"has {sorted(files)}, but needs an image and a json"], None
    image, annotation = read_member(tar, found[1]), read_member(tar, files["json"][0])
    faults = []
    if digest is not None and sample_digest(image, annotation) != digest:
        faults.append("its bytes are not those that were indexed")
    try:
        sample = parse_sample(annotation)
    except ValueError as error:
        return [*faults, f"its json is malformed ({error})"], None
    faults += _image_faults(image, found[0], sample)
    faults += _region_faults(sample, categories)
    return faults, sample


def _image_faults(content: bytes, extension: str, sample: SampleJson) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as image:
                kind, size = image.format, image.size
                image.load()
    except (*DECODING_ERRORS, Image.DecompressionBombWarning) as error:
        yield f"its image does not decode ({error})"
        return
    if kind != FORMATS[extension]:
        yield f"its image is a {kind}, but named .{extension}"
    if size != (sample.width, sample.height):
        yield f"its image is {size[0]} x {size[1]} px, but its json says {sample.width} x {sample.height}"


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
