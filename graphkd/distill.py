"""The distillation step: one student, one batch, what the teacher said of it; out come the losses by name.

The step speaks to the student only through the detector interface and to the teacher only through its signals.
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
    """A detector and what it learns from; ``forward`` gives every loss term, each float32 [B], one value a page.

    Under autocast the student's networks run in its precision; the teacher, graphs and losses stay in float32.

    Args:
        detector: the student.
        method: what it learns from besides ground truth.
        statistics: the teacher's, on the device of training; needed by every method but none.
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
            # Learns with the student and is dropped with the teacher: the exported student never needs it.
            self.adapter = nn.Conv2d(detector.spec.channels, len(statistics.mean), kernel_size=1)

    def forward(self, batch: PageBatch, said: TeacherSignals | TeacherPass | None) -> dict[str, Tensor]:
        """Run the student once; ``said`` is what the teacher says of the batch, needed by every method but none."""
        features = self.detector.features(batch.images, batch.image_sizes())
        targets = batch.targets()
        proposals, losses = self.detector.propose_and_losses(features, targets)
        if self.method.name == "none":
            return losses
        if isinstance(said, TeacherPass):
            with no_autocast(batch.images):
                said = said.signals(proposals, targets)
        assert said is not None and self.statistics is not None
        self._check(said)
        terms: dict[str, Callable[..., dict[str, Tensor]]] = {
            "dsig": self._dsig,
            "pkd": self._pkd,
            "graphkd": self._graphkd,
        }
        return losses | terms[self.method.name](batch, features, said, self.statistics)

    def _graphkd(
        self, _: PageBatch, features: Features, said: TeacherSignals, statistics: TeacherStatistics
    ) -> dict[str, Tensor]:
        nodes, regions = self._nodes(features, said)
        with no_autocast(nodes):
            graph = build_graph(said, statistics, self.method.graph)
            terms = graphkd_loss(nodes, regions, said, graph, statistics, self.method.weights)
        return terms | self._map_term(features, said, statistics)

    def _dsig(
        self, batch: PageBatch, features: Features, said: TeacherSignals, statistics: TeacherStatistics
    ) -> dict[str, Tensor]:
        nodes, regions = self._nodes(features, said)
        with no_autocast(nodes):
            foreground = batch.overlaps_ground_truth(said.boxes)
            terms = dsig_loss(nodes, regions, said, foreground, statistics.mean_square, self.method.dsig)
        return terms | self._map_term(features, said, statistics)

    def _pkd(self, _: PageBatch, features: Features, said: TeacherSignals, __: TeacherStatistics) -> dict[str, Tensor]:
        assert said.maps is not None, "pkd runs with a live teacher"
        maps = self._maps(features)
        with no_autocast(said.pooled):
            return pkd_loss(maps, said.maps, self.method.pkd)

    def _map_term(self, features: Features, said: TeacherSignals, statistics: TeacherStatistics) -> dict[str, Tensor]:
        weight = self.method.maps_weight
        if not weight or said.maps is None:
            return {}
        maps = self._maps(features)
        with no_autocast(said.pooled):
            return {"kd_maps": weight * map_loss(maps, said.maps, statistics.mean_square)}

    def _maps(self, features: Features) -> dict[str, Tensor]:
        return {name: self.adapter(maps).float() for name, maps in features.maps.items()}

    def _nodes(self, features: Features, said: TeacherSignals) -> tuple[Tensor, RegionPredictions | None]:
        """The student's features at the teacher's boxes, in the shape of the teacher's, and its predictions there."""
        pooled = self.detector.pool(features, said.box_list())
        shape = said.valid.shape
        regions = self.detector.classify(pooled)
        if regions is not None:
            regions = RegionPredictions(
                logits=regions.logits.unflatten(0, shape), deltas=regions.deltas.unflatten(0, shape)
            )
        nodes = self.adapter(pooled).float().unflatten(0, shape)
        return mean_std_pair(nodes) if said.is_compressed else nodes, regions

    def _check(self, said: TeacherSignals) -> None:
        spec, statistics = self.detector.spec, self.statistics
        channels, side = said.pooled.shape[2], said.pooled.shape[-1]
        if statistics is not None and channels != len(statistics.mean):
            raise ConfigError(
                f"the teacher's nodes have {channels} channels and its statistics {len(statistics.mean)}, to which the "
                "student was adapted; build statistics and cache from one teacher"
            )
        if side != spec.pooled_side and not said.is_compressed:
            raise ConfigError(
                f"the teacher pools {side} x {side} and the student {spec.pooled_side} x {spec.pooled_side}; "
                "give both the same detector.pooled_side"
            )
        if said.logits is not None and said.logits.shape[-1] != spec.num_classes + 1:
            raise ConfigError(
                f"the teacher knows {said.logits.shape[-1] - 1} classes and the student {spec.num_classes}; "
                "distil on the dataset that the teacher was trained for"
            )


def no_autocast(on: Tensor) -> torch.autocast:
    """The context in which nothing on the device of ``on`` is computed in less than its own precision."""
    return torch.autocast(on.device.type, enabled=False)
