"""A page with its annotated regions, and beside it with those that each run found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from pipeline.report.charts import INK, png

DPI = 110
PANEL_INCHES = {1: 5.0, 2: 5.0, 3: 4.0}
"""Width of a page by the number of pages in a row."""
MAX_ASPECT = 2.5
TITLE_INCHES = 0.6
LABEL_SHARE = 0.02
"""Height of a label, as a share of the page's."""
MATCH_IOU = 0.5
CLASS_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#AA4499", "#E69F00", "#332288", "#882255", "#117733"),
    *("#56B4E9", "#999933", "#CC6677", "#661100", "#44AA99", "#6B6B6B", "#CC79A7", "#7A5C00"),
)
"""Okabe and Ito's and Tol's muted palettes. With this many colours, the class's name is always written too."""


@dataclass(frozen=True, slots=True)
class Regions:
    """Annotated or predicted regions of one page."""

    boxes: NDArray[np.float32]
    """[n, 4]: x, y, width, height, image px."""
    classes: NDArray[np.int64]
    """[n], 0-based."""
    scores: NDArray[np.float32] | None = None
    """[n], 0 to 1; None for annotations."""

    def above(self, threshold: float) -> Regions:
        """Regions with a score of at least ``threshold``, best first; annotations as they are."""
        if self.scores is None:
            return self
        order = np.argsort(-self.scores, kind="stable")
        order = order[self.scores[order] >= threshold]
        return Regions(self.boxes[order], self.classes[order], self.scores[order])


def class_colour(index: int) -> str:
    """Colour of a 0-based class, as ``#RRGGBB``."""
    return CLASS_COLOURS[index % len(CLASS_COLOURS)]


def draw_page(
    image: Image.Image,
    truth: Regions,
    predictions: Sequence[tuple[str, Regions]],
    class_names: Sequence[str],
    score_threshold: float = 0.5,
) -> bytes:
    """Draw annotations and predictions as a PNG; wrong predictions have dashed outlines.

    Args:
        image: the page.
        truth: annotations.
        predictions: of each run, with its name.
        class_names: names in class order.
        score_threshold: predictions below it are not drawn.
    """
    columns = columns_of(1 + len(predictions))
    rows = -(-(1 + len(predictions)) // columns)
    width = PANEL_INCHES[columns]
    height = width * min(MAX_ASPECT, max(0.25, image.height / image.width)) + TITLE_INCHES
    figure = Figure(figsize=(columns * width, rows * height), dpi=DPI, layout="constrained", facecolor="white")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    annotated = len(truth.boxes)
    title = f"Ground truth\n{annotated} regions"
    _draw_panel(panels[0], image, title, truth, np.ones(annotated, dtype=bool), class_names)
    for panel, (label, regions) in zip(panels[1:], predictions, strict=False):
        found = regions.above(score_threshold)
        correct = matched(found, truth)
        count = int(correct.sum())
        title = f"{label}\n{count} of {annotated} found, {len(correct) - count} wrong"
        _draw_panel(panel, image, title, found, correct, class_names)
    for panel in panels[1 + len(predictions) :]:
        panel.set_visible(False)
    return png(figure)


def columns_of(count: int) -> int:
    """Number of columns for ``count`` pages: up to three, but two for four."""
    return 2 if count == 4 else min(count, 3)


def matched(found: Regions, truth: Regions) -> NDArray[np.bool_]:
    """Whether each found region, best first, matches an annotation of its class with an IoU of at least .5: bool [n].

    Each annotation matches at most one region, as in COCO's AP50.
    """
    overlap = _iou(found.boxes, truth.boxes) * (found.classes[:, None] == truth.classes[None, :])
    correct = np.zeros(len(found.boxes), dtype=bool)
    if not overlap.size:
        return correct
    for index, row in enumerate(overlap):
        best = int(row.argmax())
        if row[best] >= MATCH_IOU:
            correct[index] = True
            overlap[:, best] = 0
    return correct


def _iou(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum((first[:, :2] + first[:, 2:])[:, None], (second[:, :2] + second[:, 2:])[None])
    common = (high - low).clip(min=0).prod(axis=-1)
    areas = first[:, 2:].prod(axis=-1)[:, None] + second[:, 2:].prod(axis=-1)[None] - common
    overlap: NDArray[np.float32] = common / np.maximum(areas, 1e-6)
    return overlap


def _draw_panel(
    axes: Axes,
    image: Image.Image,
    title: str,
    regions: Regions,
    correct: NDArray[np.bool_],
    class_names: Sequence[str],
) -> None:
    show_page(axes, image, title)
    for index, (x, y, width, height) in enumerate(regions.boxes.tolist()):
        colour = class_colour(int(regions.classes[index]))
        outline = Rectangle((x, y), width, height, facecolor=(colour, 0.12), edgecolor=colour, linewidth=1.4)
        outline.set_linestyle("-" if correct[index] else (0, (4, 3)))
        axes.add_patch(outline)
        name = class_names[regions.classes[index]]
        label = name if regions.scores is None else f"{name} {regions.scores[index]:.2f}"
        ground = {"facecolor": colour, "edgecolor": "none", "pad": 1}
        side = "bottom" if y > LABEL_SHARE * image.height else "top"
        axes.text(max(x, 0), max(y, 0), label, va=side, fontsize=6, color="white", clip_on=True, bbox=ground)


def show_page(axes: Axes, image: Image.Image, title: str, faded: float = 0.0) -> None:
    """Show a page without axes, ``faded`` towards white by a share from 0 to 1."""
    page = Image.blend(image.convert("RGB"), Image.new("RGB", image.size, "white"), faded)
    axes.imshow(np.asarray(page), extent=(0, image.width, image.height, 0), interpolation="antialiased")
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.set_aspect("auto" if image.height > MAX_ASPECT * image.width else "equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["top", "right", "left", "bottom"]].set_color("#d0d7de")
