"""Sampling of anchors and regions from a generator keyed by the page, never from the global one.

A page then draws the same sample whatever rank, batch or restart it is met in.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KeyedSampler:
    """Picks a fixed number of positive and negative entries per page, as torchvision's sampler does, by seed.

    Set ``seeds`` (one int per page) before calling. Labels are float or int [A]: 1 and more foreground,
    0 background, negative ignored.
    """

    def __init__(self, size: int, positive_fraction: float, salt: int) -> None:
        self.size = size
        self.max_positives = int(size * positive_fraction)
        self.salt = salt
        self.seeds: list[int] = []

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Give a mask of the sampled positives and one of the sampled negatives for each page."""
        assert len(labels) == len(self.seeds), "one seed per page must be set before sampling"
        masks = [self._sample(page, seed) for page, seed in zip(labels, self.seeds, strict=True)]
        return [positive for positive, _ in masks], [negative for _, negative in masks]

    def _sample(self, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed((seed * 2 + self.salt) % (1 << 63))
        positives = _choose(torch.where(labels >= 1)[0], self.max_positives, generator)
        negatives = _choose(torch.where(labels == 0)[0], self.size - len(positives), generator)
        return _mask(labels, positives), _mask(labels, negatives)


def _choose(indices: Tensor, count: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(len(indices), generator=generator)[:count]
    return indices[order.to(indices.device)]


def _mask(like: Tensor, indices: Tensor) -> Tensor:
    mask = torch.zeros(like.shape, dtype=torch.uint8, device=like.device)
    mask[indices] = 1
    return mask
