"""One distillation step: batch and teacher signals in, named losses out.

The student is used only through the detector interface, the teacher only through its signals.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from graphkd.batch import Features, PageBatch, RegionPredictions, Targets
from graphkd.detectors import DetectorModule
from graphkd.errors import ConfigError
from graphkd.method import TeacherStatistics, build_graph, dsig_loss, graphkd_loss, pkd_loss
from graphkd.method.baselines import map_loss
from graphkd.method.config import MethodConfig
from graphkd.nodes import TeacherPass
from graphkd.signals import TeacherSignals, mean_std_pair


class TrainingStep(nn.Module):
    """A student and the method it learns by; ``forward`` returns every loss term, float32 [B], one value per page.

    Under autocast the student's networks run in its precision; graphs and losses stay in float32.

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
        sizes = batch.sizes.to(batch.images.device, non_blocking=True)
        return self.losses(batch.images, sizes, batch.targets(), signals)

    def losses(
        self, images: Tensor, sizes: Tensor, targets: Targets, signals: TeacherSignals | TeacherPass | None
    ) -> dict[str, Tensor]:
        """Losses of uint8 images [B, 3, H, W] with pages of ``sizes`` [B, 2], all on one device.

        Everything has a fixed shape for given pages, nodes and padding of ground truth, so that it can be compiled.
        """
        features = self.detector.features(images, sizes)
        proposals, losses = self.detector.propose_and_losses(features, targets)
        if self.method.name == "none":
            return losses
        if isinstance(signals, TeacherPass):
            signals = signals.signals(proposals, targets)
        assert signals is not None and self.statistics is not None
        self._check(signals)
        terms: dict[str, Callable[..., dict[str, Tensor]]] = {
            "dsig": self._dsig,
            "pkd": self._pkd,
            "graphkd": self._graphkd,
        }
        return losses | terms[self.method.name](targets, features, signals, self.statistics)

    def _graphkd(
        self, _: Targets, features: Features, signals: TeacherSignals, statistics: TeacherStatistics
    ) -> dict[str, Tensor]:
        nodes, regions = self._nodes(features, signals)
        with no_autocast(nodes):
            graph = build_graph(signals, statistics, self.method.graph)
            terms = graphkd_loss(nodes, regions, signals, graph, statistics, self.method.weights)
        return terms | self._map_term(features, signals, statistics)

    def _dsig(
        self, targets: Targets, features: Features, signals: TeacherSignals, statistics: TeacherStatistics
    ) -> dict[str, Tensor]:
        nodes, regions = self._nodes(features, signals)
        with no_autocast(nodes):
            foreground = targets.overlap(signals.boxes)
            terms = dsig_loss(nodes, regions, signals, foreground, statistics.mean_square, self.method.dsig)
        return terms | self._map_term(features, signals, statistics)

    def _pkd(self, _: Targets, features: Features, signals: TeacherSignals, __: TeacherStatistics) -> dict[str, Tensor]:
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
        pooled = self.detector.pool(features, signals.boxes)
        nodes = _each_node(self.adapter, pooled).float()
        return mean_std_pair(nodes) if signals.is_compressed else nodes, self.detector.classify(pooled)

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


def _each_node(module: nn.Module, nodes: Tensor) -> Tensor:
    """Apply a module of images to pooled features [B, N, C, P, P]."""
    changed: Tensor = module(nodes.flatten(0, 1))
    return changed.unflatten(0, nodes.shape[:2])


def no_autocast(on: Tensor) -> torch.autocast:
    """Context without autocast on the device of ``on``."""
    return torch.autocast(on.device.type, enabled=False)
