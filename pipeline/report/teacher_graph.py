"""The graph of one evaluated page, from the teacher of a distilled run."""

from __future__ import annotations

import torch

from graphkd.method import adjacency, build_graph
from graphkd.nodes import live_signals
from pipeline.config import RunConfig
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.loading.loader import PageDataset, collate
from pipeline.data.loading.order import SampleRef
from pipeline.report.graph import GraphPicture, crop_page, graph_picture
from pipeline.teacher.identity import open_teacher
from pipeline.teacher.statistics import read_statistics

LOOKED_AT = 64  # pages among which the one that shows most is chosen


def teacher_graph(config: RunConfig, dataset: PackedDataset) -> GraphPicture:
    """Run the teacher of ``config`` on the page of ``dataset`` that shows most, and give its graph for drawing.

    Raises the UserError of a teacher or statistics that are missing or do not fit.
    """
    teacher = open_teacher(config)
    statistics = read_statistics(config.cache_location, storage=config.data.storage)
    detector = teacher.detector(dataset.num_classes, torch.device("cpu"))
    items = PageDataset(dataset, config.data.view, config.run.seed, views=-1)
    batch = collate([items[SampleRef(0, _telling_page(dataset))]])
    signals = live_signals(detector, batch, teacher.settings.nodes)
    graph = build_graph(signals, statistics, config.method.graph)
    before = adjacency(signals.boxes, graph.regions, gap=config.method.graph.gap, nearest=config.method.graph.nearest)
    page = crop_page(batch.images[0], batch.image_sizes()[0])
    return graph_picture(page, signals, graph, before, page=0)


def _telling_page(dataset: PackedDataset) -> int:
    """The page with most regions among those with two or more that are not text; else simply with most regions."""
    text = torch.tensor(dataset.text_classes)

    def worth(sample: int) -> tuple[int, int]:
        classes = torch.from_numpy(dataset.sample(sample).classes)
        return min(2, int((~text[classes]).sum())), len(classes)

    return max(range(min(len(dataset), LOOKED_AT)), key=worth)
