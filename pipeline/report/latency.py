"""Accuracy, size and latency of trained and exported models, from ``graphkd bench``."""

from __future__ import annotations

from typing import Any

from pipeline.report.runs import RunSummary
from pipeline.report.tables import MISSING, Row

HEADINGS = ["run", "kind", "threads", "AP, %", "MB", "ms a page", "90th percentile", "memory, MB"]


def latency_rows(runs: list[RunSummary]) -> list[Row]:
    """Run, and the cells below the other ``HEADINGS``, of every model that was timed."""
    return [Row(run.label, _cells(row)) for run in runs for row in run.latency]


def _cells(row: dict[str, Any]) -> list[str]:
    ap = row.get("ap")
    figures = [(row.get(key), digits) for key, digits in (("mb", 1), ("total_ms", 1), ("p90_ms", 1), ("peak_mb", 0))]
    return [
        str(row.get("kind", MISSING)),
        str(row.get("threads", MISSING)),
        MISSING if ap is None or ap < 0 else f"{100 * ap:.1f}",
        *(MISSING if value is None else f"{value:.{digits}f}" for value, digits in figures),
    ]
