"""What one training worker trains, and where its teacher's signals come from."""

from __future__ import annotations

import logging

import torch

from graphkd.distill import TrainingStep
from graphkd.errors import ConfigError
from graphkd.weight_inheritance import inherit
from pipeline.cache.reader import CachedTeacher
from pipeline.config import RunConfig
from pipeline.data.format.dataset import PackedDataset
from pipeline.models import check_num_classes, load_initial_weights, new_detector
from pipeline.teacher.identity import TeacherRun, cache_identity, open_teacher, statistics_identity
from pipeline.teacher.source import LiveTeacher, NoTeacher, SignalSource
from pipeline.teacher.statistics import read_statistics

log = logging.getLogger(__name__)


def build_step(config: RunConfig, dataset: PackedDataset, device: torch.device) -> TrainingStep:
    """The detector with its first weights, the method, and the teacher's statistics where one takes part."""
    detector = new_detector(config, check_num_classes(config, dataset))
    if config.run.init is not None:
        anew = load_initial_weights(detector, config.run.init)
        log.info("starting from %s; %d tensors start anew: %s", config.run.init, len(anew), ", ".join(anew) or "none")
    statistics = None
    if config.method.name != "none":
        teacher = open_teacher(config)
        identity = statistics_identity(config, teacher, dataset)
        statistics = read_statistics(config.cache_location, identity, config.data.storage).to(device)
        if config.method.inherits and same_anchors(config, teacher):
            taken = inherit(detector, teacher.detector(dataset.num_classes, torch.device("cpu")), config.method)
            log.info("%d tensors inherited from %s", len(taken), teacher.settings.run)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        return TrainingStep(detector, config.method, statistics).to(device)


def same_anchors(config: RunConfig, teacher: TeacherRun) -> bool:
    """Whether student and teacher propose from the same anchors, without which a proposal head means something else.

    Raises ConfigError where they do not and ``method.inherit`` asks for the teacher's heads.
    """
    ours, theirs = config.detector, teacher.config.detector
    same = (ours.anchor_sizes, ours.aspect_ratios) == (theirs.anchor_sizes, theirs.aspect_ratios)
    if not same and config.method.inherit:
        raise ConfigError(
            f"method.inherit is true, but the student has anchors {ours.anchor_sizes}, {ours.aspect_ratios} and the "
            f"teacher {theirs.anchor_sizes}, {theirs.aspect_ratios}; give both the same, or leave method.inherit out"
        )
    return same


def signal_source(config: RunConfig, dataset: PackedDataset, device: torch.device) -> SignalSource:
    """Live teacher, cache or nothing, as the config says."""
    if config.method.name == "none" or config.teacher is None:
        return NoTeacher()
    teacher = open_teacher(config)
    if config.teacher.signals == "live":
        compress = config.teacher.store == "descriptors"
        detector = teacher.detector(dataset.num_classes, device)
        return LiveTeacher(detector, config.teacher.nodes, config.method, compress)
    identity = cache_identity(config, teacher, dataset)
    return CachedTeacher(config.cache_location, dataset, identity, config.data.storage)
