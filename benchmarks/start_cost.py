"""Time to the first batch of a dataset with very many shards, cold and resumed, and of computing the order of samples
for very many samples and ranks.

    python -m benchmarks.start_cost --out runs/start

A hundred thousand shards are hard links to one small tar. Every measurement is a process of its own, timed from opening
the dataset (imports done) to the first batch. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

from benchmarks.common import finish, ratio, run_command

BATCH = 8
LINKS = 50_000  # hard links that one file may have


def make_shards(out: Path, count: int) -> Path:
    """A dataset of ``count`` shards, all of them the same four pages."""
    from pipeline.data.format.schema import DatasetJson, index_path, read_dataset_json, write_dataset_json
    from pipeline.data.prepare.pack import pack
    from pipeline.synth import write_pages

    many = out / "many"
    if (many / "dataset.json").exists():
        return many
    pack(write_pages(out / "pages", count=4, seed=0), out / "pages" / "images", out / "one", samples_per_shard=4)
    one = read_dataset_json(out / "one")
    many.mkdir(exist_ok=True)
    source = out / "one" / one.shards[0].name
    shards = []
    for number in range(count):
        shard = one.shards[0].model_copy(update={"name": f"shard-{number:06d}.tar"})
        for path in (source, index_path(source)):
            target = many / path.name.replace("shard-000000", f"shard-{number:06d}")
            if number % LINKS:
                os.link(many / path.name.replace("shard-000000", f"shard-{number // LINKS * LINKS:06d}"), target)
            else:
                shutil.copy(path, target)
        shards.append(shard)
    description = DatasetJson(version=one.version, categories=one.categories, shards=shards)
    write_dataset_json(many, description)
    return many


def first_batch(folder: Path, step: int, workers: int) -> dict[str, float]:
    """Seconds from opening the dataset to the batch of ``step``, and of what comes before."""
    from pipeline.data.format.dataset import PackedDataset
    from pipeline.data.loading.augmentation import NEW_VIEW_EVERY_EPOCH, AugmentationConfig
    from pipeline.data.loading.batches import TrainBatches
    from pipeline.data.loading.loader import PageDataset, page_loader, start_fork_server
    from pipeline.data.loading.order import CanonicalOrder

    begin = time.perf_counter()
    if workers:
        start_fork_server()
    dataset = PackedDataset(folder)
    opened = time.perf_counter()
    order = CanonicalOrder(dataset.shard_sizes, 0, BATCH)
    view = AugmentationConfig(canvas=(256, 192), shortest_edge=(192, 192))
    items = PageDataset(dataset, view, 0, NEW_VIEW_EVERY_EPOCH)
    batches = TrainBatches(order, BATCH, 0, 1, step, step + 10)
    next(iter(page_loader(items, batches, workers)))
    done = time.perf_counter()
    assert dataset.identity
    return {"first_batch": done - begin, "open": opened - begin, "identity": time.perf_counter() - done}


def order_cost(samples: int, ranks: int) -> float:
    """Seconds to compute an epoch's order of ``samples`` in shards of 256, and each rank's part of one batch."""
    from pipeline.data.loading.order import CanonicalOrder, batch_positions

    begin = time.perf_counter()
    order = CanonicalOrder((256,) * (samples // 256), 0, 8 * ranks)
    for rank in range(ranks):
        order.refs(batch_positions(1000, 8 * ranks, rank, ranks))
    return time.perf_counter() - begin


def in_own_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.start_cost", "--child", *arguments]
    return dict(json.loads(run_command(command).strip().splitlines()[-1]))


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "STEP", "WORKERS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(first_batch(Path(given.child[0]), int(given.child[1]), int(given.child[2]))))
        return
    folder = str(make_shards(given.out, given.shards))
    middle = str(given.shards * 4 // BATCH // 2)
    starts: dict[str, list[dict[str, float]]] = {"cold": [], "resumed": [], "cold, 2 workers": []}
    for _ in range(given.rounds):
        for name, step, workers in (("cold", "0", "0"), ("resumed", middle, "0"), ("cold, 2 workers", "0", "2")):
            starts[name].append(in_own_process(folder, step, workers))
    orders = [order_cost(10**8, 1024) for _ in range(given.rounds)]
    first = {name: [start["first_batch"] for start in own] for name, own in starts.items()}
    print(f"| {given.shards} shards | first batch, s: median (smallest to largest) | opening it | its identity |")
    print("|---|---|---|---|")
    for name, own in starts.items():
        times = first[name]
        rest = " | ".join(f"{statistics.median(start[part] for start in own):.2f}" for part in ("open", "identity"))
        print(f"| {name} | {statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f}) | {rest} |")
    resumed = ratio(first["resumed"], first["cold"])
    print(f"resumed over cold: {resumed['median']:.2f} ({resumed['low']:.2f} to {resumed['high']:.2f})")
    spread = f"{statistics.median(orders):.2f} s ({min(orders):.2f} to {max(orders):.2f})"
    print(f"order of 1e8 samples for 1,024 ranks: {spread}")
    finish({"shards": given.shards, "first_batch_s": first, "resumed_over_cold": resumed, "order_s": orders})


if __name__ == "__main__":
    main()
