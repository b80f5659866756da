"""Typed, frozen run configs, checked as a whole before anything starts.

Names are imported at first use, so that ``pipeline.config.layers`` works without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config.load import load_config, resolve
    from pipeline.config.schema import DataConfig, EngineConfig, RunConfig, RunSettings, ScheduleConfig, TeacherConfig

__all__ = [
    "DataConfig",
    "EngineConfig",
    "RunConfig",
    "RunSettings",
    "ScheduleConfig",
    "TeacherConfig",
    "load_config",
    "resolve",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("pipeline.config.load" if name.islower() else "pipeline.config.schema"), name)
