"""Writing the report: one HTML file with everything in it, no network and no scripts."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image

from pipeline.core.errors import DataError
from pipeline.core.files import write_atomic
from pipeline.data.format.dataset import PackedDataset, Sample
from pipeline.report.curves import class_bars, class_names, loss_curves
from pipeline.report.facts import ap, commands, compare, details, differences, headline, role
from pipeline.report.graph import GraphPicture
from pipeline.report.graph_drawing import draw_graph
from pipeline.report.pages import Regions, draw_page, in_a_row
from pipeline.report.palette import run_colour
from pipeline.report.runs import RunSummary
from pipeline.report.starts import start_rows
from pipeline.report.tables import accuracy_rows, class_rows, training_rows

TEMPLATE = "report.html.j2"
SCORE_THRESHOLD = 0.5
PALETTE_COLOURS = 256


def write_report(
    runs: list[RunSummary],
    out: Path,
    *,
    dataset: PackedDataset | None,
    graph: GraphPicture | None,
    pages: int = 4,
    title: str = "Comparing document layout detectors",
) -> Path:
    """Write the page that compares ``runs`` to ``out``; what a run lacks is left out.

    Args:
        runs: in the order of columns.
        out: HTML file, replaced as a whole.
        dataset: what the runs were evaluated on, for page pictures; None shows none.
        graph: the graph of one page; None shows none.
        pages: pages shown, spread evenly over the dataset.
        title: heading of the page.

    Raises:
        DataError: where predictions name a class that ``dataset`` lacks, or its images cannot be read.
        OutputError: where ``out`` cannot be written.
    """
    comparison = compare(runs)
    content = _template().render(
        title=title,
        headline=headline(runs),
        details=details(runs),
        comparison=comparison,
        runs=[_run_facts(run, place, runs) for place, run in enumerate(runs)],
        accuracy=accuracy_rows(runs, comparison) if any(run.evaluation for run in runs) else [],
        training=training_rows(runs),
        starts=start_rows(runs),
        classes=class_rows(runs, comparison),
        bars=_embedded_png(class_bars(runs)) if class_names(runs) else None,
        curves=_embedded_png(loss_curves(runs)) if any(run.metrics for run in runs) else None,
        pages=[] if dataset is None else _page_pictures(dataset, runs, pages),
        score_threshold=SCORE_THRESHOLD,
        graph=None if graph is None else embedded(draw_graph(graph)),
        differences=differences(runs),
        commands=commands(runs),
    )
    return write_atomic(out, content)


def embedded(image: Image.Image) -> str:
    """An image as a data URI, reduced to 256 colours: a third of the bytes, and no difference to the eye here."""
    buffer = io.BytesIO()
    reduced = image.convert("RGB").quantize(PALETTE_COLOURS, dither=Image.Dither.NONE)
    reduced.save(buffer, "PNG", optimize=True)
    return _embedded_png(buffer.getvalue())


def shown_samples(dataset: PackedDataset, pages: int) -> list[int]:
    """``pages`` sample numbers spread evenly over the dataset, moved on to the next page that has regions."""
    starts = np.linspace(0, len(dataset), min(pages, len(dataset)), endpoint=False).astype(int).tolist()
    ends = [*starts, len(dataset)][1:]
    return [
        next((sample for sample in range(start, end) if len(dataset.sample(sample).boxes)), start)
        for start, end in zip(starts, ends, strict=True)
    ]


@lru_cache(maxsize=1)
def _template() -> Template:
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template(TEMPLATE)


def _embedded_png(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _run_facts(run: RunSummary, place: int, runs: Sequence[RunSummary]) -> dict[str, Any]:
    points = ap(run)
    detector = run.config.get("detector") or {}
    return {
        "label": run.label,
        "role": role(run, runs),
        "colour": run_colour(place),
        "ap": None if math.isnan(points) else points,
        "detector": " on ".join(
            str(detector[key]).replace("_", " ") for key in ("architecture", "backbone") if detector.get(key)
        ),
        "pages": (run.evaluation or {}).get("pages"),
    }


def _page_pictures(dataset: PackedDataset, runs: Sequence[RunSummary], pages: int) -> list[dict[str, str]]:
    shown = [run for run in runs if run.has_predictions]
    pictures = []
    for sample in shown_samples(dataset, pages):
        record = dataset.sample(sample)
        columns = [(run.label, _regions(run, record, dataset)) for run in shown]
        truth = Regions(record.boxes[~record.crowd], record.classes[~record.crowd])
        picture = draw_page(dataset.image(record), truth, columns, dataset.class_names, SCORE_THRESHOLD)
        pictures.append(
            {"name": record.file_name, "picture": embedded(picture), "across": str(in_a_row(1 + len(columns)))}
        )
    return pictures


def _regions(run: RunSummary, record: Sample, dataset: PackedDataset) -> Regions:
    classes = {category.id: place for place, category in enumerate(dataset.description.categories)}
    found = run.predictions.get(record.image_id, [])
    unknown = [result["category_id"] for result in found if result["category_id"] not in classes]
    if unknown:
        raise DataError(
            f"predictions of {run.folder} name category id {unknown[0]}, which {dataset.location} lacks; "
            "give the dataset that the run was evaluated on"
        )
    return Regions(
        boxes=np.array([result["bbox"] for result in found], dtype=np.float32).reshape(-1, 4),
        classes=np.array([classes[result["category_id"]] for result in found], dtype=np.int64),
        scores=np.array([result["score"] for result in found], dtype=np.float32),
    )
