"""Sampling of anchors and regions with a generator seeded by the page instead of the global one.

The sample of a page is then the same on any rank, in any batch and after any restart. Time and memory of drawing grow
with the sample size, not with the hundreds of thousands of anchors per page.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """Sampled entries of each page, padded to S."""

    indices: Tensor
    """int64 [B, S]: positives first, then negatives; 0 for padding."""
    positive: Tensor
    """bool [B, S]."""
    negative: Tensor
    """bool [B, S]; padding is neither positive nor negative."""

    @property
    def valid(self) -> Tensor:
        """Bool [B, S]: False for padding."""
        return self.positive | self.negative


class SeededSampler:
    """Samples a fixed number of positive and negative entries per page like torchvision's sampler, but by seed.

    Labels are float or int: at least 1 for foreground, 0 for background, negative for ignored.
    """

    def __init__(self, size: int, positive_fraction: float, salt: int) -> None:
        self.size = size
        self.max_positives = int(size * positive_fraction)
        self.salt = salt
        self.seeds: list[int] = []

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return uint8 masks [A_i] of each page's positives and negatives; torchvision calls it with ``seeds`` set."""
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
        ranks = np.zeros((2, len(seeds), self.size), dtype=np.int32)  # 1 is the first candidate, 0 is padding
        for page, (seed, (positives, negatives)) in enumerate(zip(seeds, counts, strict=True)):
            random = np.random.default_rng((seed * 2 + self.salt) % (1 << 63))
            first = _draw(random, positives, self.max_positives)
            rest = _draw(random, negatives, self.size - len(first))
            ranks[0, page, : len(first)] = first
            ranks[1, page, len(first) : len(first) + len(rest)] = rest
        drawn = torch.from_numpy(ranks).to(labels.device, non_blocking=True)
        positive, negative = drawn > 0
        found = torch.searchsorted(ranked, drawn)
        indices = torch.where(positive, found[0], torch.where(negative, found[1], 0))
        return Sampled(indices=indices, positive=positive, negative=negative)


def _draw(random: np.random.Generator, candidates: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Draw up to ``count`` distinct integers from 1 to ``candidates``."""
    if candidates <= count:
        return np.arange(1, candidates + 1)
    return 1 + random.choice(candidates, count, replace=False, shuffle=False)


def _mask(like: Tensor, indices: Tensor, chosen: Tensor) -> Tensor:
    pages, entries = like.shape
    mask = torch.zeros(pages, entries + 1, dtype=torch.uint8, device=like.device)  # the last column collects padding
    return mask.scatter(1, indices.masked_fill(~chosen, entries), 1)[:, :-1]
