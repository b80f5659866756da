"""Rows of the report's tables, as text."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.report.runs import RunSummary, class_names
from pipeline.runs.attempts import FINISHED

MISSING = "\N{EN DASH}"
METRICS = {
    "AP": "ap",
    "AP50": "ap50",
    "AP75": "ap75",
    "AP small": "ap_small",
    "AP medium": "ap_medium",
    "AP large": "ap_large",
    "AR100": "ar_100",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A name and one cell per run."""

    name: str
    cells: list[str]


def summary(runs: list[RunSummary]) -> str:
    """One sentence: the AP of every evaluated run."""
    scores = [f"{run.label} {run.points():.1f}" for run in runs if not math.isnan(run.points())]
    if not scores:
        return "No run has been evaluated yet."
    return f"AP: {', '.join(scores)}."


def comparison_warnings(runs: list[RunSummary]) -> list[str]:
    """Differences that make the runs not directly comparable."""
    evaluated = [run for run in runs if run.evaluation]
    students = [run for run in evaluated if role(run, runs) != "teacher"]
    warnings = []
    if len({run.setting("data", "val") for run in evaluated}) > 1:
        warnings.append("The runs were evaluated on different pages.")
    if len({run.trained_steps for run in students if run.trained_steps}) > 1:
        warnings.append("The students were trained for different numbers of steps.")
    if len(evaluated) > 1:
        warnings.append("Each result is from one seed; results vary between seeds.")
    return warnings


def role(run: RunSummary, runs: list[RunSummary]) -> str:
    """Role of the run: teacher, distilled student, or student alone."""
    if run.is_distilled:
        return "distilled student"
    return "teacher" if any(_is_teacher(run, other) for other in runs if other is not run) else "student alone"


def _is_teacher(run: RunSummary, student: RunSummary) -> bool:
    teacher = student.setting("teacher", "run") if student.is_distilled else None
    # Folder names are compared instead of paths, so that the match survives moving the runs.
    return teacher is not None and Path(str(teacher)).resolve().name == run.folder.resolve().name


def run_rows(runs: list[RunSummary]) -> list[Row]:
    """Role, accuracy, size and cost of each run, without rows that are empty for all of them."""
    formatters: dict[str, Callable[[RunSummary], str]] = {
        "Role": lambda run: role(run, runs),
        "Detector": _detector,
        **{f"{name}, %": lambda run, key=key: _format_percent(run.points(key)) for name, key in METRICS.items()},  # type: ignore[misc]
        "Evaluated pages": lambda run: _format_count((run.evaluation or {}).get("pages")),
        "Trained steps": lambda run: _format_count(run.trained_steps),
        "Parameters": _parameters,
        "Training time": lambda run: _format_logged(run, "seconds", lambda values: duration(values[-1])),
        "Training speed, pages/s": lambda run: _format_logged(
            run, "pages_per_s", lambda values: f"{median(values):.3g}"
        ),
        "Data wait, %": lambda run: _format_logged(run, "data_wait", lambda values: f"{100 * median(values):.0f}"),
    }
    rows = [Row(name, [format_cell(run) for run in runs]) for name, format_cell in formatters.items()]
    return [row for row in rows if set(row.cells) != {MISSING}]


def class_rows(runs: list[RunSummary]) -> list[Row]:
    """AP of each class, as percentages."""
    return [Row(name, [_format_percent(run.class_points(name)) for run in runs]) for name in class_names(runs)]


def attempt_rows(runs: list[RunSummary]) -> list[list[str]]:
    """Attempts of the runs that have several: run, start time, steps, workers, end, repeated steps."""
    rows = []
    for run in (run for run in runs if len(run.attempts) > 1):
        for attempt, next_attempt in zip(run.attempts, [*run.attempts[1:], None], strict=True):
            lasted = f" after {duration(attempt.ended - attempt.started)}" if attempt.ended is not None else ""
            # The last step of a killed attempt is the last one that it logged.
            repeated = 0 if next_attempt is None else max(0, attempt.last_step - next_attempt.step)
            rows.append(
                [
                    run.label,
                    datetime.fromtimestamp(attempt.started, timezone.utc).strftime("%Y-%m-%d %H:%M:%S"),
                    f"{attempt.step:,} to {attempt.last_step:,}",
                    f"{attempt.workers} on {attempt.hosts}",
                    (attempt.reason or "unknown") + lasted,
                    MISSING if attempt.reason == FINISHED or next_attempt is None else f"{repeated:,}",
                ]
            )
    return rows


def config_rows(runs: list[RunSummary]) -> list[Row]:
    """Dotted config keys whose values differ between runs."""
    configs = [_flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    parents = {key.rsplit(".", depth)[0] for key in keys for depth in range(1, key.count(".") + 1)}
    rows = [
        Row(key, [MISSING if config.get(key) is None else _format_value(config[key]) for config in configs])
        for key in keys
        if key not in parents and key not in ("name", "run.folder")
    ]
    return [row for row in rows if len(set(row.cells)) > 1]


def commands(runs: list[RunSummary]) -> list[str]:
    """Shell commands that retrain each run under a new name and regenerate this report."""
    lines = []
    for run in runs:
        name = f"{run.config.get('name', run.folder.resolve().name)}-again"
        folder = run.setting("run", "folder")
        folder_override = [f"run.folder={Path(str(folder)).with_name(name)}"] if folder else []
        lines.append(
            shlex.join(["graphkd", "train", str(run.folder / "config.yaml"), f"name={name}", *folder_override])
        )
    return [*lines, shlex.join(["graphkd", "report", *(str(run.folder) for run in runs)])]


def duration(seconds: float) -> str:
    """Format seconds, such as ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _detector(run: RunSummary) -> str:
    parts = [run.setting("detector", key) for key in ("architecture", "backbone")]
    return ", ".join(str(part).replace("_", " ") for part in parts if part) or MISSING


def _format_percent(value: float) -> str:
    return MISSING if math.isnan(value) else f"{value:.1f}"


def _format_count(value: Any) -> str:
    return MISSING if value is None else f"{value:,}"


def _parameters(run: RunSummary) -> str:
    count = (run.evaluation or {}).get("parameters")
    return MISSING if not count else f"{count / 1e6:.1f} M"


def _format_logged(run: RunSummary, key: str, text: Callable[[list[float]], str]) -> str:
    values = [float(line[key]) for line in run.metrics if line.get(key) is not None and math.isfinite(line[key])]
    return text(values) if values else MISSING


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _format_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_format_value(entry) for entry in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)
