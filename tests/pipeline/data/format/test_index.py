"""A dataset's index and tars: changed ones are refused by name, and version 1 is still read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.core.errors import DataError
from pipeline.data.format.dataset import BadSampleError, PackedDataset
from pipeline.data.format.index import parse_index
from pipeline.data.format.schema import INDEX_SCHEMA, INDEX_SCHEMA_1, index_path, read_dataset_json
from pipeline.data.prepare.index_external import index_dataset
from pipeline.data.prepare.verify import verify

SHARD = "shard-000001.tar"


@pytest.fixture
def copy(dataset_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset_folder, tmp_path / "copy"))


def write_index(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def with_column(folder: Path, name: str, change: Callable[[list[Any]], list[Any]]) -> None:
    """Rewrite the index of a shard with one column changed by a function of its values."""
    path = index_path(folder / SHARD)
    table = parse_index(path.read_bytes(), str(path)).table
    position, field = table.column_names.index(name), table.schema.field(name)
    values = pa.array(change(table.column(name).to_pylist()), field.type)
    write_index(path, table.set_column(position, field, [values]))


def as_version_1(folder: Path) -> None:
    """Make a dataset what an earlier release wrote, as far as its index and ``dataset.json`` go."""
    for path in folder.glob("*.index.arrow"):
        table = parse_index(path.read_bytes(), str(path)).table
        write_index(path, table.select(INDEX_SCHEMA_1.names).cast(INDEX_SCHEMA_1))
    path = folder / "dataset.json"
    content = json.loads(path.read_text())
    content.pop("repairs")
    for shard in content["shards"]:
        shard.pop("index_sha256")
    path.write_text(json.dumps({**content, "version": 1}))


def without_hashes(folder: Path) -> None:
    path = folder / "dataset.json"
    content = json.loads(path.read_text())
    for shard in content["shards"]:
        shard.pop("index_sha256")
    path.write_text(json.dumps({**content, "version": 1}))


def test_a_changed_index_is_refused_and_verify_says_so(copy: Path) -> None:
    with_column(copy, "boxes", lambda rows: [[value + 1 for value in row] for row in rows])
    with pytest.raises(DataError, match=r"shard-000001\.index\.arrow is not the index that dataset\.json describes"):
        PackedDataset(copy).sample(5)
    assert PackedDataset(copy).sample(0).key == "000000000"
    assert any("another index than dataset.json says" in problem.what for problem in verify(copy, workers=1))
    index_dataset(copy)
    assert verify(copy, workers=1) == []


def test_version_1_is_read_with_the_same_identity_and_upgraded_by_indexing(copy: Path) -> None:
    before = PackedDataset(copy)
    samples = [before.sample(sample) for sample in range(len(before))]
    pixels = [np.asarray(before.image(sample)) for sample in samples]
    as_version_1(copy)
    old = PackedDataset(copy)
    assert old.identity == before.identity
    for number, sample in enumerate(samples):
        found = old.sample(number)
        assert np.array_equal(found.boxes, sample.boxes)
        assert (found.areas.tolist(), found.image_digest) == (sample.areas.tolist(), None)
        assert np.array_equal(np.asarray(old.image(found)), pixels[number])
    assert verify(copy, workers=1) == []
    index_dataset(copy)
    assert read_dataset_json(copy) == before.description.model_copy(update={"repairs": {}})
    assert PackedDataset(copy).identity == before.identity


IMPOSSIBLE = {
    "boxes": (lambda rows: [[float("nan")] * len(row) for row in rows], "a box is not finite"),
    "iscrowd": (lambda rows: [[*row, 0] for row in rows], "lists have different lengths"),
    "image_offset": (lambda rows: [value + 10**9 for value in rows], "an image lies outside its tar"),
    "image_bytes": (lambda rows: [-value for value in rows], "an image lies outside its tar"),
    "width": (lambda rows: [0 for _ in rows], "a page has no size"),
    "key": (lambda rows: [None for _ in rows], "values are missing"),
}


@pytest.mark.parametrize("column", IMPOSSIBLE)
def test_what_an_index_cannot_say_is_refused_without_a_hash(copy: Path, column: str) -> None:
    change, message = IMPOSSIBLE[column]
    with_column(copy, column, change)
    without_hashes(copy)
    with pytest.raises(DataError, match=f"is damaged.*{message}"):
        PackedDataset(copy).sample(5)


def test_verify_compares_the_index_with_the_jsons_of_the_tar(copy: Path) -> None:
    with_column(copy, "category_ids", lambda rows: [[9 for _ in row] for row in rows])
    without_hashes(copy)
    found = verify(copy, workers=1)
    assert {problem.key for problem in found} >= {"000000004", "000000005"}
    assert all("its row in the index has another category_ids" in problem.what for problem in found)


def test_a_tar_of_another_size_is_refused(copy: Path) -> None:
    with (copy / SHARD).open("ab") as file:
        file.write(b"\0" * 512)
    dataset = PackedDataset(copy)
    with pytest.raises(DataError, match=r"shard-000001\.tar has \d+ bytes, but dataset\.json says \d+; it was"):
        dataset.image(dataset.sample(5))


def test_a_changed_image_is_refused_by_name(copy: Path) -> None:
    dataset = PackedDataset(copy)
    sample = dataset.sample(5)
    content = bytearray((copy / SHARD).read_bytes())
    content[sample.image_offset + sample.image_bytes - 9] ^= 1
    (copy / SHARD).write_bytes(content)
    with pytest.raises(BadSampleError, match=r"'000000005' cannot be read \(its bytes are not those"):
        dataset.image(sample)


def test_a_lost_index_of_a_changed_tar_is_not_made_again(copy: Path) -> None:
    content = bytearray((copy / SHARD).read_bytes())
    content[600] ^= 1
    (copy / SHARD).write_bytes(content)
    index_path(copy / SHARD).unlink()
    with pytest.raises(DataError, match="is missing or was changed since it was packed"):
        PackedDataset(copy).sample(5)
    assert INDEX_SCHEMA.names[: len(INDEX_SCHEMA_1)] == INDEX_SCHEMA_1.names
