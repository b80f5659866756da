"""Charts of runs as PNG bytes. Figures are created without pyplot, which keeps global state."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray

from pipeline.report.runs import RunSummary, class_names

DPI = 144
INK, GREY, GRID = "#24292f", "#6e7781", "#e6e8eb"
BAR_INCHES = 0.13
SMOOTHING = 0.04
"""Time constant of the moving average, as a share of the logged steps."""
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
"""Okabe and Ito's palette, safe for colour blindness, without its yellow."""

Curve = Callable[[dict[str, Any]], float]


def run_colour(index: int) -> str:
    """Colour of the run at ``index``, as ``#RRGGBB``."""
    return RUN_COLOURS[index % len(RUN_COLOURS)]


def loss_curves(runs: list[RunSummary]) -> bytes:
    """Losses by step, and AP if it was evaluated during training; ticks on the axis mark restarts."""
    panels: list[tuple[str, Curve]] = [
        ("Total loss", lambda line: float(line.get("loss", math.nan))),
        ("Detection loss", lambda line: _sum_of_terms(line, "loss_")),
    ]
    if any(name.startswith("kd_") for run in runs for line in run.metrics for name in line.get("terms", {})):
        panels.append(("Distillation loss", lambda line: _sum_of_terms(line, "kd_")))
    has_evaluations = any(run.evaluations for run in runs)
    columns = len(panels) + has_evaluations
    figure = Figure(figsize=(3.8 * columns, 3.3), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for panel, (title, curve) in zip(axes, panels, strict=False):
        _draw_losses(panel, runs, title, curve)
    if has_evaluations:
        _draw_accuracy(axes[-1], runs)
    _legend(figure, runs, list(range(len(runs))))
    return png(figure)


def class_bars(runs: list[RunSummary]) -> bytes:
    """AP of each class as horizontal bars, %."""
    names = class_names(runs)
    indices = [index for index, run in enumerate(runs) if run.evaluation is not None]
    height = 1.1 + len(names) * (0.14 + BAR_INCHES * len(indices))
    figure = Figure(figsize=(9.6, max(2.2, height)), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.subplots()
    _style(axes, "AP per class, %")
    thickness = 0.8 / max(1, len(indices))
    for row, index in enumerate(indices):
        values = np.array([runs[index].class_points(name) for name in names])
        centres = np.arange(len(names)) + (row - (len(indices) - 1) / 2) * thickness
        bars = axes.barh(centres, np.nan_to_num(values), thickness * 0.9, color=run_colour(index))
        labels = ["not defined" if math.isnan(value) else f"{value:.1f}" for value in values]
        axes.bar_label(bars, labels, padding=2, fontsize=7, color=GREY)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 106)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    _legend(figure, [runs[index] for index in indices], indices)
    return png(figure)


def smoothed(values: NDArray[np.float64], time_constant: float) -> NDArray[np.float64]:
    """Unbiased exponential moving average, float64 [n] -> [n]; values that are not finite are ignored.

    ``time_constant`` is in values; below 1 nothing is smoothed.
    """
    decay = math.exp(-1 / time_constant) if time_constant >= 1 else 0.0
    result = np.full(len(values), np.nan)
    total = weight = 0.0
    for index, value in enumerate(values):
        if np.isfinite(value):
            total, weight = decay * total + (1 - decay) * value, decay * weight + 1 - decay
        if weight > 0:
            result[index] = total / weight
    return result


def png(figure: Figure) -> bytes:
    """Render a figure; equal figures give equal bytes."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # names may contain a dollar sign
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _draw_losses(axes: Axes, runs: list[RunSummary], title: str, curve: Curve) -> None:
    _style(axes, title)
    limit = 0.0
    for index, run in enumerate(runs):
        steps = [line["step"] for line in run.metrics]
        values = np.array([curve(line) for line in run.metrics], dtype=np.float64)
        if not np.isfinite(values).any():
            continue
        colour = run_colour(index)
        axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, smoothed(values, SMOOTHING * len(values)), color=colour, linewidth=1.8, marker=marker)
        restarts = [attempt.step for attempt in run.attempts[1:]]
        axes.vlines(restarts, 0, 0.06, transform=axes.get_xaxis_transform(), color=colour, linewidth=1.2)
        limit = max(limit, float(np.percentile(values[np.isfinite(values)], 98)))
    if axes.lines:
        axes.set_ylim(0, 1.15 * limit or 1)  # the first few losses may be far above all others
    else:
        axes.text(0.5, 0.5, "nothing logged", transform=axes.transAxes, ha="center", color=GREY)
    _label_steps(axes)


def _draw_accuracy(axes: Axes, runs: list[RunSummary]) -> None:
    _style(axes, "AP during training, %")
    for index, run in enumerate(runs):
        steps, points = [line["step"] for line in run.evaluations], [100 * line["ap"] for line in run.evaluations]
        axes.plot(steps, points, color=run_colour(index), linewidth=1.8, marker="o")
    axes.set_ylim(bottom=0)
    _label_steps(axes)


def _sum_of_terms(line: dict[str, Any], prefix: str) -> float:
    terms = [float(value) for name, value in line.get("terms", {}).items() if name.startswith(prefix)]
    return sum(terms) if terms else math.nan


def _label_steps(axes: Axes) -> None:
    axes.set_xlabel("step", color=GREY, fontsize=9)
    axes.grid(color=GRID, linewidth=0.8)


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.set_axisbelow(True)


def _legend(figure: Figure, runs: list[RunSummary], indices: list[int]) -> None:
    handles = [Axes.plot(figure.axes[0], [], [], color=run_colour(index), linewidth=5)[0] for index in indices]
    labels = [run.label for run in runs]
    columns = min(4, max(1, len(runs)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5)
