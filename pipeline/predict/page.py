"""A page to predict on, and what was found on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    import supervision

COLOURS = (
    *("#3b6fb6", "#d1495b", "#2e8b57", "#e08a1e", "#7a5195", "#00808a"),
    *("#a0522d", "#5f6b7a", "#b5179e", "#6a994e", "#c1121f"),
)


POINTS_PER_INCH = 72


@dataclass(frozen=True, kw_only=True, slots=True)
class PageSource:
    """One page of an input."""

    file: str
    """Path as it was given or found, or the dataset's sample key."""
    page: int
    """Number of the page in its file, from 1."""
    image: Image.Image
    """RGB, upright."""
    dpi: float | None = None
    """Resolution at which a PDF's page was rendered; None for images."""
    image_id: int | None = None
    """Of a packed dataset."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PagePrediction:
    """Regions of one page, best first."""

    file: str
    page: int
    """Number of the page in its file, from 1."""
    width: int
    """Of the page, px."""
    height: int
    boxes: NDArray[np.float32]
    """[n, 4], xyxy in px of the page."""
    classes: NDArray[np.int64]
    """[n], index into ``class_names``."""
    scores: NDArray[np.float32]
    """[n], 0 to 1."""
    class_names: list[str]
    dpi: float | None = None
    """Resolution at which a PDF's page was rendered, else None."""
    image_id: int | None = None
    """Of a packed dataset, else None."""
    image: Image.Image | None = field(default=None, repr=False, compare=False)
    """The page, unless it was dropped to save memory."""

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def labels(self) -> list[str]:
        """Class name of each region."""
        return [self.class_names[index] for index in self.classes]

    @property
    def boxes_pt(self) -> NDArray[np.float32] | None:
        """Boxes in points of a PDF's page, y downwards; None for images."""
        return None if self.dpi is None else self.boxes * np.float32(POINTS_PER_INCH / self.dpi)

    def to_dict(self) -> dict[str, Any]:
        """All but the image, for JSON."""
        found: dict[str, Any] = {"file": self.file, "page": self.page, "width": self.width, "height": self.height}
        if self.dpi is not None:
            found["dpi"] = self.dpi
        if self.image_id is not None:
            found["image_id"] = self.image_id
        rows = zip(self.boxes.tolist(), self.labels, self.scores.tolist(), strict=True)
        found["regions"] = [
            {"label": label, "score": round(score, 6), "box": [round(side, 3) for side in box]}
            for box, label, score in rows
        ]
        if self.boxes_pt is not None:
            for region, box in zip(found["regions"], self.boxes_pt.tolist(), strict=True):
                region["box_pt"] = [round(side, 3) for side in box]
        return found

    def to_coco(self, image_id: int = 1) -> list[dict[str, Any]]:
        """COCO results: ``bbox`` is x, y, width, height in px; ``category_id`` counts classes from 1."""
        rows = zip(self.boxes.tolist(), self.classes.tolist(), self.scores.tolist(), strict=True)
        return [
            {
                "image_id": image_id,
                "category_id": index + 1,
                "bbox": [round(left, 3), round(top, 3), round(right - left, 3), round(bottom - top, 3)],
                "score": round(score, 6),
            }
            for (left, top, right, bottom), index, score in rows
        ]

    def to_supervision(self) -> supervision.Detections:
        """As ``supervision.Detections``, if that package is installed."""
        import supervision

        return supervision.Detections(
            xyxy=self.boxes,
            confidence=self.scores,
            class_id=self.classes.astype(int),
            data={"class_name": np.array(self.labels)},
        )

    def draw(self, path: str | Path | None = None) -> Image.Image:
        """The page with its regions drawn on it, also written to ``path`` if given.

        Raises:
            ValueError: if the image was dropped.
        """
        if self.image is None:
            raise ValueError(f"page {self.page} of {self.file} has no image; predict with keep_images=True")
        drawn = self.image.copy()
        painter, side = ImageDraw.Draw(drawn), max(drawn.size)
        font, line = ImageFont.load_default(max(10, side // 90)), max(1, side // 500)
        for box, index, score in zip(self.boxes.tolist(), self.classes.tolist(), self.scores.tolist(), strict=True):
            colour, text = COLOURS[index % len(COLOURS)], f"{self.class_names[index]} {score:.2f}"
            painter.rectangle(box, outline=colour, width=line)
            place = painter.textbbox((box[0] + line, box[1] + line), text, font=font)
            painter.rectangle(place, fill=colour)
            painter.text((box[0] + line, box[1] + line), text, fill="white", font=font)
        if path is not None:
            drawn.save(path)
        return drawn
