"""Writing the report: one HTML file with its pictures embedded, without network access or scripts."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image

from graphkd.errors import UserError
from pipeline.config import RunConfig
from pipeline.context import RunContext
from pipeline.core.errors import DataError
from pipeline.core.files import write_atomic
from pipeline.data.format.dataset import PackedDataset, Sample
from pipeline.data.loading.augmentation import AugmentationConfig
from pipeline.data.loading.region_counts import count_regions, describe_losses
from pipeline.models import load_run_config
from pipeline.report.charts import class_bars, loss_curves, run_colour
from pipeline.report.graph import teacher_graph
from pipeline.report.latency import HEADINGS, latency_rows
from pipeline.report.pages import Regions, columns_of, draw_page
from pipeline.report.runs import RunSummary, class_names
from pipeline.report.tables import (
    attempt_rows,
    class_rows,
    commands,
    comparison_warnings,
    config_rows,
    run_rows,
    summary,
)

logger = logging.getLogger(__name__)

TEMPLATE = "report.html.j2"
SCORE_THRESHOLD = 0.5
PALETTE_COLOURS = 256
MAX_COUNTED_SHARDS = 256  # whose indexes are read to count regions


def report_runs(runs: Sequence[RunSummary], out: Path, title: str = "GraphKD runs", pages: int = 4) -> Path:
    """Write the report of ``runs``, with pages of the last run's ``data.val`` and the graph of the first distilled run.

    Pages or graph are left out with a warning if their dataset or teacher is missing.
    """
    configs = [load_run_config(run.folder) for run in runs]
    dataset = _open_dataset(configs[-1])
    return write_report(list(runs), out, dataset=dataset, graph=_draw_graph(configs, dataset), pages=pages, title=title)


def write_report(
    runs: list[RunSummary],
    out: Path,
    *,
    dataset: PackedDataset | None,
    graph: bytes | None,
    pages: int = 4,
    title: str = "Document layout detectors",
) -> Path:
    """Write the report to ``out``; sections without content are left out.

    Args:
        runs: in the order of columns.
        out: HTML file, replaced atomically.
        dataset: that the runs were evaluated on, for pictures of pages; None shows none.
        graph: PNG of a page's graph; None shows none.
        pages: number of pages shown, spread evenly over the dataset.
        title: heading.

    Raises:
        DataError: if predictions name a class that ``dataset`` lacks, or its images cannot be read.
        OutputError: if ``out`` cannot be written.
    """
    content = _template().render(
        title=title,
        summary=summary(runs),
        warnings=[*comparison_warnings(runs), *([] if dataset is None else _losses(dataset, runs))],
        runs=[{"label": run.label, "colour": run_colour(index)} for index, run in enumerate(runs)],
        rows=run_rows(runs),
        latency=latency_rows(runs),
        latency_headings=HEADINGS,
        classes=class_rows(runs),
        bars=_embed(class_bars(runs)) if class_names(runs) else None,
        curves=_embed(loss_curves(runs)) if any(run.metrics for run in runs) else None,
        starts=attempt_rows(runs),
        pages=[] if dataset is None else _page_pictures(dataset, runs, pages),
        score_threshold=SCORE_THRESHOLD,
        graph=None if graph is None else _embed(graph),
        differences=config_rows(runs),
        commands=commands(runs),
    )
    return write_atomic(out, content)


def _losses(dataset: PackedDataset, runs: list[RunSummary]) -> list[str]:
    """What evaluation does not see of the dataset as it was drawn."""
    evaluations = [run.evaluation for run in runs if run.evaluation is not None]
    limit = max((int(evaluation.get("detection_limit", 0)) for evaluation in evaluations), default=0)
    over = max((int(evaluation.get("pages_over_limit", 0)) for evaluation in evaluations), default=0)
    notes = describe_losses(count_regions(dataset, AugmentationConfig(), MAX_COUNTED_SHARDS))
    if over:
        notes.append(
            f"{over} pages have more than {limit} regions of one class, and AP counts no more detections of it"
        )
    return [f"{dataset.location}: {note}." for note in notes]


def shown_samples(dataset: PackedDataset, pages: int) -> list[int]:
    """Indices of ``pages`` samples spread evenly over the dataset, each moved on to a page with regions."""
    starts = np.linspace(0, len(dataset), min(pages, len(dataset)), endpoint=False).astype(int).tolist()
    ends = [*starts, len(dataset)][1:]
    return [
        next((sample for sample in range(start, end) if len(dataset.sample(sample).boxes)), start)
        for start, end in zip(starts, ends, strict=True)
    ]


def _open_dataset(config: RunConfig) -> PackedDataset | None:
    if config.data.val is None:
        return None
    try:
        return PackedDataset(config.data.val, config.data.storage)
    except UserError as error:
        logger.warning("the report shows no pages: %s", error)
        return None


def _draw_graph(configs: Sequence[RunConfig], dataset: PackedDataset | None) -> bytes | None:
    distilled = next((config for config in configs if config.method.name != "none"), None)
    if distilled is None or dataset is None:
        return None
    try:
        return teacher_graph(RunContext(distilled), dataset)
    except UserError as error:
        logger.warning("the report shows no graph: %s", error)
        return None


@lru_cache(maxsize=1)
def _template() -> Template:
    loader = FileSystemLoader(Path(__file__).parent)
    options = {"trim_blocks": True, "lstrip_blocks": True}
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, **options).get_template(TEMPLATE)  # type: ignore[arg-type]


def _embed(picture: bytes) -> str:
    """A PNG as a data URI, reduced to 256 colours, which takes a third of the bytes."""
    buffer = io.BytesIO()
    reduced = Image.open(io.BytesIO(picture)).convert("RGB").quantize(PALETTE_COLOURS, dither=Image.Dither.NONE)
    reduced.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _page_pictures(dataset: PackedDataset, runs: list[RunSummary], pages: int) -> list[dict[str, str]]:
    evaluated = [run for run in runs if run.evaluation is not None or run.predictions]
    pictures = []
    for index in shown_samples(dataset, pages):
        sample = dataset.sample(index)
        found = [(run.label, _predictions(run, sample, dataset)) for run in evaluated]
        truth = Regions(sample.boxes[~sample.crowd], sample.classes[~sample.crowd])
        picture = draw_page(dataset.image(sample), truth, found, dataset.class_names, SCORE_THRESHOLD)
        columns = str(columns_of(1 + len(found)))
        pictures.append({"name": sample.file_name, "picture": _embed(picture), "columns": columns})
    return pictures


def _predictions(run: RunSummary, sample: Sample, dataset: PackedDataset) -> Regions:
    classes = {category.id: index for index, category in enumerate(dataset.categories)}
    found = run.predictions.get(sample.image_id, [])
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
