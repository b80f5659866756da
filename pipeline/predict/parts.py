"""Predicting documents part by part; each part is one file in the output folder, whole or absent."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from typing import Any

from pipeline.core.files import fingerprint, write_atomic
from pipeline.predict import DEFAULT_DPI
from pipeline.predict.inputs import Document, PageError, read_pages
from pipeline.predict.page import PagePrediction, PageSource
from pipeline.predict.predictor import Predictor
from pipeline.predict.writers import Format, Line, page_name

PARTS, DRAWN = "parts", "drawn"
PART_PAGES = 64
Part = list[Document]


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictSettings:
    """How documents are predicted, apart from the model."""

    form: Format = "coco"
    dpi: float = DEFAULT_DPI
    pages: list[int] | None = None
    """Page numbers from 1; None for all."""
    batch: int = 1
    workers: int = 1
    """Threads that render pages on the canvas."""
    draw: bool = False


def finished_documents(out: Path) -> dict[str, Path]:
    """File of each document that is finished, by the document's key."""
    return {
        line.get("document", path.stem): path  # files of the first release hold one document each
        for path in sorted((out / PARTS).glob("*.jsonl"))
        for line in read_part(path)
    }


def read_part(path: Path) -> Iterator[Line]:
    """Lines of a part: predicted pages, and errors."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def divide(documents: Iterable[Document]) -> list[Part]:
    """Divide documents into parts of about ``PART_PAGES`` pages, in their order."""
    parts, pages = list[Part](), PART_PAGES
    for document in documents:
        if pages >= PART_PAGES:
            parts.append([])
            pages = 0
        parts[-1].append(document)
        pages += 1 if document.last is None else document.last - document.first
    return parts


def predict_parts(
    predictor: Predictor, parts: Sequence[Part], out: Path, settings: PredictSettings
) -> Iterator[tuple[int, int]]:
    """Predict parts into ``out`` and yield documents and pages of each as it is written.

    Pages of the next part are read while the network works on one. What is complete of a part is written also where
    an exception, such as Ctrl-C, ends the work.
    """
    found: Iterator[Any] = predictor.stream(
        _with_ends(parts, settings), settings.batch, threads=settings.workers, keep_images=settings.draw
    )
    for part in parts:
        complete: dict[str, list[Line]] = {}
        try:
            for document in part:
                own = takewhile(lambda each, end=document: each is not end, found)  # type: ignore[misc]
                complete[document.key] = [_line(each, document, out, settings) for each in own]
        finally:
            _write(complete, out)
        yield len(complete), sum("error" not in line for lines in complete.values() for line in lines)


def _with_ends(parts: Sequence[Part], settings: PredictSettings) -> Iterator[PageSource | PageError | Document]:
    """Pages of all documents, each followed by the document itself."""
    wanted = None if settings.pages is None else set(settings.pages)
    for part in parts:
        for document in part:
            yield from read_pages(document, settings.dpi, wanted)
            yield document


def _line(found: PagePrediction | PageError, document: Document, out: Path, settings: PredictSettings) -> Line:
    if isinstance(found, PageError):
        return {"file": str(document.path), "error": str(found)}
    if settings.draw:
        (out / DRAWN).mkdir(exist_ok=True)
        digest = sha256(found.file.encode()).hexdigest()[:8]  # files in two folders may have the same name
        found.draw(out / DRAWN / f"{page_name({'file': found.file, 'page': found.page})}-{digest}.jpg")
    return found.to_dict()


def _write(complete: dict[str, list[Line]], out: Path) -> None:
    rows = [{"document": key, **line} for key, lines in complete.items() for line in lines]
    if rows:
        path = out / PARTS / f"{fingerprint(list(complete))[:24]}.jsonl"
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
