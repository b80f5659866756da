"""``graphkd train``: a teacher, a student alone, or a distilled student."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.console import counted, figures_table, out, print_json, progress_bar

if TYPE_CHECKING:
    from pipeline.context import RunContext
    from pipeline.runs.checkpoint import Checkpoint

ConfigFile = Annotated[Path, typer.Argument(help="Config of the run.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides, such as schedule.steps=1000.")]
Engine = Annotated[str | None, typer.Option("--engine", help="ray or local; default: engine.name of the config.")]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(train)


def open_context(config: Path, overrides: list[str] | None, engine: str | None = None) -> RunContext:
    """Context of the config with overrides; ``engine`` takes precedence."""
    from pipeline.config import load_config
    from pipeline.context import RunContext

    engine_override = [f"engine.name={engine}"] if engine else []
    return RunContext(load_config(config, [*(overrides or []), *engine_override]))


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    engine: Engine = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Train ten steps on one page in this process; writes nothing.")
    ] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Continue a run under a config that differs from its own.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON document.")] = False,
) -> None:
    """Train a run to its end and evaluate it. Rerun to resume from the newest checkpoint."""
    context = open_context(config, overrides, engine)
    if smoke:
        _smoke(context, as_json)
        return
    checkpoint = _train(context, allow_changes)
    if int(os.environ.get("RANK", "0")):
        return  # under torchrun, rank 0 does the rest
    folder, figures = context.config.folder, dict[str, Any]()
    if context.val is not None:
        figures = evaluate(context)
    if as_json:
        print_json({"run": str(folder), "step": checkpoint.step, **figures})
        return
    out.print(f"{folder}: step {checkpoint.step}, {checkpoint.folder}")
    if figures:
        out.print(figures_table({context.config.name: figures}))


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

    with counted(f"evaluating {context.config.name}") as update:
        return evaluate_run(context, checkpoint, update)


def _smoke(context: RunContext, as_json: bool) -> None:
    from pipeline.train.smoke import smoke

    losses = smoke(context)
    if as_json:
        print_json({"losses": losses})
        return
    out.print("  ".join(f"{loss:.3f}" for loss in losses))
    out.print(f"ten steps on one page: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
