"""``graphkd train``: a teacher, a student alone, or a distilled student."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.console import console, metrics_table, page_progress, print_json, progress_bar

if TYPE_CHECKING:
    from pipeline.context import RunContext
    from pipeline.runs.checkpoint import Checkpoint

ConfigArgument = Annotated[Path, typer.Argument(help="Config of the run.")]
OverridesArgument = Annotated[list[str] | None, typer.Argument(help="Overrides, such as schedule.steps=1000.")]
EngineOption = Annotated[str | None, typer.Option("--engine", help="ray or local; default: engine.name of the config.")]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(train)


def open_context(config: Path, overrides: list[str] | None, engine: str | None = None) -> RunContext:
    """Load a config with overrides and return its context; ``engine`` overrides ``engine.name``."""
    from pipeline.config import load_config
    from pipeline.context import RunContext

    engine_override = [f"engine.name={engine}"] if engine else []
    return RunContext(load_config(config, [*(overrides or []), *engine_override]))


def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    engine: EngineOption = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Train ten steps on one page in this process; writes nothing.")
    ] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume even if the config differs from the run's.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train to completion, then evaluate on data.val. Rerun to resume from the newest checkpoint."""
    context = open_context(config, overrides, engine)
    if smoke:
        _smoke(context, as_json)
        return
    checkpoint = _train(context, allow_changes)
    if int(os.environ.get("RANK", "0")):
        return  # under torchrun, rank 0 does the rest
    folder = context.config.folder
    metrics = {} if context.config.data.val is None else evaluate(context)
    if as_json:
        print_json({"run": str(folder), "step": checkpoint.step, **metrics})
        return
    console.print(f"{folder}: step {checkpoint.step}, {checkpoint.folder}")
    if metrics:
        console.print(metrics_table({context.config.name: metrics}))


def _train(context: RunContext, allow_changes: bool) -> Checkpoint:
    from pipeline.train.run import train_run

    steps = context.config.schedule.scaled().steps
    with progress_bar(f"training {context.config.name}", "steps") as update:

        def on_line(line: dict[str, Any]) -> None:
            update(line["step"], steps, f"loss {line['loss']:.3f}, {line['pages_per_s']:.1f} pages/s")

        return train_run(context, on_line, allow_changes)


def evaluate(context: RunContext, checkpoint: Checkpoint | None = None) -> dict[str, Any]:
    """Evaluate a run under a progress bar of pages."""
    from pipeline.train.run import evaluate_run

    with page_progress(f"evaluating {context.config.name}") as update:
        return evaluate_run(context, checkpoint, update)


def _smoke(context: RunContext, as_json: bool) -> None:
    from pipeline.train.smoke import smoke

    losses = smoke(context)
    if as_json:
        print_json({"losses": losses})
        return
    console.print("  ".join(f"{loss:.3f}" for loss in losses))
    console.print(f"ten steps on one page: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
