"""The structured graph of one page, drawn before and after merging text."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from graphkd.method import StructuredGraph, adjacency, build_graph
from graphkd.nodes import live_signals
from graphkd.signals import TeacherSignals
from pipeline.context import RunContext
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.loading.augmentation import EVALUATION_VIEW
from pipeline.data.loading.loader import PageDataset, collate
from pipeline.data.loading.order import SampleRef
from pipeline.report.charts import png
from pipeline.report.pages import show_page
from pipeline.teacher.statistics import read_statistics

TEXT_COLOUR, OTHER_COLOUR, EDGE_COLOUR = "#0072B2", "#D55E00", "#3d444d"
PANEL_INCHES, DPI = 5.4, 120
CANDIDATE_PAGES = 64


def teacher_graph(context: RunContext, dataset: PackedDataset) -> bytes:
    """Draw the graph that a distilled run's teacher gives on one page of ``dataset``, as a PNG.

    Raises:
        UserError: if teacher or statistics are missing or do not fit.
    """
    config, teacher = context.config, context.teacher
    statistics = read_statistics(config.cache_location, storage=config.data.storage)
    detector = teacher.load(dataset.num_classes, torch.device("cpu"))
    pages = PageDataset(dataset, config.data.view, config.run.seed, EVALUATION_VIEW)
    batch = collate([pages[SampleRef(0, _interesting_page(dataset))]])
    signals = live_signals(detector, batch, teacher.settings.nodes)
    graph = build_graph(signals, statistics, config.method.graph)
    settings = config.method.graph
    before = adjacency(signals.boxes, graph.regions, gap=settings.gap, nearest=settings.nearest)
    return draw_graph(
        crop_page(batch.images[0], (int(batch.sizes[0, 0]), int(batch.sizes[0, 1]))), signals, graph, before
    )


def _interesting_page(dataset: PackedDataset) -> int:
    """Page with most regions, preferably with at least two that are not text."""
    text = torch.tensor(dataset.text_classes)

    def rank(sample: int) -> tuple[int, int]:
        classes = torch.from_numpy(dataset.sample(sample).classes)
        return min(2, int((~text[classes]).sum())), len(classes)

    return max(range(min(len(dataset), CANDIDATE_PAGES)), key=rank)


def crop_page(canvas: Tensor, size: tuple[int, int]) -> Image.Image:
    """Crop a page of (height, width) px from its canvas, uint8 [3, H, W]."""
    height, width = size
    return Image.fromarray(canvas[:, :height, :width].permute(1, 2, 0).contiguous().cpu().numpy())


def draw_graph(
    image: Image.Image, signals: TeacherSignals, graph: StructuredGraph, before: Tensor, page: int = 0
) -> bytes:
    """Draw one page's nodes and edges before and after merging, as a PNG.

    Args:
        image: the page, cropped from its canvas.
        signals: of the batch that the page is in.
        graph: of that batch.
        before: edges between the nodes before merging, bool [B, N, N].
        page: index of the page in the batch.
    """
    aspect = min(max(image.height / image.width, 0.5), 1.7)
    figure = Figure(figsize=(2 * PANEL_INCHES, PANEL_INCHES * aspect + 1), dpi=DPI, layout="constrained", facecolor="w")
    left, right = figure.subplots(1, 2)
    nodes, text, merged = node_masks(graph, page)
    show_page(left, image, f"Before merging: {int(nodes.sum())} nodes", faded=0.62)
    _draw_nodes(left, signals.boxes[page], nodes, text)
    _draw_edges(left, signals.boxes[page], before[page] & nodes[:, None] & nodes)
    show_page(right, image, f"After merging: {int(merged.sum())} nodes", faded=0.62)
    _draw_nodes(right, graph.boxes[page], merged, graph.text[page])
    _draw_edges(right, graph.boxes[page], graph.adjacent[page] & merged[:, None] & merged)
    figure.legend(handles=_legend_handles(), loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    return png(figure)


def node_masks(graph: StructuredGraph, page: int) -> tuple[Tensor, Tensor, Tensor]:
    """Masks of one page's nodes before merging, of the text among them, and of the nodes after merging: bool [N]."""
    nodes, representative = graph.regions[page], graph.merge.cluster[page]
    # Merging clears the text flag of absorbed nodes, but a cluster has one category.
    text = graph.text[page][representative] & nodes
    is_representative = representative == torch.arange(len(representative), device=representative.device)
    return nodes, text, nodes & graph.valid[page] & is_representative


def _draw_nodes(axes: Axes, boxes: Tensor, shown: Tensor, text: Tensor) -> None:
    for is_text, colour, marker in ((True, TEXT_COLOUR, "o"), (False, OTHER_COLOUR, "s")):
        own = boxes[shown & (text == is_text)].float().cpu().numpy()
        for x1, y1, x2, y2 in own.tolist():
            face, edge = (colour, 0.08), (colour, 0.8)
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, facecolor=face, edgecolor=edge, linewidth=1.2))
        x, y = _centres(own).T
        axes.scatter(x, y, s=46, c=colour, marker=marker, edgecolors="white", linewidths=1.1, zorder=4)


def _draw_edges(axes: Axes, boxes: Tensor, adjacent: Tensor) -> None:
    centres = _centres(boxes.float().cpu().numpy())
    lines = [centres[pair] for pair in adjacent.triu(diagonal=1).nonzero().tolist()]
    axes.add_collection(LineCollection(lines, colors=EDGE_COLOUR, linewidths=1.4, zorder=3), autolim=False)


def _centres(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Xyxy [n, 4] -> xy [n, 2]."""
    return ((boxes[:, :2] + boxes[:, 2:]) / 2).astype(np.float32)


def _legend_handles() -> list[Line2D]:
    dot = {"linestyle": "", "markersize": 8}
    return [
        Line2D([], [], color=TEXT_COLOUR, marker="o", label="text", **dot),  # type: ignore[arg-type]
        Line2D([], [], color=OTHER_COLOUR, marker="s", label="not text", **dot),  # type: ignore[arg-type]
        Line2D([], [], color=EDGE_COLOUR, linewidth=1.4, label="edge between neighbours"),
    ]
