"""What a cache will cost before it is built: bytes, hours, and the rate at which training will read it."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.cache.build import check_ownership
from pipeline.cache.builder import CacheBuilder
from pipeline.cache.compare import evenly_spread
from pipeline.cache.format import cache_index_name, cache_shard_name
from pipeline.cache.sizes import Size, row_bytes, sizes
from pipeline.config import RunConfig
from pipeline.core.errors import OutputError

TEST_BYTES = 64 << 20
MARGIN = 1.02  # of free space that a plan leaves alone: indexes, other writers

STORAGE_GB_S = {
    "1 GbE NFS": 0.11,
    "hard disk": 0.18,
    "SATA SSD": 0.5,
    "10 GbE NFS": 1.1,
    "object storage, one node": 1.5,
    "NVMe SSD": 3.0,
    "parallel file system": 10.0,
}
"""What common storage gives when read in pieces of a megabyte, GB/s: orders of magnitude from data sheets."""


@dataclass(frozen=True, slots=True)
class StorageThroughput:
    """Whether a kind of storage feeds the GPUs."""

    storage: str
    gb_s: float
    pages_s: float
    """Pages a second that it gives."""
    enough: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The cost of one cache."""

    folder: str
    rows: int
    """Pages, each in every view."""
    mean_nodes: float
    """Of the pages that were looked at."""
    page_bytes: int
    """At that mean."""
    need_bytes: int
    """Still to be written."""
    most_bytes: int
    """The same where every page has all its nodes."""
    free_bytes: int
    pages_s: float
    """What one builder makes here, reading and decoding included."""
    write_mb_s: float
    """What the disk took, synced."""
    hours: float
    bound: str
    """teacher or disk: what the hours hang on."""
    builders: int
    sizes: list[Size]
    read_mb_s: float
    """What the training named by ``gpus`` and ``rate`` reads."""
    feeds: list[StorageThroughput]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def require_room(self) -> None:
        """Raise OutputError where the cache will not fit, naming what would."""
        if self.need_bytes * MARGIN <= self.free_bytes:
            return
        fitting = [size for size in self.sizes if size.total_bytes * MARGIN <= self.free_bytes]
        best = max(fitting, key=lambda size: size.total_bytes, default=None)
        remedy = "give teacher.cache on another disk"
        if best is not None:
            remedy += (
                f", or teacher.store={best.store} teacher.cache_dtype={best.precision} "
                f"teacher.nodes.count={best.nodes} ({best.total_bytes / 1e9:.1f} GB)"
            )
        need, free = (f"{count / 1e9:.1f} GB" for count in (self.need_bytes, self.free_bytes))
        raise OutputError(f"the cache needs {need}, but {self.folder} has {free} free; {remedy}")


def plan_cache(
    student: RunConfig, device: torch.device, builders: int = 1, gpus: int = 1, rate: float = 100.0, pages: int = 16
) -> Plan:
    """Measure teacher and disk for some seconds and reckon the rest.

    Args:
        student: whose config names teacher, dataset and cache.
        device: where the teacher is measured.
        builders: how many will work side by side, each as fast as this one.
        gpus: how many will train from the cache.
        rate: pages a second that each of them takes.
        pages: how many the teacher looks at.
    """
    builder = CacheBuilder(student, device)
    folder, settings = student.cache_folder, builder.teacher.settings
    check_ownership(folder, builder.identity)
    nodes, pages_s = _measure_teacher(builder, pages)
    rows = len(builder.dataset) * settings.views
    missing = rows - _rows_there(builder)
    form = settings.store, settings.cache_dtype
    page, most = row_bytes(builder, *form, nodes), row_bytes(builder, *form, settings.nodes.count)
    where = existing_parent(folder)
    free, write = shutil.disk_usage(where).free, measure_write(where)
    teacher_s, disk_s = missing / (pages_s * builders), missing * page / write
    return Plan(
        folder=str(folder),
        rows=rows,
        mean_nodes=nodes,
        page_bytes=page,
        need_bytes=missing * page,
        most_bytes=missing * most,
        free_bytes=free,
        pages_s=pages_s,
        write_mb_s=write / 1e6,
        hours=max(teacher_s, disk_s) / 3600,
        bound="teacher" if teacher_s >= disk_s else "disk",
        builders=builders,
        sizes=sizes(builder, rows),
        read_mb_s=gpus * rate * page / 1e6,
        feeds=[
            StorageThroughput(name, gb, gb * 1e9 / page, gb * 1e9 >= gpus * rate * page)
            for name, gb in STORAGE_GB_S.items()
        ],
    )


def _measure_teacher(builder: CacheBuilder, pages: int) -> tuple[float, float]:
    """Mean nodes a page, and pages a second after a first batch that warms up."""
    size = builder.student.run.eval_batch
    refs = evenly_spread(len(builder.dataset), builder.teacher.settings.views, pages)
    batches = [refs[first : first + size] for first in range(0, len(refs), size)]
    counts = [len(row["scores"]) for rows in builder.said(batches[:1]) for row in rows]
    begin, done = time.perf_counter(), 0
    for rows in builder.said(batches[1:] or batches):
        counts += [len(row["scores"]) for row in rows]
        done += len(rows)
    return sum(counts) / len(counts), done / (time.perf_counter() - begin)


def _rows_there(builder: CacheBuilder) -> int:
    folder, views = builder.student.cache_folder, builder.teacher.settings.views
    there = [
        shard.samples
        for shard in builder.dataset.description.shards
        if (folder / cache_index_name(cache_shard_name(shard.name))).exists()
    ]
    return sum(there) * views


def existing_parent(folder: Path) -> Path:
    """The folder itself or the nearest one above it that exists."""
    folder = folder.resolve()
    return folder if folder.is_dir() else existing_parent(folder.parent)


def measure_write(folder: Path) -> float:
    """Bytes a second of a synced test write in ``folder``, which is removed again; raises OutputError where none can
    be made.
    """
    path = folder / f".speed.{os.getpid()}.tmp"
    content = os.urandom(1 << 20)
    try:
        begin = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for _ in range(TEST_BYTES // len(content)):
                file.write(content)
            os.fsync(file.fileno())
        return TEST_BYTES / (time.perf_counter() - begin)
    except OSError as error:
        raise OutputError(f"cannot write to {folder} ({error.strerror}); give another teacher.cache") from error
    finally:
        path.unlink(missing_ok=True)
