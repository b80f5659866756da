"""Predicting all inputs into a folder: resumable by document, and what cannot be read is reported at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from pipeline.core.errors import OutputError
from pipeline.core.files import ensure_owned_dir, fingerprint, write_atomic, write_json
from pipeline.core.locks import checked_lock, file_lock
from pipeline.predict import DEFAULT_DPI
from pipeline.predict.inputs import Document, PageError, read_pages
from pipeline.predict.page import PagePrediction
from pipeline.predict.predictor import Predictor
from pipeline.predict.writers import Format, Line, page_name, write_predictions

MARKER, PARTS, DRAWN, LOCK = "predict.json", "parts", "drawn", ".predict.lock"


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


@dataclass(slots=True)
class PredictSummary:
    """What a prediction came to."""

    documents: int = 0
    pages: int = 0
    regions: int = 0
    errors: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


def predict_documents(
    predictor: Predictor,
    documents: Sequence[Document],
    out: Path,
    settings: PredictSettings,
    progress: Callable[[int, int, int], None] = lambda done, total, pages: None,
) -> PredictSummary:
    """Predict every document into ``out``, and continue there if it was interrupted.

    Args:
        predictor: model and thresholds.
        documents: inputs; each is written once it is complete.
        out: folder, new or of the same prediction.
        settings: of the prediction.
        progress: called with documents done, in total, and pages done.

    Raises:
        OutputError: if ``out`` holds something else, another process writes there, or the disk is full.
    """
    with checked_lock(lambda: _claim(out, predictor, settings), file_lock(out / LOCK)):
        paths = [_part(out, document) for document in documents]
        pages = 0
        for number, (document, path) in enumerate(zip(documents, paths, strict=True)):
            if not path.exists():
                _predict_document(predictor, document, path, out, settings)
            pages += sum(1 for line in _lines(path) if "error" not in line)
            progress(number + 1, len(documents), pages)
        return _finish(paths, _category_ids(documents, predictor.class_names), settings.form, out)


def _category_ids(documents: Sequence[Document], class_names: list[str]) -> dict[str, int]:
    """Category id of each class: of the packed dataset if there is one, else counted from 1."""
    ids = {name: number for number, name in enumerate(class_names, start=1)}
    for path in {document.path for document in documents if document.kind == "dataset"}:
        from pipeline.data.format.dataset import PackedDataset

        ids |= PackedDataset(path).category_ids
    return {name: ids[name] for name in class_names}


def _claim(out: Path, predictor: Predictor, settings: PredictSettings) -> None:
    ensure_owned_dir(out, MARKER, "a prediction", also=(LOCK,))
    own = {
        "model": predictor.model.identity,
        "thresholds": [round(float(value), 6) for value in predictor.minimum],
        "dpi": settings.dpi,
        "pages": settings.pages,
        "draw": settings.draw,
    }
    marker = out / MARKER
    if not marker.exists():
        (out / PARTS).mkdir(exist_ok=True)
        write_json(marker, own)
        return
    try:
        found = json.loads(marker.read_text())
    except (OSError, ValueError) as error:
        raise OutputError(f"{marker} is unreadable ({error}); give another --out") from error
    differing = [name for name in own if not isinstance(found, dict) or found.get(name) != own[name]]
    if differing:
        raise OutputError(f"{out} holds a prediction with another {', '.join(differing)}; give another --out")


def _part(out: Path, document: Document) -> Path:
    path = document.path
    stat = path.stat()
    key = fingerprint([str(path.absolute()), stat.st_size, stat.st_mtime_ns, document.first, document.last])
    return out / PARTS / f"{key[:24]}.jsonl"


def _predict_document(
    predictor: Predictor, document: Document, path: Path, out: Path, settings: PredictSettings
) -> None:
    wanted = None if settings.pages is None else set(settings.pages)
    source = read_pages(document, settings.dpi, wanted)
    lines = []
    for found in predictor.stream(source, settings.batch, threads=settings.workers, keep_images=settings.draw):
        if isinstance(found, PageError):
            lines.append({"file": str(document.path), "error": str(found)})
            continue
        lines.append(found.to_dict())
        if settings.draw:
            _draw(found, out)
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _draw(found: PagePrediction, out: Path) -> None:
    (out / DRAWN).mkdir(exist_ok=True)
    name = page_name({"file": found.file, "page": found.page})
    digest = sha256(found.file.encode()).hexdigest()[:8]  # two files may have the same name in other folders
    found.draw(out / DRAWN / f"{name}-{digest}.jpg")


def _lines(path: Path) -> Iterator[Line]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _finish(paths: list[Path], category_ids: dict[str, int], form: Format, out: Path) -> PredictSummary:
    summary = PredictSummary(documents=len(paths))

    def good() -> Iterator[Line]:
        for path in paths:
            for line in _lines(path):
                if "error" in line:
                    summary.errors.append(line["error"])
                else:
                    summary.pages += 1
                    summary.regions += len(line["regions"])
                    yield line

    summary.files = [str(path) for path in write_predictions(good(), category_ids, form, out)]
    return summary
