"""Verifying: every kind of damage is found and named, and what is taken out stays out."""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.core.errors import DataError
from pipeline.data.format.dataset import BadSampleError, PackedDataset
from pipeline.data.format.schema import index_path, read_dataset_json
from pipeline.data.loading.augmentation import NEW_VIEW_EVERY_EPOCH, AugmentationConfig
from pipeline.data.loading.loader import PageDataset, collate, limit_bad_samples
from pipeline.data.loading.order import SampleRef
from pipeline.data.prepare.index_external import index_dataset
from pipeline.data.prepare.verify import verify

VIEW = AugmentationConfig(canvas=(128, 96), shortest_edge=(96, 96))
Members = dict[str, bytes]


@pytest.fixture
def copy(dataset_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset_folder, tmp_path / "copy"))


def members(shard: Path) -> Members:
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def write_tar(shard: Path, files: list[tuple[str, bytes]]) -> None:
    with tarfile.open(shard, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def rewritten(shard: Path, change: Callable[[Members], Any], index: bool = True) -> None:
    """Change the files of a tar, and bring index and dataset.json up to date as someone's own script would."""
    files = members(shard)
    more = change(files) or []
    write_tar(shard, [*files.items(), *more])
    if index:
        index_dataset(shard.parent)


def edited(key: str, **changes: Any) -> Callable[[Members], None]:
    if "boxes" in changes:
        changes["areas"] = None

    def change(files: Members) -> None:
        files[f"{key}.json"] = json.dumps({**json.loads(files[f"{key}.json"]), **changes}).encode()

    return change


def put(name: str, content: bytes) -> Callable[[Members], None]:
    return lambda files: files.update({name: content})


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (96, 128)).save(buffer, "JPEG")
    return buffer.getvalue()


SHARD = "shard-000001.tar"
KEY = "000000005"
BAD_SAMPLES: dict[str, Callable[[Members], Any]] = {
    "its image does not decode": put(f"{KEY}.png", b"no image"),
    "its image is a JPEG, but named .png": put(f"{KEY}.png", jpeg()),
    "its image is 96 x 128 px, but its json says 97 x 128": edited(KEY, width=97),
    r"box 0 \[90\.0, 10\.0, 20\.0, 10\.0\] is not on its page": edited(
        KEY, boxes=[[90, 10, 20, 10]], category_ids=[3], iscrowd=[0]
    ),
    "has category id 77": edited(KEY, boxes=[[1, 1, 9, 9]], category_ids=[77], iscrowd=[0]),
    "image id 100 is used in shard-000000.tar already": edited(KEY, image_id=100),
}
BAD_TARS: dict[str, Callable[[Members], Any]] = {
    "json is malformed": put(f"{KEY}.json", b"{"),
    "which must be one of each": edited(KEY, iscrowd=[0] * 99),
    "but needs an image and a json": lambda files: files.pop(f"{KEY}.json") and None,
    "its key is used 2 times": lambda files: [(f"{KEY}.png", jpeg())],
}


@pytest.mark.parametrize("message", [*BAD_SAMPLES, *BAD_TARS])
def test_a_bad_sample_is_named_and_can_be_taken_out_for_good(copy: Path, message: str) -> None:
    before = read_dataset_json(copy)
    change = BAD_SAMPLES.get(message) or BAD_TARS[message]
    rewritten(copy / SHARD, change, index=message in BAD_SAMPLES)
    found = [problem for problem in verify(copy, workers=1) if problem.key is not None]
    assert {(problem.shard, problem.key) for problem in found} == {(SHARD, KEY)}
    assert any(re.search(message, problem.what) for problem in found), found
    verify(copy, exclude=True, workers=1)
    after = read_dataset_json(copy)
    assert [shard.samples for shard in after.shards] == [4, 3, 2]
    assert after.identity() != before.identity()
    assert verify(copy, workers=1) == []
    dataset = PackedDataset(copy)
    keys = [dataset.sample(sample).key for sample in range(len(dataset))]
    assert len(keys) == 9 and KEY not in keys
    index_path(copy / SHARD).unlink()  # a lost index is made again without what was taken out
    assert [PackedDataset(copy).sample(sample).key for sample in range(9)] == keys


def test_a_sound_dataset_has_no_problems(copy: Path) -> None:
    before = (copy / "dataset.json").read_bytes()
    assert verify(copy, exclude=True, workers=1) == []
    assert (copy / "dataset.json").read_bytes() == before


def test_a_flipped_byte_is_found_and_its_sample_named(copy: Path) -> None:
    record = PackedDataset(copy).sample(5)
    path = copy / SHARD
    content = bytearray(path.read_bytes())
    content[record.image_offset + record.image_bytes // 2] ^= 1
    path.write_bytes(content)
    found = verify(copy, workers=1)
    assert any(problem.key is None and "has SHA-256" in problem.what for problem in found)
    assert any(problem.key == KEY and "not those that were indexed" in problem.what for problem in found)
    verify(copy, exclude=True, workers=1)
    assert verify(copy, workers=1) == []


@pytest.mark.parametrize("between_members", [False, True])
def test_a_truncated_tar_is_found_and_its_samples_taken_out(copy: Path, between_members: bool) -> None:
    path = copy / SHARD
    with tarfile.open(path) as tar:
        third = next(member for member in tar if member.name.startswith("000000006"))
    # tarfile takes the end of a file between two members for the end of the tar, so that only the index knows better.
    path.write_bytes(path.read_bytes()[: third.offset if between_members else third.offset_data + 10])
    assert any("bytes, but dataset.json says" in problem.what for problem in verify(copy, workers=1))
    verify(copy, exclude=True, workers=1)
    assert verify(copy, workers=1) == []
    assert [shard.samples for shard in read_dataset_json(copy).shards] == ([4, 2, 2] if between_members else [4, 2])


def test_missing_shards_and_indexes_are_named(copy: Path) -> None:
    (copy / SHARD).unlink()
    index_path(copy / "shard-000002.tar").unlink()
    found = [str(problem) for problem in verify(copy, workers=1)]
    assert found == [f"{SHARD}: is missing", "shard-000002.tar: has no index; run `graphkd data index`"]


def test_a_dataset_without_a_sound_sample_is_not_emptied(copy: Path) -> None:
    for shard in copy.glob("*.tar"):
        shard.write_bytes(b"no tar")
    with pytest.raises(DataError, match="holds no sample that can be used"):
        verify(copy, exclude=True, workers=1)
    assert len(read_dataset_json(copy).shards) == 3


@pytest.mark.e2e
def test_processes_and_ray_find_the_same(copy: Path) -> None:
    rewritten(copy / SHARD, BAD_SAMPLES["has category id 77"])
    assert verify(copy, workers=2) == verify(copy, workers=1) != []


def test_tars_made_elsewhere_are_indexed_where_they_lie(dataset_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    for number, shard in enumerate(sorted(dataset_folder.glob("*.tar"))):
        # Folders within the tar, another order of extensions, and members that are no samples.
        files = sorted(members(shard).items(), reverse=True)
        write_tar(
            folder / f"part-{number}.tar", [("./", b""), ("README", b"hello"), *((f"pages/{n}", c) for n, c in files)]
        )
    with pytest.raises(DataError, match="give --categories FILE"):
        index_dataset(folder)
    (tmp_path / "classes.json").write_text(json.dumps([{"id": 3, "name": "Text"}, {"id": 5, "name": "Picture"}]))
    index_dataset(folder, categories=tmp_path / "classes.json", workers=1)
    assert any("has category id 9" in problem.what for problem in verify(folder, workers=1))
    classes = [{"id": 3, "name": "Text"}, {"id": 5, "name": "Picture"}, {"id": 9, "name": "Title"}]
    (tmp_path / "classes.json").write_text(json.dumps({"categories": classes}))
    (folder / "dataset.json").unlink()
    dataset = index_dataset(folder, categories=tmp_path / "classes.json", workers=1)
    assert verify(folder, workers=1) == []
    assert [category.text for category in dataset.categories] == [True, False, True]
    ours, theirs = PackedDataset(dataset_folder), PackedDataset(folder)
    by_id = {theirs.sample(sample).image_id: theirs.sample(sample).boxes.tolist() for sample in range(10)}
    assert by_id == {ours.sample(sample).image_id: ours.sample(sample).boxes.tolist() for sample in range(10)}


def broken(copy: Path, *keys: str) -> PackedDataset:
    """Damage images in place, as a disk would, so that nothing knows of it yet."""
    dataset = PackedDataset(copy)
    for sample in range(len(dataset)):
        record = dataset.sample(sample)
        if record.key in keys:
            with (copy / record.shard).open("r+b") as file:
                file.seek(record.image_offset)
                file.write(b"\0" * record.image_bytes)
    return PackedDataset(copy)


def test_a_bad_sample_stops_a_run_naming_shard_and_key(copy: Path) -> None:
    items = PageDataset(broken(copy, KEY), VIEW, 0, NEW_VIEW_EVERY_EPOCH)
    with pytest.raises(BadSampleError, match=rf"{SHARD}: the image of '{KEY}' cannot be read"):
        items[SampleRef(0, 5)]


def test_a_bad_sample_is_replaced_within_a_budget(copy: Path) -> None:
    items = PageDataset(broken(copy, KEY, "000000006"), VIEW, 0, NEW_VIEW_EVERY_EPOCH, substitute_bad=True)
    batch = collate(items.__getitems__([SampleRef(0, 5), SampleRef(0, 1)]))
    assert batch.samples.tolist() == [7, 1]  # the next that can be read, under any topology
    assert batch.replaced_sample.tolist() == [5, -1]
    again = collate([items[SampleRef(1, 6)]])
    assert len(list(limit_bad_samples([batch, batch, again], tolerated=2))) == 3
    with pytest.raises(DataError, match=r"2 pages could not be read, such as sample 5, but data.bad_samples is 1"):
        list(limit_bad_samples([batch, again], tolerated=1))
