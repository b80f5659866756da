"""Sampling of anchors and regions from a generator keyed by the page, never from the global one.

A page then draws the same sample whatever rank, batch or restart it is met in. What is drawn are ranks among the
candidates, in time and memory that grow with the sample and not with the hundred thousands of anchors of a page.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """Sampled entries of each page, padded to one number."""

    indices: Tensor
    """int64 [B, S]: positives first, then negatives; 0 where there is none."""
    positive: Tensor
    """bool [B, S]"""
    negative: Tensor
    """bool [B, S]; neither where a page has fewer entries than were asked for."""

    @property
    def valid(self) -> Tensor:
        """Bool [B, S]: which entries there are."""
        return self.positive | self.negative


class SeededSampler:
    """Picks a fixed number of positive and negative entries per page, as torchvision's sampler does, by seed.

    Labels are float or int: 1 and more foreground, 0 background, negative ignored.
    """

    def __init__(self, size: int, positive_fraction: float, salt: int) -> None:
        self.size = size
        self.max_positives = int(size * positive_fraction)
        self.salt = salt
        self.seeds: list[int] = []

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Called by torchvision after ``seeds`` was set: uint8 masks [A_i] of each page's positives and negatives."""
        assert len(labels) == len(self.seeds), "one seed per page must be set before sampling"
        padded = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-1)
        sampled = self.sample(padded, self.seeds)
        masks = [_mask(padded, sampled.indices, chosen) for chosen in (sampled.positive, sampled.negative)]
        positives, negatives = ([mask[: len(page)] for mask, page in zip(each, labels, strict=True)] for each in masks)
        return positives, negatives

    def sample(self, labels: Tensor, seeds: list[int]) -> Sampled:
        """Sample every page of ``labels`` [B, A], with one seed per page."""
        candidates = torch.stack([labels >= 1, labels == 0])  # [2, B, A]
        ranked = candidates.cumsum(dim=-1, dtype=torch.int32)
        counts = ranked[..., -1].T.tolist()
        ranks = np.zeros((2, len(seeds), self.size), dtype=np.int32)  # 1 is the first candidate; 0 for none
        for page, (seed, (positives, negatives)) in enumerate(zip(seeds, counts, strict=True)):
            random = np.random.default_rng((seed * 2 + self.salt) % (1 << 63))
            first = _draw(random, positives, self.max_positives)
            rest = _draw(random, negatives, self.size - len(first))
            ranks[0, page, : len(first)] = first
            ranks[1, page, len(first) : len(first) + len(rest)] = rest
        drawn = torch.from_numpy(ranks).to(labels.device, non_blocking=True)
        positive, negative = drawn > 0
        places = torch.searchsorted(ranked, drawn)
        indices = torch.where(positive, places[0], torch.where(negative, places[1], 0))
        return Sampled(indices=indices, positive=positive, negative=negative)


def _draw(random: np.random.Generator, candidates: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """At most ``count`` different ranks from 1 to ``candidates``."""
    if candidates <= count:
        return np.arange(1, candidates + 1)
    return 1 + random.choice(candidates, count, replace=False, shuffle=False)


def _mask(like: Tensor, indices: Tensor, chosen: Tensor) -> Tensor:
    pages, entries = like.shape
    mask = torch.zeros(pages, entries + 1, dtype=torch.uint8, device=like.device)  # the last for what was not chosen
    return mask.scatter(1, indices.masked_fill(~chosen, entries), 1)[:, :-1]
