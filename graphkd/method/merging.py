"""Merging text nodes, so that text does not outweigh figures and tables.

Symbols: ``B`` pages, ``N`` nodes per page (padded); a cluster is identified by the index of one of its members.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphkd.method.adjacency import UNBOUNDED_NODES, meets_any, take

MAX_PARTNERS = 8  # that are looked at on pages of more than UNBOUNDED_NODES nodes
ROUNDS = 6  # pages of 64 nodes need three or four; each round at least halves a chain of equal nodes


@dataclass(frozen=True, kw_only=True, slots=True)
class Merge:
    """A partition of each page's nodes into clusters."""

    cluster: Tensor
    """int64 [B, N]: cluster of each node; its own index if it was not merged."""
    valid: Tensor
    """bool [B, N]: nodes whose index identifies a cluster."""

    def membership(self, weights: Tensor) -> Tensor:
        """Averaging matrix with rows that sum to 1: weights [B, N] such as areas -> float32 [B, N clusters, N]."""
        member = members(self.cluster) * weights[:, None, :].float()
        return member / member.sum(dim=-1, keepdim=True).clamp(min=1e-12)


def merge_text_nodes(
    adjacent: Tensor, lengths: Tensor, text: Tensor, boxes: Tensor, valid: Tensor, *, rounds: int = ROUNDS
) -> Merge:
    """Merge mutually nearest adjacent text nodes of one column, in rounds, until text no longer dominates.

    Two adjacent text clusters merge if each is the other's nearest by average edge length, they overlap horizontally by
    at least half of the narrower one, and the union of their boxes intersects no non-text node. A page stops at
    ``max(non-text nodes, ceil(sqrt(initial text nodes)))`` text clusters, when nothing can merge, or after ``rounds``.
    The paper merges "iteratively" without a stopping rule; this one is explained in ``docs/method.md``.

    Args:
        adjacent: bool [B, N, N], symmetric.
        lengths: float [B, N, N], edge lengths of the teacher.
        text: bool [B, N].
        boxes: float [B, N, 4], xyxy.
        valid: bool [B, N], False for padding.
        rounds: number of rounds, fixed so that nothing synchronises with the host.
    """
    text = text & valid
    other = valid & ~text
    starting = text.sum(dim=1)
    target = torch.maximum(other.sum(dim=1), starting.float().sqrt().ceil().long())
    cluster = torch.arange(boxes.shape[1], device=boxes.device).expand_as(text).clone()
    for _ in range(rounds):
        cluster = _round(cluster, adjacent, lengths.float(), text, other, boxes.float(), target)
    own = torch.arange(boxes.shape[1], device=boxes.device)
    return Merge(cluster=cluster, valid=valid & (cluster == own))


def _round(
    cluster: Tensor, adjacent: Tensor, lengths: Tensor, text: Tensor, other: Tensor, boxes: Tensor, target: Tensor
) -> Tensor:
    own = torch.arange(cluster.shape[1], device=cluster.device)
    alive = text & (cluster == own)
    extent = cluster_boxes(cluster, boxes)
    possible = alive[:, :, None] & alive[:, None, :] & (own[:, None] != own) & _same_column(extent)
    linked, average = _between_clusters(cluster, adjacent, lengths, text)
    distance = average.masked_fill(~(linked & possible), torch.inf)
    shortest, partner = _nearest_with_free_union(distance, extent, boxes, other)
    mutual = (partner.gather(1, partner) == own) & shortest.isfinite()
    absorbed = mutual & (partner < own)  # of each pair, the higher index joins the lower
    rank = shortest.masked_fill(~absorbed, torch.inf).argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    absorbed &= rank < (alive.sum(dim=1) - target)[:, None]
    return torch.where(absorbed, partner, own.expand_as(cluster)).gather(1, cluster)


def _between_clusters(cluster: Tensor, adjacent: Tensor, lengths: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Whether text members of two clusters are adjacent, and the mean length between them: [B, N, N] each.

    Time is quadratic in N on pages of more than ``UNBOUNDED_NODES`` nodes, and a matrix product on smaller ones.
    """
    if cluster.shape[1] <= UNBOUNDED_NODES:
        member = (members(cluster) & text[:, None, :]).float()
        return _linked(member, adjacent), _average_length(member, lengths)
    both = text[:, :, None] & text[:, None, :]
    links, total = (_sum_by_cluster((values * both).float(), cluster) for values in (adjacent, lengths))
    size = torch.zeros_like(total[..., 0]).scatter_add(1, cluster, text.float())
    return links > 0, total / (size[:, :, None] * size[:, None, :]).clamp(min=1)


def _nearest_with_free_union(distance: Tensor, extent: Tensor, boxes: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the nearest cluster whose union with each is free of other nodes, inf without one, and its index.

    On pages of more than ``UNBOUNDED_NODES`` nodes, only the ``MAX_PARTNERS`` nearest clusters of each are looked at.
    """
    if distance.shape[1] <= UNBOUNDED_NODES:
        nearest = distance.masked_fill(~_union_is_free(extent, boxes, other), torch.inf).min(dim=-1)
        return nearest.values, nearest.indices
    order = distance.argsort(dim=-1, stable=True)[..., :MAX_PARTNERS]
    partners = take(extent, order)
    low = torch.minimum(extent[:, :, None, :2], partners[..., :2])
    high = torch.maximum(extent[:, :, None, 2:], partners[..., 2:])
    blocked = meets_any(low, high, boxes, other[:, None, None, :])
    nearest = distance.gather(-1, order).masked_fill(blocked, torch.inf).min(dim=-1)
    return nearest.values, order.gather(-1, nearest.indices[..., None])[..., 0]


def _sum_by_cluster(values: Tensor, cluster: Tensor) -> Tensor:
    """Sums over the members of each pair of clusters: [B, N, N], [B, N] -> [B, N, N]."""
    pages, nodes = cluster.shape
    index = (cluster + nodes * torch.arange(pages, device=cluster.device)[:, None]).flatten()
    for _ in range(2):  # rows, then columns
        flat = values.new_zeros(pages * nodes, nodes).index_add_(0, index, values.flatten(0, 1))
        values = flat.view(pages, nodes, nodes).transpose(1, 2)
    return values


def members(cluster: Tensor) -> Tensor:
    """Membership matrix: int64 [B, N] -> bool [B, N clusters, N nodes]."""
    own = torch.arange(cluster.shape[1], device=cluster.device)
    return cluster[:, None, :] == own[:, None]


def cluster_boxes(cluster: Tensor, boxes: Tensor) -> Tensor:
    """Union box of every cluster's members: [B, N], [B, N, 4] -> [B, N, 4]; indices without members keep their box."""
    index = cluster[..., None].expand(-1, -1, 2)
    low = boxes[..., :2].scatter_reduce(1, index, boxes[..., :2], "amin", include_self=True)
    high = boxes[..., 2:].scatter_reduce(1, index, boxes[..., 2:], "amax", include_self=True)
    return torch.cat([low, high], dim=-1)


def _linked(member: Tensor, adjacent: Tensor) -> Tensor:
    return member @ adjacent.to(member.dtype) @ member.transpose(1, 2) > 0


def _average_length(member: Tensor, lengths: Tensor) -> Tensor:
    size = member.sum(dim=-1)
    pairs = (size[:, :, None] * size[:, None, :]).clamp(min=1)
    return member @ lengths @ member.transpose(1, 2) / pairs


def _same_column(extent: Tensor) -> Tensor:
    low = torch.maximum(extent[:, :, None, 0], extent[:, None, :, 0])
    high = torch.minimum(extent[:, :, None, 2], extent[:, None, :, 2])
    width = extent[..., 2] - extent[..., 0]
    return high - low >= 0.5 * torch.minimum(width[:, :, None], width[:, None, :])


def _union_is_free(extent: Tensor, boxes: Tensor, other: Tensor) -> Tensor:
    """Whether the union of two clusters' boxes intersects no non-text box: bool [B, N, N], in memory quadratic in N.

    The union of i and j starts left of k's right edge if i or j does, and likewise on all four sides. Expanded, the
    conjunction of these four disjunctions is a sum of 16 products of a bit of (i, k) and a bit of (j, k): one matrix
    product instead of a table of all triples.
    """
    sides = [
        extent[..., None, 0] < boxes[:, None, :, 2],
        extent[..., None, 2] > boxes[:, None, :, 0],
        extent[..., None, 1] < boxes[:, None, :, 3],
        extent[..., None, 3] > boxes[:, None, :, 1],
    ]
    by_first = other[:, None, None, :].expand(*extent.shape[:2], 1, -1)
    by_second = torch.ones_like(by_first)
    for side in sides:  # either the first or the second node meets the condition
        by_first = torch.cat([by_first & side[:, :, None], by_first], dim=2)
        by_second = torch.cat([by_second, by_second & side[:, :, None]], dim=2)
    met = by_first.flatten(2).float() @ by_second.flatten(2).float().transpose(1, 2)
    return met == 0
