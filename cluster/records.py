"""Submitted jobs of a run: one line each in its ``jobs.jsonl``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from graphkd.errors import UserError
from pipeline.core.jsonl import append_jsonl, read_jsonl
from pipeline.core.run_paths import JOBS, RunName


class JobRecord(BaseModel):
    """One submission."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scheduler: str
    """``slurm`` or ``ray``."""
    job: str
    """Id that the scheduler gave."""
    name: RunName
    submitted: float
    """Unix time."""
    command: tuple[str, ...]
    """Arguments of ``graphkd``."""
    logs: str
    """Path or glob pattern of its log files."""
    site: str
    """Name of the site, or address of the Ray cluster."""
    resubmit: dict[str, Any] = {}
    """Arguments that submit it again."""


def record_job(folder: Path, record: JobRecord) -> None:
    """Append a submission to the run's record."""
    append_jsonl(folder / JOBS, record.model_dump(mode="json"))


def read_jobs(folder: Path) -> list[JobRecord]:
    """Submissions of a run, oldest first."""
    return [JobRecord.model_validate(line) for line in read_jsonl(folder / JOBS)]


def check_owner(folder: Path) -> None:
    """Raise UserError if another user owns a run folder or its record of jobs, which names commands and files."""
    for path in (folder, folder / JOBS):
        if path.exists() and path.lstat().st_uid != os.getuid():
            raise UserError(
                f"{path} belongs to user {path.lstat().st_uid}, and its records name commands and files; give "
                "--any-owner if you trust it"
            )


def submitted_runs(root: Path) -> list[Path]:
    """Folders of submitted runs at most two levels below ``root``."""
    return sorted({path.parent for pattern in (JOBS, f"*/{JOBS}", f"*/*/{JOBS}") for path in root.glob(pattern)})
