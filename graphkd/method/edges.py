"""Edge lengths: Mahalanobis distance or cosine distance between node descriptors.

Symbols: ``B`` pages, ``N`` nodes per page, ``C`` channels, ``n`` descriptors of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

Lengths = Literal["mahalanobis", "cosine"]


@dataclass(slots=True)
class CovarianceAccumulator:
    """Mean and covariance of descriptors added in parts, from float64 sums on the CPU."""

    count: int = 0
    """Number of descriptors added."""
    _sum: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    _outer: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))

    def add(self, nodes: Tensor) -> None:
        """Add descriptors, float [n, C]."""
        rows = nodes.double().cpu()
        if not self.count and not self._sum.numel():
            self._sum, self._outer = rows.new_zeros(rows.shape[1]), rows.new_zeros(rows.shape[1], rows.shape[1])
        self.count += len(rows)
        self._sum += rows.sum(dim=0)
        self._outer += rows.T @ rows

    def mean(self) -> Tensor:
        """Mean descriptor, float64 [C]. Raises ValueError if fewer than two descriptors were added."""
        self._require_two()
        return self._sum / self.count

    def covariance(self) -> Tensor:
        """Unbiased covariance, float64 [C, C]. Raises ValueError if fewer than two descriptors were added."""
        mean = self.mean()
        return (self._outer - self.count * torch.outer(mean, mean)) / (self.count - 1)

    def _require_two(self) -> None:
        if self.count < 2:
            raise ValueError(f"statistics need at least 2 nodes, got {self.count}; give pages with regions on them")


def whitening(sample: Tensor | CovarianceAccumulator, shrinkage: float = 0.1) -> Tensor:
    """Return W with ``W^T W = (Sigma + g tr(Sigma)/C I)^-1``, so that ``|W (a - b)|`` is the Mahalanobis distance.

    Args:
        sample: descriptors, float [n, C], or an accumulator of them; Sigma is their covariance.
        shrinkage: g, which bounds the weight of directions with little variance; 0 needs a covariance of full rank.
            The form of Ledoit and Wolf (2004), with g given instead of estimated.

    Returns:
        float32 [C, C], computed in float64: the inverse of the Cholesky factor.

    Raises:
        ValueError: if there are fewer than two descriptors, or the shrunk covariance is not positive definite.
    """
    if isinstance(sample, Tensor):
        descriptors_seen, sample = sample, CovarianceAccumulator()
        sample.add(descriptors_seen)
    return whitening_of(sample.covariance(), shrinkage)


def whitening_of(covariance: Tensor, shrinkage: float = 0.1) -> Tensor:
    """:func:`whitening` of a known covariance, float [C, C], symmetric and positive semi-definite."""
    sigma = covariance.double()
    channels = sigma.shape[0]
    eye = torch.eye(channels, dtype=sigma.dtype, device=sigma.device)
    factor, failed = torch.linalg.cholesky_ex(sigma + shrinkage * sigma.trace() / channels * eye)
    if failed.any():
        raise ValueError(
            f"the covariance [{channels}, {channels}] with shrinkage {shrinkage} is not positive definite; "
            "give a larger shrinkage or more nodes"
        )
    return torch.linalg.solve_triangular(factor, eye, upper=False).float()


def descriptors(pooled: Tensor) -> Tensor:
    """Spatial mean of pooled features in float32: [..., C, P, P] -> [..., C]."""
    return pooled.float().mean(dim=(-2, -1))


def edge_lengths(nodes: Tensor, whiten: Tensor) -> Tensor:
    """Mahalanobis distance between each pair of nodes of a page, in standard deviations of the teacher.

    ``d_ij = sqrt((t_i - t_j)^T M (t_i - t_j))`` with ``M = W^T W`` (the distance of arXiv 2402.11401; the
    covariance is that of the teacher's descriptors on its dataset).

    Args:
        nodes: float [B, N, C] descriptors of either network; fp16 and bf16 are converted to fp32.
        whiten: float32 [C, C], W from :func:`whitening`.

    Returns:
        float32 [B, N, N], symmetric, 0 on the diagonal; the gradient of a length of 0 is 0.
    """
    white = nodes.float() @ whiten.float().T
    squares = white.square().sum(dim=-1)
    products = white @ white.transpose(1, 2)
    squared = (squares[:, :, None] + squares[:, None, :] - 2 * products).clamp(min=0)
    own = torch.eye(nodes.shape[1], dtype=torch.bool, device=nodes.device)
    return safe_sqrt(squared.masked_fill(own, 0))


def cosine_lengths(nodes: Tensor) -> Tensor:
    """``1 - cos(t_i, t_j)`` between each pair of nodes of a page: the edges of Dsig (Chen et al., ICCV 2021).

    Args:
        nodes: float [B, N, C] descriptors, or [B, N, C P P] flattened features; converted to fp32.

    Returns:
        float32 [B, N, N], symmetric, 0 to 2, 0 on the diagonal; a node of zeros has length 1 to all others.
    """
    unit = normalize(nodes.float(), dim=-1)
    own = torch.eye(nodes.shape[1], dtype=torch.bool, device=nodes.device)
    return (1 - unit @ unit.transpose(1, 2)).masked_fill(own, 0)


def safe_sqrt(squared: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0 instead of infinite; any shape, values >= 0."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1).sqrt(), 0)
