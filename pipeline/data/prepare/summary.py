"""Summary of a dataset in numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.data.format.dataset import PackedDataset


def summarize(location: str | Path) -> dict[str, Any]:
    """Count pages, regions, shards, bytes and regions per class; reads only the indexes."""
    dataset = PackedDataset(location)
    regions: Counter[int] = Counter()
    for index in range(len(dataset)):
        regions.update(dataset.sample(index).classes.tolist())
    categories = dataset.description.categories
    return {
        "pages": len(dataset),
        "regions": regions.total(),
        "shards": len(dataset.shard_sizes),
        "excluded": sum(len(shard.excluded) for shard in dataset.description.shards),
        "bytes": sum(shard.bytes for shard in dataset.description.shards),
        "identity": dataset.identity,
        "classes": {
            category.name: {"id": category.id, "text": category.text, "regions": regions[index]}
            for index, category in enumerate(categories)
        },
    }
