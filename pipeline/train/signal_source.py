"""Choosing where a run's teacher signals come from."""

from __future__ import annotations

import torch

from pipeline.cache.cached_teacher import CachedTeacher
from pipeline.context import RunContext
from pipeline.teacher.source import LiveTeacher, NoTeacher, SignalSource
from pipeline.train.precision import DTYPES, apply_memory_format, compile_parts


def signal_source(context: RunContext, device: torch.device) -> SignalSource:
    """Live teacher on ``device``, cache, or none, by the run's config."""
    config = context.config
    if config.method.name == "none" or config.teacher is None:
        return NoTeacher()
    if config.teacher.signals == "live":
        teacher = context.teacher.load(context.dataset.num_classes, device)
        apply_memory_format(teacher, config.compute)
        compile_parts(teacher, config.compute)
        compress, dtype = config.teacher.store == "descriptors", DTYPES[config.compute.teacher_precision]
        return LiveTeacher(teacher, config.teacher.nodes, config.method, compress, dtype)
    return open_cache(context)


def open_cache(context: RunContext) -> CachedTeacher:
    """Open and verify the teacher's cache. Raises CacheError if it is missing or does not fit."""
    config = context.config
    return CachedTeacher(config.cache_location, context.dataset, context.cache_identity, config.data.storage)
