"""A small page in numbers, which the tests of the method share."""

from __future__ import annotations

import torch
from torch import Tensor

from graphkd.batch import RegionPredictions
from graphkd.method import StatisticsAccumulator, TeacherStatistics
from graphkd.signals import TeacherSignals

TEXT = torch.tensor([True, True, False])
B, N, C, P, K = 2, 9, 6, 3, 3


def teacher_signals(nodes: tuple[int, ...] = (N, 5), seed: int = 0) -> TeacherSignals:
    generator = torch.Generator().manual_seed(seed)
    low = torch.stack([torch.rand(B, N, generator=generator) * 40, torch.arange(N).expand(B, N) * 12.0], dim=-1)
    size = torch.rand(B, N, 2, generator=generator) * torch.tensor([40.0, 6.0]) + torch.tensor([20.0, 4.0])
    return TeacherSignals(
        boxes=torch.cat([low, low + size], dim=-1),
        valid=torch.arange(N) < torch.tensor(nodes)[:, None],
        scores=torch.rand(B, N, generator=generator),
        classes=torch.randint(0, K, (B, N), generator=generator),
        logits=torch.randn(B, N, K + 1, generator=generator),
        deltas=torch.randn(B, N, K, 4, generator=generator),
        pooled=torch.randn(B, N, C, P, P, generator=generator),
    )


def statistics(signals: TeacherSignals) -> TeacherStatistics:
    accumulator = StatisticsAccumulator(text_classes=TEXT)
    accumulator.add(signals, signals.valid)
    return accumulator.finish()


def student_side(seed: int = 1) -> tuple[Tensor, RegionPredictions]:
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(B, N, C, P, P, generator=generator, requires_grad=True)
    logits = torch.randn(B, N, K + 1, generator=generator, requires_grad=True)
    deltas = torch.randn(B, N, K, 4, generator=generator, requires_grad=True)
    return pooled, RegionPredictions(logits=logits, deltas=deltas)
