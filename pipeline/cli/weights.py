"""``graphkd weights``: checkpoints of detectron2's in, and out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.console import out, print_json

PARTS = ("student", "teacher")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    commands = typer.Typer(help="Checkpoints of detectron2's.", no_args_is_help=True)
    commands.command("import")(import_weights)
    commands.command("export")(export_weights)
    app.add_typer(commands, name="weights")


def import_weights(
    file: Annotated[Path, typer.Argument(help="A .pth or .pkl of detectron2's, or a state dict with its names.")],
    config: Annotated[Path, typer.Argument(help="Config of the run that it becomes.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides, such as run.folder=runs/r50.")] = None,
    part: Annotated[str, typer.Option(help="Of a file with a student and a teacher: which.")] = "student",
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON document.")] = False,
) -> None:
    """Make a finished run of a checkpoint, and say which of its tensors fitted."""
    from graphkd.errors import ConfigError
    from pipeline.config import load_config
    from pipeline.detectron2.weights import import_weights as take

    if part not in PARTS:
        raise ConfigError(f"--part {part} is none of {', '.join(PARTS)}")
    run = load_config(config, overrides or [])
    found = take(file, run, "teacher" if part == "teacher" else "student")
    if as_json:
        shapes = {name: list(map(list, pair)) for name, pair in found.shape_mismatch.items()}
        print_json(
            {
                "run": str(run.folder),
                "matched": len(found.matched),
                "missing": found.missing,
                "misshapen": shapes,
                "unused": found.unused,
            }
        )
        return
    for name, (theirs, ours) in found.shape_mismatch.items():
        out.print(f"{name}: {theirs} in the file, {ours} in the detector")
    for title, names in (("missing in the file", found.missing), ("not used", found.unused)):
        out.print(f"{len(names)} {title}" + (f": {', '.join(names[:8])}{' ...' * (len(names) > 8)}" if names else ""))
    out.print(f"{len(found.matched)} tensors taken; the run is {run.folder}")


def export_weights(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    file: Annotated[Path, typer.Argument(help="The .pth to write.")],
) -> None:
    """Write a run's detector as detectron2 names and lays out its own."""
    from pipeline.detectron2.weights import export_weights as write

    out.print(f"{write(run, file)} tensors in {file}")
