"""Statistics of a teacher's descriptors over a dataset: the constants of the graph and its lengths.

Computed in one pass over a fixed sample of pages before training or caching, so that a live and a cached teacher use
the same numbers. Symbols: ``B`` pages, ``N`` nodes per page, ``C`` channels, ``K`` classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphkd.method.edges import CovarianceAccumulator, descriptors, whitening
from graphkd.method.text import Categorizer, moments, text_score
from graphkd.signals import TeacherSignals

CHANNEL_SHRINKAGE = 0.1  # bounds the weight of channels with little variance


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherStatistics:
    """Statistics of a teacher."""

    mean: Tensor
    """float32 [C]: mean descriptor."""
    covariance: Tensor
    """float32 [C, C]: covariance of descriptors."""
    whitening: Tensor
    """float32 [C, C]: W with ``|W (a - b)|`` the Mahalanobis distance."""
    mean_square: float
    """Mean square of the pooled features: the scale of node errors."""
    discriminant: Tensor
    """float32 [2C]: weights of the linear text discriminant on mean and log variance."""
    thresholds: dict[Categorizer, float]
    """Score of each categoriser above which a node is text."""
    text_classes: Tensor
    """bool [K]: classes of text."""
    accuracy: dict[Categorizer, float]
    """Balanced accuracy of each categoriser on the nodes that it was fitted to, 0 to 1."""

    @property
    def channel_scale(self) -> Tensor:
        """float32 [C]: ``1 / (sigma_c^2 + g mean sigma^2)``, sigma^2 the variance of descriptors, g = .1."""
        variance = self.covariance.diagonal()
        return 1 / (variance + CHANNEL_SHRINKAGE * variance.mean()).clamp(min=1e-12)

    def to(self, device: torch.device | str) -> TeacherStatistics:
        """Move every tensor to ``device``."""
        return TeacherStatistics(
            mean=self.mean.to(device),
            covariance=self.covariance.to(device),
            whitening=self.whitening.to(device),
            mean_square=self.mean_square,
            discriminant=self.discriminant.to(device),
            thresholds=self.thresholds,
            text_classes=self.text_classes.to(device),
            accuracy=self.accuracy,
        )


CATEGORIZERS: tuple[Categorizer, ...] = ("teacher_class", "moments", "covariance_trace")


@dataclass(kw_only=True, slots=True)
class StatisticsAccumulator:
    """Accumulates float64 sums over pages, and the scores of nodes with ground truth."""

    text_classes: Tensor
    """bool [K]."""
    _covariance: CovarianceAccumulator = field(default_factory=CovarianceAccumulator)
    _sum_of_mean_squares: float = 0.0
    _moments: list[Tensor] = field(default_factory=list)
    _pooled_scores: dict[Categorizer, list[Tensor]] = field(default_factory=dict)
    _is_text: list[Tensor] = field(default_factory=list)

    def add(self, signals: TeacherSignals, labelled: Tensor) -> None:
        """Add one batch; ``labelled`` bool [B, N] marks nodes whose class is ground truth."""
        self._covariance.add(descriptors(signals.pooled)[signals.valid])
        self._sum_of_mean_squares += float(signals.pooled[signals.valid].double().square().mean(dim=(-3, -2, -1)).sum())
        known = labelled & signals.valid
        self._moments.append(moments(signals.pooled[known]).cpu())
        self._is_text.append(self.text_classes[signals.classes[known].cpu()])
        self._add_scores(signals, known)

    def _add_scores(self, signals: TeacherSignals, known: Tensor) -> None:
        logits = None if signals.logits is None else signals.logits[known].cpu()
        for name in ("teacher_class", "covariance_trace"):
            if name == "teacher_class" and logits is None:
                continue
            score = text_score(signals.pooled[known].cpu(), logits, categorizer=name, text_classes=self.text_classes)
            self._pooled_scores.setdefault(name, []).append(score)

    def finish(self, shrinkage: float = 0.1) -> TeacherStatistics:
        """Compute the statistics.

        Raises:
            ValueError: if fewer than two nodes were added.
        """
        mean, covariance = self._covariance.mean(), self._covariance.covariance()
        is_text, features = torch.cat(self._is_text), torch.cat(self._moments)
        discriminant = fit_discriminant(features, is_text)
        scores = {name: torch.cat(parts) for name, parts in self._pooled_scores.items()}
        scores["moments"] = features @ discriminant
        fitted = {name: fit_threshold(score, is_text) for name, score in scores.items()}
        return TeacherStatistics(
            mean=mean.float(),
            covariance=covariance.float(),
            whitening=whitening(self._covariance, shrinkage),
            mean_square=self._sum_of_mean_squares / self._covariance.count,
            discriminant=discriminant,
            thresholds={name: threshold for name, (threshold, _) in fitted.items()},
            text_classes=self.text_classes,
            accuracy={name: accuracy for name, (_, accuracy) in fitted.items()},
        )


def fit_discriminant(features: Tensor, is_text: Tensor, shrinkage: float = 0.1) -> Tensor:
    """Fisher's linear discriminant with shrinkage: features [n, F], labels bool [n] -> weights float32 [F].

    Returns zeros if one of the two categories is missing.
    """
    if is_text.all() or not is_text.any():
        return torch.zeros(features.shape[1])
    groups = [features[is_text].double(), features[~is_text].double()]
    centred = torch.cat([group - group.mean(dim=0) for group in groups])
    within = centred.T @ centred / len(centred)
    within += shrinkage * within.trace() / len(within) * torch.eye(len(within), dtype=within.dtype)
    return torch.linalg.solve(within, groups[0].mean(dim=0) - groups[1].mean(dim=0)).float()


def fit_threshold(scores: Tensor, is_text: Tensor) -> tuple[float, float]:
    """Return the threshold with the best balanced accuracy, and that accuracy: scores [n], labels bool [n].

    The threshold is halfway between two scores; -inf or +inf if there is one category only.
    """
    if len(is_text) == 0 or is_text.all():
        return -torch.inf, 1.0
    if not is_text.any():
        return torch.inf, 1.0
    order = scores.argsort()
    ordered, labels = scores[order].double(), is_text[order].double()
    recall_text = 1 - labels.cumsum(0) / labels.sum()
    recall_other = (1 - labels).cumsum(0) / (1 - labels).sum()
    accuracy = (recall_text + recall_other) / 2
    usable = torch.cat([ordered[1:] > ordered[:-1], torch.tensor([True])])
    best = int(accuracy.masked_fill(~usable, -1).argmax())
    following = ordered[min(best + 1, len(ordered) - 1)]
    return float((ordered[best] + following) / 2), float(accuracy[best])
