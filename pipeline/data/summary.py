"""Summary of a dataset in numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graphkd.detectors.config import DetectorConfig
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.loading.augmentation import AugmentationConfig
from pipeline.data.loading.region_counts import count_regions, describe_losses

DEFAULT_NODES = 64  # of graphkd.nodes.NodePolicy, which needs torch


def summarize(location: str | Path, view: AugmentationConfig | None = None) -> dict[str, Any]:
    """Count pages, regions, shards, bytes and regions per class; reads only the indexes.

    ``notes`` say which regions training or evaluation does not see as they were drawn, on the canvas of ``view`` and
    with the default numbers of nodes and detections.
    """
    dataset = PackedDataset(location)
    counts = count_regions(dataset, view or AugmentationConfig())
    limit = DetectorConfig().detections_per_page
    notes = describe_losses(counts, nodes=DEFAULT_NODES, detections=limit)
    notes += [f"packing {what} {count} regions" for what, count in dataset.description.repairs.items()]
    return {
        "pages": len(dataset),
        "regions": counts.regions.total(),
        "shards": len(dataset.shard_sizes),
        "excluded": sum(len(shard.excluded) for shard in dataset.description.shards),
        "bytes": sum(shard.bytes for shard in dataset.description.shards),
        "identity": dataset.identity,
        "classes": {
            name: {
                "id": category.id,
                "text": category.text,
                "regions": counts.regions[name],
                "crowd": counts.crowd[name],
                "thin": counts.thin[name],
            }
            for category, name in zip(dataset.categories, dataset.class_names, strict=True)
        },
        "most_regions": max(counts.per_page),
        "notes": notes,
    }
