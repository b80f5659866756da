"""The distillation step: one student, one batch, what the teacher said of it; out come the losses by name.

The step speaks to the student only through the detector interface and to the teacher only through its signals.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from graphkd.detectors import DetectorModule
from graphkd.errors import CacheError
from graphkd.method import GraphConfig, LossWeights, TeacherStatistics, build_graph, graphkd_loss
from graphkd.pages import Features, PageBatch, RegionPredictions
from graphkd.signals import TeacherSignals

Method = Literal["none", "graphkd"]


class MethodConfig(BaseModel):
    """The method and its switches."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Method = "none"
    """none trains the detector alone; graphkd distils."""
    graph: GraphConfig = GraphConfig()
    """How the graph is built."""
    weights: LossWeights = LossWeights()
    """Loss weights."""


class TrainingStep(nn.Module):
    """A detector and what it learns from; ``forward`` gives every loss term, each float32 [B], one value a page."""

    def __init__(
        self,
        detector: DetectorModule,
        method: MethodConfig,
        statistics: TeacherStatistics | None = None,
    ) -> None:
        super().__init__()
        self.detector = detector
        self.method = method
        self.statistics = statistics
        self.adapter: nn.Module = nn.Identity()
        if statistics is not None and len(statistics.mean) != detector.spec.channels:
            # Learns with the student and is dropped with the teacher: the exported student never needs it.
            self.adapter = nn.Conv2d(detector.spec.channels, len(statistics.mean), kernel_size=1)

    def forward(self, batch: PageBatch, signals: TeacherSignals | None) -> dict[str, Tensor]:
        """Run the student once; ``signals`` is needed by every method but ``none``."""
        features = self.detector.features(batch.images, batch.image_sizes())
        _, losses = self.detector.propose_and_losses(features, batch.targets())
        if self.method.name != "none":
            assert signals is not None and self.statistics is not None
            losses |= self._distillation(features, signals, self.statistics)
        return losses

    def _distillation(
        self, features: Features, signals: TeacherSignals, statistics: TeacherStatistics
    ) -> dict[str, Tensor]:
        self._check(signals)
        statistics = statistics.to(signals.boxes.device)
        pooled = self.detector.pool(features, signals.box_list())
        shape = signals.valid.shape
        regions = self.detector.classify(pooled)
        if regions is not None:
            regions = RegionPredictions(
                logits=regions.logits.unflatten(0, shape), deltas=regions.deltas.unflatten(0, shape)
            )
        graph = build_graph(signals, statistics, self.method.graph)
        nodes = self.adapter(pooled).unflatten(0, shape)
        return graphkd_loss(nodes, regions, signals, graph, statistics, self.method.weights)

    def _check(self, signals: TeacherSignals) -> None:
        spec = self.detector.spec
        side = signals.pooled.shape[-1]
        if side != spec.pooled_side:
            raise CacheError(
                f"the teacher pools {side} x {side} and the student {spec.pooled_side} x {spec.pooled_side}; "
                "give both the same detector.pooled_side"
            )
        if signals.logits is not None and signals.logits.shape[-1] != spec.num_classes + 1:
            raise CacheError(
                f"the teacher knows {signals.logits.shape[-1] - 1} classes and the student {spec.num_classes}; "
                "distil on the dataset that the teacher was trained for"
            )
