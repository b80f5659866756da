"""Pages of hundreds of nodes: the graph of the rule, in time that grows with the square of the nodes."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor

from graphkd.method.adjacency import adjacency
from graphkd.method.merging import merge_text_nodes

pytestmark = pytest.mark.method
merging = import_module("graphkd.method.merging")


def column_page(count: int, seed: int) -> tuple[Tensor, ...]:
    """Boxes in columns, their lengths, which are text, and which are valid, of two pages."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(count)
    low = torch.stack([(place % 6) * 220.0, (place // 6) * 30.0], dim=-1).expand(2, count, 2)
    low = low + torch.rand(2, count, 2, generator=generator) * 8
    size = torch.rand(2, count, 2, generator=generator) * torch.tensor([60.0, 6.0]) + torch.tensor([120.0, 12.0])
    half = torch.rand(2, count, count, generator=generator)
    text = torch.rand(2, count, generator=generator) > 0.15
    valid = torch.rand(2, count, generator=generator) > 0.1
    return torch.cat([low, low + size], dim=-1), half + half.transpose(1, 2), text, valid


@pytest.mark.parametrize("seed", range(8))
def test_large_pages_merge_as_small_ones(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, lengths, text, valid = column_page(90 + 25 * seed, seed)
    adjacent = adjacency(boxes, valid)
    many = merge_text_nodes(adjacent, lengths, text, boxes, valid)
    monkeypatch.setattr(merging, "UNBOUNDED_NODES", 10**6)
    few = merge_text_nodes(adjacent, lengths, text, boxes, valid)
    assert torch.equal(many.cluster, few.cluster) and torch.equal(many.valid, few.valid)
    assert (many.cluster != torch.arange(boxes.shape[1])).any(), "something merged"


def test_sums_by_cluster_are_those_of_the_membership_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 9, (2, 30, 30), generator=generator).float()
    cluster = torch.randint(0, 30, (2, 30), generator=generator)
    member = merging.members(cluster).float()
    assert torch.equal(merging._sum_by_cluster(values, cluster), member @ values @ member.transpose(1, 2))
