"""Cost of distillation relative to training the student alone: graph and losses, and the whole step.

    python -m benchmarks.step_cost
    python -m benchmarks.step_cost --canvas 1184 832 --pages 2

Ratios within one run, median of interleaved pairs with the smallest and the largest. The student is a ResNet-18 with
the published widths. Small pages make the student's own step cheap, so the shares shown are above those at 800 px.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import finish, interleaved, ratio
from graphkd.batch import PageBatch, RegionPredictions
from graphkd.method import GraphConfig, LossWeights, TeacherStatistics, build_graph, graphkd_loss
from graphkd.signals import TeacherSignals
from pipeline.cache.build import build_cache, local_builders
from pipeline.config import RunConfig, resolve
from pipeline.context import RunContext
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.loading.augmentation import EVALUATION_VIEW
from pipeline.data.loading.loader import PageDataset, collate
from pipeline.data.loading.order import SampleRef
from pipeline.data.prepare.pack import pack
from pipeline.synth import write_pages
from pipeline.train.precision import apply_precision_and_compile, autocast
from pipeline.train.run import train_run
from pipeline.train.signal_source import signal_source
from pipeline.training_step import build_training_step

CHANNELS, SIDE, CLASSES = 256, 7, 11


def graph_work(pages: int, nodes: int, device: torch.device) -> Callable[[], None]:
    """Graph and losses of ``pages`` pages with ``nodes`` nodes, forward and backward, on random features."""
    generator = torch.Generator().manual_seed(0)
    columns = 4
    place = torch.arange(nodes)
    low = torch.stack([(place % columns) * 200.0, (place // columns) * 24.0], dim=-1).expand(pages, nodes, 2)
    low = low + torch.rand(pages, nodes, 2, generator=generator) * 4
    signals = TeacherSignals(
        boxes=torch.cat([low, low + torch.tensor([180.0, 16.0])], dim=-1),
        valid=torch.ones(pages, nodes, dtype=torch.bool),
        scores=torch.ones(pages, nodes),
        classes=torch.zeros(pages, nodes, dtype=torch.long),
        logits=torch.randn(pages, nodes, CLASSES + 1, generator=generator),
        deltas=torch.randn(pages, nodes, CLASSES, 4, generator=generator),
        pooled=torch.randn(pages, nodes, CHANNELS, SIDE, SIDE, generator=generator),
    ).to(device)
    fitted = TeacherStatistics(
        mean=torch.zeros(CHANNELS),
        covariance=torch.eye(CHANNELS),
        whitening=torch.eye(CHANNELS),
        mean_square=1.0,
        discriminant=torch.zeros(2 * CHANNELS),
        thresholds={"teacher_class": -1.0},
        text_classes=torch.arange(CLASSES) < 8,
        accuracy={},
    ).to(device)
    student = torch.randn(pages, nodes, CHANNELS, SIDE, SIDE, generator=generator).to(device).requires_grad_()
    regions = RegionPredictions(
        logits=torch.randn(pages, nodes, CLASSES + 1, generator=generator).to(device).requires_grad_(),
        deltas=torch.randn(pages, nodes, CLASSES, 4, generator=generator).to(device).requires_grad_(),
    )

    def work() -> None:
        graph = build_graph(signals, fitted, GraphConfig())
        terms = graphkd_loss(student, regions, signals, graph, fitted, LossWeights())
        torch.stack([values.sum() for values in terms.values()]).sum().backward()

    return work


def load_run_config(folder: Path, name: str, canvas: list[int], pages: int, **changes: Any) -> RunConfig:
    content: dict[str, Any] = {
        "name": name,
        "data": {
            "train": str(folder / "data"),
            "loader_workers": 0,
            "view": {"canvas": canvas, "shortest_edge": [min(canvas), min(canvas)]},
        },
        "detector": {"backbone": "resnet18", "norm": "frozen", "anchor_sizes": [12, 24, 48, 96, 160]},
        "schedule": {"steps": 1, "batch": pages, "reference_batch": pages},
        "engine": {"name": "local"},
        "run": {"folder": str(folder / name), "eval_batch": pages},
    }
    return resolve(content | changes, name)


def step_work(
    config: RunConfig, dataset: PackedDataset, batch: PageBatch, device: torch.device, *, prefetches: bool = False
) -> Callable[[], None]:
    """One training step on ``batch``: teacher signals, forward, backward and update, with the compute settings.

    A cache is read every time: in the step, or with ``prefetches`` during earlier steps.
    """
    module = apply_precision_and_compile(build_training_step(RunContext(config), device).train(), config.compute)
    source = signal_source(RunContext(config), device)
    read: Iterator[tuple[PageBatch, Any]] = source.prefetch(repeat(batch)) if prefetches else repeat((batch, None))
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6)

    def work() -> None:
        signals = source.signals(*next(read))
        with autocast(config.compute, device):
            terms = module(batch, signals)
        optimizer.zero_grad(set_to_none=True)
        (torch.stack([values.sum() for values in terms.values()]).sum() / len(batch)).backward()
        optimizer.step()

    return work


def steps(folder: Path, canvas: list[int], pages: int, device: torch.device, live: bool) -> list[Callable[[], None]]:
    """The student's step alone, with GraphKD from a cache, and if ``live`` with a live ResNet-50 teacher."""
    write_pages(folder / "pages", count=pages, seed=0, width=canvas[1], height=canvas[0])
    pack(folder / "pages" / "annotations.json", folder / "pages" / "images", folder / "data")
    dataset = PackedDataset(folder / "data")
    big = {"backbone": "resnet50", "norm": "frozen", "anchor_sizes": [12, 24, 48, 96, 160]}
    train_run(RunContext(load_run_config(folder, "teacher", canvas, pages, detector=big)))
    nodes = {"count": 64, "min_score": 0.0, "nms_iou": 1.0}  # an untrained teacher: keep all proposals
    teacher = {"run": str(folder / "teacher"), "nodes": nodes, "statistics_pages": pages}
    method = {"name": "graphkd"}
    cached = load_run_config(folder, "cached", canvas, pages, method=method, teacher=teacher)
    build_cache(RunContext(cached), local_builders(RunContext(cached)))
    items = PageDataset(dataset, cached.data.view, 0, EVALUATION_VIEW)
    batch = collate([items[SampleRef(0, sample)] for sample in range(pages)]).to(device)
    configs = [load_run_config(folder, "alone", canvas, pages), cached]
    if live:
        beside = {**teacher, "signals": "live"}
        configs.append(load_run_config(folder, "live", canvas, pages, method=method, teacher=beside))
    return [step_work(config, dataset, batch, device) for config in configs]


def main() -> None:
    """Run the benchmark and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--canvas", type=int, nargs=2, default=[320, 224], help="height and width, px")
    parser.add_argument("--pages", type=int, default=8, help="pages a step")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--live", action="store_true", help="time a live ResNet-50 teacher too")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        works = steps(Path(folder), given.canvas, given.pages, device, given.live)
        seconds = interleaved(given.pairs, graph_work(given.pages, 64, device), *works)
    graph_only, alone, cached, *live = seconds
    shares = {
        f"graph and losses, {given.pages} pages x 64 nodes": ratio(graph_only, alone),
        "step with cached signals": ratio(cached, alone),
    }
    if live:
        shares["step with a live ResNet-50 teacher"] = ratio(live[0], alone)
    print(f"ResNet-18 student alone, {given.pages} pages of {given.canvas} px: {statistics.median(alone):.2f} s a step")
    for name, values in shares.items():
        print(f"{name:<40} {values['median']:.3f}  ({values['low']:.3f} to {values['high']:.3f}) of that")
    growth = {}
    for nodes in (64, 256, 1024):
        work = graph_work(1, nodes, device)
        growth[nodes] = statistics.median(interleaved(3 if nodes < 1000 else 1, work)[0])
        print(f"graph and losses of one page with {nodes:>4} nodes: {1000 * growth[nodes]:9.1f} ms")
    step_s = statistics.median(alone)
    finish(
        {"shares": shares, "seconds_of_nodes": growth, "canvas": given.canvas, "pages": given.pages, "step_s": step_s}
    )


if __name__ == "__main__":
    main()
