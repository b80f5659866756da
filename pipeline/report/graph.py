"""The structured graph of a page, taken out of a batch for drawing (:mod:`pipeline.report.graph_drawing`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from graphkd.method import StructuredGraph
from graphkd.signals import TeacherSignals

Edges = list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphPicture:
    """What is drawn of one page's graph; its regions are numbered without padding and other nodes."""

    image: Image.Image
    """The page, cropped from its canvas."""
    boxes: NDArray[np.float32]
    """[n, 4]: original nodes, xyxy in px of ``image``."""
    text: NDArray[np.bool_]
    """[n]: which original nodes are text."""
    cluster: NDArray[np.int64]
    """[n]: the node that stands for the cluster of each."""
    merged_boxes: NDArray[np.float32]
    """[n, 4]: the clusters' boxes, meant where ``alive``."""
    alive: NDArray[np.bool_]
    """[n]: which nodes stand for a cluster."""
    merged_text: NDArray[np.bool_]
    """[n]: which of those are text."""
    edges: Edges
    """Pairs i < j of merged nodes."""
    original_edges: Edges
    """Pairs i < j of original nodes."""


def crop_page(canvas: Tensor, size: tuple[int, int]) -> Image.Image:
    """The page on a canvas: uint8 [3, H, W] and its (height, width) in px -> RGB image."""
    height, width = size
    return Image.fromarray(canvas[:, :height, :width].permute(1, 2, 0).contiguous().cpu().numpy())


def graph_picture(
    image: Image.Image, signals: TeacherSignals, graph: StructuredGraph, adjacent_before: Tensor, page: int
) -> GraphPicture:
    """Take one page's graph out of a batch.

    Args:
        image: the page, cropped from its canvas (:func:`crop_page`).
        signals: what the teacher said of the batch.
        graph: the graph built from it.
        adjacent_before: bool [B, N, N], edges between the original nodes.
        page: number of the page in the batch.
    """
    kept = graph.regions[page].nonzero().flatten()
    renumber = torch.zeros(signals.valid.shape[1], dtype=torch.long, device=kept.device)
    renumber[kept] = torch.arange(len(kept), device=kept.device)
    cluster = graph.merge.cluster[page]
    own = torch.arange(len(cluster), device=cluster.device)
    # A merged text node keeps its flag only at its representative, but all of a cluster are of one category.
    text = graph.text[page][cluster] & signals.valid[page]
    return GraphPicture(
        image=image.convert("RGB"),
        boxes=signals.boxes[page, kept].float().cpu().numpy(),
        text=text[kept].cpu().numpy(),
        cluster=renumber[cluster[kept]].cpu().numpy(),
        merged_boxes=graph.boxes[page, kept].float().cpu().numpy(),
        alive=(graph.valid[page] & (cluster == own))[kept].cpu().numpy(),
        merged_text=graph.text[page, kept].cpu().numpy(),
        edges=_pairs(graph.adjacent[page][kept][:, kept]),
        original_edges=_pairs(adjacent_before[page][kept][:, kept]),
    )


def _pairs(adjacent: Tensor) -> Edges:
    return [(int(first), int(second)) for first, second in adjacent.triu(diagonal=1).nonzero().tolist()]
