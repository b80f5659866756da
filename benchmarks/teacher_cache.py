"""Cost of building and reading a teacher cache, and when it pays off.

    python -m benchmarks.teacher_cache build --canvas 256 192 --pages 32
    python -m benchmarks.teacher_cache read --pages 512
    python -m benchmarks.teacher_cache growth --counts 100 1000 10000
    python -m benchmarks.teacher_cache project --canvas 256 192 --pages 8

build: the builder, which decodes, encodes, hashes, writes and syncs, over the bare teacher on batches in memory. read:
rows of the cache in random order, put together into batches, over a numpy memmap of the same feature bytes. growth:
seconds and bytes per page for increasing numbers of pages. project: seconds of a whole training with a live and a
cached teacher. Ratios within one run, median of 7 interleaved pairs with the smallest and the largest. Ends with one
JSON line.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import finish, interleaved, ratio
from benchmarks.step_cost import load_run_config, step_work
from graphkd.nodes import live_signals
from pipeline.cache.build import build_cache, local_builders
from pipeline.cache.builder import CacheBuilder
from pipeline.cache.cached_teacher import CachedTeacher
from pipeline.cache.format import NodeStore, cache_index_name, cache_shard_name
from pipeline.cache.quantize import Precision
from pipeline.config import RunConfig
from pipeline.context import RunContext
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.loading.augmentation import EVALUATION_VIEW
from pipeline.data.loading.loader import PageDataset, collate
from pipeline.data.loading.order import SampleRef
from pipeline.data.prepare.pack import pack
from pipeline.synth import write_pages
from pipeline.train.run import train_run
from pipeline.train.signal_source import open_cache

NODES, CHANNELS, SIDE, BATCH = 64, 256, 7, 8
ALL_NODES = {"count": NODES, "min_score": 0.0, "nms_iou": 1.0}  # an untrained teacher: keep all proposals
RESNET50 = {"backbone": "resnet50", "norm": "frozen", "anchor_sizes": [12, 24, 48, 96, 160]}
SMALL = {"backbone": "resnet18", "norm": "frozen", "anchor_sizes": [8, 16, 32, 64, 128]}
STUDENTS = (1, 2, 5)


def prepared(folder: Path, canvas: list[int], pages: int, teacher: dict[str, Any], shard: int = 256) -> None:
    """Pages and an untrained teacher, unless they exist."""
    if not (folder / "data").exists():
        write_pages(folder / "pages", count=pages, seed=0, width=canvas[1], height=canvas[0])
        images = folder / "pages" / "images"
        pack(folder / "pages" / "annotations.json", images, folder / "data", samples_per_shard=shard, workers=1)
        train_run(RunContext(load_run_config(folder, "teacher", canvas, 1, detector=teacher)))


def student(folder: Path, canvas: list[int], store: NodeStore, precision: Precision, **teacher: Any) -> RunConfig:
    name = f"{store}-{precision}"
    settings = {"run": str(folder / "teacher"), "nodes": ALL_NODES, "statistics_pages": 8, "cache": str(folder / name)}
    settings |= {"store": store, "cache_dtype": precision, **teacher}
    return load_run_config(folder, name, canvas, BATCH, method={"name": "graphkd"}, teacher=settings)


def building(folder: Path, canvas: list[int], pages: int, pairs: int, device: torch.device) -> dict[str, Any]:
    prepared(folder, canvas, pages, RESNET50)
    config = student(folder, canvas, "pooled", "fp16")
    builder = CacheBuilder(RunContext(config))
    name = cache_shard_name(builder.context.dataset.description.shards[0].name)
    batches = [collate(builder.pages.__getitems__(part)).to(device) for part in builder.refs(0)]

    def bare() -> None:
        for batch in batches:
            live_signals(builder.detector, batch, builder.settings.nodes)

    def build() -> None:
        for old in (name, cache_index_name(name)):
            (config.cache_folder / old).unlink(missing_ok=True)
        builder.build(0)

    alone, built = interleaved(pairs, bare, build)
    raw = pages * NODES * CHANNELS * SIDE**2
    sizes = {
        "fp16 file over raw bytes": (config.cache_folder / name).stat().st_size / (2 * raw),
        "int8 file over raw fp16 bytes": size_of(folder, canvas, "int8") / (2 * raw),
    }
    return {
        "building over the bare teacher": ratio(alone, built),
        "pages a second, bare": pages / statistics.median(alone),
        **sizes,
    }


def size_of(folder: Path, canvas: list[int], precision: Precision) -> int:
    config = student(folder, canvas, "pooled", precision)
    context = RunContext(config)
    CacheBuilder(context).build(0)
    return (config.cache_folder / cache_shard_name(context.dataset.description.shards[0].name)).stat().st_size


def opened(config: RunConfig) -> CachedTeacher:
    return open_cache(RunContext(config))


def reading(folder: Path, pages: int, pairs: int, device: torch.device) -> dict[str, Any]:
    canvas = [128, 96]
    prepared(folder, canvas, pages, SMALL)
    figures: dict[str, Any] = {}
    for precision in ("fp16", "int8"):
        config = student(folder, canvas, "pooled", precision)
        build_cache(RunContext(config), local_builders(RunContext(config)))
        cached = opened(config)
        items = PageDataset(cached.dataset, config.data.view, 0, EVALUATION_VIEW)
        order = np.random.default_rng(0).permutation(pages).tolist()
        groups = [order[first : first + BATCH] for first in range(0, pages, BATCH)]
        batches = [collate(items.__getitems__([SampleRef(0, sample) for sample in group])) for group in groups]
        path = folder / f"plain-{precision}.bin"
        plain = memmap_work(path, precision, groups)
        ours, prefetch, theirs = interleaved(pairs, cache_work(cached, batches), prefetch_work(cached, batches), plain)
        del cached, plain  # mapped files stay in memory
        figures[f"first epoch of {precision} from the disk, every row checked"] = first_epoch(
            config, batches, path, precision
        )
        figures[f"reading {precision} over numpy memmap, one thread"] = ratio(theirs, ours)
        figures[f"reading {precision} ahead, as training does, over numpy memmap"] = ratio(theirs, prefetch)
        row = NODES * CHANNELS * SIDE**2 * {"fp16": 2, "int8": 1}[precision]
        figures[f"GB a second, {precision}"] = pages * row / statistics.median(ours) / 1e9
    return figures


def cache_work(cached: CachedTeacher, batches: list[Any]) -> Callable[[], None]:
    def work() -> None:
        for batch in batches:
            read = cached.stored(batch)  # noqa: F841 (held until the next is there, as a step does)

    return work


def prefetch_work(cached: CachedTeacher, batches: list[Any]) -> Callable[[], None]:
    def work() -> None:
        for _ in cached.prefetch(batches):
            pass

    return work


def memmap_work(path: Path, precision: Precision, groups: list[list[int]]) -> Callable[[], None]:
    """The same bytes of features in a plain file, gathered page by page into batches."""
    kind = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}[precision]
    shape = (sum(map(len, groups)), NODES, CHANNELS, SIDE, SIDE)
    if not path.exists():
        np.broadcast_to(np.arange(shape[0]).reshape(-1, 1, 1, 1, 1) % 100, shape).astype(kind).tofile(path)
    values = np.memmap(path, dtype=kind, mode="r", shape=shape)

    def work() -> None:
        for group in groups:
            batch = np.empty((len(group), *shape[1:]), dtype=kind)
            for place, page in enumerate(group):
                batch[place] = values[page]

    return work


def first_epoch(config: RunConfig, batches: list[Any], plain: Path, precision: Precision) -> dict[str, float]:
    """Seconds of a plain file relative to a newly opened cache whose rows are all hashed, both from disk."""
    groups = [batch.samples.tolist() for batch in batches]
    seconds: list[list[float]] = [[], []]
    for _ in range(7):
        for own, files, work in (
            (seconds[0], list(config.cache_folder.glob("*.arrow")), lambda: prefetch_work(opened(config), batches)()),
            (seconds[1], [plain], lambda: memmap_work(plain, precision, groups)()),
        ):
            forget(files)
            begin = time.perf_counter()
            work()
            own.append(time.perf_counter() - begin)
    return ratio(seconds[1], seconds[0])


def forget(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def growth(counts: list[int], device: torch.device) -> dict[str, Any]:
    """Seconds and bytes per page, building and reading, for increasing numbers of pages; 16 channels."""
    figures: dict[str, Any] = {}
    small = {**SMALL, "fpn_channels": 16, "head_width": 32, "rpn_proposals": 64, "rpn_proposals_before_nms": 64}
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            folder, canvas = Path(name), [64, 64]
            prepared(folder, canvas, count, small)
            config = student(folder, canvas, "pooled", "fp16")
            RunContext(config).ensure_statistics()
            begin = time.perf_counter()
            build_cache(RunContext(config), local_builders(RunContext(config)))
            built = time.perf_counter() - begin
            figures[f"{count} pages"] = {
                "built, ms a page": 1000 * built / count,
                "kB a page": opened(config).description.bytes / count / 1000,
                **reading_growth(config, count),
            }
            print(count, figures[f"{count} pages"], flush=True)
    return figures


def reading_growth(config: RunConfig, count: int) -> dict[str, float]:
    cached = opened(config)
    items = PageDataset(cached.dataset, config.data.view, 0, EVALUATION_VIEW)
    samples = np.random.default_rng(0).permutation(count).tolist()
    batches = [collate([items[SampleRef(0, sample)]]) for sample in samples[:500]]
    cache_work(cached, batches)()  # indexes opened, rows checked
    begin = time.perf_counter()
    cache_work(cached, batches)()
    return {"read, us a page": 1e6 * (time.perf_counter() - begin) / len(batches), "anonymous MB": anonymous_mb()}


def anonymous_mb() -> float:
    """Memory of this process that is not a mapped file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000


def project(
    folder: Path, canvas: list[int], pages: int, pairs: int, epochs: int, device: torch.device
) -> dict[str, Any]:
    """Seconds per page of one epoch's training with each source, and of building; then whole projects."""
    prepared(folder, canvas, pages, RESNET50)
    cached = student(folder, canvas, "pooled", "fp16")
    build_cache(RunContext(cached), local_builders(RunContext(cached)))
    live = student(folder, canvas, "pooled", "fp16", signals="live")
    dataset = PackedDataset(folder / "data")
    items = PageDataset(dataset, cached.data.view, 0, EVALUATION_VIEW)
    batch = collate([items[SampleRef(0, sample)] for sample in range(min(pages, BATCH))]).to(device)
    builder = CacheBuilder(RunContext(cached))
    name = cache_shard_name(builder.context.dataset.description.shards[0].name)

    def build() -> None:
        for old in (name, cache_index_name(name)):
            (cached.cache_folder / old).unlink()
        builder.build(0)

    works = [step_work(config, dataset, batch, device) for config in (cached, live)]
    seconds = interleaved(pairs, *works, build)
    counts = (len(batch), len(batch), pages)
    per_page = [statistics.median(own) / count for own, count in zip(seconds, counts, strict=True)]
    step, beside, make = per_page
    figures: dict[str, Any] = {
        "ms a page": {"cached step": 1000 * step, "live step": 1000 * beside, "building": 1000 * make},
        "live step over cached step": ratio(seconds[1], seconds[0]),
        "epochs after which one student has paid for the cache": make / (beside - step),
    }
    for students in STUDENTS:
        whole = students * epochs * beside, make + students * epochs * step
        figures[f"{students} students, {epochs} epochs: live over cached, building included"] = whole[0] / whole[1]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("build", "read", "growth", "project"))
    parser.add_argument("--canvas", type=int, nargs=2, default=[256, 192])
    parser.add_argument("--pages", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 1000, 10000])
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as name:
        folder = Path(name)
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "build": lambda: building(folder, given.canvas, given.pages, given.pairs, device),
            "read": lambda: reading(folder, given.pages, given.pairs, device),
            "growth": lambda: growth(given.counts, device),
            "project": lambda: project(folder, given.canvas, given.pages, given.pairs, given.epochs, device),
        }
        figures = parts[given.part]()
    for label, value in figures.items():
        print(f"{label:<64} {value}")
    finish({"benchmark": f"teacher_cache {given.part}", "pages": given.pages, "canvas": given.canvas, **figures})


if __name__ == "__main__":
    main()
