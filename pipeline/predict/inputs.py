"""Reading pages from image files, PDFs, folders, patterns and packed datasets, one at a time."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

from graphkd.errors import UserError
from pipeline.core.errors import DataError, first_line
from pipeline.core.files import fingerprint
from pipeline.data.format.images import DECODING_ERRORS, SOURCE_FORMATS, decode_rgb
from pipeline.predict.page import POINTS_PER_INCH, PageSource

if TYPE_CHECKING:
    import pypdfium2

    from pipeline.data.format.dataset import PackedDataset

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jp2", ".ppm", ".pdf")
DATASET_PART = 256  # pages of a dataset that make a document
PDF_PART = 64  # pages of a PDF that make a document
MAX_SIDE = 20_000  # px of a page that is rendered or decoded
Kind = Literal["image", "pdf", "dataset"]


class PageError(UserError):
    """A file or page that cannot be read; the others are predicted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """An image file, or some pages of a PDF or packed dataset: what is written, and resumed, as a whole."""

    path: Path
    kind: Kind
    key: str
    """Changes with the file's path, size and time, and with the range of pages."""
    first: int = 0
    """First page of a PDF, or sample of a dataset, from 0."""
    last: int | None = None
    """Page or sample after the last one; None for all."""


def find_documents(inputs: Sequence[str | Path], wanted: set[int] | None = None) -> list[Document]:
    """Documents that the inputs name, each once: files, folders (with all below), glob patterns, packed datasets.

    Args:
        inputs: names.
        wanted: page numbers, from 1; ranges of a PDF without any of them are left out. None for all.

    Raises:
        DataError: if an input names nothing, or is a PDF and pypdfium2 is not installed.
    """
    found: dict[Path, list[Document]] = {}
    for given in inputs:
        for path in _paths(str(given)):
            if path not in found:
                found[path] = _documents(path, wanted)
    return [document for documents in found.values() for document in documents]


def _documents(path: Path, wanted: set[int] | None) -> list[Document]:
    if path.is_dir():
        from pipeline.data.format.dataset import PackedDataset

        return _ranges(path, "dataset", len(PackedDataset(path)), DATASET_PART)
    if path.suffix.lower() != ".pdf":
        return [_document(path, "image")]
    try:
        with closing(_open_pdf(path)) as pdf:
            ranges = _ranges(path, "pdf", len(pdf), PDF_PART)
    except PageError:  # as reading it will tell
        ranges = []
    held = [each for each in ranges if wanted is None or any(each.first < page <= (each.last or 0) for page in wanted)]
    return held or [_document(path, "pdf")]


def _ranges(path: Path, kind: Kind, total: int, size: int) -> list[Document]:
    return [_document(path, kind, start, min(total, start + size)) for start in range(0, total, size)]


def _document(path: Path, kind: Kind, first: int = 0, last: int | None = None) -> Document:
    stat = path.stat()
    key = fingerprint([str(path.absolute()), stat.st_size, stat.st_mtime_ns, first, last])[:24]
    return Document(path=path, kind=kind, key=key, first=first, last=last)


def _paths(given: str) -> list[Path]:
    path = Path(given)
    if path.is_dir():
        if (path / "dataset.json").exists():
            return [path]
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise DataError(f"{given} holds no page images or PDFs ({', '.join(SUFFIXES)})")
        return files
    if path.exists():
        return [path]
    matching = sorted(Path(name) for name in glob.glob(given, recursive=True) if Path(name).is_file())
    if not matching:
        raise DataError(f"{given} does not exist, and no file matches it; give a file, folder, pattern or dataset")
    return matching


def parse_pages(text: str | None) -> set[int] | None:
    """Page numbers of ``1-3,7``; None for all.

    Raises:
        DataError: if it is something else.
    """
    if text is None:
        return None
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or int(first) < 1:
            raise DataError(f"--pages {text!r}: {part.strip()!r} is no page or range from 1 on; give such as 1-3,7")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def read_pages(document: Document, dpi: float, wanted: set[int] | None = None) -> Iterator[PageSource | PageError]:
    """Yield the pages of a document, decoded one at a time, with an error in place of what cannot be read.

    Args:
        document: what to read.
        dpi: resolution at which PDFs are rendered.
        wanted: page numbers, from 1; None for all. A dataset is read whole.
    """
    if document.kind == "dataset":
        from pipeline.data.format.dataset import PackedDataset

        dataset = PackedDataset(document.path)
        yield from dataset_pages(dataset, document.first, len(dataset) if document.last is None else document.last)
        return
    read = _pdf_pages(document, dpi, wanted) if document.kind == "pdf" else _image_pages(document.path, wanted)
    found = False
    for page in read:
        found = True
        yield page
    if not found:
        yield PageError(f"{document.path} has none of the wanted pages")


def _image_pages(path: Path, wanted: set[int] | None) -> Iterator[PageSource | PageError]:
    try:
        with Image.open(path, formats=SOURCE_FORMATS) as image:
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            for number in range(1, frames + 1):
                if wanted is None or number in wanted:
                    yield PageSource(file=str(path), page=number, image=_frame(image, number, frames))
    except DECODING_ERRORS as error:
        yield PageError(f"{path}: {first_line(error)}")


def _frame(image: Image.Image, number: int, frames: int) -> Image.Image:
    if frames > 1:
        image.seek(number - 1)
    if max(image.size) > MAX_SIDE:
        raise ValueError(f"it has {image.size[0]} x {image.size[1]} px, more than {MAX_SIDE} on a side")
    return decode_rgb(image.copy() if frames > 1 else image)


def _open_pdf(path: Path) -> pypdfium2.PdfDocument:
    """Raises PageError if it is no PDF or has a password, and DataError without pypdfium2."""
    try:
        import pypdfium2
    except ImportError as error:
        raise DataError(f"{path} is a PDF, which needs pypdfium2: pip install 'graphkd[predict]'") from error
    try:
        return pypdfium2.PdfDocument(path)
    except (pypdfium2.PdfiumError, OSError) as error:
        raise PageError(f"{path} is no readable PDF, or has a password ({first_line(error)})") from error


def _pdf_pages(document: Document, dpi: float, wanted: set[int] | None) -> Iterator[PageSource | PageError]:
    path = document.path
    try:
        pdf = _open_pdf(path)
    except PageError as error:
        yield error
        return
    with closing(pdf):
        if not len(pdf):
            yield PageError(f"{path} has no pages")
        last = len(pdf) if document.last is None else min(document.last, len(pdf))
        for number in range(document.first + 1, last + 1):
            if wanted is None or number in wanted:
                yield _render(pdf, path, number, dpi)


def _render(pdf: pypdfium2.PdfDocument, path: Path, number: int, dpi: float) -> PageSource | PageError:
    try:
        page = pdf[number - 1]
        shown = min(dpi, MAX_SIDE * POINTS_PER_INCH / max(page.get_size()))
        image = page.render(scale=shown / POINTS_PER_INCH).to_pil().convert("RGB")
        page.close()
    except (RuntimeError, ValueError, ZeroDivisionError, MemoryError) as error:
        return PageError(f"page {number} of {path} cannot be rendered ({first_line(error)})")
    return PageSource(file=str(path), page=number, image=image, dpi=shown)


def dataset_pages(dataset: PackedDataset, first: int, last: int) -> Iterator[PageSource | PageError]:
    """Pages of an opened dataset from sample ``first`` to before ``last``, as :func:`read_pages`."""
    from pipeline.data.format.dataset import BadSampleError

    for index in range(first, last):
        sample = dataset.sample(index)
        try:
            image = decode_rgb(dataset.open_image(dataset.read_images([sample])[0], sample))
        except (BadSampleError, *DECODING_ERRORS) as error:
            yield PageError(f"{sample.key} of {dataset.location}: {first_line(error)}")
            continue
        yield PageSource(file=sample.key, page=1, image=image, image_id=sample.image_id)
