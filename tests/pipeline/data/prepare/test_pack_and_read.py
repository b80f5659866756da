"""Packing and reading back, and one clear line for every kind of bad input."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.core.errors import DataError, OutputError
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.format.scan import build_index
from pipeline.data.format.schema import index_path
from pipeline.data.loading.augmentation import EVALUATION_VIEW, NEW_VIEW_EVERY_EPOCH, AugmentationConfig
from pipeline.data.loading.batches import FinitePassBatches, TrainBatches
from pipeline.data.loading.loader import PageDataset, page_loader
from pipeline.data.loading.order import CanonicalOrder, SampleRef
from pipeline.data.prepare.index_external import index_dataset
from pipeline.data.prepare.pack import pack
from pipeline.data.prepare.verify import verify
from pipeline.data.summary import summarize

VIEW = AugmentationConfig(canvas=(128, 96), shortest_edge=(64, 96))


def test_what_is_packed_is_read_back(coco_folder: Path, dataset_folder: Path) -> None:
    coco = json.loads((coco_folder / "annotations.json").read_text())
    dataset = PackedDataset(dataset_folder)
    assert dataset.shard_sizes == (4, 4, 2)
    assert dataset.class_names == ["Text", "Picture", "Title"]
    assert dataset.text_classes == [True, False, True]
    for sample in range(len(dataset)):
        record = dataset.sample(sample)
        expected = [entry["bbox"] for entry in coco["annotations"] if entry["image_id"] == record.image_id]
        assert record.boxes.tolist() == expected
        with Image.open(coco_folder / "images" / record.file_name) as image:
            assert np.array_equal(np.asarray(dataset.image(record)), np.asarray(image))


def test_pages_without_regions_stay_as_background(dataset_folder: Path) -> None:
    dataset = PackedDataset(dataset_folder)
    assert [len(dataset.sample(sample).boxes) for sample in (8, 9)] == [0, 0]
    assert summarize(dataset_folder)["pages"] == 10


def test_packing_is_deterministic_and_packing_again_changes_nothing(coco_folder: Path, tmp_path: Path) -> None:
    arguments = (coco_folder / "annotations.json", coco_folder / "images")
    first = pack(*arguments, tmp_path / "a", samples_per_shard=4)
    second = pack(*arguments, tmp_path / "b", samples_per_shard=4)
    assert [shard.sha256 for shard in first.shards] == [shard.sha256 for shard in second.shards]
    stamp = (tmp_path / "a" / "dataset.json").stat().st_mtime_ns
    assert pack(*arguments, tmp_path / "a", samples_per_shard=4) == first
    assert (tmp_path / "a" / "dataset.json").stat().st_mtime_ns == stamp


def test_webdataset_reads_the_tars(dataset_folder: Path) -> None:
    import webdataset as wds

    samples = list(wds.WebDataset(str(dataset_folder / "shard-000000.tar"), shardshuffle=False).decode("pil"))
    assert len(samples) == 4
    assert samples[0]["png"].size == (96, 128)
    assert set(samples[0]["json"]) >= {"boxes", "category_ids", "width"}


BAD_FILES: dict[str, Callable[[dict[str, Any]], None]] = {
    "is off its page": lambda coco: coco["annotations"][0].update(bbox=[80, 10, 40, 10]),
    "has no area": lambda coco: coco["annotations"][0].update(bbox=[10, 10, 0, 10]),
    "names category id 77": lambda coco: coco["annotations"][0].update(category_id=77),
    "names image id 5": lambda coco: coco["annotations"][0].update(image_id=5),
    "image id 100 is used 2 times": lambda coco: coco["images"][1].update(id=100),
    "annotation id 1 is used 2 times": lambda coco: coco["annotations"][0].update(id=1),
    "is used by 2 images": lambda coco: coco["images"][1].update(file_name=coco["images"][0]["file_name"]),
    "image 'absent.png' is missing": lambda coco: coco["images"][0].update(file_name="absent.png"),
    "its annotation says": lambda coco: coco["images"][0].update(width=120),
    "is no COCO file": lambda coco: coco["images"][0].update(width="wide"),
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_bad_annotations_are_one_line_and_leave_nothing(message: str, coco_folder: Path, tmp_path: Path) -> None:
    coco = json.loads((coco_folder / "annotations.json").read_text())
    BAD_FILES[message](coco)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(coco))
    with pytest.raises(DataError, match=message) as caught:
        pack(path, coco_folder / "images", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("**/*.tar*"))
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_an_unreadable_image_is_named(coco_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(coco_folder, tmp_path / "pages")
    (tmp_path / "pages" / "images" / "page-003.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"page-003\.png cannot be read"):
        pack(tmp_path / "pages" / "annotations.json", tmp_path / "pages" / "images", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_repair_clips_and_drops(coco_folder: Path, tmp_path: Path) -> None:
    coco = json.loads((coco_folder / "annotations.json").read_text())
    coco["annotations"][0]["bbox"] = [80, 10, 40, 10]
    coco["annotations"][1]["bbox"] = [200, 10, 40, 10]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(coco))
    pack(path, coco_folder / "images", tmp_path / "out", repair=True)
    record = PackedDataset(tmp_path / "out").sample(0)
    assert record.boxes[0].tolist() == [80, 10, 16, 10]
    assert len(record.boxes) == sum(entry["image_id"] == 100 for entry in coco["annotations"]) - 1


def test_a_folder_that_holds_something_else_is_left_alone(coco_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match=r"already holds something that is no dataset"):
        pack(coco_folder / "annotations.json", coco_folder / "images", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_another_dataset_in_the_folder_is_refused(coco_folder: Path, tmp_path: Path) -> None:
    pack(coco_folder / "annotations.json", coco_folder / "images", tmp_path / "out", samples_per_shard=4)
    with pytest.raises(OutputError, match="already holds another dataset"):
        pack(coco_folder / "annotations.json", coco_folder / "images", tmp_path / "out", samples_per_shard=5)


def test_unknown_text_classes_are_listed(coco_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--text: unknown classes Txet; the classes are Text, Picture, Title"):
        pack(coco_folder / "annotations.json", coco_folder / "images", tmp_path / "out", text=["Txet"])


@pytest.fixture
def copy(dataset_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset_folder, tmp_path / "copy"))


def test_a_missing_index_is_made_and_a_damaged_one_named(copy: Path) -> None:
    shard = copy / "shard-000001.tar"
    before = PackedDataset(copy).shard_index(1).table
    index_path(shard).unlink()
    assert PackedDataset(copy).shard_index(1).table.equals(before)
    index_path(shard).write_bytes(b"ARROW1 no")
    with pytest.raises(DataError, match=r"is not the index that dataset\.json describes"):
        PackedDataset(copy).shard_index(1)


def test_a_truncated_tar_is_named(copy: Path) -> None:
    shard = copy / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"shard-000000\.tar is not a readable tar"):
        build_index(shard)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not readable"), ('{"version": 99}', "has version 99"), ('{"version": 1, "shards": []}', "malformed at")],
)
def test_bad_dataset_files_are_named(copy: Path, content: str, message: str) -> None:
    (copy / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=message):
        PackedDataset(copy)


def test_a_description_changed_by_hand_is_refused_until_it_is_meant(copy: Path) -> None:
    path = copy / "dataset.json"
    path.write_text(path.read_text().replace('"name": "Title"', '"name": "Head"'))
    with pytest.raises(DataError, match=r"does not have its own checksum.*graphkd data index"):
        PackedDataset(copy)
    index_dataset(copy)
    assert PackedDataset(copy).class_names == ["Text", "Picture", "Head"]


def test_shard_names_cannot_leave_the_folder(copy: Path) -> None:
    description = json.loads((copy / "dataset.json").read_text())
    description["shards"][0]["name"] = "../other.tar"
    (copy / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(DataError, match=r"malformed at shards\.0\.name"):
        PackedDataset(copy)


def batches(dataset: PackedDataset, ranks: int, workers: int, start: int = 0, stop: int = 6) -> list[list[int]]:
    """The samples of each global batch, read by all ranks together."""
    order = CanonicalOrder(dataset.shard_sizes, seed=5, batch=4)
    items = PageDataset(dataset, VIEW, seed=5, views=NEW_VIEW_EVERY_EPOCH)
    read = [
        [
            batch.samples.tolist()
            for batch in page_loader(items, TrainBatches(order, 4, rank, ranks, start, stop), workers)
        ]
        for rank in range(ranks)
    ]
    return [sum(parts, []) for parts in zip(*read, strict=True)]


def test_global_batches_do_not_depend_on_ranks_workers_or_restarts(dataset_folder: Path) -> None:
    dataset = PackedDataset(dataset_folder)
    reference = batches(dataset, ranks=1, workers=0)
    assert batches(dataset, ranks=3, workers=0) == reference
    assert batches(dataset, ranks=1, workers=2) == reference
    assert batches(dataset, ranks=2, workers=0, start=3) == reference[3:]
    assert sorted(sum(reference, [])[:10]) == list(range(10))


@pytest.mark.parametrize("ranks", [1, 3, 16])
def test_the_finite_pass_reads_every_page_once(dataset_folder: Path, ranks: int) -> None:
    seen = [
        ref.sample for rank in range(ranks) for batch in FinitePassBatches(range(10), 2, rank, ranks) for ref in batch
    ]
    assert sorted(seen) == list(range(10))


PACKING = """
import os, sys, time
from pathlib import Path
import pipeline.data.prepare.pack as packing
written = packing.write_shard
def slowly(task):
    shard = written(task)
    if int(sys.argv[4]) == task.first:
        print("ready", flush=True)
        time.sleep(60)
    return shard
packing.write_shard = slowly
packing.pack(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), samples_per_shard=2, workers=1)
"""


def test_a_bad_page_is_named_with_all_others_and_finished_shards_are_kept(coco_folder: Path, tmp_path: Path) -> None:
    pages = Path(shutil.copytree(coco_folder, tmp_path / "pages"))
    arguments = (pages / "annotations.json", pages / "images", tmp_path / "out")
    sound = {name: (pages / "images" / name).read_bytes() for name in ("page-005.png", "page-009.png")}
    for name in sound:
        (pages / "images" / name).write_bytes(b"no image")
    with pytest.raises(
        DataError, match=r"2 of 10 images .*page-005\.png cannot be read .*page-009\.png cannot be read"
    ):
        pack(*arguments, samples_per_shard=2)
    for name, content in sound.items():  # headers are sound, pixels are not
        (pages / "images" / name).write_bytes(content[:60])
    with pytest.raises(DataError, match=r"page-005\.png cannot be read"):
        pack(*arguments, samples_per_shard=2)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / ".building").glob("*.tar")}
    assert len(kept) == 2
    coco = json.loads((pages / "annotations.json").read_text())
    gone = coco["images"].pop(5)["id"], coco["images"].pop(8)["id"]
    coco["annotations"] = [region for region in coco["annotations"] if region["image_id"] not in gone]
    (pages / "annotations.json").write_text(json.dumps(coco))
    packed = pack(*arguments, samples_per_shard=2)
    assert packed.samples == 8
    assert [(tmp_path / "out" / path.name).stat().st_mtime_ns for path in kept] == list(kept.values())
    assert verify(tmp_path / "out", workers=1) == []


def test_images_that_changed_since_packing_are_named(coco_folder: Path, tmp_path: Path) -> None:
    pages = Path(shutil.copytree(coco_folder, tmp_path / "pages"))
    arguments = (pages / "annotations.json", pages / "images", tmp_path / "out")
    first = pack(*arguments, samples_per_shard=4)
    (pages / "images" / "page-006.png").write_bytes((pages / "images" / "page-007.png").read_bytes())
    with pytest.raises(DataError, match=r"1 images in .* have changed since .* was packed: page-006\.png"):
        pack(*arguments, samples_per_shard=4)
    shutil.rmtree(pages / "images")  # no longer needed
    (pages / "images").mkdir()
    assert pack(*arguments, samples_per_shard=4) == first


@pytest.mark.e2e
def test_two_packings_at_once_leave_one_dataset(coco_folder: Path, tmp_path: Path) -> None:
    arguments = (coco_folder / "annotations.json", coco_folder / "images", tmp_path / "out")
    code = (
        "import sys; from pathlib import Path; from pipeline.data.prepare.pack import pack; "
        "pack(*map(Path, sys.argv[1:]), samples_per_shard=2, workers=1)"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stderr=subprocess.PIPE) for _ in "ab"]
    errors = [process.communicate()[1].decode() for process in both]
    for process, error in zip(both, errors, strict=True):
        assert process.returncode == 0 or "being packed by another process" in error
    assert 0 in [process.returncode for process in both]
    assert verify(tmp_path / "out", workers=1) == []


@pytest.mark.parametrize("name", ["scans\\page 000.png", "scans/page%20000.png"])
def test_names_of_files_as_exporters_write_them(name: str, coco_folder: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "scans").mkdir(parents=True)
    coco = json.loads((coco_folder / "annotations.json").read_text())
    coco["images"] = coco["images"][:1]
    shutil.copy(coco_folder / "images" / coco["images"][0]["file_name"], images / "scans" / "page 000.png")
    coco["images"][0]["file_name"] = name
    coco["annotations"] = []
    (tmp_path / "a.json").write_text(json.dumps(coco))
    assert pack(tmp_path / "a.json", images, tmp_path / "out").samples == 1


@pytest.mark.kill
@pytest.mark.parametrize("stopped_at", [0, 4, 8])
def test_packing_resumes_where_it_was_killed(coco_folder: Path, tmp_path: Path, stopped_at: int) -> None:
    arguments = (coco_folder / "annotations.json", coco_folder / "images")
    whole = pack(*arguments, tmp_path / "whole", samples_per_shard=2, workers=1)
    out = tmp_path / "out"
    victim = subprocess.Popen(
        [sys.executable, "-c", PACKING, *map(str, arguments), str(out), str(stopped_at)], stdout=subprocess.PIPE
    )
    assert victim.stdout is not None and victim.stdout.readline() == b"ready\n"
    with pytest.raises(OutputError, match="being packed by another process"):
        pack(*arguments, out, samples_per_shard=2, workers=1)
    victim.kill()
    victim.wait()
    victim.stdout.close()
    assert not list(out.glob("*.tar")) and not (out / "dataset.json").exists()
    done = {path: path.stat().st_mtime_ns for path in (out / ".building").glob("shard-*.tar")}
    assert len(done) == stopped_at // 2 + 1
    moments = []
    packed = pack(
        *arguments, out, samples_per_shard=2, workers=1, progress=lambda pages, total: moments.append((pages, total))
    )
    assert packed == whole
    assert moments[-1] == (10, 10)
    assert [(out / path.name).stat().st_mtime_ns for path in done] == list(done.values())
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())


@pytest.mark.kill
def test_packing_resumes_when_killed_during_renaming(coco_folder: Path, tmp_path: Path) -> None:
    arguments = (coco_folder / "annotations.json", coco_folder / "images")
    out = tmp_path / "out"
    whole = pack(*arguments, out, samples_per_shard=4, workers=1)
    task = {"source": whole.source}
    building = out / ".building"
    building.mkdir()
    (building / "plan.json").write_text(json.dumps(task))
    (out / "dataset.json").unlink()
    for shard in whole.shards:
        (building / shard.name).with_suffix(".json").write_text(shard.model_dump_json())
    for name in ("shard-000002.tar", "shard-000002.index.arrow"):
        (out / name).rename(building / name)
    assert pack(*arguments, out, samples_per_shard=4, workers=1) == whole
    assert verify(out, workers=1) == []


@pytest.mark.e2e
def test_processes_write_the_same_bytes(coco_folder: Path, tmp_path: Path) -> None:
    arguments = (coco_folder / "annotations.json", coco_folder / "images")
    one = pack(*arguments, tmp_path / "one", samples_per_shard=2, workers=1)
    assert pack(*arguments, tmp_path / "two", samples_per_shard=2, workers=2) == one
    with pytest.raises(DataError, match="its annotation says"):
        coco = json.loads((coco_folder / "annotations.json").read_text())
        coco["images"][5].update(width=120)
        (tmp_path / "bad.json").write_text(json.dumps(coco))
        pack(tmp_path / "bad.json", coco_folder / "images", tmp_path / "bad", samples_per_shard=2, workers=2)


@pytest.mark.ray
@pytest.mark.slow  # verifying on Ray goes the same way
def test_ray_writes_the_same_bytes(coco_folder: Path, tmp_path: Path) -> None:
    arguments = (coco_folder / "annotations.json", coco_folder / "images")
    one = pack(*arguments, tmp_path / "one", samples_per_shard=2, workers=1)
    assert pack(*arguments, tmp_path / "two", samples_per_shard=2, on_ray=True) == one
    assert verify(tmp_path / "two", on_ray=True) == []


def test_a_batch_is_a_handful_of_tensors_whatever_its_size(dataset_folder: Path) -> None:
    items = PageDataset(PackedDataset(dataset_folder), VIEW, 0, EVALUATION_VIEW)
    for size in (1, 10):
        batch = next(iter(page_loader(items, [[SampleRef(0, sample) for sample in range(size)]], 0)))
        values = [getattr(batch, field.name) for field in fields(batch)]
        assert len(values) <= 10
        assert all(isinstance(value, torch.Tensor) and value.is_contiguous() for value in values)


def test_few_files_stay_open(dataset_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.storage.local.MAX_OPEN_FILES", 2)
    monkeypatch.setattr("pipeline.data.format.dataset.MAX_OPEN_INDEXES", 2)
    shutil.copytree(dataset_folder, tmp_path / "own")
    dataset = PackedDataset(tmp_path / "own")
    for sample in (0, 4, 8, 1, 5, 9):
        dataset.read_images([dataset.sample(sample)])
        own = [path for path in descriptors() if path.startswith(str(tmp_path))]
        for ending in (".tar", ".arrow"):
            assert len([path for path in own if path.endswith(ending)]) <= 2
        assert own
    del dataset
    gc.collect()
    assert not [path for path in descriptors() if path.startswith(str(tmp_path))]


def descriptors() -> Iterator[str]:
    """Where this process's open descriptors lead."""
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            yield os.readlink(f"/proc/self/fd/{number}")
