"""``graphkd train``: a teacher, a student alone, or a distilled student."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.console import counted, figures_table, out, print_json, progress_bar

ConfigFile = Annotated[Path, typer.Argument(help="Config of the run.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides, such as schedule.steps=1000.")]
Engine = Annotated[str | None, typer.Option("--engine", help="ray or local; by default what the config says.")]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(train)


def configured(config: Path, overrides: list[str] | None, engine: str | None = None) -> Any:
    """The config with overrides; ``engine`` counts last."""
    from pipeline.config import load_config

    chosen = [f"engine.name={engine}"] if engine else []
    return load_config(config, [*(overrides or []), *chosen])


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    engine: Engine = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Ten steps on one page in this process, nothing written.")
    ] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Go on with a run under a config that differs from its own.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON document.")] = False,
) -> None:
    """Train a run to its end and evaluate it; started again, it goes on from its newest checkpoint."""
    settings = configured(config, overrides, engine)
    if smoke:
        _smoke(settings, as_json)
        return
    from pipeline.train.run import evaluate_run, train_run

    checkpoint = train_with_progress(settings, partial(train_run, allow_changes=allow_changes))
    if int(os.environ.get("RANK", "0")):
        return  # under torchrun the first process says the rest
    figures: dict[str, Any] = {}
    if settings.data.val is not None:
        figures = evaluate_with_progress(settings, evaluate_run)
    if as_json:
        print_json({"run": str(settings.folder), "step": checkpoint.step, **figures})
        return
    out.print(f"{settings.folder}: step {checkpoint.step}, {checkpoint.folder}")
    if figures:
        out.print(figures_table({settings.name: figures}))


def train_with_progress(settings: Any, train_run: Any) -> Any:
    """Run ``train_run`` under a progress bar of steps."""
    steps = settings.schedule.scaled().steps
    with progress_bar(f"training {settings.name}", "steps") as update:

        def on_line(line: dict[str, Any]) -> None:
            update(line["step"], steps, f"loss {line['loss']:.3f}, {line['pages_per_s']:.1f} pages/s")

        return train_run(settings, on_line)


def evaluate_with_progress(settings: Any, evaluate_run: Any, checkpoint: Any = None) -> Any:
    """Run ``evaluate_run`` under a progress bar of pages."""
    with counted(f"evaluating {settings.name}") as update:
        return evaluate_run(settings, checkpoint, update)


def _smoke(settings: Any, as_json: bool) -> None:
    from pipeline.train.smoke import smoke

    losses = smoke(settings)
    if as_json:
        print_json({"losses": losses})
        return
    out.print("  ".join(f"{loss:.3f}" for loss in losses))
    out.print(f"ten steps on one page: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
