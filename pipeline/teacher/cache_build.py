"""Precomputing a teacher's signals into Arrow, shard by shard; finished shards are not made again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from graphkd.detectors import DetectorModule
from graphkd.errors import CacheError, ConfigError, OutputError
from graphkd.nodes import live_signals
from graphkd.signals import TeacherSignals
from pipeline.config import RunConfig
from pipeline.data.dataset import PackedDataset
from pipeline.data.loader import PageItems, page_loader
from pipeline.data.order import SampleRef
from pipeline.files import replaced, sha256_file, write_json
from pipeline.teacher.cache_format import (
    CACHE_FILE,
    CachedShard,
    CacheJson,
    cache_schema,
    cache_shard_name,
    read_cache_json,
)
from pipeline.teacher.identity import TeacherRun, cache_identity, open_teacher, require_same
from pipeline.teacher.precision import Precision, encode
from pipeline.teacher.statistics import STATISTICS_FILE, ensure_statistics

IDENTITY_FILE = "identity.json"
REMEDY = "delete that folder, or give another teacher.cache"


def build_cache(
    student: RunConfig, device: torch.device, progress: Callable[[str, int, int], None] | None = None
) -> CacheJson:
    """Build statistics and cache for ``student``, going on with what is there.

    ``progress`` is called with (what is being done, pages done, pages in all).

    Raises:
        CacheError: where the folder belongs to another teacher, dataset or setting, naming it.
        OutputError: where the disk is full.
    """
    dataset = PackedDataset(student.data.train, student.data.storage)
    teacher = open_teacher(student)
    identity = cache_identity(student, teacher, dataset)
    folder = student.cache_folder
    _claim(folder, identity)
    ensure_statistics(student, teacher, dataset, device, _named(progress, "statistics"))
    if (folder / CACHE_FILE).exists():
        return read_cache_json(folder)
    detector = teacher.detector(dataset.num_classes, device)
    shards = list(_build_shards(student, teacher, detector, dataset, device, _named(progress, "features")))
    description = CacheJson(
        identity=identity,
        precision=teacher.settings.cache_dtype,
        views=teacher.settings.views,
        classifies=detector.spec.classifies_regions,
        channels=detector.spec.channels,
        pooled_side=detector.spec.pooled_side,
        num_classes=detector.spec.num_classes,
        shards=shards,
    )
    write_json(folder / CACHE_FILE, description.model_dump())
    return description


def require_teacher(student: RunConfig) -> None:
    """Raise ConfigError where ``student`` names no teacher to precompute."""
    if student.teacher is None:
        raise ConfigError(f"{student.name} has no teacher; a cache is built for the config of a distilled student")


def _claim(folder: Path, identity: dict[str, str]) -> None:
    path = folder / IDENTITY_FILE
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise CacheError(f"{path} is damaged ({error}); {REMEDY}") from error
        require_same(found, identity, folder, REMEDY)
        return
    others = [name.name for name in folder.iterdir() if name.name != STATISTICS_FILE] if folder.is_dir() else []
    if others:
        raise OutputError(f"{folder} already holds something that is no cache (such as {others[0]!r}); {REMEDY}")
    write_json(path, identity)


def _build_shards(
    student: RunConfig,
    teacher: TeacherRun,
    detector: DetectorModule,
    dataset: PackedDataset,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> Iterator[CachedShard]:
    views, total = teacher.settings.views, len(dataset) * teacher.settings.views
    start = 0
    for shard in dataset.description.shards:
        path = student.cache_folder / cache_shard_name(shard.name)
        samples = range(start, start + shard.samples)
        if not path.exists():
            rows = _rows(student, teacher, detector, dataset, samples, device)
            _write_shard(path, _counted(rows, progress, start * views, total), teacher)
        start += shard.samples
        progress(start * views, total)
        yield CachedShard(
            name=path.name, rows=len(samples) * views, bytes=path.stat().st_size, sha256=sha256_file(path)
        )


def _rows(
    student: RunConfig,
    teacher: TeacherRun,
    detector: DetectorModule,
    dataset: PackedDataset,
    samples: range,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """Rows in the order of samples, then views."""
    views = teacher.settings.views
    items = PageItems(dataset, student.data.view, student.run.seed, views if views > 1 else -1)
    refs = [SampleRef(view, sample) for sample in samples for view in range(views)]
    batches = [refs[first : first + student.run.eval_batch] for first in range(0, len(refs), student.run.eval_batch)]
    for own, batch in zip(batches, page_loader(items, batches, workers=0), strict=True):
        signals = live_signals(detector, batch.to(device), teacher.settings.nodes)
        for place, ref in enumerate(own):
            yield _row(signals, place, ref, teacher.settings.cache_dtype)


def _row(signals: TeacherSignals, place: int, ref: SampleRef, precision: Precision) -> dict[str, Any]:
    valid = signals.valid[place]
    arrays = {
        name: _of_page(value, place, valid)
        for name in ("boxes", "scores", "classes", "logits", "deltas")
        if (value := getattr(signals, name)) is not None
    }
    pooled, scales = encode(_of_page(signals.pooled, place, valid), precision)
    return {"sample": ref.sample, "view": ref.epoch, **arrays, "pooled": pooled, "pooled_scale": scales}


def _of_page(values: Tensor, place: int, valid: Tensor) -> np.ndarray:
    return values[place][valid].cpu().numpy()


def _counted(
    rows: Iterator[dict[str, Any]], progress: Callable[[int, int], None], before: int, total: int
) -> Iterator[dict[str, Any]]:
    for done, row in enumerate(rows, start=1):
        yield row
        progress(before + done, total)


def _write_shard(path: Path, rows: Iterator[dict[str, Any]], teacher: TeacherRun) -> None:
    schema = cache_schema(teacher.settings.cache_dtype)
    with (
        replaced(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        for row in rows:
            writer.write_batch(_record_batch(row, schema))


def _record_batch(row: dict[str, Any], schema: pa.Schema) -> pa.RecordBatch:
    columns = []
    for field in schema:
        value = row.get(field.name, np.zeros(0, dtype=np.float32))
        if not pa.types.is_list(field.type):
            columns.append(pa.array([value], type=field.type))
            continue
        item = field.type.value_type
        values = pa.array(value.ravel().astype(item.to_pandas_dtype()), type=item)
        columns.append(pa.ListArray.from_arrays(pa.array([0, len(values)], type=pa.int32()), values))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _named(progress: Callable[[str, int, int], None] | None, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total) if progress is not None else None
