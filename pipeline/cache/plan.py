"""Cost of a cache before it is built: bytes, hours, and the rate at which training will read it."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.cache.build import check_ownership
from pipeline.cache.builder import CacheBuilder
from pipeline.cache.compare import evenly_spread
from pipeline.cache.format import cache_shard_name, is_built
from pipeline.cache.sizes import Size, cache_sizes, row_bytes
from pipeline.context import RunContext
from pipeline.core.errors import OutputError

TEST_BYTES = 64 << 20
MARGIN = 1.02  # free space that a plan needs, relative to the cache: indexes, other writers

STORAGE_GB_S = {
    "1 GbE NFS": 0.11,
    "hard disk": 0.18,
    "SATA SSD": 0.5,
    "10 GbE NFS": 1.1,
    "object storage, one node": 1.5,
    "NVMe SSD": 3.0,
    "parallel file system": 10.0,
}
"""Typical read rates in pieces of a megabyte, GB/s: orders of magnitude from data sheets."""


@dataclass(frozen=True, slots=True)
class StorageThroughput:
    """Whether a kind of storage is fast enough for the GPUs."""

    storage: str
    gb_s: float
    pages_s: float
    """Pages per second at that rate."""
    enough: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Cost of one cache."""

    folder: str
    rows: int
    """Pages times views."""
    mean_nodes: float
    """Nodes per page, on the pages that were measured."""
    page_bytes: int
    """At that mean."""
    need_bytes: int
    """Still to be written."""
    most_bytes: int
    """The same if every page has the maximum number of nodes."""
    free_bytes: int
    pages_s: float
    """Of one builder on this host, with reading and decoding."""
    write_mb_s: float
    """Of the disk, synced."""
    hours: float
    bound: str
    """teacher or disk: what limits the build."""
    builders: int
    sizes: list[Size]
    read_mb_s: float
    """Read rate of the training that ``gpus`` and ``rate`` describe."""
    feeds: list[StorageThroughput]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def check_space(self) -> None:
        """Raise OutputError if the cache does not fit, naming a form that does."""
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


def plan_cache(context: RunContext, builders: int = 1, gpus: int = 1, rate: float = 100.0, pages: int = 16) -> Plan:
    """Measure teacher and disk for some seconds and extrapolate.

    Args:
        context: of the student.
        builders: number of parallel builders (assumed as fast as this host).
        gpus: GPUs that will train from the cache.
        rate: pages per second of each of them.
        pages: pages to measure the teacher on.
    """
    builder, dataset, settings = CacheBuilder(context), context.dataset, context.teacher.settings
    folder, spec = context.config.cache_folder, builder.detector.spec
    check_ownership(folder, context.cache_identity)
    nodes, pages_s = _measure_teacher(builder, len(dataset), pages)
    built = [shard.samples for shard in dataset.description.shards if is_built(folder, cache_shard_name(shard.name))]
    rows = len(dataset) * settings.views
    missing = rows - sum(built) * settings.views
    form = settings.store, settings.cache_dtype
    page, most = row_bytes(spec, *form, nodes), row_bytes(spec, *form, settings.nodes.count)
    parent = existing_parent(folder)
    free, write = shutil.disk_usage(parent).free, measure_write(parent)
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
        sizes=cache_sizes(spec, rows, settings.nodes.count),
        read_mb_s=gpus * rate * page / 1e6,
        feeds=[_throughput(name, gb_s, page, gpus * rate) for name, gb_s in STORAGE_GB_S.items()],
    )


def _throughput(storage: str, gb_s: float, page_bytes: int, pages_s: float) -> StorageThroughput:
    return StorageThroughput(storage, gb_s, gb_s * 1e9 / page_bytes, gb_s * 1e9 >= pages_s * page_bytes)


def _measure_teacher(builder: CacheBuilder, samples: int, pages: int) -> tuple[float, float]:
    """Mean nodes per page, and pages per second after a first batch that warms up."""
    size = builder.eval_batch
    refs = evenly_spread(samples, builder.settings.views, pages)
    batches = [refs[first : first + size] for first in range(0, len(refs), size)]
    counts = [len(row["scores"]) for rows in builder.teacher_rows(batches[:1]) for row in rows]
    begin, done = time.perf_counter(), 0
    for rows in builder.teacher_rows(batches[1:] or batches):
        counts += [len(row["scores"]) for row in rows]
        done += len(rows)
    return sum(counts) / len(counts), done / (time.perf_counter() - begin)


def existing_parent(folder: Path) -> Path:
    """The folder itself, or its nearest parent that exists."""
    folder = folder.resolve()
    return folder if folder.is_dir() else existing_parent(folder.parent)


def measure_write(folder: Path) -> float:
    """Bytes per second of a synced test write in ``folder``, which is removed again.

    Raises:
        OutputError: if the folder cannot be written.
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
