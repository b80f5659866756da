"""GraphKD: knowledge distillation of document object detectors through graphs of region features.

The names below are the public interface. They are imported at first use, so that ``import graphkd`` is instant.

``graphkd.method`` contains the graph and its losses, ``graphkd.detectors`` the detector interface and its adapters,
``graphkd.distill`` the training step. They need torch only: they read no files and do not import Ray. ``train``,
``evaluate`` and ``load`` run the pipeline.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphkd.api import evaluate, load, train
    from graphkd.batch import PageBatch
    from graphkd.detectors import Detector, DetectorConfig, build_detector
    from graphkd.distill import TrainingStep
    from graphkd.errors import UserError
    from graphkd.method import (
        GraphConfig,
        LossWeights,
        StatisticsAccumulator,
        StructuredGraph,
        TeacherStatistics,
        build_graph,
        graphkd_loss,
    )
    from graphkd.method.config import MethodConfig
    from graphkd.nodes import NodePolicy, live_signals
    from graphkd.signals import TeacherSignals

__version__ = "0.1.0"

_MODULES = {
    "Detector": "graphkd.detectors",
    "DetectorConfig": "graphkd.detectors",
    "GraphConfig": "graphkd.method",
    "LossWeights": "graphkd.method",
    "MethodConfig": "graphkd.method.config",
    "NodePolicy": "graphkd.nodes",
    "PageBatch": "graphkd.batch",
    "StatisticsAccumulator": "graphkd.method",
    "StructuredGraph": "graphkd.method",
    "TeacherSignals": "graphkd.signals",
    "TeacherStatistics": "graphkd.method",
    "TrainingStep": "graphkd.distill",
    "UserError": "graphkd.errors",
    "build_detector": "graphkd.detectors",
    "build_graph": "graphkd.method",
    "evaluate": "graphkd.api",
    "graphkd_loss": "graphkd.method",
    "live_signals": "graphkd.nodes",
    "load": "graphkd.api",
    "train": "graphkd.api",
}

__all__ = [
    "Detector",
    "DetectorConfig",
    "GraphConfig",
    "LossWeights",
    "MethodConfig",
    "NodePolicy",
    "PageBatch",
    "StatisticsAccumulator",
    "StructuredGraph",
    "TeacherSignals",
    "TeacherStatistics",
    "TrainingStep",
    "UserError",
    "build_detector",
    "build_graph",
    "evaluate",
    "graphkd_loss",
    "live_signals",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'graphkd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
