"""``graphkd predict``: regions of page images, PDFs and packed datasets."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from pipeline.cli.console import console, err, print_json, progress_bar
from pipeline.predict import DEFAULT_DPI, DEFAULT_THRESHOLD

if TYPE_CHECKING:
    from pipeline.predict.on_ray import RayPrediction
    from pipeline.predict.run import PredictSummary

ENGINES = ("local", "ray")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("predict")(predict)


def predict(
    model: Annotated[Path, typer.Argument(help="Run folder, checkpoint, or bundle of `graphkd export`.")],
    inputs: Annotated[
        list[str],
        typer.Argument(help="Images, PDFs, folders, patterns in quotes, packed datasets.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the results; continues there if it was interrupted.")],
    form: Annotated[str, typer.Option("--format", help="coco, jsonl, docling or page-xml.", metavar="FORMAT")] = "coco",
    threshold: Annotated[
        list[str] | None,
        typer.Option(help="Score below which regions are dropped: a number, or CLASS=NUMBER. Repeatable."),
    ] = None,
    draw: Annotated[bool, typer.Option("--draw", help="Also write pages with their regions drawn.")] = False,
    pages: Annotated[str | None, typer.Option(help="Pages of PDFs and multi-page images, such as 1-3,7.")] = None,
    dpi: Annotated[float, typer.Option(min=10, max=1200, help="Resolution at which PDFs are rendered.")] = DEFAULT_DPI,
    batch: Annotated[int, typer.Option(min=1, help="Pages detected together.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Threads that prepare pages.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    engine: Annotated[
        str, typer.Option(help="local, or ray: the cluster that RAY_ADDRESS names, or all cores of this machine.")
    ] = "local",
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON document.")] = False,
) -> None:
    """Predict pages. Boxes are in px of each page, and for PDFs also in points.

    Exit code 1 if some inputs could not be read; the others are predicted and these are listed.
    """
    from pipeline.predict.inputs import parse_pages
    from pipeline.predict.on_ray import RayPrediction
    from pipeline.predict.parts import PredictSettings
    from pipeline.predict.writers import Format

    _check_choice("--engine", engine, ENGINES)
    _check_choice("--format", form, get_args(Format))
    minimum, by_class = parse_thresholds(threshold or [], DEFAULT_THRESHOLD)
    wanted = parse_pages(pages)
    settings = PredictSettings(
        form=form,  # type: ignore[arg-type]
        dpi=dpi,
        pages=None if wanted is None else sorted(wanted),
        batch=batch,
        workers=workers,
        draw=draw,
    )
    work = RayPrediction(model=model, threshold=minimum, thresholds=by_class, device=device, out=out, settings=settings)
    _report(_predict(work, inputs, on_ray=engine == "ray"), as_json)


def _check_choice(option: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise typer.BadParameter(f"{option} {given!r} is none of {', '.join(choices)}")


def _predict(work: RayPrediction, inputs: list[str], on_ray: bool) -> PredictSummary:
    from pipeline.predict.inputs import find_documents
    from pipeline.predict.model import open_model
    from pipeline.predict.on_ray import predict_on_ray
    from pipeline.predict.predictor import Predictor
    from pipeline.predict.run import predict_documents

    wanted = work.settings.pages
    documents = find_documents(inputs, None if wanted is None else set(wanted))
    model = open_model(work.model, "cpu" if on_ray else work.device)
    predictor, begin = Predictor(model, work.threshold, work.thresholds), time.monotonic()
    with progress_bar("predicting", "documents") as update:
        return predict_documents(
            predictor,
            documents,
            work.out,
            work.settings,
            lambda done, total, read: update(done, total, f"{read} pages, {read / (time.monotonic() - begin):.1f}/s"),
            predict_on_ray(work) if on_ray else None,
        )


def _report(summary: PredictSummary, as_json: bool) -> None:
    for line in summary.errors:
        err.print(f"not read: {line}", soft_wrap=True)
    if as_json:
        print_json(asdict(summary))
    else:
        files = ", ".join(summary.files[:3])
        console.print(f"{summary.pages} pages, {summary.regions} regions: {files}", soft_wrap=True)
    if summary.errors:
        raise typer.Exit(1)


def parse_thresholds(given: list[str], default: float) -> tuple[float, dict[str, float]]:
    """Threshold of all classes, and of single ones, from ``0.3`` and ``Title=0.5``."""
    minimum, by_class = default, dict[str, float]()
    for text in given:
        name, equals, value = text.rpartition("=")
        try:
            number = float(value)
        except ValueError as error:
            raise typer.BadParameter(f"--threshold {text!r} is neither a number nor CLASS=NUMBER") from error
        if not 0 <= number <= 1:
            raise typer.BadParameter(f"--threshold {text!r} is not from 0 to 1")
        if equals:
            by_class[name] = number
        else:
            minimum = number
    return minimum, by_class
