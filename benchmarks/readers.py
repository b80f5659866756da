"""Reads packed pages with one of several libraries and prints the rate: run by ``benchmarks.streaming``.

    python -m benchmarks.readers NAME FOLDER --workers N --batch B

All decode and render pages with the same function, and return the same tensors. Timing starts after the workers have
started and ends with the last batch. Libraries other than ours and webdataset are installed into
environments of their own, from which this file is run.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.loading.augmentation import Augmentation, boxes_to_canvas, compute_transform, decode_image, render

CANVAS, EDGE = (832, 640), 576
VIEW = Augmentation(EDGE)
EPOCHS = 1
SKIPPED = 12  # batches before the clock starts: workers start and fill their queues

Page = tuple[np.ndarray, np.ndarray, np.ndarray]


def render_page(content: bytes, annotation: dict[str, Any]) -> Page:
    """Decode and render a page."""
    image = Image.open(io.BytesIO(content))
    placed = compute_transform(*image.size, VIEW, CANVAS)
    pixels = render(decode_image(image, VIEW, placed), placed, VIEW, CANVAS)
    boxes = boxes_to_canvas(np.array(annotation["boxes"], dtype=np.float32).reshape(-1, 4), placed)
    return pixels, boxes, np.array(annotation["category_ids"])


def stacked(pages: list[Page]) -> Any:
    """A batch of tensors."""
    import torch

    return (
        torch.from_numpy(np.stack([page[0] for page in pages])),
        torch.from_numpy(np.concatenate([page[1] for page in pages])),
        torch.from_numpy(np.concatenate([page[2] for page in pages])),
        torch.tensor([len(page[1]) for page in pages]),
    )


def ours(folder: Path, workers: int, batch: int) -> Iterator[Any]:
    """The training loader as one rank of one."""
    from pipeline.data.format.dataset import PackedDataset
    from pipeline.data.loading.augmentation import NEW_VIEW_EVERY_EPOCH, AugmentationConfig
    from pipeline.data.loading.batches import TrainBatches
    from pipeline.data.loading.loader import PageDataset, page_loader
    from pipeline.data.loading.order import CanonicalOrder

    dataset = PackedDataset(folder / "packed")
    order = CanonicalOrder(dataset.shard_sizes, 0, batch)
    items = PageDataset(dataset, AugmentationConfig(canvas=CANVAS, shortest_edge=(EDGE, EDGE)), 0, NEW_VIEW_EVERY_EPOCH)
    return iter(page_loader(items, TrainBatches(order, batch, 0, 1, 0, EPOCHS * len(dataset) // batch), workers))


def webdataset(folder: Path, workers: int, batch: int) -> Iterator[Any]:
    """webdataset's own pipeline: shuffled shards, a shuffle buffer, batches made in the workers."""
    import webdataset as wds

    shards = sorted(str(path) for path in (folder / "packed").glob("*.tar"))
    pipeline = (
        wds.WebDataset(shards * EPOCHS, shardshuffle=len(shards), workersplitter=wds.split_by_worker)
        .shuffle(256)
        .map(lambda sample: render_page(sample["jpg"], json.loads(sample["json"])))
        .batched(batch, collation_fn=stacked)
    )
    return iter(wds.WebLoader(pipeline, batch_size=None, num_workers=workers, prefetch_factor=4))


def mosaicml(folder: Path, workers: int, batch: int) -> Iterator[Any]:
    """mosaicml-streaming over its own format."""
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    class Pages(StreamingDataset):
        def __getitem__(self, index: int) -> Page:
            sample = super().__getitem__(index)
            return render_page(sample["jpg"], sample["json"])

    dataset = Pages(local=str(folder / "mds"), shuffle=True, batch_size=batch)
    loader = DataLoader(dataset, batch, num_workers=workers, collate_fn=stacked, prefetch_factor=4)
    return (item for _ in range(EPOCHS) for item in loader)


def litdata(folder: Path, workers: int, batch: int) -> Iterator[Any]:
    """litdata over its own format."""
    from litdata import StreamingDataLoader, StreamingDataset

    class Pages(StreamingDataset):
        def __getitem__(self, index: Any) -> Page:
            content, annotation = super().__getitem__(index)
            return render_page(bytes(content), json.loads(bytes(annotation)))

    dataset = Pages(str(folder / "litdata"), shuffle=True)
    loader = StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, collate_fn=stacked, prefetch_factor=4)
    return (item for _ in range(EPOCHS) for item in loader)


def limit(folder: Path, workers: int, batch: int) -> Iterator[Any]:
    """No library: each process reads and lays out a share of the pages in a bare loop; one item a page."""
    from multiprocessing import get_context

    from pipeline.data.format.dataset import PackedDataset

    count = len(PackedDataset(folder / "packed"))
    context = get_context("spawn")
    done = context.Queue()
    jobs = [
        context.Process(target=_bare_loop, args=(folder, range(worker, count, workers), batch, done))
        for worker in range(workers)
    ]
    for job in jobs:
        job.start()
    for _ in range(EPOCHS * count // batch):
        yield done.get()
    for job in jobs:
        job.join()


def _bare_loop(folder: Path, samples: range, batch: int, done: Any) -> None:
    from pipeline.data.format.dataset import PackedDataset

    dataset = PackedDataset(folder / "packed")
    records = [dataset.sample(sample) for sample in samples]
    files = {record.shard: os.open(folder / "packed" / record.shard, os.O_RDONLY) for record in records}
    for number, record in enumerate(records * EPOCHS, start=1):
        content = os.pread(files[record.shard], record.image_bytes, record.image_offset)
        image = Image.open(io.BytesIO(content))
        placed = compute_transform(*image.size, VIEW, CANVAS)
        render(decode_image(image, VIEW, placed), placed, VIEW, CANVAS)
        if number % batch == 0:
            done.put(batch)


PREFETCH_THREADS: dict[str, Callable[[Path, int, int], Iterator[Any]]] = {
    reader.__name__: reader for reader in (ours, webdataset, mosaicml, litdata, limit)
}


def write_mosaicml(folder: Path) -> None:
    """The packed pages in mosaicml-streaming's format."""
    from streaming import MDSWriter

    with MDSWriter(out=str(folder / "mds"), columns={"jpg": "bytes", "json": "json"}, size_limit=16 << 20) as writer:
        for content, annotation in _samples(folder):
            writer.write({"jpg": content, "json": json.loads(annotation)})


def write_litdata(folder: Path) -> None:
    """The packed pages in litdata's format."""
    from litdata import optimize

    optimize(
        fn=_same,
        inputs=list(_samples(folder)),
        output_dir=str(folder / "litdata"),
        chunk_bytes="16MB",
        num_workers=1,
    )


def _same(sample: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    return sample


def _samples(folder: Path) -> Iterator[tuple[bytes, bytes]]:
    import tarfile

    for path in sorted((folder / "packed").glob("*.tar")):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name, content in files.items():
            if name.endswith(".jpg"):
                yield content, files[name.replace(".jpg", ".json")]


def rate(batches: Iterator[Any], batch: int) -> float:
    """Pages a second after the first ``SKIPPED`` batches."""
    begin, timed = 0.0, 0
    for number, _ in enumerate(batches):
        if number == SKIPPED:
            begin = time.perf_counter()
        timed += number > SKIPPED
    return timed * batch / (time.perf_counter() - begin)


def main() -> None:
    """Read, or write another library's format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*PREFETCH_THREADS, "write-mosaicml", "write-litdata"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    given = parser.parse_args()
    if given.name.startswith("write-"):
        {"write-mosaicml": write_mosaicml, "write-litdata": write_litdata}[given.name](given.folder)
        return
    import torch

    torch.set_num_threads(1)
    measured = rate(PREFETCH_THREADS[given.name](given.folder, given.workers, given.batch), given.batch)
    print(json.dumps({"reader": given.name, "workers": given.workers, "pages_per_s": measured}))


if __name__ == "__main__":
    main()
