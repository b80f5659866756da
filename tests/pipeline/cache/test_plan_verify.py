"""Planning, verifying and describing a cache; its content; reading it from afar and with flat memory."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from typer.testing import CliRunner

from graphkd.signals import mean_std_pair
from pipeline.cache import plan as cache_plan
from pipeline.cache.format import COLUMNS, CacheJson, NodeStore, cache_schema
from pipeline.cache.plan import plan_cache
from pipeline.cache.quantize import Precision
from pipeline.cache.reader import CacheReader, Row
from pipeline.cache.verify import verify_cache
from pipeline.cli.main import app
from pipeline.config import RunConfig
from pipeline.context import RunContext
from pipeline.core.errors import CacheError, DataError, OutputError
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.loading.augmentation import EVALUATION_VIEW
from pipeline.data.loading.loader import PageDataset, collate
from pipeline.data.loading.order import SampleRef
from pipeline.train.signal_source import signal_source
from tests.support.runs import StudentOf, build_here
from tests.support.servers import served_bucket, served_files

pytestmark = pytest.mark.cache

CPU = torch.device("cpu")
FORMS: list[tuple[NodeStore, Precision]] = [
    ("pooled", "fp32"),
    ("pooled", "fp16"),
    ("pooled", "int8"),
    ("descriptors", "fp16"),
]


def built(student_of: StudentOf, store: NodeStore, precision: Precision, **teacher: Any) -> tuple[RunConfig, CacheJson]:
    config = student_of(f"tools-{store}-{precision}", store=store, cache_dtype=precision, **teacher)
    return config, build_here(config)


@pytest.mark.parametrize(("store", "precision"), FORMS)
def test_a_plan_predicts_the_bytes(store: NodeStore, precision: Precision, student_of: StudentOf) -> None:
    config = student_of(f"planned-{store}-{precision}", store=store, cache_dtype=precision)
    plan = plan_cache(RunContext(config), pages=10)
    assert not config.cache_folder.exists(), "nothing is left by planning"
    description = build_here(config)
    footers = sum(shard.bytes for shard in description.shards) - plan.need_bytes
    assert 0 <= footers < 0.02 * description.bytes + 2000 * len(description.shards)
    assert plan.most_bytes >= plan.need_bytes and plan.rows == 10
    assert plan_cache(RunContext(config), pages=2).need_bytes == 0, "what is built needs no more room"


def test_a_plan_estimates_hours_and_storage(student_of: StudentOf, monkeypatch: pytest.MonkeyPatch) -> None:
    config = student_of("reckoned", store="pooled", cache_dtype="fp16")
    monkeypatch.setattr(cache_plan, "measure_write", lambda folder: 1000.0)  # a disk of 1 kB/s
    slow = plan_cache(RunContext(config), gpus=4, rate=50.0, pages=4)
    assert slow.bound == "disk" and slow.hours == pytest.approx(slow.need_bytes / 1000 / 3600)
    assert slow.read_mb_s == pytest.approx(200 * slow.page_bytes / 1e6)
    assert [feed.enough for feed in slow.feeds] == [feed.pages_s >= 200 for feed in slow.feeds]
    monkeypatch.setattr(cache_plan, "measure_write", lambda folder: 1e12)
    fast = plan_cache(RunContext(config), builders=2, pages=4)
    assert fast.bound == "teacher" and fast.hours == pytest.approx(10 / (2 * fast.pages_s) / 3600)


def test_a_cache_that_will_not_fit_is_refused_with_one_that_does(
    student_of: StudentOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = student_of("too-large", store="pooled", cache_dtype="fp32")
    plan = plan_cache(RunContext(config), pages=4)
    plan.check_space()
    room = next(size.total_bytes for size in plan.sizes if (size.store, size.nodes) == ("descriptors", 16))
    monkeypatch.setattr(cache_plan.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2 * room))
    with pytest.raises(OutputError, match=r"the cache needs .* GB free; give teacher\.cache on another disk, or "):
        plan_cache(RunContext(config), pages=4).check_space()


@pytest.mark.parametrize(("store", "precision"), FORMS)
def test_verify_finds_nothing_wrong_with_a_fresh_cache(
    store: NodeStore, precision: Precision, student_of: StudentOf
) -> None:
    config, _ = built(student_of, store, precision)
    found = verify_cache(RunContext(config), pages=6)
    assert found.problems == [] and found.comparison is not None
    seen = found.comparison
    assert seen.pages == 6 and seen.same_nodes == 1.0
    assert seen.max_error <= {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.3}[precision] * max(1, seen.scale)
    assert (
        seen.mean_error <= seen.max_error
        and seen.cosine > {"fp32": 0.999999, "fp16": 0.99999, "int8": 0.999}[precision]
    )
    assert seen.loss_difference < {"fp32": 1e-5, "fp16": 1e-3, "int8": 1e-2}[precision]


@pytest.mark.parametrize("factor", [1.5, float("nan")])
def test_verify_reports_a_teacher_with_other_outputs(
    factor: float, student_of: StudentOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that are whole, but of features that this teacher never gave."""
    config, _ = built(student_of, "pooled", "fp32")
    original = CacheReader.rows

    def altered(self: CacheReader, places: Any) -> list[Row]:
        rows = original(self, places)
        return [Row(row.sample, row.view, row.arrays | {"pooled": row.arrays["pooled"] * factor}) for row in rows]

    monkeypatch.setattr(CacheReader, "rows", altered)
    found = verify_cache(RunContext(config), pages=4)
    assert len(found.problems) == 1 and "losses differ from the live teacher's by" in found.problems[0]


def test_a_student_without_a_method_verifies_too(student_of: StudentOf) -> None:
    build_here(student_of("tools-pooled-fp32", cache_dtype="fp32", store="pooled"))
    alone = student_of("tools-pooled-fp32", {"method": {"name": "none"}}, cache_dtype="fp32", store="pooled")
    found = verify_cache(RunContext(alone), pages=2)
    assert found.problems == [] and found.comparison is not None and found.comparison.loss_difference < 1e-5


def test_planning_refuses_a_folder_of_another_cache(student_of: StudentOf) -> None:
    build_here(student_of("tools-pooled-fp16", cache_dtype="fp16", store="pooled"))
    with pytest.raises(CacheError, match="dtype"):
        plan_cache(RunContext(student_of("tools-pooled-fp16", cache_dtype="int8", store="pooled")), pages=2)


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_a_compressed_cache_gives_the_same_signals(compression: str, student_of: StudentOf) -> None:
    plain, description = built(student_of, "pooled", "fp16")
    config = student_of(f"tools-{compression}", cache_dtype="fp16", compression=compression)
    packed = build_here(config)
    assert {shard.compression for shard in packed.shards} == {compression} and packed.bytes != description.bytes
    ours, theirs = read(plain, range(10)), read(config, range(10))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def read(config: RunConfig, samples: range) -> dict[str, torch.Tensor]:
    dataset = PackedDataset(config.data.train)
    items = PageDataset(dataset, config.data.view, config.run.seed, config.views)
    source = signal_source(RunContext(config), CPU)
    batches = [collate([items[SampleRef(0, sample)]]) for sample in samples]
    all_signals = [source.signals(batch, stored) for batch, stored in source.prefetch(batches)]
    names = ("boxes", "scores", "classes", "logits", "deltas", "pooled", "valid")
    return {name: torch.cat([getattr(signals, name) for signals in all_signals]) for name in names}


def test_descriptors_are_mean_and_variance_of_the_features(student_of: StudentOf) -> None:
    pooled, compressed = (read(built(student_of, store, "fp32")[0], range(10)) for store in ("pooled", "descriptors"))
    valid = pooled["valid"]
    features, points = pooled["pooled"][valid].flatten(-2), compressed["pooled"][valid].flatten(-2)
    torch.testing.assert_close(points.mean(-1), features.mean(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(points.var(-1, correction=0), features.var(-1, correction=0), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(compressed["pooled"], mean_std_pair(pooled["pooled"]) * valid[..., None, None, None])
    # The mean squared difference of two pairs is that of means and deviations, and a lower bound of the features'.
    one, other = features[:-1], features[1:]
    gap = (points[:-1] - points[1:]).square().mean(-1)
    moments = (one.mean(-1) - other.mean(-1)).square()
    moments += (one.var(-1, correction=0).sqrt() - other.var(-1, correction=0).sqrt()).square()
    torch.testing.assert_close(gap, moments, rtol=1e-2, atol=1e-4)
    assert (gap <= (one - other).square().mean(-1) + 1e-4).all()


def test_a_file_has_its_schema_and_any_arrow_reader_reads_it(student_of: StudentOf) -> None:
    config, description = built(student_of, "pooled", "int8")
    table = pa.ipc.open_file(str(config.cache_folder / "shard-000000.arrow")).read_all()
    assert table.schema == cache_schema("int8") and table.schema.names == [column.name for column in COLUMNS]
    assert table.column("sample").to_pylist() == [0, 1, 2, 3]
    nodes, classes = len(table.column("scores")[0]), description.num_classes
    channels, side, _ = description.feature_shape
    lists = ("boxes", "logits", "deltas", "pooled", "pooled_scale", "affine")
    lengths = {name: len(table.column(name)[0]) for name in lists}
    assert lengths == {
        "boxes": 4 * nodes,
        "logits": (classes + 1) * nodes,
        "deltas": 4 * classes * nodes,
        "pooled": nodes * channels * side * side,
        "pooled_scale": channels,
        "affine": 4,
    }


def test_a_page_shown_in_another_view_is_refused(student_of: StudentOf) -> None:
    config, _ = built(student_of, "pooled", "fp32")
    dataset = PackedDataset(config.data.train)
    batch = collate([PageDataset(dataset, config.data.view, 0, EVALUATION_VIEW)[SampleRef(0, 3)]])
    mirrored = replace(batch, affine=-batch.affine)
    with pytest.raises(CacheError, match="has sample 3 in view 0 at"):
        signal_source(RunContext(config), CPU).signals(mirrored)


def test_a_cache_over_http_is_prefetched_and_survives_faults(student_of: StudentOf, tmp_path: Path) -> None:
    config, _ = built(student_of, "pooled", "fp16")
    with served_files(config.cache_folder) as served:
        served.faults = {"shard-000000.arrow": ["drop", "503"], "cache.json": ["503"]}
        served.faults["shard-000001.index.arrow"] = ["drop"]
        remote = student_of(served.url, cache_dtype="fp16")
        expected, found = read(config, range(10)), read(remote, range(10))
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert served.requests["shard-000000.arrow"] >= 6  # a row each, and those tried again
        dataset, source = PackedDataset(remote.data.train), signal_source(RunContext(remote), CPU)
        batch = collate([PageDataset(dataset, remote.data.view, 0, EVALUATION_VIEW)[SampleRef(0, 8)]])
        source.signals(batch)
        damaged = served.folder / "shard-000002.arrow"
        content = damaged.read_bytes()
        try:
            half = len(content) // 2
            damaged.write_bytes(content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :])
            for _ in range(2):  # a row that was read before is checked again: what is behind a URL may be replaced
                with pytest.raises((CacheError, DataError), match=r"shard-000002\.arrow"):
                    read(remote, range(8, 10))
            damaged.write_bytes(bytes(byte ^ 1 for byte in content))
            with pytest.raises(CacheError, match=r"shard-000002\.arrow: the row of sample 8 is damaged"):
                source.signals(batch)
        finally:
            damaged.write_bytes(content)


def test_a_cache_in_s3_is_read(student_of: StudentOf) -> None:
    config, _ = built(student_of, "pooled", "fp16")
    with served_bucket(config.cache_folder) as url:
        expected, found = read(config, range(10)), read(student_of(url, cache_dtype="fp16"), range(10))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_copies_of_remote_cache_files_are_kept_where_asked(student_of: StudentOf, tmp_path: Path) -> None:
    config, _ = built(student_of, "pooled", "fp16")
    with served_files(config.cache_folder) as served:
        storage = {"data": {"storage": {"cache": str(tmp_path / "copies")}}}
        remote = student_of(served.url, storage, cache_dtype="fp16")
        dataset = PackedDataset(remote.data.train)
        source: Any = signal_source(RunContext(remote), CPU)
        batch = collate([PageDataset(dataset, remote.data.view, 0, EVALUATION_VIEW)[SampleRef(0, 0)]])
        source.signals(batch)
        source.store.close()
        (copy,) = (tmp_path / "copies").glob("*/shard-000000.arrow")
        assert copy.read_bytes() == (config.cache_folder / "shard-000000.arrow").read_bytes()
        asked = served.requests["shard-000000.arrow"]
        source.signals(batch)
        assert served.requests["shard-000000.arrow"] == asked


def test_few_files_are_mapped_and_memory_stays_flat(student_of: StudentOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.cache.reader.MAX_OPEN_FILES", 2)
    config, _ = built(student_of, "pooled", "fp32")
    shutil.copytree(config.cache_folder, config.cache_folder.with_name("mapped"), dirs_exist_ok=True)
    config = student_of("mapped", cache_dtype="fp32")
    dataset = PackedDataset(config.data.train)
    items = PageDataset(dataset, config.data.view, config.run.seed, EVALUATION_VIEW)
    source = signal_source(RunContext(config), CPU)
    batches = [collate([items[SampleRef(0, sample)]]) for sample in range(10)]
    for _ in range(3):
        for batch in batches:
            source.signals(batch)
            maps = Path("/proc/self/maps").read_text().splitlines()
            assert 1 <= len({line.split()[-1] for line in maps if "/mapped/" in line}) <= 2


def test_rows_are_views_of_the_file_and_not_copies(student_of: StudentOf) -> None:
    config, _ = built(student_of, "pooled", "fp32")
    source: Any = signal_source(RunContext(config), CPU)
    (row,) = source.reader.rows([(0, 1)])
    buffer = source.reader._mapped(0)
    for values in row.arrays.values():
        address = values.__array_interface__["data"][0]
        assert len(values) == 0 or buffer.address <= address < buffer.address + buffer.size
        assert not values.flags.writeable


def test_the_commands_plan_build_verify_and_describe(student_of: StudentOf, tmp_path: Path) -> None:
    import yaml

    config = student_of(tmp_path / "by-command", cache_dtype="fp16")
    path = tmp_path / "student.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    run = CliRunner().invoke
    for arguments in (["plan", str(path), "--pages", "4"], ["build", str(path)], ["verify", str(path), "--pages", "2"]):
        result = run(app, ["cache", *arguments])
        assert result.exit_code == 0, result.output
    planned = json.loads(run(app, ["cache", "plan", str(path), "--pages", "4", "--json"]).stdout.splitlines()[-1])
    assert planned["rows"] == 10 and planned["need_bytes"] == 0 and len(planned["sizes"]) == 24
    compressed = json.loads(run(app, ["cache", "info", str(tmp_path / "by-command"), "--json"]).stdout.splitlines()[-1])
    assert compressed["identity"]["dtype"] == "fp16" and set(compressed["accuracy"]) >= {"moments"}
    assert "10 pages in 3 shards" in run(app, ["cache", "info", str(tmp_path / "by-command")]).output
    cut = tmp_path / "by-command" / "shard-000001.arrow"
    cut.write_bytes(cut.read_bytes()[:-1])
    result = run(app, ["cache", "verify", str(path), "--json"])
    assert (
        result.exit_code == 1 and "shard-000001.arrow has" in json.loads(result.stdout.splitlines()[-1])["problems"][0]
    )


def test_int8_takes_half_of_fp16_and_fp16_little_more_than_its_numbers(student_of: StudentOf) -> None:
    """At the published 256 channels of 7 x 7 and 64 nodes, where a page is 1.6 MB."""
    from pipeline.cache.writer import record_batch

    rng = np.random.default_rng(0)
    nodes, classes, values = 64, 5, 64 * 256 * 49
    common = {
        "sample": 0,
        "view": 0,
        "affine": np.zeros(4),
        "boxes": rng.random(4 * nodes),
        "scores": rng.random(nodes),
        "classes": np.zeros(nodes),
        "logits": rng.random((classes + 1) * nodes),
        "deltas": rng.random(4 * classes * nodes),
    }
    sizes = {}
    for precision, more in (("fp16", {}), ("int8", {"pooled_scale": np.ones(256)})):
        row = {**common, "pooled": np.zeros(values, dtype=np.int8), **more}
        sizes[precision] = pa.ipc.get_record_batch_size(record_batch(row, cache_schema(precision)))  # type: ignore[arg-type]
    assert sizes["fp16"] <= 1.02 * 2 * values
    assert sizes["int8"] <= 0.52 * 2 * values
