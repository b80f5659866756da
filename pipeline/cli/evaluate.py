"""``graphkd eval``: COCO AP of a run, or of any COCO results file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.console import err, figures_table, out, percent, print_json
from pipeline.cli.train import Overrides, configured, evaluate_with_progress


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("eval")(evaluate)


def evaluate(
    config: Annotated[Path | None, typer.Argument(help="Config of a trained run.")] = None,
    overrides: Overrides = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint or run folder; by default the run's best.")
    ] = None,
    predictions: Annotated[Path | None, typer.Option(help="COCO results file to score instead of a run.")] = None,
    annotations: Annotated[Path | None, typer.Option(help="COCO annotations that it is scored against.")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Evaluate each new checkpoint of a run in training, until it ends.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON document; fractions.")] = False,
) -> None:
    """Score a run on its data.val, or --predictions against --annotations."""
    if (config is None) == (predictions is None) or (predictions is None) != (annotations is None):
        raise typer.BadParameter("give either a CONFIG, or both --predictions and --annotations")
    if predictions is not None and annotations is not None:
        from pipeline.evaluate.coco_ap import score_files

        figures, label = score_files(predictions, annotations), predictions.name
    else:
        assert config is not None
        if follow:
            _follow(configured(config, overrides))
        figures, label = _evaluate_run(configured(config, overrides), checkpoint)
    if as_json:
        print_json(figures)
        return
    out.print(figures_table({label: figures}))
    for name, value in figures["per_class"].items():
        out.print(f"  {name:<24} {percent(value):>6}")


def _follow(settings: Any) -> None:
    from pipeline.train.watch import watch

    _require_pages(settings)
    watch(settings, lambda line: err.print(f"step {line['step']}: AP {percent(line['ap'])}"))


def _require_pages(settings: Any) -> None:
    from graphkd.errors import ConfigError

    if settings.data.val is None:
        raise ConfigError(f"{settings.name} names no data.val to evaluate on; give data.val=FOLDER")


def _evaluate_run(settings: Any, checkpoint: Path | None) -> tuple[dict[str, Any], str]:
    from pipeline.models import find_checkpoint
    from pipeline.train.run import evaluate_run

    _require_pages(settings)
    chosen = None if checkpoint is None else find_checkpoint(checkpoint)
    return evaluate_with_progress(settings, evaluate_run, chosen), settings.name
