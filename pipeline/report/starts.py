"""The report's rows about runs that were stopped or killed and went on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from pipeline.report.facts import MISSING
from pipeline.report.runs import RunSummary
from pipeline.report.tables import duration
from pipeline.runs.start_history import FINISHED, RunStart


@dataclass(frozen=True, slots=True)
class StartRow:
    """One start of a run, as text ready to print."""

    run: str
    began: str
    steps: str
    workers: str
    ended: str
    lost: str


def start_rows(runs: Sequence[RunSummary]) -> list[StartRow]:
    """Every start of the runs that were started more than once, in order."""
    return [
        _row(run, start, next_start)
        for run in runs
        if len(run.starts) > 1
        for start, next_start in zip(run.starts, [*run.starts[1:], None], strict=True)
    ]


def _row(run: RunSummary, start: RunStart, following: RunStart | None) -> StartRow:
    # Of a start that was killed only what it logged is known.
    lost = 0 if following is None else max(0, start.last_step - following.step)
    lasted = f" after {duration(start.ended - start.time)}" if start.ended is not None else ""
    return StartRow(
        run=run.label,
        began=datetime.fromtimestamp(start.time, timezone.utc).strftime("%Y-%m-%d %H:%M:%S"),
        steps=f"{start.step:,} to {start.last_step:,}",
        workers=f"{start.workers} on {start.host}",
        ended=(start.why or "no end is known") + lasted,
        lost=MISSING if start.why == FINISHED or following is None else f"{lost:,}",
    )
