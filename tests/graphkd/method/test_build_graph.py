"""The whole graph: its switches, and what must not change it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphkd.batch import RegionPredictions
from graphkd.boxes import pairwise_iou
from graphkd.method import (
    GraphConfig,
    LossWeights,
    StructuredGraph,
    TeacherStatistics,
    build_graph,
    graphkd_loss,
    whitening,
)
from graphkd.method.adjacency import all_pairs
from graphkd.method.graph import node_lengths
from graphkd.signals import TeacherSignals
from tests.support.toy import B, C, K, N, statistics, student_side, teacher_signals

pytestmark = pytest.mark.method

SIGNALS = teacher_signals(nodes=(N, N))
FITTED = statistics(SIGNALS)
NAMES = ("boxes", "valid", "scores", "classes", "logits", "deltas", "pooled")


def graph_of(signals: TeacherSignals, **switches: Any) -> StructuredGraph:
    return build_graph(signals, FITTED, GraphConfig(**switches))


def permuted(signals: TeacherSignals, order: Tensor) -> TeacherSignals:
    return TeacherSignals(**{name: getattr(signals, name)[:, order] for name in NAMES})


def clusters(graph: StructuredGraph, page: int) -> set[frozenset[int]]:
    numbers = graph.merge.cluster[page].tolist()
    return {frozenset(i for i, own in enumerate(numbers) if own == number) for number in numbers}


def test_the_toy_page_has_all_that_a_graph_can_have() -> None:
    graph = graph_of(SIGNALS)
    assert graph.adjacent.any() and graph.text.any() and (graph.valid & ~graph.text).any()
    assert (graph.valid.sum(dim=1) < N).any(), "nothing merged"


def test_a_column_of_text_next_to_a_picture_by_hand() -> None:
    """Three paragraphs in one column and a picture across the gutter: the paragraphs become two nodes."""
    boxes = torch.tensor([[[0.0, 0, 40, 10], [0, 12, 40, 22], [0, 24, 40, 34], [50, 0, 90, 34]]])
    values = torch.tensor([0.0, 0.1, 1.0, 9.0])  # the first two are nearest
    signals = TeacherSignals(
        boxes=boxes,
        valid=torch.ones(1, 4, dtype=torch.bool),
        scores=torch.ones(1, 4),
        classes=torch.tensor([[0, 0, 0, 2]]),
        logits=torch.tensor([[[5.0, 0, 0, 0]] * 3 + [[0.0, 0, 5, 0]]]),
        deltas=None,
        pooled=values.view(1, 4, 1, 1, 1).expand(1, 4, C, 1, 1),
    )
    fitted = replace(FITTED, whitening=torch.eye(C), thresholds={"teacher_class": 0.0})
    graph = build_graph(signals, fitted, GraphConfig())
    assert graph.merge.cluster.tolist() == [[0, 0, 2, 3]]
    assert graph.text.tolist() == [[True, False, True, False]]
    assert graph.boxes[0, 0].tolist() == [0, 0, 40, 22]
    assert graph.membership[0, 0].tolist() == [0.5, 0.5, 0, 0]
    edges = {(i, j) for i, j in graph.adjacent[0].nonzero().tolist() if i < j}
    assert edges == {(0, 2), (0, 3), (2, 3)}
    loops = graph.self_loops(node_lengths(signals.pooled.flatten(2), fitted, "mahalanobis"))
    torch.testing.assert_close(loops, torch.tensor([[0.1, 0, 0, 0]]), atol=1e-3, rtol=0)


def page_of(boxes: list[list[float]], scores: list[float]) -> TeacherSignals:
    count = len(boxes)
    return TeacherSignals(
        boxes=torch.tensor([boxes]),
        valid=torch.ones(1, count, dtype=torch.bool),
        scores=torch.tensor([scores]),
        classes=torch.zeros(1, count, dtype=torch.long),
        logits=torch.tensor([[[5.0, 0, 0, 0]] * count]),
        deltas=None,
        pooled=torch.randn(1, count, C, 1, 1, generator=torch.Generator().manual_seed(0)),
    )


def test_duplicates_and_background_are_nodes_but_no_regions_of_the_graph() -> None:
    boxes = [[0.0, 0, 40, 10], [0, 12, 40, 22], [1, 1, 40, 11], [0, 11, 40, 13]]
    graph = graph_of(page_of(boxes, [1.0, 1.0, 0.9, 0.05]), merge=False)
    assert graph.regions.tolist() == [[True, True, False, False]]
    assert graph.valid.all()
    assert graph.adjacent[0].nonzero().tolist() == [[0, 1], [1, 0]]  # the strip of background does not stand between
    blocked = graph_of(page_of(boxes, [1.0, 1.0, 0.9, 0.05]), merge=False, min_score=0.0, distinct_iou=1.0)
    assert not blocked.adjacent[0, 0, 1]


def test_ground_truth_that_overlaps_stays_in_the_graph() -> None:
    graph = graph_of(page_of([[0.0, 0, 40, 10], [0, 0, 40, 12]], [1.0, 1.0]), merge=False)
    assert graph.regions.all()


def test_overlaps_by_hand() -> None:
    boxes = torch.tensor([[[0.0, 0, 2, 2], [1, 0, 3, 2], [5, 5, 5, 5]]])
    overlap = pairwise_iou(boxes, boxes)[0]
    torch.testing.assert_close(overlap, torch.tensor([[1.0, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 0]]))


def test_without_merging_every_node_stays() -> None:
    graph = graph_of(SIGNALS, merge=False)
    assert torch.equal(graph.valid, SIGNALS.valid)
    assert torch.equal(graph.membership, torch.eye(N).expand(B, N, N))


def test_without_categories_no_node_is_text_and_nothing_merges() -> None:
    graph = graph_of(SIGNALS, categorizer="none")
    assert not graph.text.any()
    assert torch.equal(graph.valid, SIGNALS.valid)


def test_the_complete_graph_joins_all_pairs() -> None:
    graph = graph_of(SIGNALS, edges="complete", merge=False)
    assert torch.equal(graph.adjacent, all_pairs(graph.regions))


def test_without_edges_there_is_no_edge_and_no_loop() -> None:
    graph = graph_of(SIGNALS, edges="none")
    assert not graph.adjacent.any() and not graph.inner.any()


def test_cosine_edges_ignore_the_scale_of_the_student() -> None:
    pooled, _ = student_side()
    graph = graph_of(SIGNALS, lengths="cosine")
    weights = LossWeights(node=0, logits=0, boxes=0)
    plain = graphkd_loss(pooled, None, SIGNALS, graph, FITTED, weights)["kd_edge"]
    scaled = graphkd_loss(pooled * 7, None, SIGNALS, graph, FITTED, weights)["kd_edge"]
    torch.testing.assert_close(plain, scaled)
    assert float(plain.detach().sum()) > 0


def test_unrelated_nodes_are_about_the_square_root_of_two_apart_in_any_width() -> None:
    for channels in (4, 64):
        generator = torch.Generator().manual_seed(0)
        spread = 0.1 + torch.rand(channels, generator=generator)  # not the same in every direction
        sample = 5 + torch.randn(4000, channels, generator=generator) * spread
        fitted = replace(FITTED, mean=sample.mean(0), whitening=whitening(sample, 0.0))
        lengths = node_lengths(sample[None, :50], fitted, "mahalanobis")
        assert float(lengths[all_pairs(torch.ones(1, 50, dtype=torch.bool))].square().mean()) == pytest.approx(
            2, rel=0.15
        )


@pytest.mark.parametrize("switches", [{}, {"merge": False}, {"edges": "complete"}, {"lengths": "cosine"}])
@given(order=st.permutations(range(N)))
@settings(max_examples=10, deadline=None)
def test_permuting_nodes_permutes_the_graph(order: list[int], switches: dict[str, Any]) -> None:
    index = torch.tensor(order)
    plain, moved = graph_of(SIGNALS, **switches), graph_of(permuted(SIGNALS, index), **switches)
    for page in range(B):
        expected = {frozenset(order.index(node) for node in cluster) for cluster in clusters(plain, page)}
        assert clusters(moved, page) == expected
    # Merged nodes may be numbered by another member; seen from the original nodes, the edges are the same.
    seen = [
        graph.adjacent.gather(1, graph.merge.cluster[..., None].expand(B, N, N)).gather(
            2, graph.merge.cluster[:, None, :].expand(B, N, N)
        )
        for graph in (plain, moved)
    ]
    assert torch.equal(seen[1], seen[0][:, index][:, :, index])


@given(scale=st.sampled_from([0.25, 0.5, 2.0, 8.0]), shift=st.integers(0, 512))
@settings(max_examples=10, deadline=None)
def test_moving_and_scaling_the_page_changes_nothing(scale: float, shift: int) -> None:
    # Multiples of 1/8 px, so that the moved page has the very same proportions in floating point.
    boxes = (SIGNALS.boxes * 8).round() / 8
    plain = graph_of(replace(SIGNALS, boxes=boxes))
    moved = graph_of(replace(SIGNALS, boxes=boxes * scale + shift))
    assert torch.equal(plain.adjacent, moved.adjacent)
    assert torch.equal(plain.merge.cluster, moved.merge.cluster)
    torch.testing.assert_close(plain.membership, moved.membership)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_low_precision_features_stay_within_tolerance_of_fp32(dtype: torch.dtype, tolerance: float) -> None:
    """Every term within 1% for fp16 and 5% for bf16: the rounding of the features themselves."""
    pooled, regions = student_side()
    graph = graph_of(SIGNALS)
    low = replace(
        SIGNALS,
        pooled=SIGNALS.pooled.to(dtype),
        logits=SIGNALS.logits.to(dtype) if SIGNALS.logits is not None else None,
        deltas=SIGNALS.deltas.to(dtype) if SIGNALS.deltas is not None else None,
    )
    low_regions = RegionPredictions(logits=regions.logits.to(dtype), deltas=regions.deltas.to(dtype))
    exact = graphkd_loss(pooled, regions, SIGNALS, graph, FITTED, LossWeights())
    rounded = graphkd_loss(pooled.to(dtype), low_regions, low, graph, FITTED, LossWeights())
    for name, values in exact.items():
        assert rounded[name].dtype == torch.float32
        torch.testing.assert_close(rounded[name], values, rtol=tolerance, atol=1e-3)


def test_flags_that_do_not_fit_the_teachers_classes_name_both() -> None:
    fitted: TeacherStatistics = replace(FITTED, text_classes=torch.tensor([True, False]))
    with pytest.raises(ValueError, match=f"logits of {K} classes and background, but 2 classes have a text flag"):
        build_graph(SIGNALS, fitted, GraphConfig())


@pytest.mark.gpu
def test_cpu_and_gpu_agree() -> None:
    pooled, regions = student_side()
    on_gpu = RegionPredictions(logits=regions.logits.cuda(), deltas=regions.deltas.cuda())
    fitted = FITTED.to("cuda")
    cpu = graphkd_loss(pooled, regions, SIGNALS, graph_of(SIGNALS), FITTED, LossWeights())
    graph = build_graph(SIGNALS.to("cuda"), fitted, GraphConfig())
    gpu = graphkd_loss(pooled.cuda(), on_gpu, SIGNALS.to("cuda"), graph, fitted, LossWeights())
    assert torch.equal(graph.merge.cluster.cpu(), graph_of(SIGNALS).merge.cluster)
    for name, values in cpu.items():
        torch.testing.assert_close(gpu[name].cpu(), values, rtol=1e-4, atol=1e-5)
    assert pooled.shape[2] == C
