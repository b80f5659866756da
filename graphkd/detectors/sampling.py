"""Sampling of anchors and regions by the seed of their page instead of torch's global generator.

The sample of a page is the same on any rank, in any batch, on any device and after any restart. Every entry gets a
random number that is a hash of the seed and its index, and the lowest are taken, so that no count crosses to the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

VERSION = 2
"""Of what is drawn. Version 1 drew with numpy on the host."""
WORD = 0xFFFFFFFF
INDEX_BITS = 24  # of at most 2^24 entries of a page
NEVER = 1 << 62


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

    Args:
        size: S, entries per page.
        positive_fraction: maximum share of positives.
        salt: makes the draws of two samplers of a page independent.
    """

    def __init__(self, size: int, positive_fraction: float, salt: int) -> None:
        self.size = size
        self.max_positives = int(size * positive_fraction)
        self.salt = salt

    def sample(self, labels: Tensor, seeds: Tensor) -> Sampled:
        """Sample every page.

        Args:
            labels: [B, A], at least 1 for foreground, 0 for background, negative for ignored.
            seeds: int64 [B], on the same device.
        """
        keys = _keys(seeds, self.salt, labels.shape[1])
        chosen, count = _lowest(keys, labels >= 1, min(self.max_positives, self.size))
        others, other_count = _lowest(keys, labels == 0, self.size)
        place = torch.arange(self.size, device=labels.device)
        positive = place < count
        negative = ~positive & (place - count < other_count)
        first = torch.nn.functional.pad(chosen, (0, self.size - chosen.shape[1]))
        rest = others.gather(1, (place - count).clamp(min=0))
        indices = torch.where(positive, first, torch.where(negative, rest, 0))
        return Sampled(indices=indices, positive=positive, negative=negative)


def _lowest(keys: Tensor, candidates: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices [B, count] of the candidates with the lowest keys, and how many there are [B, 1]."""
    usable = torch.where(candidates, keys, NEVER)
    lowest = usable.topk(min(count, keys.shape[1]), dim=1, largest=False).values
    found = torch.nn.functional.pad(lowest, (0, count - lowest.shape[1]), value=NEVER)
    return found & ((1 << INDEX_BITS) - 1), (found < NEVER).sum(dim=1, keepdim=True)


def _keys(seeds: Tensor, salt: int, entries: int) -> Tensor:
    """Distinct random integers int64 [B, A], whose lowest bits are the entry's index."""
    assert entries <= 1 << INDEX_BITS, f"{entries} entries a page"
    index = torch.arange(entries, device=seeds.device)
    low, high = _hash(seeds & WORD, salt)[:, None], _hash((seeds >> 32) & WORD, salt + 1)[:, None]
    return (_hash(_hash(index ^ low, 2) ^ high, 3) << INDEX_BITS) | index


def _hash(values: Tensor, salt: int) -> Tensor:
    """Mix the bits of 32-bit integers in int64 (the "lowbias32" constants of C. Wellons' hash prospector)."""
    mixed = (values + salt * 0x9E3779B9) & WORD
    mixed = ((mixed ^ (mixed >> 16)) * 0x7FEB352D) & WORD
    mixed = ((mixed ^ (mixed >> 15)) * 0x846CA68B) & WORD
    return mixed ^ (mixed >> 16)
