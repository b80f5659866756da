from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from graphkd.method import GraphConfig, StructuredGraph, TeacherStatistics, adjacency, build_graph
from graphkd.signals import TeacherSignals
from pipeline.report.graph import OTHER_COLOUR, TEXT_COLOUR, crop_page, draw_graph, node_masks

PARAGRAPHS = [[20, 20 + 30 * row, 180, 40 + 30 * row] for row in range(5)]
FIGURE = [20, 180, 180, 260]


@pytest.fixture
def batch() -> tuple[TeacherSignals, StructuredGraph, torch.Tensor]:
    """Two pages; the second has five paragraphs over a figure, twice, with padding among them."""
    boxes, valid, logits = torch.zeros(2, 9, 4), torch.zeros(2, 9, dtype=torch.bool), torch.zeros(2, 9, 3)
    boxes[1, [0, 1, 2, 4, 5, 7]] = torch.tensor([*PARAGRAPHS, FIGURE]).float()
    valid[1, [0, 1, 2, 4, 5, 7]] = True
    logits[1, :6, 0] = 9.0
    boxes[1, 8], valid[1, 8] = boxes[1, 7], True  # the figure again, which is no node of the graph
    logits[1, 7:, 1] = 9.0
    signals = TeacherSignals(
        boxes=boxes, valid=valid, scores=valid * torch.linspace(1, 0.5, 9), classes=logits.argmax(dim=-1),
        logits=logits, deltas=None, pooled=torch.ones(2, 9, 4, 2, 2),
    )  # fmt: skip
    statistics = TeacherStatistics(
        mean=torch.zeros(4), covariance=torch.eye(4), whitening=torch.eye(4), mean_square=1.0,
        discriminant=torch.zeros(8), thresholds={"teacher_class": 0.0},
        text_classes=torch.tensor([True, False]), accuracy={},
    )  # fmt: skip
    return signals, build_graph(signals, statistics, GraphConfig()), adjacency(boxes, valid)


def test_padding_is_left_out(batch):
    signals, graph, _ = batch
    nodes, text, _ = node_masks(graph, 1)
    assert signals.boxes[1][nodes].tolist() == [*PARAGRAPHS, FIGURE]
    assert text[nodes].tolist() == [True] * 5 + [False]


def test_text_was_merged_and_the_figure_was_not(batch):
    signals, graph, _ = batch
    nodes, _, merged = node_masks(graph, 1)
    assert merged.sum() < nodes.sum() and merged[7]
    assert graph.text[1][merged].tolist() == [True] * (int(merged.sum()) - 1) + [False]
    for node in merged.nonzero().flatten().tolist():
        members = signals.boxes[1][nodes & (graph.merge.cluster[1] == node)]
        expected = torch.cat([members[:, :2].amin(dim=0), members[:, 2:].amax(dim=0)])
        assert torch.equal(graph.boxes[1, node], expected)


@pytest.mark.parametrize(("page", "colours"), [(1, {TEXT_COLOUR, OTHER_COLOUR}), (0, set())])
def test_both_categories_are_drawn_and_an_empty_page_has_none(batch, page: int, colours: set[str]):
    content = draw_graph(Image.new("RGB", (200, 280), "white"), *batch, page)
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    # The legend is below the pages.
    pages = picture.crop((0, 0, picture.width, picture.height - 80))
    pixels = {"#{:02X}{:02X}{:02X}".format(*colour) for _, colour in pages.getcolors(1 << 24)}
    assert picture.width > 1000 and {TEXT_COLOUR, OTHER_COLOUR} & pixels == colours


def test_cropping_takes_the_page_off_its_canvas():
    canvas = torch.zeros(3, 64, 96, dtype=torch.uint8)
    canvas[0, :40, :30] = 200
    page = crop_page(canvas, (40, 30))
    assert page.size == (30, 40)
    assert page.getcolors() == [(1200, (200, 0, 0))]
