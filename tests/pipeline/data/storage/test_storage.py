"""Datasets that lie elsewhere: read like local ones, through whatever a network does."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from graphkd.errors import ConfigError
from pipeline.core.errors import DataError
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.loading.augmentation import NEW_VIEW_EVERY_EPOCH, AugmentationConfig
from pipeline.data.loading.batches import TrainBatches
from pipeline.data.loading.loader import PageDataset, page_loader
from pipeline.data.loading.order import CanonicalOrder
from pipeline.data.storage.base import StorageConfig
from pipeline.data.storage.open import open_store
from pipeline.data.storage.remote import RemoteStore, _options
from pipeline.data.storage.shard_cache import CachedStore
from tests.support.servers import Files, served_bucket, served_files

VIEW = AugmentationConfig(canvas=(128, 96), shortest_edge=(64, 96))
QUICK = StorageConfig(attempts=4, timeout_s=0.5)
SHARD = "shard-000000.tar"


@pytest.fixture
def files(dataset_folder: Path) -> Iterator[Files]:
    with served_files(dataset_folder) as files:
        yield files


def pages(location: str | Path, storage: StorageConfig | None = None, workers: int = 0) -> list[torch.Tensor]:
    dataset = PackedDataset(location, storage)
    order = CanonicalOrder(dataset.shard_sizes, 1, 4)
    items = PageDataset(dataset, VIEW, 1, NEW_VIEW_EVERY_EPOCH)
    return [batch.images for batch in page_loader(items, TrainBatches(order, 4, 0, 1, 0, 4), workers)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_every_kind_of_location_gives_the_same_pages(dataset_folder: Path, files: Files) -> None:
    expected = pages(dataset_folder)
    assert same(pages(f"file://{dataset_folder}"), expected)
    assert same(pages(files.url, QUICK), expected)
    with served_bucket(dataset_folder) as url:
        assert same(pages(url, QUICK), expected)
        assert PackedDataset(url, QUICK).identity == PackedDataset(dataset_folder).identity


def test_loader_workers_open_their_own_connections(dataset_folder: Path, files: Files) -> None:
    assert same(pages(files.url, QUICK, workers=2), pages(dataset_folder))


def test_only_the_bytes_that_are_needed_travel(dataset_folder: Path, files: Files) -> None:
    store = open_store(files.url, QUICK)
    dataset = PackedDataset(files.url, QUICK)
    record = dataset.sample(1)
    assert dataset.read_images([record]) == [
        (dataset_folder / SHARD).read_bytes()[record.image_offset : record.image_offset + record.image_bytes]
    ]
    assert store.read("dataset.json") == (dataset_folder / "dataset.json").read_bytes()


@pytest.mark.e2e
@pytest.mark.parametrize("fault", ["drop", "stall", "503", "429", "whole"])
def test_transient_faults_are_retried(dataset_folder: Path, files: Files, fault: str) -> None:
    expected = pages(dataset_folder)
    described = () if fault == "whole" else ("dataset.json", "shard-000001.index.arrow")  # those are wanted whole
    for name in (*described, SHARD, "shard-000002.tar"):
        files.faults[name] = [fault, fault]
    assert same(pages(files.url, StorageConfig(attempts=5, timeout_s=0.5)), expected)
    assert not any(files.faults.values())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("503", r"shard-000000.tar cannot be read .*503.* after 3 tries"),
        ("stall", r"shard-000000.tar cannot be read .* after 3 tries"),
        ("whole", r"asked for \d+ bytes from"),
        ("403", r"shard-000000.tar cannot be read .*403"),
        ("404", r"shard-000000.tar does not exist"),
    ],
)
def test_permanent_faults_are_one_line(files: Files, fault: str, message: str) -> None:
    dataset = PackedDataset(files.url, StorageConfig(attempts=3, timeout_s=0.3))
    records = [dataset.sample(5), dataset.sample(0)]  # of two shards: the one at fault is named
    files.faults[SHARD] = [fault] * 9
    files.stall_s = 0.8
    with pytest.raises(DataError, match=message) as caught:
        dataset.read_images(records)
    assert "\n" not in str(caught.value)
    assert files.requests[SHARD] == (1 if fault in ("403", "404") else 3)  # trying again would not help those


def test_one_failed_range_does_not_fetch_the_others_again(files: Files) -> None:
    dataset = PackedDataset(files.url, QUICK)
    records = [dataset.sample(sample) for sample in (0, 5, 9)]
    files.faults["shard-000001.tar"] = ["503"]
    before = dict(files.requests)
    dataset.read_images([*records, records[0]])
    assert {name: files.requests[name] - before.get(name, 0) for name in files.requests if name.endswith("tar")} == {
        "shard-000000.tar": 1,
        "shard-000001.tar": 2,
        "shard-000002.tar": 1,
    }


def test_unknown_protocols_and_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"has the protocol 'ftp'; datasets are read from folders, or file, http"):
        PackedDataset("ftp://host/set")

    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)  # as in a fresh process
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(
        ConfigError, match=r"s3 datasets need s3fs, which is not installed; pip install 'graphkd\[remote"
    ):
        PackedDataset("s3://bucket/set")


def test_google_cloud_storage_takes_our_options() -> None:
    gcsfs = pytest.importorskip("gcsfs")
    assert gcsfs.GCSFileSystem(token="anon", skip_instance_cache=True, **_options("gs", 5.0)).requests_timeout == 5.0


def test_a_remote_dataset_is_sent_to_other_processes_by_name(files: Files) -> None:
    dataset = PackedDataset(files.url, QUICK)
    assert len(pickle.dumps(dataset)) < 500
    assert pickle.loads(pickle.dumps(dataset)).identity == dataset.identity


# The local copy of remote shards.


def cached(files: Files, folder: Path, gigabytes: float = 1.0) -> tuple[PackedDataset, CachedStore]:
    dataset = PackedDataset(files.url, StorageConfig(cache=folder, cache_gb=gigabytes, attempts=2, timeout_s=0.5))
    assert isinstance(dataset.store, CachedStore)
    return dataset, dataset.store


def read_all(dataset: PackedDataset) -> list[bytes]:
    return [dataset.read_images([dataset.sample(sample)])[0] for sample in range(len(dataset))]


def copies(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*/*.tar"))


def test_shards_are_copied_once_and_read_from_the_copy(dataset_folder: Path, files: Files, tmp_path: Path) -> None:
    expected = read_all(PackedDataset(dataset_folder))
    dataset, store = cached(files, tmp_path)
    assert read_all(dataset) == expected
    store.close()
    assert copies(tmp_path) == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    again, _ = cached(files, tmp_path)
    before = sum(count for name, count in files.requests.items() if name.endswith(".tar"))
    assert read_all(again) == expected
    assert sum(count for name, count in files.requests.items() if name.endswith(".tar")) == before


def test_the_cache_keeps_its_bound_and_drops_what_was_used_longest_ago(files: Files, tmp_path: Path) -> None:
    dataset, store = cached(files, tmp_path, gigabytes=25_000 / 1e9)  # two shards of 10 kB
    for shard, sample in enumerate((0, 4, 8)):
        dataset.read_images([dataset.sample(sample)])
        store.close()
        os.utime(store.folder / f"shard-{shard:06d}.tar", (shard, shard))
        used = sum(path.stat().st_size for path in tmp_path.glob("*/*.tar"))
        assert used <= 25_000
    assert copies(tmp_path) == ["shard-000001.tar", "shard-000002.tar"]
    assert read_all(dataset)


def test_a_shard_larger_than_the_cache_is_read_from_afar(files: Files, tmp_path: Path) -> None:
    dataset, store = cached(files, tmp_path, gigabytes=1e-6)
    assert len(read_all(dataset)) == 10
    store.close()
    assert copies(tmp_path) == []


def test_a_copy_that_does_not_fit_its_checksum_is_not_kept(
    files: Files, tmp_path: Path, dataset_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    altered = tmp_path / "altered"
    altered.mkdir()
    for path in dataset_folder.iterdir():
        (altered / path.name).write_bytes(path.read_bytes())
    content = bytearray((altered / SHARD).read_bytes())
    content[-1] ^= 1
    (altered / SHARD).write_bytes(content)
    files.folder = altered
    dataset, store = cached(files, tmp_path / "cache")
    dataset.read_images([dataset.sample(0)])
    store.close()
    assert copies(tmp_path / "cache") == []
    assert "has other bytes than its dataset describes" in caplog.text
    assert not list((tmp_path / "cache").glob("*/.*.tmp"))


@pytest.mark.e2e
@pytest.mark.parametrize("fault", ["drip", "endless"])
@pytest.mark.parametrize("name", ["dataset.json", SHARD])
def test_endless_and_dripping_answers_end_in_one_line(
    files: Files, fault: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.storage.http.MAX_FILE_BYTES", 4 << 20)
    quick = StorageConfig(attempts=2, timeout_s=0.5)
    if name == SHARD:
        dataset = PackedDataset(files.url, quick)
        sample = dataset.sample(1)
    files.faults[name] = [fault] * 9
    begin = time.monotonic()
    with pytest.raises(DataError, match="cannot be read") as caught:
        PackedDataset(files.url, quick) if name != SHARD else dataset.image(sample)
    assert "\n" not in str(caught.value) and time.monotonic() - begin < 20
    files.faults[name] = []


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_copy_is_replaced(dataset_folder: Path, files: Files, tmp_path: Path, damage: str) -> None:
    storage = QUICK.model_copy(update={"cache": tmp_path / "cache"})
    expected = pages(dataset_folder)
    dataset = PackedDataset(files.url, storage)
    sample = dataset.sample(2)
    dataset.image(sample)
    dataset.store.close()  # type: ignore[attr-defined]
    (copied,) = (tmp_path / "cache").glob(f"*/{SHARD}")
    content = bytearray(copied.read_bytes())
    content[sample.image_offset + 40] ^= 1
    copied.write_bytes(content if damage == "flip" else content[:100])
    assert same(pages(files.url, storage), expected)


def test_training_continues_while_the_store_is_down_once_shards_are_copied(files: Files, tmp_path: Path) -> None:
    dataset, store = cached(files, tmp_path)
    expected = read_all(dataset)
    store.close()
    files.down = True
    assert read_all(dataset) == expected


COPYING = """
import sys
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.storage.base import StorageConfig
from pathlib import Path
dataset = PackedDataset(sys.argv[1], StorageConfig(cache=Path(sys.argv[2]), timeout_s=60))
dataset.read_images([dataset.sample(0)])
dataset.store.close()
"""


@pytest.mark.kill
def test_a_killed_copy_leaves_no_valid_file(files: Files, tmp_path: Path) -> None:
    files.stall_s = 60
    dataset = PackedDataset(files.url, QUICK)
    record = dataset.sample(0)
    files.faults[SHARD] = ["none", "stall"]  # the sample itself comes, its shard hangs
    victim = subprocess.Popen([sys.executable, "-c", COPYING, files.url, str(tmp_path)])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/.*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.glob("*/.*.tmp"))
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert copies(tmp_path) == []
    survivor, store = cached(files, tmp_path)
    assert survivor.read_images([record]) == dataset.read_images([record])
    store.close()
    assert copies(tmp_path) == [SHARD]
    assert not list(tmp_path.glob("*/.*.tmp"))


def test_the_protocol_of_a_store_is_seen_without_connecting() -> None:
    assert isinstance(open_store("s3://bucket/set"), RemoteStore)
