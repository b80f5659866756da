"""The rows of the report's tables, as text ready to print."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from pipeline.report.curves import class_ap, class_names
from pipeline.report.facts import MISSING, Comparison, ap, role, trained_steps
from pipeline.report.runs import RunSummary

ACCURACY = (
    ("AP", "mean over classes and over overlaps of 50 to 95 %", "ap"),
    ("AP50", "a region counts where it overlaps by half", "ap50"),
    ("AP75", "a region counts where it overlaps by three quarters", "ap75"),
    ("AP small", "regions below 32 x 32 px", "ap_small"),
    ("AP medium", "regions up to 96 x 96 px", "ap_medium"),
    ("AP large", "regions above that", "ap_large"),
    ("AR100", "regions found, given 100 tries a page", "ar_100"),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One entry of a table."""

    text: str
    best: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One row: a name, what it means, one cell a run, and the signed gain of distillation."""

    name: str
    note: str
    cells: list[Cell]
    gain: float | None = None

    @property
    def gain_text(self) -> str:
        """The gain with its sign, or a dash."""
        return MISSING if self.gain is None else f"{self.gain:+.1f}".replace("-", "\N{MINUS SIGN}")


def accuracy_rows(runs: Sequence[RunSummary], comparison: Comparison | None) -> list[Row]:
    """AP and AR in points of 100."""
    return [_points_row(runs, comparison, name, note, _evaluated(key)) for name, note, key in ACCURACY]


def class_rows(runs: Sequence[RunSummary], comparison: Comparison | None) -> list[Row]:
    """AP of each class in points of 100."""
    return [_points_row(runs, comparison, name, "", _of_class(name)) for name in class_names(runs)]


def training_rows(runs: Sequence[RunSummary]) -> list[Row]:
    """Steps, size, time and speed; rows that no run has anything for are left out."""
    columns: list[tuple[str, str, Callable[[RunSummary], str]]] = [
        ("Steps", "optimiser steps behind these figures", _steps),
        ("Parameters", "weights of the detector", _parameters),
        ("Training time", "as logged, on whatever machine it was", _seconds),
        ("Speed", "pages a second, median", _speed),
        ("Waiting for data", "share of the time", _data_wait),
    ]
    rows = [Row(name, note, [Cell(value(run)) for run in runs]) for name, note, value in columns]
    return [row for row in rows if any(cell.text != MISSING for cell in row.cells)]


def duration(seconds: float) -> str:
    """Seconds in words, such as ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _points_row(
    runs: Sequence[RunSummary],
    comparison: Comparison | None,
    name: str,
    note: str,
    value: Callable[[RunSummary], float],
) -> Row:
    values = [value(run) for run in runs]
    rivals = [round(points, 1) for points, run in zip(values, runs, strict=True) if _is_rival(run, runs, points)]
    best = max(rivals) if len(rivals) > 1 else math.inf
    cells = [
        Cell(_points(points), _is_rival(run, runs, points) and round(points, 1) == best)
        for points, run in zip(values, runs, strict=True)
    ]
    gain = None if comparison is None else value(comparison.distilled) - value(comparison.alone)
    return Row(name, note, cells, None if gain is None or math.isnan(gain) else gain)


def _is_rival(run: RunSummary, runs: Sequence[RunSummary], points: float) -> bool:
    return role(run, runs) != "teacher" and not math.isnan(points)


def _evaluated(key: str) -> Callable[[RunSummary], float]:
    return lambda run: ap(run, key)


def _of_class(name: str) -> Callable[[RunSummary], float]:
    return lambda run: 100 * class_ap(run, name)


def _points(value: float) -> str:
    return MISSING if math.isnan(value) else f"{value:.1f}"


def _steps(run: RunSummary) -> str:
    steps = trained_steps(run)
    return MISSING if steps is None else f"{steps:,}"


def _parameters(run: RunSummary) -> str:
    count = (run.evaluation or {}).get("parameters")
    return MISSING if not count else f"{count / 1e6:.1f} M"


def _seconds(run: RunSummary) -> str:
    logged = _logged(run, "seconds")
    return duration(logged[-1]) if logged else MISSING


def _speed(run: RunSummary) -> str:
    logged = _logged(run, "pages_per_s")
    return f"{median(logged):.3g}" if logged else MISSING


def _data_wait(run: RunSummary) -> str:
    logged = _logged(run, "data_wait")
    return f"{100 * median(logged):.0f} %" if logged else MISSING


def _logged(run: RunSummary, key: str) -> list[float]:
    values: list[Any] = [entry.get(key) for entry in run.metrics]
    return [float(value) for value in values if value is not None and math.isfinite(value)]
