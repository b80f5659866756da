"""Neighbour edges: cases drawn by hand, a naive loop, and what must not change them."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphkd.method import adjacency
from graphkd.method.adjacency import box_gaps

pytestmark = pytest.mark.method
module = import_module("graphkd.method.adjacency")  # the function has its name


def page(*boxes: tuple[float, float, float, float]) -> tuple[Tensor, Tensor]:
    return torch.tensor([boxes]), torch.ones(1, len(boxes), dtype=torch.bool)


def naive(boxes: list[list[float]], gap: float, nearest: int, margin: float) -> set[tuple[int, int]]:
    """The definition, one pair at a time."""
    count = len(boxes)

    def distance(i: int, j: int) -> float:
        dx = max(0.0, max(boxes[i][0], boxes[j][0]) - min(boxes[i][2], boxes[j][2]))
        dy = max(0.0, max(boxes[i][1], boxes[j][1]) - min(boxes[i][3], boxes[j][3]))
        return (dx**2 + dy**2) ** 0.5

    def blocked(i: int, j: int) -> bool:
        sides = []
        for axis in (0, 1):
            a, b = max(boxes[i][axis], boxes[j][axis]), min(boxes[i][axis + 2], boxes[j][axis + 2])
            low, high = min(a, b), max(a, b)
            cut = margin * (high - low)
            sides.append((low + cut, high - cut))
        return any(
            sides[0][0] < box[2] and sides[0][1] > box[0] and sides[1][0] < box[3] and sides[1][1] > box[1]
            for k, box in enumerate(boxes)
            if k not in (i, j)
        )

    heights = sorted(box[3] - box[1] for box in boxes)
    median = heights[(count - 1) // 2]
    close = {
        i: sorted((j for j in range(count) if j != i), key=lambda j, i=i: distance(i, j))[:nearest]
        for i in range(count)
    }
    return {
        (i, j)
        for i in range(count)
        for j in range(count)
        if i != j and (distance(i, j) <= gap * median or j in close[i] or i in close[j]) and not blocked(i, j)
    }


def edges(boxes: Tensor, valid: Tensor, **options: float) -> set[tuple[int, int]]:
    return {(int(i), int(j)) for i, j in adjacency(boxes, valid, **options)[0].nonzero()}  # type: ignore[arg-type]


def test_stacked_paragraphs_join_their_neighbours_only() -> None:
    boxes, valid = page((0, 0, 10, 2), (0, 3, 10, 5), (0, 6, 10, 8))
    assert edges(boxes, valid) == {(0, 1), (1, 0), (1, 2), (2, 1)}


def test_a_figure_between_two_regions_hides_them_from_each_other() -> None:
    boxes, valid = page((0, 0, 10, 2), (0, 2.5, 10, 9), (0, 9.5, 10, 11))
    assert (0, 2) not in edges(boxes, valid, gap=100.0)


def test_columns_join_across_the_gutter() -> None:
    boxes, valid = page((0, 0, 10, 4), (12, 0, 22, 4))
    assert edges(boxes, valid) == {(0, 1), (1, 0)}


def test_gaps_by_hand() -> None:
    boxes, _ = page((0, 0, 1, 1), (4, 5, 6, 7), (0.5, 0.5, 2, 2))
    gaps = box_gaps(boxes)[0]
    assert gaps[0, 1] == pytest.approx(5.0)  # 3 across, 4 down
    assert gaps[0, 2] == 0


boxes_strategy = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(1, 20), st.integers(1, 20)),
    min_size=1,
    max_size=9,
    unique=True,
)


def as_boxes(raw: list[tuple[int, int, int, int]]) -> list[list[float]]:
    # Odd multiples of a small step keep two distances from being equal, where either order would be right.
    return [
        [x + 0.013 * i * i, y + 0.007 * i, x + w + 0.011 * i, y + h + 0.017 * i * i]
        for i, (x, y, w, h) in enumerate(raw)
    ]


@given(boxes_strategy, st.sampled_from([0.0, 0.5, 1.0, 3.0]), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_equals_the_naive_loop(raw: list[tuple[int, int, int, int]], gap: float, nearest: int) -> None:
    boxes = as_boxes(raw)
    tensor = torch.tensor([boxes], dtype=torch.float32)
    valid = torch.ones(1, len(boxes), dtype=torch.bool)
    assert edges(tensor, valid, gap=gap, nearest=nearest) == naive(boxes, gap, nearest, 0.15)


@given(boxes_strategy, st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_permuting_nodes_permutes_edges(raw: list[tuple[int, int, int, int]], random: object) -> None:
    boxes = torch.tensor([as_boxes(raw)])
    valid = torch.ones(1, len(raw), dtype=torch.bool)
    order = list(range(len(raw)))
    random.shuffle(order)  # type: ignore[attr-defined]
    permuted = adjacency(boxes[:, order], valid)
    assert torch.equal(permuted, adjacency(boxes, valid)[:, order][:, :, order])


@given(boxes_strategy, st.sampled_from([0.25, 2.0, 8.0]), st.sampled_from([0.0, 64.0, 256.0]))
@settings(max_examples=30, deadline=None)
def test_moving_and_scaling_the_page_changes_nothing(
    raw: list[tuple[int, int, int, int]], scale: float, shift: float
) -> None:
    boxes = torch.tensor([raw], dtype=torch.float32)
    boxes[..., 2:] += boxes[..., :2]
    valid = torch.ones(1, len(raw), dtype=torch.bool)
    assert torch.equal(adjacency(boxes, valid), adjacency(boxes * scale + shift, valid))


def test_padding_takes_no_part() -> None:
    boxes, valid = page((0, 0, 10, 2), (0, 3, 10, 5), (0, 2, 10, 3))
    valid[0, 2] = False
    assert edges(boxes, valid) == {(0, 1), (1, 0)}


@pytest.mark.parametrize("count", [0, 1])
def test_no_or_one_node_has_no_edge(count: int) -> None:
    assert not adjacency(torch.rand(2, count, 4), torch.ones(2, count, dtype=torch.bool)).any()


def large_page(count: int, spread: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, validity, and the number of candidates of each node."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(1, count, 2, generator=generator) * spread
    size = torch.rand(1, count, 2, generator=generator) * torch.tensor([80.0, 20.0]) + 10
    boxes, valid = torch.cat([corner, corner + size], dim=-1), torch.rand(1, count, generator=generator) > 0.1
    gaps = box_gaps(boxes).masked_fill(~module.all_pairs(valid), torch.inf)
    near = gaps <= module._median_height(boxes, valid)[:, None, None]
    return boxes, valid, (near | module._nearest(gaps, 2)).sum(dim=-1)


@pytest.mark.parametrize("seed", range(12))
def test_a_large_page_has_the_edges_of_the_rule_where_the_bound_allows(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes, valid, candidates = large_page(100 + 7 * seed, 2500.0, seed)
    assert candidates.max() <= module.MAX_CANDIDATES
    bounded = adjacency(boxes, valid)
    monkeypatch.setattr(module, "UNBOUNDED_NODES", 10**6)
    assert torch.equal(bounded, adjacency(boxes, valid)) and bounded.any()


@pytest.mark.parametrize("seed", range(6))
def test_a_crowded_page_looks_at_the_nearest_candidates_of_each_node(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes, valid, candidates = large_page(150, 60.0, seed)
    assert candidates.max() > module.MAX_CANDIDATES
    bounded = adjacency(boxes, valid)
    monkeypatch.setattr(module, "UNBOUNDED_NODES", 10**6)
    whole = adjacency(boxes, valid)
    gaps = box_gaps(boxes).masked_fill(~module.all_pairs(valid), torch.inf)
    order = gaps.argsort(dim=-1, stable=True)[..., : module.MAX_CANDIDATES]
    nearest = torch.zeros_like(whole).scatter(-1, order, True)
    assert torch.equal(bounded, bounded.transpose(1, 2))
    assert torch.equal(bounded, whole & (nearest | nearest.transpose(1, 2)))
