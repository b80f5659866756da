"""Whitening, edge lengths, text scores and merging against cases worked out by hand."""

from __future__ import annotations

import pytest
import torch

from graphkd.method import edge_lengths, merge_text_nodes, text_score, whitening
from graphkd.method.statistics import fit_discriminant, fit_threshold

pytestmark = pytest.mark.method


def test_mahalanobis_length_by_hand() -> None:
    covariance = torch.diag(torch.tensor([4.0, 9.0]))
    nodes = torch.tensor([[[0.0, 0.0], [2.0, 3.0]]])
    lengths = edge_lengths(nodes, whitening(covariance, shrinkage=0.0))
    assert lengths[0, 0, 1] == pytest.approx(2**0.5)  # (2/2)^2 + (3/3)^2


def test_length_equals_the_naive_quadratic_form() -> None:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(200, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
    covariance, nodes = sample.T.cov(), sample[:6]
    shrunk = covariance.double() + 0.1 * covariance.double().trace() / 5 * torch.eye(5, dtype=torch.float64)
    inverse = torch.linalg.inv(shrunk)
    lengths = edge_lengths(nodes[None], whitening(covariance, 0.1))[0]
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
    plain = edge_lengths(sample[None, :5].float(), whitening(sample.T.cov(), 0.0))
    other = edge_lengths(mixed[None, :5].float(), whitening(mixed.T.cov(), 0.0))
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
        whitening(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), 0.0)


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
