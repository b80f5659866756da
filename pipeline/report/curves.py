"""Charts of runs as PNG bytes, drawn with matplotlib's object interface so that no global state is touched."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray

from pipeline.report.palette import run_colour
from pipeline.report.runs import RunSummary

DPI = 144
INK = "#24292f"
FAINT = "#6e7781"
BAR_INCHES = 0.13
SMOOTHING_SHARE = 0.04
"""Share of the logged steps over which the moving average forgets to 1/e."""

Curve = Callable[[dict[str, Any]], float]


def loss_curves(runs: Sequence[RunSummary]) -> bytes:
    """Curves by step as a PNG: loss in all, the detector's own (``loss_*``), distillation (``kd_*``) and AP where a run
    has them; ticks at the foot show where a run went on after it was stopped or killed.
    """
    panels: list[tuple[str, Curve]] = [
        ("Total loss", lambda entry: float(entry.get("loss", math.nan))),
        ("Detector's own loss", lambda entry: _sum_of_terms(entry, "loss_")),
    ]
    if any(_has_terms(run, "kd_") for run in runs):
        panels.append(("Distillation terms", lambda entry: _sum_of_terms(entry, "kd_")))
    judged = any(run.evaluations for run in runs)
    columns = len(panels) + judged
    figure = Figure(figsize=(3.8 * columns, 3.3), dpi=DPI, layout="constrained", facecolor="white")
    every = figure.subplots(1, columns, squeeze=False)[0]
    for axes, (title, curve) in zip(every, panels, strict=False):
        _draw_curves(axes, runs, title, curve)
    if judged:
        _draw_accuracy(every[-1], runs)
    _legend(figure, runs)
    return _png(figure)


def class_bars(runs: Sequence[RunSummary]) -> bytes:
    """AP of each class as grouped horizontal bars, 0 to 100, as a PNG; classes in the order of the evaluations."""
    names = class_names(runs)
    shown = [run for run in runs if run.evaluation is not None]
    height = 1.1 + len(names) * (0.14 + BAR_INCHES * len(shown))
    figure = Figure(figsize=(9.6, max(2.2, height)), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.subplots()
    _style(axes, "AP of each class")
    thickness = 0.8 / max(1, len(shown))
    for row, run in enumerate(shown):
        values = [100 * class_ap(run, name) for name in names]
        places = np.arange(len(names)) + (row - (len(shown) - 1) / 2) * thickness
        axes.barh(places, np.nan_to_num(values), thickness * 0.9, color=run_colour(list(runs).index(run)))
        for place, value in zip(places, values, strict=True):
            _write_value(axes, value, place)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 106)
    axes.grid(axis="x", color="#e6e8eb", linewidth=0.8)
    _legend(figure, shown, [run_colour(list(runs).index(run)) for run in shown])
    return _png(figure)


def class_names(runs: Sequence[RunSummary]) -> list[str]:
    """Every class that some run was evaluated on, in the order of the evaluations."""
    return list(dict.fromkeys(name for run in runs for name in (run.evaluation or {}).get("per_class", {})))


def class_ap(run: RunSummary, name: str) -> float:
    """AP of one class as a fraction; NaN where it is not defined."""
    value = (run.evaluation or {}).get("per_class", {}).get(name)
    return math.nan if value is None or value < 0 else float(value)


def smoothed(values: NDArray[np.float64], window: float) -> NDArray[np.float64]:
    """Exponential moving average, float64 [n] -> [n], unbiased at the start; values that are not finite are left out.

    ``window`` is the number of values over which it forgets to 1/e; below 1 it smooths nothing.
    """
    decay = math.exp(-1 / window) if window >= 1 else 0.0
    result = np.full(len(values), np.nan)
    total = weight = 0.0
    for place, value in enumerate(values):
        if np.isfinite(value):
            total, weight = decay * total + (1 - decay) * value, decay * weight + 1 - decay
        if weight > 0:
            result[place] = total / weight
    return result


def _draw_curves(axes: Axes, runs: Sequence[RunSummary], title: str, curve: Curve) -> None:
    _style(axes, title)
    drawn: list[NDArray[np.float64]] = []
    for place, run in enumerate(runs):
        steps = [entry["step"] for entry in run.metrics]
        values = np.array([curve(entry) for entry in run.metrics], dtype=np.float64)
        if not np.isfinite(values).any():
            continue
        smooth = smoothed(values, SMOOTHING_SHARE * len(values))
        axes.plot(steps, values, color=run_colour(place), alpha=0.22, linewidth=0.8)
        axes.plot(steps, smooth, color=run_colour(place), linewidth=1.8, marker="o" if len(steps) == 1 else None)
        drawn.append(values[np.isfinite(values)])
        resumed = [start.step for start in run.starts[1:]]
        axes.vlines(resumed, 0, 0.06, transform=axes.get_xaxis_transform(), color=run_colour(place), linewidth=1.2)
    if drawn:
        # A few huge values of the first steps would press everything after them flat.
        axes.set_ylim(0, 1.15 * max(float(np.percentile(values, 98)) for values in drawn) or 1)
    else:
        axes.text(0.5, 0.5, "nothing logged", transform=axes.transAxes, ha="center", color=FAINT)
    axes.set_xlabel("step", color=FAINT, fontsize=9)
    axes.grid(color="#e6e8eb", linewidth=0.8)


def _draw_accuracy(axes: Axes, runs: Sequence[RunSummary]) -> None:
    _style(axes, "AP during training")
    for place, run in enumerate(runs):
        steps = [line["step"] for line in run.evaluations]
        axes.plot(
            steps, [100 * line["ap"] for line in run.evaluations], color=run_colour(place), linewidth=1.8, marker="o"
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step", color=FAINT, fontsize=9)
    axes.grid(color="#e6e8eb", linewidth=0.8)


def _sum_of_terms(entry: dict[str, Any], prefix: str) -> float:
    terms = [float(value) for name, value in entry.get("terms", {}).items() if name.startswith(prefix)]
    return sum(terms) if terms else math.nan


def _has_terms(run: RunSummary, prefix: str) -> bool:
    return any(name.startswith(prefix) for entry in run.metrics for name in entry.get("terms", {}))


def _write_value(axes: Axes, value: float, place: float) -> None:
    text, start = ("not defined", 0.0) if math.isnan(value) else (f"{value:.1f}", value)
    axes.text(start + 0.4, place, text, va="center_baseline", fontsize=7, color=FAINT)


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.set_axisbelow(True)


def _legend(figure: Figure, runs: Sequence[RunSummary], colours: Sequence[str] | None = None) -> None:
    colours = colours or [run_colour(place) for place in range(len(runs))]
    lines = [Axes.plot(figure.axes[0], [], [], color=colour, linewidth=5)[0] for colour in colours]
    labels = [run.label for run in runs]
    figure.legend(
        lines, labels, loc="outside lower center", ncols=min(4, max(1, len(runs))), frameon=False, fontsize=9.5
    )


def _png(figure: Figure) -> bytes:
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a name may hold a dollar sign
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
