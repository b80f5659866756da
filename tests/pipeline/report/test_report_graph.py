from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from graphkd.method import GraphConfig, StructuredGraph, TeacherStatistics, adjacency, build_graph
from graphkd.signals import TeacherSignals
from pipeline.report.graph import GraphPicture, crop_page, graph_picture
from pipeline.report.graph_drawing import OTHER_COLOUR, TEXT_COLOUR, draw_graph

PARAGRAPHS = [[20, 20 + 30 * row, 180, 40 + 30 * row] for row in range(5)]
FIGURE = [20, 180, 180, 260]


@pytest.fixture
def batch() -> tuple[TeacherSignals, StructuredGraph, torch.Tensor]:
    """Two pages; the second has five paragraphs over a figure, with a gap of padding among them."""
    boxes, valid, logits = torch.zeros(2, 9, 4), torch.zeros(2, 9, dtype=torch.bool), torch.zeros(2, 9, 3)
    boxes[1, [0, 1, 2, 4, 5, 7]] = torch.tensor([*PARAGRAPHS, FIGURE]).float()
    valid[1, [0, 1, 2, 4, 5, 7]] = True
    logits[1, :6, 0] = 9.0
    logits[1, 7, 1] = 9.0
    signals = TeacherSignals(
        boxes=boxes, valid=valid, scores=valid.float(), classes=logits.argmax(dim=-1), logits=logits, deltas=None,
        pooled=torch.ones(2, 9, 4, 2, 2),
    )  # fmt: skip
    statistics = TeacherStatistics(
        mean=torch.zeros(4), covariance=torch.eye(4), whitening=torch.eye(4), mean_square=1.0,
        discriminant=torch.zeros(8), thresholds={"teacher_class": 0.0},
        text_classes=torch.tensor([True, False]), accuracy={},
    )  # fmt: skip
    return signals, build_graph(signals, statistics, GraphConfig()), adjacency(boxes, valid)


@pytest.fixture
def picture(batch) -> GraphPicture:
    return graph_picture(Image.new("RGB", (200, 280), "white"), *batch, 1)


def test_padding_is_left_out_and_nodes_are_renumbered(picture):
    assert picture.boxes.tolist() == [*PARAGRAPHS, FIGURE]
    assert picture.text.tolist() == [True] * 5 + [False]
    assert picture.cluster.max() < 6 and picture.alive[picture.cluster].all()


def test_text_was_merged_and_the_figure_was_not(picture):
    assert picture.alive.sum() < 6
    assert picture.alive[5] and not picture.merged_text[5]
    assert (picture.merged_text[picture.alive].sum()) == picture.alive.sum() - 1
    for node in np.flatnonzero(picture.alive):
        members = picture.boxes[picture.cluster == node]
        np.testing.assert_array_equal(
            picture.merged_boxes[node], [*members[:, :2].min(axis=0), *members[:, 2:].max(axis=0)]
        )


def test_edges_are_pairs_of_nodes_that_exist(picture):
    assert (0, 1) in picture.original_edges and (0, 5) not in picture.original_edges
    assert picture.edges and all(first < second for first, second in picture.edges)
    assert all(picture.alive[first] and picture.alive[second] for first, second in picture.edges)


def test_both_categories_are_drawn(picture):
    drawn = draw_graph(picture)
    pixels = {"#{:02X}{:02X}{:02X}".format(*colour) for _, colour in drawn.getcolors(1 << 24)}
    assert drawn.mode == "RGB" and drawn.width > 1000
    assert {TEXT_COLOUR, OTHER_COLOUR} <= pixels


def test_an_empty_page_is_drawn_without_nodes(batch):
    empty = graph_picture(Image.new("RGB", (200, 280)), *batch, 0)
    assert len(empty.boxes) == 0 and empty.edges == []
    assert draw_graph(empty).width > 1000


def test_cropping_takes_the_page_off_its_canvas():
    canvas = torch.zeros(3, 64, 96, dtype=torch.uint8)
    canvas[0, :40, :30] = 200
    page = crop_page(canvas, (40, 30))
    assert page.size == (30, 40)
    assert page.getcolors() == [(1200, (200, 0, 0))]
