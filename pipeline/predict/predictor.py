"""Predicting a stream of pages: read in one thread, rendered in others, detected in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, repeat
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.core.errors import DataError
from pipeline.core.parallel import prefetch
from pipeline.data.format.images import decode_rgb
from pipeline.data.loading.augmentation import (
    AugmentationConfig,
    Transform,
    compute_transform,
    decode_image,
    evaluation_augmentation,
    render,
)
from pipeline.predict import DEFAULT_DPI, DEFAULT_THRESHOLD
from pipeline.predict.inputs import PageError, find_documents, read_pages
from pipeline.predict.model import Found, PageModel
from pipeline.predict.page import PagePrediction, PageSource

AHEAD = 2  # batches that are read and rendered ahead
Item = TypeVar("Item")
Input = str | Path | Image.Image | NDArray[np.uint8]


class Predictor:
    """A model with thresholds: the object that ``graphkd.load`` returns.

    Args:
        model: what detects.
        threshold: score below which regions are dropped, 0 to 1.
        thresholds: of single classes by name.

    Raises:
        DataError: if a class of ``thresholds`` does not exist.
    """

    def __init__(
        self,
        model: PageModel,
        threshold: float = DEFAULT_THRESHOLD,
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        self.model = model
        self.minimum = np.full(len(model.class_names), threshold, dtype=np.float32)
        for name, value in (thresholds or {}).items():
            if name not in model.class_names:
                raise DataError(
                    f"threshold of {name!r}: the model has no such class; it has {', '.join(model.class_names)}"
                )
            self.minimum[model.class_names.index(name)] = value

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by index."""
        return self.model.class_names

    def predict(
        self, *inputs: Input, dpi: float = DEFAULT_DPI, pages: set[int] | None = None, batch: int = 1
    ) -> Iterator[PagePrediction]:
        """Yield the prediction of every page.

        Args:
            inputs: paths of images, PDFs, folders, patterns or packed datasets; PIL images; RGB arrays [h, w, 3].
            dpi: resolution at which PDFs are rendered.
            pages: page numbers from 1 of PDFs and multi-page images; None for all.
            batch: pages that are detected together.

        Raises:
            PageError: if a page cannot be read; one line.
        """
        for found in self.stream(_sources(inputs, dpi, pages), batch):
            if isinstance(found, PageError):
                raise found
            yield found

    def stream(
        self, pages: Iterable[PageSource | PageError], batch: int = 1, *, threads: int = 1, keep_images: bool = True
    ) -> Iterator[PagePrediction | PageError]:
        """Predict pages in their order, and pass errors on in place of pages that cannot be read.

        Args:
            pages: read in a thread of its own, while earlier ones are detected.
            batch: pages that are detected together.
            threads: that render pages on the canvas.
            keep_images: whether predictions hold their page.
        """
        source = iter(pages)
        ahead = prefetch(lambda _: next(source, None), repeat(None), 1, AHEAD * batch, "read-pages")
        rendered = prefetch(self._shown, _until_none(ahead), threads, AHEAD * batch, "render-pages")
        for group in _grouped(rendered, batch):
            yield from self._predict(group, keep_images)

    def _shown(self, page: PageSource | PageError) -> tuple[PageSource, NDArray[np.uint8], Transform] | PageError:
        if isinstance(page, PageError):
            return page
        return page, *on_canvas(page.image, self.model.view)

    def _predict(
        self, group: list[tuple[PageSource, NDArray[np.uint8], Transform] | PageError], keep_images: bool
    ) -> Iterator[PagePrediction | PageError]:
        good = [each for each in group if not isinstance(each, PageError)]
        found: Iterator[Found] = iter(())
        if good:
            sizes = np.array([(transform.height, transform.width) for _, _, transform in good], dtype=np.int64)
            found = iter(self.model.detect(np.stack([canvas for _, canvas, _ in good]), sizes))
        for each in group:
            if isinstance(each, PageError):
                yield each
            else:
                yield self._on_page(each[0], each[2], next(found), keep_images)

    def _on_page(self, page: PageSource, transform: Transform, found: Found, keep_images: bool) -> PagePrediction:
        width, height = page.image.size
        kept = found.scores >= self.minimum[found.classes]
        scale = np.array([width / transform.width, height / transform.height] * 2, dtype=np.float32)
        boxes = np.clip(found.boxes[kept] * scale, 0, np.array([width, height] * 2, dtype=np.float32))
        return PagePrediction(
            file=page.file,
            page=page.page,
            width=width,
            height=height,
            boxes=boxes.astype(np.float32),
            classes=found.classes[kept],
            scores=found.scores[kept],
            class_names=self.class_names,
            dpi=page.dpi,
            image_id=page.image_id,
            image=page.image if keep_images else None,
        )


def on_canvas(page: Image.Image, view: AugmentationConfig) -> tuple[NDArray[np.uint8], Transform]:
    """A page as evaluation shows it: canvas uint8 [3, H, W] and where the page lies on it."""
    shown = evaluation_augmentation(view)
    transform = compute_transform(*page.size, shown, view.canvas)
    return render(decode_image(page, shown, transform), transform, shown, view.canvas), transform


def _sources(inputs: Iterable[Input], dpi: float, pages: set[int] | None) -> Iterator[PageSource | PageError]:
    for number, given in enumerate(inputs, start=1):
        if isinstance(given, (str, Path)):
            for document in find_documents([given]):
                yield from read_pages(document, dpi, pages)
        else:
            image = given if isinstance(given, Image.Image) else Image.fromarray(given)
            yield PageSource(file=f"input {number}", page=1, image=decode_rgb(image.copy()))


def _until_none(items: Iterator[PageSource | PageError | None]) -> Iterator[PageSource | PageError]:
    for item in items:
        if item is None:
            return
        yield item


def _grouped(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while group := list(islice(items, size)):
        yield group
