"""Counting the regions that training or evaluation does not see as they were drawn, from the indexes alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.data.format.dataset import PackedDataset
from pipeline.data.format.index import ShardIndex
from pipeline.data.loading.augmentation import AugmentationConfig


@dataclass(slots=True)
class RegionCounts:
    """Pages and regions of a dataset, or of some of its shards."""

    pages: int = 0
    regions: Counter[str] = field(default_factory=Counter)
    """By class, as the next two."""
    crowd: Counter[str] = field(default_factory=Counter)
    """Regions with ``iscrowd``, which are no targets."""
    thin: Counter[str] = field(default_factory=Counter)
    """Regions below 1 px on the canvas, which are widened to 1 px."""
    per_page: list[int] = field(default_factory=list)
    """Regions of each page that are no crowd."""

    def pages_above(self, limit: int) -> int:
        """Pages with more regions than ``limit``."""
        return sum(count > limit for count in self.per_page)

    @property
    def targets(self) -> int:
        """Regions that training learns."""
        return self.regions.total() - self.crowd.total()


def count_regions(dataset: PackedDataset, view: AugmentationConfig, max_shards: int | None = None) -> RegionCounts:
    """Count the regions of a dataset, or of ``max_shards`` of its shards, evenly spread."""
    shards = range(len(dataset.shard_sizes))
    step = 1 if max_shards is None else -(-len(shards) // max_shards)
    counts = RegionCounts()
    for shard in shards[::step]:
        _add(counts, dataset.shard_index(shard), dataset, view)
    return counts


def _add(counts: RegionCounts, index: ShardIndex, dataset: PackedDataset, view: AugmentationConfig) -> None:
    columns = index.arrays()
    on_page = np.diff(columns.starts)
    crowd = columns.crowd
    page = np.repeat(np.arange(len(index)), on_page)
    thin = ~crowd & (columns.boxes[:, 2:].min(axis=1, initial=np.inf) * _scales(columns.sizes, view)[page] < 1)
    counts.pages += len(index)
    counts.per_page += np.bincount(page[~crowd], minlength=len(index)).tolist()
    for total, chosen in ((counts.regions, slice(None)), (counts.crowd, crowd), (counts.thin, thin)):
        ids, numbers = np.unique(columns.category_ids[chosen], return_counts=True)
        total.update(dict(zip(dataset.names_of(ids), numbers.tolist(), strict=True)))


def _scales(sizes: NDArray[np.int64], view: AugmentationConfig) -> NDArray[np.float64]:
    """Canvas px per image px of pages of (width, height) in the evaluation view."""
    width, height = sizes.T.astype(np.float64)
    edge = view.shortest_edge[1] / np.minimum(width, height)
    scales: NDArray[np.float64] = np.minimum(edge, np.minimum(view.canvas[0] / height, view.canvas[1] / width))
    return scales


def describe_losses(
    counts: RegionCounts, *, nodes: int | None = None, detections: int | None = None, limit: int | None = None
) -> list[str]:
    """Notes for start-up, ``data info`` and the report; empty if every region is used as annotated.

    Args:
        counts: of the dataset.
        nodes: nodes per page of the graph.
        detections: detections that the detector keeps per page.
        limit: detections per page and class that AP counts.
    """
    found = []
    if counts.crowd:
        of_all = f"{counts.crowd.total()} of {counts.regions.total()} regions"
        found.append(f"{of_all} are crowd, no targets ({_by_class(counts.crowd)})")
    if counts.thin:
        thin = counts.thin.total()
        found.append(f"{thin} regions below 1 px on the canvas are widened to 1 px ({_by_class(counts.thin)})")
    for bound, what in (
        (nodes, "nodes (teacher.nodes.count), so that some are no nodes"),
        (detections, "detections (detector.detections_per_page), so that some are never found"),
        (limit, "detections that AP counts per class (run.detection_limit)"),
    ):
        if bound is not None and (pages := counts.pages_above(bound)):
            found.append(f"{pages} of {counts.pages} pages have more regions than {bound} {what}")
    return found


def _by_class(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())
