"""The training step of a run: its detector with initial weights, its method, and the teacher's statistics."""

from __future__ import annotations

import logging

import torch

from graphkd.detectors import DetectorConfig, DetectorModule
from graphkd.distill import TrainingStep
from graphkd.errors import ConfigError
from graphkd.method.config import MethodConfig
from graphkd.weight_inheritance import inherit
from pipeline.context import RunContext
from pipeline.teacher.identity import TeacherRun

log = logging.getLogger(__name__)


def build_training_step(context: RunContext, device: torch.device) -> TrainingStep:
    """Build the training step of a run on ``device``, with the weights that training starts from."""
    config, method = context.config, context.config.method
    detector, statistics = context.build_detector(), None
    if method.name != "none":
        statistics = context.statistics.to(device)
        _inherit(detector, config.detector, context.teacher, method, context.dataset.num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        return TrainingStep(detector, method, statistics).to(device)


def _inherit(
    detector: DetectorModule, config: DetectorConfig, teacher: TeacherRun, method: MethodConfig, num_classes: int
) -> None:
    if method.inherits and _same_anchors(config, teacher.detector_config, method):
        names = inherit(detector, teacher.load(num_classes, torch.device("cpu")), method)
        log.info("%d tensors inherited from %s", len(names), teacher.settings.run)


def _same_anchors(student: DetectorConfig, teacher: DetectorConfig, method: MethodConfig) -> bool:
    """Whether both propose from the same anchors, without which a proposal head means something else.

    Raises:
        ConfigError: if they do not and ``method.inherit`` asks for the teacher's heads.
    """
    same = (student.anchor_sizes, student.aspect_ratios) == (teacher.anchor_sizes, teacher.aspect_ratios)
    if not same and method.inherit:
        raise ConfigError(
            f"method.inherit is true, but the student has anchors {student.anchor_sizes}, {student.aspect_ratios} and "
            f"the teacher {teacher.anchor_sizes}, {teacher.aspect_ratios}; give both the same, or leave "
            "method.inherit out"
        )
    return same
