"""Accuracy of each categoriser on held-out pages, with the thresholds of the statistics.

python -m benchmarks.categories configs/quickstart/student-graphkd.yaml [key=value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import finish
from graphkd.method import text_score
from graphkd.nodes import live_signals
from graphkd.signals import TeacherSignals
from pipeline.config import RunConfig, load_config
from pipeline.context import RunContext
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.loading.augmentation import EVALUATION_VIEW
from pipeline.data.loading.batches import FinitePassBatches
from pipeline.data.loading.loader import PageDataset, page_loader
from pipeline.teacher.statistics import labelled_nodes, read_statistics


def ground_truth_nodes(config: RunConfig, dataset: PackedDataset) -> list[tuple[TeacherSignals, Tensor]]:
    """Teacher signals on every page of ``dataset``, with masks of ground-truth nodes, bool [B, N]."""
    teacher = RunContext(config).teacher
    detector = teacher.load(dataset.num_classes, torch.device("cpu"))
    items = PageDataset(dataset, config.data.view, config.run.seed, EVALUATION_VIEW)
    found = []
    for batch in page_loader(items, FinitePassBatches(range(len(dataset)), config.run.eval_batch, 0, 1), workers=0):
        signals = live_signals(detector, batch, teacher.settings.nodes)
        found.append((signals, labelled_nodes(batch, signals.valid)))
    return found


def accuracies(config: RunConfig) -> dict[str, float]:
    """Balanced accuracy, 0 to 1, of each categoriser on ground-truth nodes of ``data.val``, and numbers of nodes."""
    assert config.data.val is not None
    dataset = PackedDataset(config.data.val)
    statistics = read_statistics(config.cache_location, storage=config.data.storage)
    truth: list[Tensor] = []
    called: dict[str, list[Tensor]] = {name: [] for name in statistics.thresholds}
    for signals, labelled in ground_truth_nodes(config, dataset):
        truth.append(statistics.text_classes[signals.classes[labelled]])
        for name in statistics.thresholds:
            score = text_score(
                signals.pooled[labelled],
                None if signals.logits is None else signals.logits[labelled],
                categorizer=name,
                text_classes=statistics.text_classes,
                discriminant=statistics.discriminant,
            )
            called[name].append(score > statistics.thresholds[name])
    text = torch.cat(truth)
    result = {name: balanced(torch.cat(parts), text) for name, parts in called.items()}
    return result | {"text nodes": int(text.sum()), "other nodes": int((~text).sum())}


def balanced(called: Tensor, text: Tensor) -> float:
    """Mean of the two categories' recalls: bool [n], bool [n]."""
    return float(called[text].float().mean() + (~called[~text]).float().mean()) / 2


def main() -> None:
    """Print the accuracies of one config."""
    figures = accuracies(load_config(Path(sys.argv[1]), sys.argv[2:]))
    for name, value in figures.items():
        print(f"{name:<20} {value:.3f}" if isinstance(value, float) else f"{name:<20} {value}")
    finish(figures)


if __name__ == "__main__":
    main()
