"""Whitening, edge lengths, text scores and merging against cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphkd.method import CovarianceAccumulator, Merge, edge_lengths, merge_text_nodes, text_score, whitening
from graphkd.method.edges import whitening_of
from graphkd.method.statistics import fit_discriminant, fit_threshold

pytestmark = pytest.mark.method


def test_mahalanobis_length_by_hand() -> None:
    covariance = torch.diag(torch.tensor([4.0, 9.0]))
    nodes = torch.tensor([[[0.0, 0.0], [2.0, 3.0]]])
    lengths = edge_lengths(nodes, whitening_of(covariance, shrinkage=0.0))
    assert lengths[0, 0, 1] == pytest.approx(2**0.5)  # (2/2)^2 + (3/3)^2


def test_length_equals_the_naive_quadratic_form() -> None:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(200, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
    covariance, nodes = sample.T.cov(), sample[:6]
    shrunk = covariance.double() + 0.1 * covariance.double().trace() / 5 * torch.eye(5, dtype=torch.float64)
    inverse = torch.linalg.inv(shrunk)
    lengths = edge_lengths(nodes[None], whitening_of(covariance, 0.1))[0]
    for i in range(6):
        for j in range(6):
            difference = (nodes[i] - nodes[j]).double()
            expected = float((difference @ inverse @ difference).clamp(min=0).sqrt())
            assert float(lengths[i, j]) == pytest.approx(expected, rel=1e-3, abs=2e-3)


def test_lengths_survive_any_invertible_map_without_shrinkage() -> None:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(300, 4, generator=generator, dtype=torch.float64)
    mixing = torch.randn(4, 4, generator=generator, dtype=torch.float64) + 2 * torch.eye(4, dtype=torch.float64)
    mixed = sample @ mixing.T
    plain = edge_lengths(sample[None, :5].float(), whitening(sample, 0.0))
    other = edge_lengths(mixed[None, :5].float(), whitening(mixed, 0.0))
    torch.testing.assert_close(plain, other, rtol=1e-3, atol=1e-3)


def test_gradient_of_a_zero_length_is_zero() -> None:
    nodes = torch.zeros(1, 3, 4, requires_grad=True)
    edge_lengths(nodes, torch.eye(4)).sum().backward()
    assert nodes.grad is not None and torch.equal(nodes.grad, torch.zeros_like(nodes))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_features_are_measured_in_fp32(dtype: torch.dtype) -> None:
    nodes = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(2))
    exact = edge_lengths(nodes, torch.eye(8))
    torch.testing.assert_close(edge_lengths(nodes.to(dtype), torch.eye(8)), exact, rtol=0.02, atol=0.02)


def test_a_singular_covariance_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"\[2, 2\] with shrinkage 0.0 is not positive definite"):
        whitening_of(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), 0.0)


def test_class_margin_by_hand() -> None:
    logits = torch.tensor([[[2.0, 1.0, 0.0, 9.0]]])  # text, text, other, background
    score = text_score(
        torch.zeros(1, 1, 2, 3, 3), logits, categorizer="teacher_class", text_classes=torch.tensor([True, True, False])
    )
    assert float(score) == pytest.approx(float(torch.tensor([2.0, 1.0]).logsumexp(0)))


def test_class_margin_of_a_dataset_without_pictures_is_finite() -> None:
    score = text_score(
        torch.zeros(1, 1, 2, 3, 3),
        torch.zeros(1, 1, 3),
        categorizer="teacher_class",
        text_classes=torch.tensor([True, True]),
    )
    assert torch.isfinite(score).all() and score > 0


def test_missing_inputs_of_a_categoriser_are_named() -> None:
    with pytest.raises(ValueError, match="needs class logits"):
        text_score(torch.zeros(1, 2, 3, 3), None, categorizer="teacher_class", text_classes=torch.tensor([True]))
    with pytest.raises(ValueError, match="needs a fitted discriminant"):
        text_score(torch.zeros(1, 2, 3, 3), None, categorizer="moments", text_classes=torch.tensor([True]))


def test_the_discriminant_separates_what_can_be_separated() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 6, generator=generator)
    is_text = torch.arange(400) % 3 > 0
    features[is_text, 2] += 6
    threshold, accuracy = fit_threshold(features @ fit_discriminant(features, is_text), is_text)
    assert accuracy > 0.98
    assert torch.isfinite(torch.tensor(threshold))


def test_threshold_by_hand() -> None:
    threshold, accuracy = fit_threshold(torch.tensor([1.0, 2.0, 5.0, 7.0]), torch.tensor([False, False, True, True]))
    assert (threshold, accuracy) == (3.5, 1.0)
    assert fit_threshold(torch.tensor([1.0]), torch.tensor([True]))[0] == -float("inf")
    assert fit_threshold(torch.tensor([1.0]), torch.tensor([False]))[0] == float("inf")


def column(count: int) -> torch.Tensor:
    return torch.tensor([[[0.0, 3.0 * i, 10.0, 3.0 * i + 2] for i in range(count)]])


def chain(count: int) -> torch.Tensor:
    near = torch.arange(count)
    return ((near[:, None] - near[None, :]).abs() == 1)[None]


def lengths(*steps: float) -> torch.Tensor:
    place = torch.tensor([0.0, *steps]).cumsum(0)
    return (place[:, None] - place[None, :]).abs()[None]


def merged(text: list[bool], adjacent: torch.Tensor, distance: torch.Tensor, boxes: torch.Tensor) -> list[int]:
    flags = torch.tensor([text])
    merge = merge_text_nodes(adjacent, distance, flags, boxes, torch.ones_like(flags))
    return merge.cluster[0].tolist()


def test_the_nearest_pair_merges_first_and_stops_at_the_square_root() -> None:
    # Four text nodes alone on a page: two are to be left. 1-2 are nearest, then 0 or 3 joins what is nearest.
    assert merged([True] * 4, chain(4), lengths(2.0, 1.0, 5.0), column(4)) == [0, 0, 0, 3]


def test_non_text_never_merges() -> None:
    assert merged([False, False, True], chain(3), lengths(0.1, 0.1), column(3)) == [0, 1, 2]


def test_what_is_not_connected_never_merges() -> None:
    assert merged([True] * 4, torch.zeros(1, 4, 4, dtype=torch.bool), lengths(1, 1, 1), column(4)) == [0, 1, 2, 3]


def test_columns_do_not_merge_across_the_gutter() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 5], [12, 0, 22, 5], [0, 6, 10, 11], [12, 6, 22, 11], [0, 12, 10, 15]]])
    adjacent = torch.ones(1, 5, 5, dtype=torch.bool) & ~torch.eye(5, dtype=torch.bool)
    clusters = merged([True] * 5, adjacent, torch.ones(1, 5, 5), boxes)
    left = {clusters[place] for place in (0, 2, 4)}
    right = {clusters[place] for place in (1, 3)}
    assert not left & right


def test_a_figure_inside_the_union_keeps_text_apart() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 2], [0, 3, 10, 6], [0, 7, 10, 9]]])
    adjacent = torch.ones(1, 3, 3, dtype=torch.bool) & ~torch.eye(3, dtype=torch.bool)
    assert merged([True, False, True], adjacent, torch.ones(1, 3, 3), boxes) == [0, 1, 2]


def test_an_empty_page_merges_nothing() -> None:
    empty = torch.zeros(1, 3, dtype=torch.bool)
    merge = merge_text_nodes(
        torch.zeros(1, 3, 3, dtype=torch.bool), torch.zeros(1, 3, 3), empty, torch.zeros(1, 3, 4), empty
    )
    assert not merge.valid.any()
    assert torch.isfinite(merge.membership(torch.zeros(1, 3))).all()


def test_moments_and_trace_equal_naive_loops() -> None:
    pooled = torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(5))
    weights = torch.randn(8, generator=torch.Generator().manual_seed(6))
    flags = torch.tensor([True])
    by_moments = text_score(pooled, None, categorizer="moments", text_classes=flags, discriminant=weights)
    by_trace = text_score(pooled, None, categorizer="covariance_trace", text_classes=flags)
    for i in range(3):
        means = [float(pooled[i, c].mean()) for c in range(4)]
        variances = [float(pooled[i, c].var(unbiased=False)) for c in range(4)]
        features = torch.tensor([*means, *(math.log(value + 1e-6) for value in variances)])
        assert float(by_moments[i]) == pytest.approx(float(features @ weights), rel=1e-4, abs=1e-5)
        assert float(by_trace[i]) == pytest.approx(-sum(variances) / sum(m * m for m in means), rel=1e-4)


def test_whitening_of_a_sample_is_that_of_its_covariance_also_in_parts() -> None:
    sample = torch.randn(40, 3, generator=torch.Generator().manual_seed(7))
    parts = CovarianceAccumulator()
    for part in sample.split(7):
        parts.add(part)
    torch.testing.assert_close(whitening(parts), whitening(sample))
    torch.testing.assert_close(whitening(sample), whitening_of(sample.T.cov()), rtol=1e-4, atol=1e-5)


def test_a_sample_of_one_is_refused_by_number() -> None:
    with pytest.raises(ValueError, match="at least 2 nodes, got 1"):
        whitening(torch.zeros(1, 3))


@given(seed=st.integers(0, 10_000), channels=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_lengths_are_unchanged_by_any_invertible_map_when_shrinkage_is_0(seed: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(60, channels, generator=generator, dtype=torch.float64)
    # Singular values between .5 and 2: invertible, and far enough from singular for fp32.
    left = torch.linalg.qr(torch.randn(channels, channels, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(channels, channels, generator=generator, dtype=torch.float64))[0]
    sizes = 0.5 + 1.5 * torch.rand(channels, generator=generator, dtype=torch.float64)
    mixed = sample @ (left * sizes @ right).T
    plain = edge_lengths(sample[None, :8].float(), whitening(sample, 0.0))
    other = edge_lengths(mixed[None, :8].float(), whitening(mixed, 0.0))
    torch.testing.assert_close(plain, other, rtol=1e-3, atol=5e-3)


def random_page(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Adjacency, lengths, text flags and boxes of a page with ``count`` random nodes."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(1, count, 2, generator=generator) * torch.tensor([30.0, 100.0])
    boxes = torch.cat([low, low + 2 + torch.rand(1, count, 2, generator=generator) * torch.tensor([40.0, 8.0])], -1)
    linked = torch.rand(1, count, count, generator=generator) < 0.4
    adjacent = (linked | linked.transpose(1, 2)) & ~torch.eye(count, dtype=torch.bool)
    distance = torch.rand(1, count, count, generator=generator)
    return adjacent, distance + distance.transpose(1, 2), torch.rand(1, count, generator=generator) < 0.8, boxes


def naive_merge(
    adjacent: torch.Tensor, distance: torch.Tensor, text: torch.Tensor, boxes: torch.Tensor, rounds: int
) -> set[frozenset[int]]:
    """The definition, one pair at a time, on one page."""
    count = len(text)
    groups = {i: [i] for i in range(count)}
    target = max(count - int(text.sum()), math.ceil(math.sqrt(int(text.sum()))))

    def extent(i: int) -> list[float]:
        own = boxes[groups[i]]
        return [*own[:, :2].amin(0).tolist(), *own[:, 2:].amax(0).tolist()]

    def mergeable(i: int, j: int) -> bool:
        a, b = extent(i), extent(j)
        overlap = min(a[2], b[2]) - max(a[0], b[0])
        low, high = [min(a[k], b[k]) for k in (0, 1)], [max(a[k], b[k]) for k in (2, 3)]
        blocked = any(
            low[0] < boxes[k, 2] and high[0] > boxes[k, 0] and low[1] < boxes[k, 3] and high[1] > boxes[k, 1]
            for k in range(count)
            if not text[k]
        )
        linked = any(adjacent[p, q] for p in groups[i] for q in groups[j])
        return bool(linked and overlap >= 0.5 * min(a[2] - a[0], b[2] - b[0]) and not blocked)

    def length(i: int, j: int) -> float:
        return sum(float(distance[p, q]) for p in groups[i] for q in groups[j]) / len(groups[i]) / len(groups[j])

    for _ in range(rounds):
        alive = [i for i in groups if text[i]]
        options = {i: {j: length(i, j) for j in alive if j != i and mergeable(i, j)} for i in alive}
        nearest = {i: min(found, key=lambda j, found=found: found[j]) for i, found in options.items() if found}
        pairs = [(i, j) for i, j in nearest.items() if j > i and nearest.get(j) == i]
        for i, j in sorted(pairs, key=lambda pair: options[pair[0]][pair[1]])[: max(0, len(alive) - target)]:
            groups[i] += groups.pop(j)
    return {frozenset(group) for group in groups.values()}


def partition(merge: Merge) -> set[frozenset[int]]:
    numbers = merge.cluster[0].tolist()
    return {frozenset(i for i, own in enumerate(numbers) if own == number) for number in numbers}


@given(seed=st.integers(0, 100_000), count=st.integers(1, 10), rounds=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_merging_equals_the_naive_loop(seed: int, count: int, rounds: int) -> None:
    adjacent, distance, text, boxes = random_page(seed, count)
    merge = merge_text_nodes(adjacent, distance, text, boxes, torch.ones_like(text), rounds=rounds)
    assert partition(merge) == naive_merge(adjacent[0], distance[0], text[0], boxes[0], rounds)


@given(seed=st.integers(0, 100_000), count=st.integers(1, 14))
@settings(max_examples=60, deadline=None)
def test_merging_joins_only_connected_text_and_ends(seed: int, count: int) -> None:
    adjacent, distance, text, boxes = random_page(seed, count)
    merge = merge_text_nodes(adjacent, distance, text, boxes, torch.ones_like(text), rounds=count)
    for group in partition(merge):
        assert len(group) == 1 or all(text[0, i] for i in group)
        reached = {min(group)}
        for _ in group:
            reached |= {j for i in reached for j in group if adjacent[0, i, j]}
        assert reached == set(group)
    more = merge_text_nodes(adjacent, distance, text, boxes, torch.ones_like(text), rounds=2 * count)
    assert torch.equal(more.cluster, merge.cluster), "as many rounds as nodes are always enough"
    starting, left = int(text.sum()), sum(all(text[0, i] for i in group) for group in partition(merge))
    assert left >= min(starting, max(count - starting, math.ceil(math.sqrt(starting))))
