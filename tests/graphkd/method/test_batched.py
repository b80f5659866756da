"""Graph and losses run without a loop over pages or nodes, and without waiting for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from graphkd.batch import RegionPredictions
from graphkd.method import GraphConfig, LossWeights, TeacherStatistics, build_graph, graphkd_loss
from graphkd.signals import TeacherSignals

pytestmark = pytest.mark.method

# Each of these gives a number or a shape that only the device knows: on a GPU the host would wait for it.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item")


class Operations(TorchDispatchMode):
    """Counts operations, and remembers those that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.waiting: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.count += 1
        indices = args[1] if "index" in name and len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
        by_mask = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
        if by_mask or any(word in name for word in WAITING):
            self.waiting.append(name)
        return func(*args, **(kwargs or {}))


Inputs = tuple[TeacherSignals, TeacherStatistics, torch.Tensor, RegionPredictions]


def inputs(pages: int, nodes: int, device: str = "cpu", channels: int = 8, classes: int = 4) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(pages, nodes, 2, generator=generator) * 400
    signals = TeacherSignals(
        boxes=torch.cat([low, low + 5 + 60 * torch.rand(pages, nodes, 2, generator=generator)], dim=-1),
        valid=torch.arange(nodes).expand(pages, nodes) < nodes - 2,
        scores=torch.rand(pages, nodes, generator=generator),
        classes=torch.zeros(pages, nodes, dtype=torch.long),
        logits=torch.randn(pages, nodes, classes + 1, generator=generator),
        deltas=torch.randn(pages, nodes, classes, 4, generator=generator),
        pooled=torch.randn(pages, nodes, channels, 3, 3, generator=generator),
    )
    statistics = TeacherStatistics(
        mean=torch.zeros(channels),
        covariance=torch.eye(channels),
        whitening=torch.eye(channels),
        mean_square=1.0,
        discriminant=torch.ones(2 * channels),
        thresholds={"teacher_class": 0.0, "moments": 0.0, "covariance_trace": -1.0},
        text_classes=torch.tensor([True] * 2 + [False] * (classes - 2)),
        accuracy={},
    )
    shapes = ((channels, 3, 3), (classes + 1,), (classes, 4))
    student = [torch.randn(pages, nodes, *shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    regions = RegionPredictions(logits=student[1], deltas=student[2])
    return signals.to(device), statistics.to(device), student[0], regions


def run(given: Inputs) -> None:
    signals, statistics, pooled, regions = given
    graph = build_graph(signals, statistics, GraphConfig())
    terms = graphkd_loss(pooled, regions, signals, graph, statistics, LossWeights())
    torch.stack(list(terms.values())).sum().backward()


def step(pages: int, nodes: int) -> Operations:
    given = inputs(pages, nodes)
    with Operations() as operations:
        run(given)
    return operations


def test_the_number_of_operations_does_not_grow_with_pages_or_nodes() -> None:
    assert step(1, 6).count == step(8, 6).count == step(1, 40).count


def test_nothing_waits_for_the_device() -> None:
    assert step(2, 12).waiting == []


def test_the_watch_sees_what_waits() -> None:
    values = torch.arange(4.0)
    with Operations() as operations:
        values[values > 1].sum().item()
    assert len(operations.waiting) >= 2


@pytest.mark.gpu
def test_nothing_synchronises_on_a_gpu() -> None:
    given = inputs(2, 12, "cuda")
    run(given)  # the first call may synchronise to load kernels
    try:
        torch.cuda.set_sync_debug_mode("error")
        run(given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
