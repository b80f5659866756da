"""Every cache that does not fit or is damaged is refused by name, and nothing is mended silently."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from graphkd.errors import ConfigError
from pipeline.cache.index import read_cache_index
from pipeline.cache.verify import verify_cache
from pipeline.config import RunConfig, resolve
from pipeline.context import RunContext
from pipeline.core.errors import CacheError, OutputError
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.loading.loader import PageDataset, collate
from pipeline.data.loading.order import SampleRef
from pipeline.data.prepare.pack import pack
from pipeline.data.storage.local import LocalStore
from pipeline.train.run import train_run
from pipeline.train.signal_source import signal_source
from tests.support.pages import write_coco
from tests.support.runs import VIEW, StudentOf, build_here, small_run

pytestmark = pytest.mark.cache

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def whole(student_of: StudentOf, taught: Path) -> Path:
    """A finished cache."""
    build_here(student_of("whole"))
    return taught / "whole"


@pytest.fixture
def copy(whole: Path, taught: Path, tmp_path: Path) -> Path:
    """A copy of it that may be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def read_all(config: RunConfig) -> None:
    """What a student reads in an epoch."""
    dataset = PackedDataset(config.data.train)
    source = signal_source(RunContext(config), CPU)
    items = PageDataset(dataset, config.data.view, config.run.seed, config.views)
    for sample in range(len(dataset)):
        source.signals(collate([items[SampleRef(0, sample)]]))


CHANGES: dict[str, dict[str, Any]] = {
    "node policy": {"teacher": {"nodes": {"count": 9}}},
    "dtype": {"teacher": {"cache_dtype": "fp32"}},
    "store": {"teacher": {"store": "descriptors"}},
    "views": {"teacher": {"views": 3}},
    "preprocessing": {"data": {"view": {"canvas": [128, 96], "shortest_edge": [80, 90]}}},
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_cache_made_for_another_setting_is_refused_by_its_name(
    field: str, whole: Path, student_of: StudentOf
) -> None:
    changes = dict(CHANGES[field])
    config = student_of(whole, changes, **changes.pop("teacher", {}))
    with pytest.raises(CacheError, match=f"made for something else: .*{field}"):
        train_run(RunContext(config))
    assert not config.folder.exists()
    with pytest.raises(CacheError, match=f"made for something else: .*{field}"):
        build_here(config)  # nor is it built over


def test_a_cache_of_another_teacher_is_refused(
    whole: Path, student_of: StudentOf, taught: Path, dataset_folder: Path
) -> None:
    other = small_run(taught, dataset_folder, "teacher-2", data=VIEW, run={"seed": 9})
    train_run(RunContext(resolve(other, "teacher-2")))
    with pytest.raises(CacheError, match="teacher weights"):
        train_run(RunContext(student_of(whole, run=str(taught / "teacher-2"))))


def test_a_cache_of_another_dataset_is_refused_with_the_shard_that_differs(
    whole: Path, student_of: StudentOf, dataset_folder: Path, tmp_path: Path
) -> None:
    write_coco(tmp_path / "coco", 10)  # the last two pages are empty in the other one
    pack(tmp_path / "coco" / "annotations.json", tmp_path / "coco" / "images", tmp_path / "packed", samples_per_shard=4)
    with pytest.raises(CacheError, match=r"dataset .*the first shard that differs is shard-000002\.tar"):
        train_run(RunContext(student_of(whole, {"data": {**VIEW, "train": str(tmp_path / "packed")}})))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte_is_found_when_its_row_is_read(copy: Path, student_of: StudentOf, whole: Path) -> None:
    entry = read_cache_index(LocalStore(copy), "shard-000001.arrow").entries[2]
    flip(copy / "shard-000001.arrow", entry.offset + entry.bytes // 2)
    config = student_of(copy)
    with pytest.raises(CacheError, match=r"shard-000001\.arrow: the row of sample 6 is damaged"):
        read_all(config)
    found = verify_cache(RunContext(config))
    assert len(found.problems) == 1 and "sample 6 view 0" in found.problems[0] and found.comparison is None
    read_all(student_of(whole))


@pytest.mark.parametrize("place", [0, -1])
def test_a_flipped_byte_outside_of_the_rows_is_found_by_verify(copy: Path, student_of: StudentOf, place: int) -> None:
    flip(copy / "shard-000000.arrow", place)
    assert "the schema or the footer" in verify_cache(RunContext(student_of(copy))).problems[0]


def truncated(folder: Path) -> None:
    path = folder / "shard-000000.arrow"
    path.write_bytes(path.read_bytes()[:-8])


def truncated_index(folder: Path) -> None:
    path = folder / "shard-000000.index.arrow"
    path.write_bytes(path.read_bytes()[:-8])


def other_index(folder: Path) -> None:
    shutil.copy(folder / "shard-000001.index.arrow", folder / "shard-000000.index.arrow")


def versioned(version: int | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "cache.json").read_text())
        content["version"] = version
        if version is None:
            del content["version"]
        (folder / "cache.json").write_text(json.dumps(content))

    return change


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated file": (truncated, r"shard-000000\.arrow has \d+ bytes, but cache\.json says"),
    "truncated index": (truncated_index, r"shard-000000\.index\.arrow is damaged"),
    "index of another shard": (other_index, r"shard-000000\.index\.arrow is damaged"),
    "missing shard": (lambda folder: (folder / "shard-000002.arrow").unlink(), r"shard-000002\.arrow is missing"),
    "missing index": (lambda folder: (folder / "shard-000002.index.arrow").unlink(), r"shard-000002\.index\.arrow"),
    "unfinished": (lambda folder: (folder / "cache.json").unlink(), "no finished cache"),
    "cut cache.json": (lambda folder: (folder / "cache.json").write_text('{"version": 3'), "damaged"),
    "newer version": (versioned(99), "has version 99, of a newer release"),
    "old schema": (versioned(2), "has version 2, of an older release"),
    "before versions": (versioned(None), "has version 2, of an older release"),
    "flipped statistics": (
        lambda folder: flip(folder / "statistics.safetensors", -9),
        "tensors do not have the SHA-256",
    ),
    "overwritten statistics": (
        lambda folder: (folder / "statistics.safetensors").write_bytes(b"x" * 40),
        "statistics.*damaged",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_cache_is_refused_by_name(kind: str, copy: Path, student_of: StudentOf) -> None:
    damage, message = DAMAGE[kind]
    damage(copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises(Exception, match=message) as raised:
        config = student_of(copy)
        train_run(RunContext(config))
    assert type(raised.value).__name__ in ("CacheError", "DataError")
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before  # nothing is mended


@pytest.mark.parametrize(
    "kind",
    ["truncated file", "missing shard", "missing index", "newer version", "cut cache.json", "flipped statistics"],
)
def test_building_does_not_repair_a_damaged_cache(kind: str, copy: Path, student_of: StudentOf) -> None:
    damage, message = DAMAGE[kind]
    damage(copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises(CacheError, match=message):
        build_here(student_of(copy))
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_an_index_of_another_schema_is_not_read(copy: Path) -> None:
    """One of another release is refused before any row is taken for something else."""
    path = copy / "shard-000000.index.arrow"
    table = pa.ipc.open_file(path.read_bytes()).read_all().append_column("more", pa.array([0] * 4))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(CacheError, match="made by another release"):
        read_cache_index(LocalStore(copy), "shard-000000.arrow")


def test_a_changed_digest_in_an_index_is_found(copy: Path, student_of: StudentOf) -> None:
    flip(copy / "shard-000001.index.arrow", (copy / "shard-000001.index.arrow").stat().st_size // 2)
    (problem,) = verify_cache(RunContext(student_of(copy))).problems
    assert "shard-000001.index.arrow is damaged (its SHA-256 differs)" in problem
    with pytest.raises(CacheError, match=r"shard-000001\.index\.arrow is damaged"):
        read_all(student_of(copy))


def test_lost_statistics_of_a_finished_cache_are_computed_again(copy: Path, student_of: StudentOf) -> None:
    path = copy / "statistics.safetensors"
    before = path.read_bytes()
    path.unlink()
    build_here(student_of(copy))
    assert path.read_bytes() == before


def test_statistics_of_another_setting_are_refused_by_building_too(copy: Path, student_of: StudentOf) -> None:
    with pytest.raises(CacheError, match="shrinkage"):
        build_here(student_of(copy, shrinkage=0.7))


def test_files_of_one_cache_may_be_compressed_or_not(copy: Path, student_of: StudentOf, whole: Path) -> None:
    """As when a build was stopped and went on with another setting."""
    for name in ("cache.json", "shard-000001.arrow", "shard-000001.index.arrow"):
        (copy / name).unlink()
    description = build_here(student_of(copy, compression="zstd"))
    assert [shard.compression for shard in description.shards] == ["none", "zstd", "none"]
    read_all(student_of(copy))


def test_a_file_url_is_a_folder_to_build_in(student_of: StudentOf, tmp_path: Path) -> None:
    build_here(student_of(f"file://{tmp_path}/cache"))
    assert (tmp_path / "cache" / "cache.json").exists()
    read_all(student_of(f"file://{tmp_path}/cache"))


def test_a_folder_that_holds_something_else_is_not_built_into(student_of: StudentOf, taught: Path) -> None:
    (taught / "mine").mkdir()
    (taught / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"no cache \(such as 'notes\.txt'\)"):
        build_here(student_of("mine"))
    assert (taught / "mine" / "notes.txt").read_text() == "mine"


def test_a_url_cannot_be_built_into(student_of: StudentOf) -> None:
    with pytest.raises(ConfigError, match="can only be read; build in a folder, then copy it there"):
        build_here(student_of("s3://bucket/cache"))


@pytest.mark.parametrize(
    "method",
    [
        {"name": "dsig"},
        {"weights": {"node_metric": "pearson"}},
        {"graph": {"categorizer": "covariance_trace"}},
    ],
)
def test_what_descriptors_cannot_serve_is_refused(method: dict[str, Any], student_of: StudentOf) -> None:
    with pytest.raises(ConfigError, match=r"needs the pooled features; set teacher\.store=pooled"):
        student_of("descriptors", {"method": {"name": "graphkd", **method}}, store="descriptors")
