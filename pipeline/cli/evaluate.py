"""``graphkd eval``: COCO AP of a run, or of any COCO results file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.console import console, err, metrics_table, percent, print_json
from pipeline.cli.train import OverridesArgument, open_context
from pipeline.cli.train import evaluate as evaluate_with_progress

if TYPE_CHECKING:
    from pipeline.context import RunContext


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("eval")(evaluate)


def evaluate(
    config: Annotated[Path | None, typer.Argument(help="Config of a trained run.")] = None,
    overrides: OverridesArgument = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint or run folder; default: the run's best checkpoint.")
    ] = None,
    predictions: Annotated[Path | None, typer.Option(help="COCO results file to score instead of a run.")] = None,
    annotations: Annotated[Path | None, typer.Option(help="COCO annotations to score it against.")] = None,
    max_detections: Annotated[
        int | None,
        typer.Option(min=10, help="Detections of a page and class that count; default: run.detection_limit, or 100."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Evaluate each new checkpoint of a run in training, until it ends.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON document; values are fractions.")] = False,
) -> None:
    """Score a run on its data.val, or --predictions against --annotations."""
    if (config is None) == (predictions is None) or (predictions is None) != (annotations is None):
        raise typer.BadParameter("give either a CONFIG, or both --predictions and --annotations")
    if predictions is not None and annotations is not None:
        from pipeline.evaluate.coco_ap import DETECTION_LIMIT, score_files

        metrics, label = score_files(predictions, annotations, max_detections or DETECTION_LIMIT), predictions.name
    else:
        assert config is not None
        limit = [] if max_detections is None else [f"run.detection_limit={max_detections}"]
        context = open_context(config, [*(overrides or []), *limit])
        if follow:
            _follow(context)
        metrics, label = _evaluate_run(context, checkpoint), context.config.name
    if as_json:
        print_json(metrics)
        return
    console.print(metrics_table({label: metrics}))
    for name, value in metrics["per_class"].items():
        console.print(f"  {name:<24} {percent(value):>6}", markup=False, highlight=False)
    if metrics["pages_over_limit"]:
        console.print(
            f"{metrics['pages_over_limit']} of {metrics['pages']} pages have more than {metrics['detection_limit']} "
            "regions of one class, and AP counts no more detections of it (COCO's maxDets); set --max-detections"
        )


def _follow(context: RunContext) -> None:
    from pipeline.train.watch import watch

    watch(context, lambda line: err.print(f"step {line['step']}: AP {percent(line['ap'])}"))


def _evaluate_run(context: RunContext, checkpoint: Path | None) -> dict[str, Any]:
    from pipeline.models import find_checkpoint

    return evaluate_with_progress(context, None if checkpoint is None else find_checkpoint(checkpoint))
