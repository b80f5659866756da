"""Mahalanobis lengths of edges, as Euclidean distances between whitened descriptors.

Legend: ``B`` pages, ``N`` nodes a page, ``C`` channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def whitening(covariance: Tensor, shrinkage: float = 0.1) -> Tensor:
    """Give W with ``W^T W = (Sigma + g tr(Sigma)/C I)^-1``, so that ``|W (a - b)|`` is the Mahalanobis distance.

    Args:
        covariance: float [C, C], Sigma, symmetric and positive semi-definite.
        shrinkage: g, which keeps directions that the sample hardly saw from counting without bound; 0 needs a
            covariance of full rank.

    Returns:
        float32 [C, C], computed in float64: the inverse of the Cholesky factor.

    Raises:
        ValueError: where the shrunk covariance is not positive definite.
    """
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
    """Mahalanobis distance between every two nodes of a page, in standard deviations of the teacher.

    ``d_ij = sqrt((t_i - t_j)^T M (t_i - t_j))`` with ``M = W^T W`` (arXiv 2402.11401 names the distance; the
    covariance is that of the teacher's descriptors on its dataset).

    Args:
        nodes: float [B, N, C] descriptors of either network; fp16 and bf16 are taken to fp32 first.
        whiten: float32 [C, C], W from :func:`whitening`.

    Returns:
        float32 [B, N, N], symmetric, 0 on the diagonal; the gradient of a length 0 is 0.
    """
    white = nodes.float() @ whiten.float().T
    squares = white.square().sum(dim=-1)
    products = white @ white.transpose(1, 2)
    squared = (squares[:, :, None] + squares[:, None, :] - 2 * products).clamp(min=0)
    return safe_sqrt(squared)


def safe_sqrt(squared: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0 instead of infinite; any shape, values >= 0."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1).sqrt(), 0)
