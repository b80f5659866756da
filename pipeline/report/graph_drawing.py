"""The structured graph drawn on its page: the teacher's regions before and after text is merged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyBboxPatch, Patch
from numpy.typing import NDArray
from PIL import Image

from pipeline.report.graph import Edges, GraphPicture

TEXT_COLOUR = "#0072B2"
OTHER_COLOUR = "#D55E00"
EDGE_COLOUR = "#3d444d"
PANEL_INCHES = 5.4
DPI = 120
PAPER = 0.62
"""How far the page fades to white, so that the graph stands out."""


def draw_graph(picture: GraphPicture) -> Image.Image:
    """Draw two panels, before and after merging, with titles and a legend; RGB."""
    aspect = picture.image.height / picture.image.width
    height = min(max(PANEL_INCHES * aspect, 2.5), 9.0)
    figure = Figure(figsize=(2 * PANEL_INCHES, height + 1.0), dpi=DPI, layout="constrained", facecolor="white")
    before, after = figure.subplots(1, 2)
    _paper(before, picture.image, f"Before merging: {_count(len(picture.boxes), 'region')}")
    _draw_before(before, picture)
    _paper(after, picture.image, f"After merging: {_count(int(picture.alive.sum()), 'node')}")
    _draw_after(after, picture)
    figure.legend(handles=_legend_handles(), loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _paper(axes: Axes, image: Image.Image, title: str) -> None:
    faded = Image.blend(image.convert("RGB"), Image.new("RGB", image.size, "white"), PAPER)
    axes.imshow(np.asarray(faded), extent=(0, image.width, image.height, 0), interpolation="antialiased")
    axes.set_title(title, loc="left", fontsize=12.5, fontweight="bold", color="#24292f")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["top", "right", "left", "bottom"]].set_color("#d0d7de")


def _draw_before(axes: Axes, picture: GraphPicture) -> None:
    for box, is_text in zip(picture.boxes, picture.text, strict=True):
        _area(axes, box, _colour(is_text), filled=0.06, rounding=0.0)
    _draw_edges(axes, picture.boxes, picture.original_edges)
    _draw_dots(axes, picture.boxes, picture.text, np.ones(len(picture.boxes), dtype=bool))


def _draw_after(axes: Axes, picture: GraphPicture) -> None:
    radius = 0.018 * max(picture.image.size)
    for node in np.flatnonzero(picture.alive).tolist():
        merged = bool(picture.merged_text[node])
        box = picture.merged_boxes[node]
        _area(axes, box, _colour(merged), filled=0.22 if merged else 0.06, rounding=radius * 0.5 * merged)
    _draw_edges(axes, picture.merged_boxes, picture.edges)
    for node in _self_loops(picture):
        x, y = _centre(picture.merged_boxes[node])
        axes.add_patch(Circle((x, y - radius), radius, fill=False, edgecolor=EDGE_COLOUR, linewidth=1.4, zorder=3))
    _draw_dots(axes, picture.merged_boxes, picture.merged_text, picture.alive)


def _self_loops(picture: GraphPicture) -> list[int]:
    """Merged nodes with an edge among their members."""
    ends = ((int(picture.cluster[first]), int(picture.cluster[second])) for first, second in picture.original_edges)
    return sorted({first for first, second in ends if first == second})


def _area(axes: Axes, box: NDArray[np.float32], colour: str, *, filled: float, rounding: float) -> None:
    left, top, right, bottom = (float(value) for value in box)
    style = f"round,pad=0,rounding_size={min(rounding, (right - left) / 2, (bottom - top) / 2)}"
    shape = FancyBboxPatch((left, top), right - left, bottom - top, boxstyle=style if rounding else "square,pad=0")
    shape.set(facecolor=(colour, filled), edgecolor=(colour, 0.8), linewidth=1.2, zorder=2)
    axes.add_patch(shape)


def _draw_edges(axes: Axes, boxes: NDArray[np.float32], edges: Edges) -> None:
    lines = [(_centre(boxes[first]), _centre(boxes[second])) for first, second in edges]
    axes.add_collection(LineCollection(lines, colors=EDGE_COLOUR, linewidths=1.4, zorder=3), autolim=False)


def _draw_dots(axes: Axes, boxes: NDArray[np.float32], text: NDArray[np.bool_], shown: NDArray[np.bool_]) -> None:
    for is_text, marker in ((True, "o"), (False, "s")):
        centres = np.array([_centre(box) for box in boxes[shown & (text == is_text)]]).reshape(-1, 2)
        axes.scatter(
            centres[:, 0],
            centres[:, 1],
            s=46,
            c=_colour(is_text),
            marker=marker,
            edgecolors="white",
            linewidths=1.1,
            zorder=4,
        )


def _centre(box: Sequence[float] | NDArray[np.float32]) -> tuple[float, float]:
    return float(box[0] + box[2]) / 2, float(box[1] + box[3]) / 2


def _colour(is_text: bool | np.bool_) -> str:
    return TEXT_COLOUR if is_text else OTHER_COLOUR


def _legend_handles() -> list[Line2D | Patch]:
    return [
        Line2D([], [], color=TEXT_COLOUR, marker="o", linestyle="", markersize=8, label="text"),
        Line2D([], [], color=OTHER_COLOUR, marker="s", linestyle="", markersize=8, label="not text"),
        Line2D([], [], color=EDGE_COLOUR, linewidth=1.4, label="edge between neighbours"),
        Line2D(
            [],
            [],
            color=EDGE_COLOUR,
            marker="o",
            fillstyle="none",
            linestyle="",
            markersize=9,
            label="edges inside merged text",
        ),
    ]
