"""One distillation step: batch and teacher signals in, named losses out.

The student is used only through the detector interface, the teacher only through its signals.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from graphkd.batch import Features, PageBatch, RegionPredictions
from graphkd.detectors import DetectorModule
from graphkd.errors import ConfigError
from graphkd.method import TeacherStatistics, build_graph, dsig_loss, graphkd_loss, pkd_loss
from graphkd.method.baselines import map_loss
from graphkd.method.config import MethodConfig
from graphkd.nodes import TeacherPass
from graphkd.signals import TeacherSignals, mean_std_pair


class TrainingStep(nn.Module):
    """A student and the method it learns by; ``forward`` returns every loss term, float32 [B], one value per page.

    Under autocast the student's networks run in its precision; the teacher, graphs and losses stay in float32.

    Args:
        detector: the student.
        method: distillation method.
        statistics: of the teacher, on the training device; required unless the method is none.
    """

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
            # Trained with the student and discarded with the teacher: the exported student does not need it.
            self.adapter = nn.Conv2d(detector.spec.channels, len(statistics.mean), kernel_size=1)

    def forward(self, batch: PageBatch, signals: TeacherSignals | TeacherPass | None) -> dict[str, Tensor]:
        """Run the student once and return its losses; ``signals`` are required unless the method is none."""
        features = self.detector.features(batch.images, batch.image_sizes())
        targets = batch.targets()
        proposals, losses = self.detector.propose_and_losses(features, targets)
        if self.method.name == "none":
            return losses
        if isinstance(signals, TeacherPass):
            with no_autocast(batch.images):
                signals = signals.signals(proposals, targets)
        assert signals is not None and self.statistics is not None
        self._check(signals)
        terms: dict[str, Callable[..., dict[str, Tensor]]] = {
            "dsig": self._dsig,
            "pkd": self._pkd,
            "graphkd": self._graphkd,
        }
        return losses | terms[self.method.name](batch, features, signals, self.statistics)

    def _graphkd(
        self, _: PageBatch, features: Features, signals: TeacherSignals, statistics: TeacherStatistics
    ) -> dict[str, Tensor]:
        nodes, regions = self._nodes(features, signals)
        with no_autocast(nodes):
            graph = build_graph(signals, statistics, self.method.graph)
            terms = graphkd_loss(nodes, regions, signals, graph, statistics, self.method.weights)
        return terms | self._map_term(features, signals, statistics)

    def _dsig(
        self, batch: PageBatch, features: Features, signals: TeacherSignals, statistics: TeacherStatistics
    ) -> dict[str, Tensor]:
        nodes, regions = self._nodes(features, signals)
        with no_autocast(nodes):
            foreground = batch.overlaps_ground_truth(signals.boxes)
            terms = dsig_loss(nodes, regions, signals, foreground, statistics.mean_square, self.method.dsig)
        return terms | self._map_term(features, signals, statistics)

    def _pkd(
        self, _: PageBatch, features: Features, signals: TeacherSignals, __: TeacherStatistics
    ) -> dict[str, Tensor]:
        assert signals.maps is not None, "pkd runs with a live teacher"
        maps = self._maps(features)
        with no_autocast(signals.pooled):
            return pkd_loss(maps, signals.maps, self.method.pkd)

    def _map_term(
        self, features: Features, signals: TeacherSignals, statistics: TeacherStatistics
    ) -> dict[str, Tensor]:
        weight = self.method.maps_weight
        if not weight or signals.maps is None:
            return {}
        maps = self._maps(features)
        with no_autocast(signals.pooled):
            return {"kd_maps": weight * map_loss(maps, signals.maps, statistics.mean_square)}

    def _maps(self, features: Features) -> dict[str, Tensor]:
        return {name: self.adapter(maps).float() for name, maps in features.maps.items()}

    def _nodes(self, features: Features, signals: TeacherSignals) -> tuple[Tensor, RegionPredictions | None]:
        """The student's features at the teacher's boxes, in the teacher's channels and shape, and its predictions."""
        pooled = self.detector.pool(features, signals.box_list())
        shape = signals.valid.shape
        regions = self.detector.classify(pooled)
        if regions is not None:
            regions = RegionPredictions(
                logits=regions.logits.unflatten(0, shape), deltas=regions.deltas.unflatten(0, shape)
            )
        nodes = self.adapter(pooled).float().unflatten(0, shape)
        return mean_std_pair(nodes) if signals.is_compressed else nodes, regions

    def _check(self, signals: TeacherSignals) -> None:
        spec, statistics = self.detector.spec, self.statistics
        channels, side = signals.pooled.shape[2], signals.pooled.shape[-1]
        if statistics is not None and channels != len(statistics.mean):
            raise ConfigError(
                f"the teacher's nodes have {channels} channels and its statistics {len(statistics.mean)}, to which the "
                "student was adapted; build statistics and cache from one teacher"
            )
        if side != spec.pooled_side and not signals.is_compressed:
            raise ConfigError(
                f"the teacher pools {side} x {side} and the student {spec.pooled_side} x {spec.pooled_side}; "
                "give both the same detector.pooled_side"
            )
        if signals.logits is not None and signals.logits.shape[-1] != spec.num_classes + 1:
            raise ConfigError(
                f"the teacher has {signals.logits.shape[-1] - 1} classes and the student {spec.num_classes}; "
                "distil on the dataset that the teacher was trained for"
            )


def no_autocast(on: Tensor) -> torch.autocast:
    """Context without autocast on the device of ``on``."""
    return torch.autocast(on.device.type, enabled=False)
