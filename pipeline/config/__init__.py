"""What a run is: typed, frozen, checked as a whole before anything starts."""

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
