"""Reading a teacher cache: memory-mapped, a page's row found by its number, so that any topology works."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from graphkd.errors import CacheError
from graphkd.pages import PageBatch
from graphkd.signals import TeacherSignals
from pipeline.data.dataset import PackedDataset
from pipeline.teacher.cache_format import CacheJson, cache_schema, cache_shard_name, read_cache_json
from pipeline.teacher.identity import require_same
from pipeline.teacher.precision import decode


class CachedTeacher:
    """A finished cache as a source of signals.

    Args:
        folder: cache folder.
        dataset: the dataset it was made for.
        identity: what it must have been made from, by name.
        nodes: N, to which every page is padded.

    Raises CacheError where the cache is unfinished, damaged, or made for something else, naming what differs.
    """

    def __init__(self, folder: Path, dataset: PackedDataset, identity: dict[str, str], nodes: int) -> None:
        self.folder = folder
        self.dataset = dataset
        self.nodes = nodes
        self.description = read_cache_json(folder)
        require_same(self.description.identity, identity, folder, "build a cache for this config in another folder")
        self._readers: dict[int, pa.ipc.RecordBatchFileReader] = {}

    def signals(self, batch: PageBatch) -> TeacherSignals:
        """Signals of the batch's pages in fp32 on the device of its images."""
        rows = [
            self._row(int(sample), int(view)) for sample, view in zip(batch.samples, batch.view_numbers, strict=True)
        ]
        counts = torch.tensor([len(row["scores"]) for row in rows])
        cached = self.description
        shape = (cached.channels, cached.pooled_side, cached.pooled_side)
        for row in rows:
            row["pooled"] = decode(row["pooled"].reshape(-1, *shape), row["pooled_scale"])
        regions = (cached.num_classes + 1,) if cached.classifies else None
        signals = TeacherSignals(
            boxes=self._padded(rows, "boxes", (4,)),
            valid=torch.arange(self.nodes) < counts[:, None],
            scores=self._padded(rows, "scores", ()),
            classes=self._padded(rows, "classes", ()).long(),
            logits=None if regions is None else self._padded(rows, "logits", regions),
            deltas=None if regions is None else self._padded(rows, "deltas", (cached.num_classes, 4)),
            pooled=self._padded(rows, "pooled", shape),
        )
        return signals.to(batch.images.device)

    def _padded(self, rows: list[dict[str, np.ndarray]], name: str, shape: tuple[int, ...]) -> Tensor:
        padded = np.zeros((len(rows), self.nodes, *shape), dtype=np.float32)
        for page, row in enumerate(rows):
            values = row[name].reshape(-1, *shape)
            padded[page, : len(values)] = values
        return torch.from_numpy(padded)

    def _row(self, sample: int, view: int) -> dict[str, np.ndarray]:
        shard, row = self.dataset.locate(sample)
        batch = self._reader(shard).get_batch(row * self.description.views + view)
        if batch.column("sample")[0].as_py() != sample or batch.column("view")[0].as_py() != view:
            raise CacheError(f"{self.folder}: row {row} of shard {shard} is not sample {sample}; build the cache again")
        lists = [name for name in batch.schema.names if name not in ("sample", "view")]
        return {name: batch.column(name).values.to_numpy(zero_copy_only=True) for name in lists}

    def _reader(self, shard: int) -> pa.ipc.RecordBatchFileReader:
        if shard not in self._readers:
            name = cache_shard_name(self.dataset.description.shards[shard].name)
            path = self.folder / name
            expected = next((entry for entry in self.description.shards if entry.name == name), None)
            self._readers[shard] = _open(path, None if expected is None else expected.bytes, self.description)
        return self._readers[shard]


def _open(path: Path, size: int | None, description: CacheJson) -> pa.ipc.RecordBatchFileReader:
    if size is None or not path.exists():
        raise CacheError(f"{path} is missing from the cache; build the cache again")
    if path.stat().st_size != size:
        raise CacheError(f"{path} has {path.stat().st_size} bytes, but cache.json says {size}; build the cache again")
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
    except pa.ArrowInvalid as error:
        raise CacheError(f"{path} is damaged ({error}); build the cache again") from error
    if reader.schema != cache_schema(description.precision):
        raise CacheError(f"{path} was made by another release; build the cache again")
    return reader
