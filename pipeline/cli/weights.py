"""``graphkd weights``: import and export of detectron2 checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.console import console, print_json
from pipeline.cli.train import open_context

if TYPE_CHECKING:
    from graphkd.detectors.detectron2.names import TensorMatch

PARTS = ("student", "teacher")
MAX_NAMES = 8  # listed of missing and unused tensors


def register(app: typer.Typer) -> None:
    """Add the commands."""
    commands = typer.Typer(help="Import and export detectron2 checkpoints.", no_args_is_help=True)
    commands.command("import")(import_weights)
    commands.command("export")(export_weights)
    app.add_typer(commands, name="weights")


def import_weights(
    file: Annotated[Path, typer.Argument(help="A .pth or .pkl of detectron2, or a state dict with its names.")],
    config: Annotated[Path, typer.Argument(help="Config of the run to create.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides, such as run.folder=runs/r50.")] = None,
    part: Annotated[str, typer.Option(help="Network of a file with both: student or teacher.")] = "student",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make a finished run of a checkpoint, and list which of its tensors matched."""
    from graphkd.errors import ConfigError
    from pipeline.detectron2.weights import import_weights as import_checkpoint

    if part not in PARTS:
        raise ConfigError(f"--part {part} is none of {', '.join(PARTS)}")
    context = open_context(config, overrides)
    found = import_checkpoint(file, context, "teacher" if part == "teacher" else "student")
    folder = context.config.folder
    if as_json:
        shapes = {name: list(map(list, pair)) for name, pair in found.shape_mismatch.items()}
        lists = {"missing": found.missing, "shape_mismatch": shapes, "unused": found.unused}
        print_json({"run": str(folder), "matched": len(found.matched), **lists})
    else:
        _show_match(found, folder)


def _show_match(found: TensorMatch, folder: Path) -> None:
    for name, (theirs, ours) in found.shape_mismatch.items():
        console.print(f"{name}: {theirs} in the file, {ours} in the detector")
    for title, names in (("missing in the file", found.missing), ("not used", found.unused)):
        listed = f": {', '.join(names[:MAX_NAMES])}{' ...' * (len(names) > MAX_NAMES)}" if names else ""
        console.print(f"{len(names)} {title}{listed}")
    console.print(f"{len(found.matched)} tensors imported into {folder}")


def export_weights(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    file: Annotated[Path, typer.Argument(help="The .pth to write.")],
) -> None:
    """Write a run's detector as a detectron2 checkpoint."""
    from pipeline.detectron2.weights import export_weights as export_checkpoint

    console.print(f"{export_checkpoint(run, file)} tensors in {file}")
