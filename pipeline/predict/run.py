"""Predicting all inputs into a folder: resumable by document, and what cannot be read is reported at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from pipeline.core.errors import OutputError
from pipeline.core.files import ensure_owned_dir, write_json
from pipeline.core.locks import checked_lock, file_lock
from pipeline.core.run_paths import WRITTEN_BY_JOBS
from pipeline.predict.inputs import Document
from pipeline.predict.parts import (
    PARTS,
    Part,
    PredictSettings,
    divide,
    finished_documents,
    predict_parts,
    read_part,
)
from pipeline.predict.predictor import Predictor
from pipeline.predict.writers import Format, Line, write_predictions

MARKER, LOCK = "predict.json", ".predict.lock"
Written = tuple[int, int]
"""Documents and pages of a part."""


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
    predict: Callable[[Sequence[Part]], Iterator[Written]] | None = None,
) -> PredictSummary:
    """Predict every document into ``out``, and continue there if it was interrupted.

    Args:
        predictor: model and thresholds.
        documents: inputs.
        out: folder, new or of the same prediction.
        settings: of the prediction.
        progress: called with documents done, in total, and pages predicted by this call.
        predict: what predicts parts, such as :func:`pipeline.predict.on_ray.predict_on_ray`; default: this process.

    Raises:
        OutputError: if ``out`` holds something else, another process writes there, or the disk is full.
    """
    with checked_lock(lambda: _claim(out, predictor, settings), file_lock(out / LOCK)):
        finished = finished_documents(out)
        missing = divide(each for each in documents if each.key not in finished)
        done, pages = len(documents) - sum(map(len, missing)), 0
        progress(done, len(documents), 0)
        for more in predict(missing) if predict else predict_parts(predictor, missing, out, settings):
            done, pages = done + more[0], pages + more[1]
            progress(done, len(documents), pages)
        return _finish(documents, _category_ids(documents, predictor.class_names), settings.form, out)


def _category_ids(documents: Sequence[Document], class_names: list[str]) -> dict[str, int]:
    """Category id of each class: of the packed dataset if there is one, else counted from 1."""
    ids = {name: number for number, name in enumerate(class_names, start=1)}
    for path in {document.path for document in documents if document.kind == "dataset"}:
        from pipeline.data.format.dataset import PackedDataset

        ids |= PackedDataset(path).category_ids
    return {name: ids[name] for name in class_names}


def _claim(out: Path, predictor: Predictor, settings: PredictSettings) -> None:
    ensure_owned_dir(out, MARKER, "a prediction", also=(LOCK, *WRITTEN_BY_JOBS))
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


def _finish(documents: Sequence[Document], category_ids: dict[str, int], form: Format, out: Path) -> PredictSummary:
    summary = PredictSummary(documents=len(documents))
    one_dataset = len({document.path for document in documents}) == 1

    def good() -> Iterator[Line]:
        for line in _in_order(documents, out):
            if "error" in line:
                summary.errors.append(line["error"])
            else:
                summary.pages += 1
                summary.regions += len(line["regions"])
                if not one_dataset:
                    line.pop("image_id", None)  # two datasets may have the same ids
                yield line

    summary.files = [str(path) for path in write_predictions(good(), category_ids, form, out)]
    return summary


def _in_order(documents: Sequence[Document], out: Path) -> Iterator[Line]:
    """Lines of all documents in the order of the inputs, of one part at a time."""
    files = finished_documents(out)
    for path, group in groupby(documents, key=lambda document: files[document.key]):
        lines: dict[str, list[Line]] = {}
        for line in read_part(path):
            lines.setdefault(line.pop("document", path.stem), []).append(line)
        for document in group:
            yield from lines[document.key]
