"""The losses: against naive loops, degenerate pages, gradients, and what must not change them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from graphkd.batch import RegionPredictions
from graphkd.method import GraphConfig, LossWeights, StatisticsAccumulator, TeacherStatistics, build_graph, graphkd_loss
from graphkd.method.edges import descriptors
from graphkd.method.loss_terms import box_loss, logit_loss
from graphkd.method.losses import Merged, NodeMetric, edge_loss, node_loss
from graphkd.signals import TeacherSignals
from tests.support.toy import TEXT, B, C, K, N, P, statistics, student_side, teacher_signals

pytestmark = pytest.mark.method


def all_terms(
    signals: TeacherSignals, fitted: TeacherStatistics, weights: LossWeights | None = None
) -> dict[str, Tensor]:
    pooled, regions = student_side()
    graph = build_graph(signals, fitted, GraphConfig())
    return graphkd_loss(pooled, regions, signals, graph, fitted, weights or LossWeights())


def by_hand() -> tuple[TeacherSignals, TeacherStatistics]:
    """A paragraph above a picture: features 0 and 2 of one channel, whose variance between nodes is 4."""
    signals = TeacherSignals(
        boxes=torch.tensor([[[0.0, 0, 10, 4], [0, 5, 10, 9]]]),
        valid=torch.ones(1, 2, dtype=torch.bool),
        scores=torch.ones(1, 2),
        classes=torch.tensor([[0, 1]]),
        logits=torch.tensor([[[9.0, 0, 0], [0, 9, 0]]]),
        deltas=torch.zeros(1, 2, 2, 4),
        pooled=torch.tensor([0.0, 2.0]).view(1, 2, 1, 1, 1),
    )
    fitted = TeacherStatistics(
        mean=torch.ones(1),
        covariance=torch.tensor([[4.0]]),
        whitening=torch.tensor([[0.5]]),
        mean_square=2.0,
        discriminant=torch.zeros(2),
        thresholds={"teacher_class": 0.0},
        text_classes=torch.tensor([True, False]),
        accuracy={},
    )
    return signals, fitted


def test_node_and_edge_terms_by_hand() -> None:
    signals, fitted = by_hand()
    graph = build_graph(signals, fitted, GraphConfig())
    assert graph.text.tolist() == [[True, False]]
    assert graph.adjacent.tolist() == [[[False, True], [True, False]]]
    student = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1, 1)
    terms = graphkd_loss(student, None, signals, graph, fitted, LossWeights(node=1, edge=1))
    # Errors 1 and 9 over the variance 4, shrunk by .1 of it; one text node to one other, so both count fully.
    assert float(terms["kd_node"]) == pytest.approx((1 + 9) / 4.4)
    assert float(terms["kd_edge"]) == pytest.approx(0.0)  # both pairs are 2 apart: only lengths count
    student = torch.tensor([1.0, 7.0]).view(1, 2, 1, 1, 1)
    terms = graphkd_loss(student, None, signals, graph, fitted, LossWeights(node=0, edge=1))
    assert float(terms["kd_edge"]) == pytest.approx((6 / 2 - 2 / 2) ** 2)


def naive_error(student: Tensor, teacher: Tensor, fitted: TeacherStatistics, metric: NodeMetric) -> Tensor:
    """The error of one node [C, P, P], one channel at a time."""
    variances = [float(fitted.covariance[c, c]) for c in range(C)]
    total = torch.tensor(0.0)
    for c in range(C):
        s, t, over = student[c], teacher[c], fitted.mean_square
        if metric == "pearson":
            s, t, over = (s - s.mean()) / s.std(unbiased=False), (t - t.mean()) / t.std(unbiased=False), 1.0
        if metric == "scaled":
            over = variances[c] + 0.1 * sum(variances) / C
        total = total + (s - t).square().mean() / over
    return total / C


@pytest.mark.parametrize("metric", ["scaled", "mse", "pearson"])
@pytest.mark.parametrize(("merged", "floor"), [("members", 0.0), ("members", 0.6), ("members", 1.0), ("mean", 0.0)])
def test_node_loss_equals_the_naive_loop(merged: Merged, floor: float, metric: NodeMetric) -> None:
    signals = teacher_signals()
    fitted = replace(statistics(signals), thresholds={"teacher_class": -1.0})  # takes more nodes for text
    graph = build_graph(signals, fitted, GraphConfig())
    pooled, _ = student_side()
    areas = (signals.boxes[..., 2:] - signals.boxes[..., :2]).prod(-1)
    expected, balances = [], []
    for b in range(B):
        errors: dict[bool, list[Tensor]] = {True: [], False: []}
        for cluster in range(N):
            members = [i for i in range(N) if int(graph.merge.cluster[b, i]) == cluster and signals.valid[b, i]]
            if members:
                weight = areas[b, members] / areas[b, members].sum()
                sides = [pooled[b, members], signals.pooled[b, members]]
                if merged == "mean":
                    sides = [(side * weight[:, None, None, None]).sum(0, keepdim=True) for side in sides]
                error = torch.stack([naive_error(*pair, fitted, metric) for pair in zip(*sides, strict=True)])
                error = error.sum() if merged == "mean" else (error * weight).sum()
                errors[bool(graph.text[b, cluster])].append(error)
        other, text = errors[False], errors[True]
        balance = max(floor, min(1.0, len(other) / max(1, len(text)))) if other else 1.0
        balances.append(balance)
        mean = {name: torch.stack(found).mean() if found else torch.tensor(0.0) for name, found in errors.items()}
        expected.append(mean[False] + balance * mean[True])
    assert (min(balances) < 1) == (floor < 1)  # some page has more text than the rest
    torch.testing.assert_close(
        node_loss(pooled, signals, graph, fitted, LossWeights(merged=merged, node_metric=metric, text_floor=floor)),
        torch.stack(expected),
        rtol=1e-4,
        atol=1e-5,
    )


def test_edge_loss_equals_the_naive_loop() -> None:
    signals = teacher_signals()
    fitted = statistics(signals)
    graph = build_graph(signals, fitted, GraphConfig())
    pooled, _ = student_side()
    whiten = fitted.whitening / C**0.5
    nodes = {"s": descriptors(pooled), "t": descriptors(signals.pooled)}
    clusters = {name: graph.merged(value) for name, value in nodes.items()}

    def gap(of: dict[str, Tensor], b: int, i: int, j: int) -> Tensor:
        return (whiten @ (of["t"][b, i] - of["t"][b, j])).norm() - (whiten @ (of["s"][b, i] - of["s"][b, j])).norm()

    expected = []
    for b in range(B):
        terms = []
        for i in range(N):
            terms += [
                (0.5 if graph.text[b, i] and graph.text[b, j] else 1.0) * gap(clusters, b, i, j) ** 2
                for j in range(i + 1, N)
                if graph.adjacent[b, i, j]
            ]
            inside = [gap(nodes, b, *pair) ** 2 for pair in _inner_pairs(graph, b, i)]
            terms += [0.5 * torch.stack(inside).mean()] if inside else []
        expected.append(torch.stack(terms).mean())
    actual = edge_loss(pooled, signals, graph, fitted, text_edge=0.5)
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-3, atol=1e-4)


def _inner_pairs(graph, b: int, cluster: int) -> list[tuple[int, int]]:  # type: ignore[no-untyped-def]
    members = (graph.merge.cluster[b] == cluster).nonzero().flatten().tolist()
    return [(i, j) for i in members for j in members if i < j and graph.inner[b, i, j] > 0]


def test_logit_and_box_losses_equal_naive_loops() -> None:
    signals = teacher_signals()
    _, regions = student_side()
    kl, boxes = [], []
    assert signals.logits is not None and signals.deltas is not None
    for b in range(B):
        divergences, distances = [], []
        for i in range(int(signals.valid[b].sum())):
            p, q = signals.logits[b, i].div(2).softmax(0), regions.logits[b, i].div(2).softmax(0)
            divergences.append(4 * (p * (p.log() - q.log())).sum())
            if int(signals.logits[b, i].argmax()) < K:
                best = int(signals.logits[b, i, :K].argmax())
                gap = (regions.deltas[b, i, best] - signals.deltas[b, i, best]) * torch.tensor([10.0, 10.0, 5.0, 5.0])
                distances.append(torch.where(gap.abs() < 1, 0.5 * gap**2, gap.abs() - 0.5).sum())
        kl.append(torch.stack(divergences).mean())
        boxes.append(torch.stack(distances).mean() if distances else torch.tensor(0.0))
    torch.testing.assert_close(logit_loss(regions.logits, signals, temperature=2.0), torch.stack(kl))
    torch.testing.assert_close(box_loss(regions.deltas, signals), torch.stack(boxes))


def test_a_student_that_equals_its_teacher_loses_nothing() -> None:
    signals = teacher_signals()
    fitted = statistics(signals)
    assert signals.logits is not None and signals.deltas is not None
    graph = build_graph(signals, fitted, GraphConfig())
    regions = RegionPredictions(logits=signals.logits, deltas=signals.deltas)
    terms = graphkd_loss(signals.pooled, regions, signals, graph, fitted, LossWeights())
    for values in terms.values():
        torch.testing.assert_close(values, torch.zeros(B), atol=1e-6, rtol=0)


@pytest.mark.parametrize("nodes", [(0, 0), (1, 0), (2, 1), (N, 0)])
def test_degenerate_pages_give_finite_values_and_gradients(nodes: tuple[int, ...]) -> None:
    fitted = statistics(teacher_signals())
    signals = teacher_signals(nodes)
    pooled, regions = student_side()
    graph = build_graph(signals, fitted, GraphConfig())
    terms = graphkd_loss(pooled, regions, signals, graph, fitted, LossWeights())
    torch.stack(list(terms.values())).sum().backward()
    assert all(torch.isfinite(values).all() for values in terms.values())
    assert all(float(values[1].detach()) == 0 for values in terms.values() if nodes[1] == 0)
    for leaf in (pooled, regions.logits, regions.deltas):
        assert leaf.grad is not None and torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("threshold", [-1e9, 1e9])
def test_pages_of_one_category_are_finite(threshold: float) -> None:
    signals = teacher_signals()
    fitted = replace(statistics(signals), thresholds={"teacher_class": threshold})
    assert all(torch.isfinite(values).all() for values in all_terms(signals, fitted).values())


def test_no_gradient_reaches_the_teacher() -> None:
    plain = teacher_signals()
    teacher = {name: getattr(plain, name).clone().requires_grad_() for name in ("pooled", "logits", "deltas")}
    terms = all_terms(replace(plain, **teacher), statistics(plain))
    assert all(values.requires_grad for values in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    assert all(value.grad is None for value in teacher.values())


def test_permuting_nodes_changes_no_loss() -> None:
    signals = teacher_signals(nodes=(N, N))
    fitted = statistics(signals)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    names = ("boxes", "valid", "scores", "classes", "logits", "deltas", "pooled")
    permuted = TeacherSignals(**{name: getattr(signals, name)[:, order] for name in names})
    pooled, regions = student_side()
    plain = all_terms(signals, fitted)
    moved = graphkd_loss(
        pooled[:, order],
        RegionPredictions(logits=regions.logits[:, order], deltas=regions.deltas[:, order]),
        permuted,
        build_graph(permuted, fitted, GraphConfig()),
        fitted,
        LossWeights(),
    )
    for name, values in plain.items():
        torch.testing.assert_close(moved[name], values, rtol=1e-4, atol=1e-5)


def test_padding_changes_no_loss() -> None:
    signals = teacher_signals(nodes=(5, 4))
    fitted = statistics(signals)
    names = ("boxes", "valid", "scores", "classes", "logits", "deltas", "pooled")
    cut = TeacherSignals(**{name: getattr(signals, name)[:, :5] for name in names})
    pooled, regions = student_side()
    short = graphkd_loss(
        pooled[:, :5],
        RegionPredictions(logits=regions.logits[:, :5], deltas=regions.deltas[:, :5]),
        cut,
        build_graph(cut, fitted, GraphConfig()),
        fitted,
        LossWeights(),
    )
    for name, values in all_terms(signals, fitted).items():
        torch.testing.assert_close(short[name], values)


def test_a_weight_of_zero_leaves_the_term_out() -> None:
    signals = teacher_signals()
    terms = all_terms(signals, statistics(signals), LossWeights(edge=0, boxes=0))
    assert set(terms) == {"kd_node", "kd_logits"}


def test_pearson_forgives_scale_and_shift() -> None:
    signals = teacher_signals()
    fitted = statistics(signals)
    graph = build_graph(signals, fitted, GraphConfig(merge=False))
    loss = node_loss(signals.pooled * 3 + 2, signals, graph, fitted, LossWeights(node_metric="pearson"))
    torch.testing.assert_close(loss, torch.zeros(B), atol=1e-4, rtol=0)


def test_nodes_that_do_not_fit_name_both_sides() -> None:
    signals = teacher_signals()
    fitted = statistics(signals)
    graph = build_graph(signals, fitted, GraphConfig())
    with pytest.raises(ValueError, match=r"student nodes \(2, 9, 4, 3, 3\) and teacher nodes \(2, 9, 6, 3, 3\)"):
        graphkd_loss(torch.zeros(B, N, 4, P, P), None, signals, graph, fitted, LossWeights())


def test_statistics_stream_equals_one_pass() -> None:
    first, second = teacher_signals(seed=4), teacher_signals(nodes=(3, N), seed=5)
    streamed = StatisticsAccumulator(text_classes=TEXT)
    streamed.add(first, first.valid)
    streamed.add(second, second.valid)
    nodes = torch.cat([descriptors(part.pooled)[part.valid] for part in (first, second)])
    torch.testing.assert_close(streamed.finish().covariance, nodes.T.cov(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(streamed.finish().mean, nodes.mean(0))
