"""Predicting a stream of pages: read in one thread, rendered in others, detected in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat, takewhile
from pathlib import Path
from typing import Any, TypeVar

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
Other = TypeVar("Other")
Input = str | Path | Image.Image | NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class _Shown:
    page: PageSource
    canvas: NDArray[np.uint8]
    transform: Transform


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
        self, pages: Iterable[PageSource | Other], batch: int = 1, *, threads: int = 1, keep_images: bool = True
    ) -> Iterator[PagePrediction | Other]:
        """Predict pages in their order, and pass on in its place what is no page, such as an error.

        Args:
            pages: read in a thread of its own, while earlier ones are detected.
            batch: pages that are detected together.
            threads: that render pages on the canvas.
            keep_images: whether predictions hold their page.
        """
        source, end = iter(pages), object()
        ahead = prefetch(lambda _: next(source, end), repeat(None), 1, AHEAD * batch, "read-pages")
        given = takewhile(lambda each: each is not end, ahead)
        rendered = prefetch(self._shown, given, threads, AHEAD * batch, "render-pages")
        for group in _batches(rendered, batch):
            yield from self._predict(group, keep_images)

    def _shown(self, page: Any) -> Any:
        return _Shown(page, *on_canvas(page.image, self.model.view)) if isinstance(page, PageSource) else page

    def _predict(self, group: list[Any], keep_images: bool) -> Iterator[Any]:
        pages = [each for each in group if isinstance(each, _Shown)]
        found: Iterator[Found] | None = None
        for each in group:
            if isinstance(each, _Shown):
                found = found or self._detect(pages)
                yield self.on_page(each.page, each.transform, next(found), keep_images)
            else:
                yield each

    def _detect(self, pages: list[_Shown]) -> Iterator[Found]:
        sizes = np.array([(page.transform.height, page.transform.width) for page in pages], dtype=np.int64)
        return iter(self.model.detect(np.stack([page.canvas for page in pages]), sizes))

    def on_page(self, page: PageSource, transform: Transform, found: Found, keep_image: bool = False) -> PagePrediction:
        """What was found on the canvas, in px of the page and above the thresholds."""
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
            image=page.image if keep_image else None,
        )


def on_canvas(page: Image.Image, view: AugmentationConfig) -> tuple[NDArray[np.uint8], Transform]:
    """A page as evaluation shows it: canvas uint8 [3, H, W] and where the page lies on it."""
    shown = evaluation_augmentation(view)
    transform = compute_transform(*page.size, shown, view.canvas)
    return render(decode_image(page, shown, transform), transform, shown, view.canvas), transform


def _sources(inputs: Iterable[Input], dpi: float, pages: set[int] | None) -> Iterator[PageSource | PageError]:
    for number, given in enumerate(inputs, start=1):
        if isinstance(given, (str, Path)):
            for document in find_documents([given], pages):
                yield from read_pages(document, dpi, pages)
        else:
            image = given if isinstance(given, Image.Image) else Image.fromarray(given)
            yield PageSource(file=f"input {number}", page=1, image=decode_rgb(image.copy()))


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Groups of ``size`` pages, with what lies between them."""
    group, pages = list[Any](), 0
    for item in items:
        group.append(item)
        pages += isinstance(item, _Shown)
        if pages == size:
            yield group
            group, pages = [], 0
    yield group
