"""A trained teacher, and students that learn from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import RunConfig, resolve
from pipeline.context import RunContext
from pipeline.train.run import train_run
from tests.support.runs import VIEW, StudentOf, small_run


@pytest.fixture(scope="session")
def taught(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a trained teacher."""
    out = tmp_path_factory.mktemp("taught")
    train_run(RunContext(resolve(small_run(out, dataset_folder, "teacher", data=VIEW), "teacher")))
    return out


@pytest.fixture(scope="session")
def student_of(taught: Path, dataset_folder: Path) -> StudentOf:
    """``student_of(cache, **teacher)``: a student whose cache is in that folder below the teacher's."""

    def make(cache: str | Path, sections: dict[str, Any] | None = None, **teacher: Any) -> RunConfig:
        settings = {"run": str(taught / "teacher"), "statistics_pages": 8, "nodes": {"count": 12, "min_score": 0.0}}
        settings["cache"] = str(cache) if "://" in str(cache) else str(taught / cache)
        content = {"method": {"name": "graphkd"}, "data": VIEW, "teacher": {**settings, **teacher}}
        for section, values in (sections or {}).items():
            content[section] = {**content.get(section, {}), **values}
        return resolve(
            small_run(taught, dataset_folder, f"student-{Path(cache).name}".replace(":", "-"), **content), "student"
        )

    return make
